"""Rows that are read from a file where they are looked at."""

import random

import pytest

from minmacpo import UserError
from minmacpo.runtime.files import INDEXED_EVERY, JsonlView, batched, read_rows, write_rows


@pytest.mark.parametrize("count", [0, 1, INDEXED_EVERY, 5 * INDEXED_EVERY + 3])
def test_a_view_has_the_rows_of_its_file(count, tmp_path, seed):
    rng = random.Random(seed)
    rows = [{"i": i, "text": "\u00e9\u2028\n" * rng.randrange(5)} for i in range(count)]
    write_rows(tmp_path / "x.jsonl", iter(rows))

    view = JsonlView(tmp_path / "x.jsonl", dict, lambda row: row["i"])

    assert read_rows(tmp_path / "x.jsonl") == rows
    assert list(view) == list(range(count))
    assert [view[i] for i in range(len(view))] == list(range(count))
    with pytest.raises(IndexError):
        view[count]
    parts = [part for part in batched(view, 7)]
    assert [number for part in parts for number in part] == list(range(count))
    assert all(len(part) == 7 for part in parts[:-1])


def test_a_broken_or_missing_file_is_told(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"i": 1}\n{"i"')

    with pytest.raises(UserError, match=r"x\.jsonl, line 2: is no JSON; the file is damaged"):
        list(JsonlView(tmp_path / "x.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        JsonlView(tmp_path / "none.jsonl")
