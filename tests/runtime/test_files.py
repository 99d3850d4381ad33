"""Rows that are read from a file where they are looked at."""

import itertools
import random

import pytest

from minmacpo import UserError
from minmacpo.runtime.files import INDEXED_EVERY, JsonlView, batched, read_rows, write_rows


@pytest.mark.parametrize("count", [0, 1, INDEXED_EVERY, 5 * INDEXED_EVERY + 3])
def test_a_view_has_the_rows_of_its_file(count, tmp_path, seed):
    rng = random.Random(seed)
    numbers = list(range(count))
    rows = []
    for number in numbers:
        rows.append({"i": number, "text": "\u00e9\u2028\n" * rng.randrange(5)})
    write_rows(tmp_path / "x.jsonl", iter(rows))

    view = JsonlView(tmp_path / "x.jsonl", dict, lambda row: row["i"])

    assert read_rows(tmp_path / "x.jsonl") == rows
    assert list(view) == numbers
    assert len(view) == count
    for number in numbers:
        assert view[number] == number
    with pytest.raises(IndexError):
        view[count]

    batches = list(batched(view, 7))
    assert list(itertools.chain.from_iterable(batches)) == numbers
    for batch in batches[:-1]:
        assert len(batch) == 7


def test_a_broken_or_missing_file_is_told(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"i": 1}\n{"i"')

    with pytest.raises(UserError, match=r"x\.jsonl, line 2: is no JSON; the file is damaged"):
        list(JsonlView(tmp_path / "x.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        JsonlView(tmp_path / "none.jsonl")
