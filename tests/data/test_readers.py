"""Which files are read, lines and arrays, broken files, and bounded memory."""

import gzip
import json
import os
import random
import tracemalloc
from dataclasses import replace

import pytest
from texts import hh_dialogue, hh_row, write_lines

from minmacpo import UserError
from minmacpo.data.formats import LoadReport, read_data, read_file
from minmacpo.data.readers import ROW_LIMIT, find_files, is_array, read_array, read_lines


def refused(path) -> str:
    """The sentence with which a file or folder is refused."""
    with pytest.raises(UserError) as caught:
        read_data(str(path))
    assert len(str(caught.value).splitlines()) <= 5
    return str(caught.value)


def read_and_count(path) -> tuple[list, dict[str, dict]]:
    """The pairs of a file or folder, and what was counted of each file."""
    pairs, reports = read_data(str(path))
    return pairs, {name: dict(report.counts) for name, report in reports.items()}


# ---- which files ----------------------------------------------------------------------------


def test_plain_and_gzipped_one_file_and_a_folder(tmp_path):
    rows = [hh_row((f"question {number}",)) for number in range(5)]
    plain = write_lines(tmp_path / "one" / "a.jsonl", *rows)
    gzipped = write_lines(tmp_path / "two" / "a.jsonl.gz", *rows)
    other_name = write_lines(tmp_path / "three" / "data.txt", *rows)

    pairs, counts = read_and_count(plain)
    assert len(pairs) == 5
    assert counts == {"a": {"read": 5, "kept": 5}}
    assert read_and_count(gzipped) == (pairs, counts)
    assert read_and_count(gzipped.parent) == (pairs, counts)

    others, _ = read_and_count(other_name)
    assert [replace(pair, meta={}) for pair in others] == [replace(p, meta={}) for p in pairs]


def test_a_folder_is_read_through_its_subfolders_and_only_its_rows(tmp_path):
    write_lines(tmp_path / "b" / "x.jsonl", hh_row(("b",)))
    write_lines(tmp_path / "a" / "x.jsonl.gz", hh_row(("a",)), hh_row(("a2",)))
    write_lines(tmp_path / "x.jsonx", "nonsense")
    write_lines(tmp_path / "README.md", "nonsense")
    (tmp_path / "folder.jsonl").mkdir()

    assert [file.name for file in find_files(str(tmp_path))] == ["x.jsonl.gz", "x.jsonl"]
    pairs, counts = read_and_count(tmp_path)
    assert [pair.prompt[0].content for pair in pairs] == ["a", "a2", "b"]
    assert sorted(count["read"] for count in counts.values()) == [1, 2]
    # two files of one name are told apart
    assert len(counts) == 2
    assert {pair.meta["file"] for pair in pairs} == set(counts)


def test_runs_in_the_data_folder_are_no_data(tmp_path):
    file = write_lines(tmp_path / "a" / "x.jsonl", hh_row())
    write_lines(tmp_path / "runs" / "hh" / "round1" / "samples.jsonl", "{}")
    (tmp_path / "runs/hh/config.toml").write_text("[run]\n")
    (tmp_path / "config.toml").write_text("[run]\n")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_files(str(tmp_path)) == [file]


def test_linked_folders_are_read_and_odd_names_shown(tmp_path):
    file = write_lines(tmp_path / "elsewhere" / "x.jsonl", hh_row())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    assert read_and_count(tmp_path / "data")[1] == {"x": {"read": 1, "kept": 1}}

    file.rename(file.with_name(os.fsdecode(b"latin\xe9.jsonl")))
    (name,) = read_and_count(tmp_path / "data")[1]
    assert name == r"latin\xe9"


def test_paths_without_data(tmp_path):
    assert "does not exist" in refused(tmp_path / "none")
    assert "no .jsonl" in refused(tmp_path)
    (tmp_path / "x.jsonl").touch()
    assert "no usable row" in refused(tmp_path)

    same_answers = hh_row(chosen="same", rejected="same")
    write_lines(tmp_path / "x.jsonl", same_answers, hh_row(chosen=""))
    sentence = refused(tmp_path)
    assert "no usable row" in sentence
    assert "identical answers" in sentence
    assert "empty answer" in sentence


def test_max_rows_are_spread_over_the_files(tmp_path):
    for name, count in (("a", 10), ("b", 10), ("c", 1)):
        rows = [hh_row((f"{name}{number}",)) for number in range(count)]
        write_lines(tmp_path / f"{name}.jsonl", *rows)

    def counts(max_rows: int) -> dict[str, int]:
        _, reports = read_data(str(tmp_path), max_rows=max_rows)
        return {name: report.counts["read"] for name, report in reports.items()}

    assert counts(7) == {"a": 3, "b": 2, "c": 1}
    assert sum(counts(2).values()) == 2
    assert sum(counts(10**6).values()) == 21


# ---- lines ----------------------------------------------------------------------------------


def test_lines_are_numbered_from_one(tmp_path):
    file = write_lines(tmp_path / "x.jsonl.gz", "a", "", "b")
    assert list(read_lines(file)) == [(1, "a"), (2, ""), (3, "b")]


def test_gzip_is_known_by_its_first_bytes(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(gzip.compress(hh_row().encode()))
    assert len(read_and_count(file)[0]) == 1


def test_byte_order_mark_blank_lines_crlf_and_a_missing_last_line_break(tmp_path):
    first = b"\xef\xbb\xbf" + hh_row(("a",)).encode() + b"\r\n"
    last = hh_row(("b",)).encode()
    (tmp_path / "x.jsonl").write_bytes(first + b"\r\n   \n" + last)
    pairs, counts = read_and_count(tmp_path)
    assert [pair.prompt[0].content for pair in pairs] == ["a", "b"]
    assert counts == {"x": {"read": 4, "kept": 2, "blank line": 2}}


def test_line_separators_inside_a_row_do_not_end_it(tmp_path):
    prompt = "a\u2028b\x85c"
    sides = {"chosen": hh_dialogue(prompt, "d"), "rejected": hh_dialogue(prompt, "e")}
    file = write_lines(tmp_path / "x.jsonl", json.dumps(sides, ensure_ascii=False))
    pairs, _ = read_and_count(file)
    assert pairs[0].prompt[0].content == prompt


def test_a_line_that_cannot_be_read_is_found_only_if_it_is_reached(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", hh_row(("a",)), "broken")
    assert len(read_data(str(file), max_rows=1)[0]) == 1
    assert "line 2" in refused(file)


# A third line, and a word of what is said of it
BROKEN_LINES = {
    "no JSON": ('{"chosen": ', "JSON"),
    "half a line": (hh_row()[:-9], "JSON"),
    "no object": ("[1, 2]", "chosen"),
    "a number": ("7", "chosen"),
    "null": ("null", "chosen"),
    "missing chosen": (json.dumps({"rejected": hh_dialogue("q", "a")}), "'chosen'"),
    "missing rejected": (json.dumps({"chosen": hh_dialogue("q", "a")}), "'rejected'"),
    "wrong type": (
        json.dumps({"chosen": ["q"], "rejected": hh_dialogue("q", "a")}),
        "'chosen' is a list, and text in the rows before",
    ),
    "null value": (
        json.dumps({"chosen": hh_dialogue("q", "a"), "rejected": None}),
        "'rejected' is absent, and text in the rows before",
    ),
    "no dialogue": (json.dumps({"chosen": "good", "rejected": "bad"}), "no dialogue"),
    "empty text": (json.dumps({"chosen": "", "rejected": hh_dialogue("q", "a")}), "no dialogue"),
    "half a surrogate pair": (
        '{"chosen": "\\n\\nHuman: \\ud83d\\n\\nAssistant: a", "rejected": "x"}',
        "surrogate",
    ),
    "invalid UTF-8": (b'{"chosen": "\xff\xfe"}', "UTF-8"),
    "UTF-16": (hh_row().encode("utf-16"), "UTF-8"),
    "deep nesting": ("[" * 100_000, "JSON"),
    "a huge number": ('{"chosen": ' + "9" * 5000 + "}", "JSON"),
}


@pytest.mark.parametrize("line", BROKEN_LINES)
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_row_that_cannot_be_read_is_an_error_with_file_and_line(tmp_path, line, name):
    broken, words = BROKEN_LINES[line]
    file = write_lines(tmp_path / name, hh_row(("a",)), hh_row(("b",)), broken, hh_row(("c",)))
    sentence = refused(file)
    assert f"{file}, line 3" in sentence
    assert words in sentence
    assert len(sentence.replace(str(file), "")) < 600


def test_a_truncated_gzip_names_file_and_line(tmp_path):
    rng = random.Random(0)
    rows = [hh_row((f"question {rng.random()}",)) for _ in range(2000)]
    file = write_lines(tmp_path / "x.jsonl.gz", *rows)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])

    sentence = refused(file)
    assert str(file) in sentence
    number = int(sentence.partition("after line ")[2].partition(":")[0])
    assert 0 < number < 2000


def test_a_gzip_that_is_none_or_broken_is_named(tmp_path):
    rows = [hh_row((f"question {number}",)) for number in range(2000)]
    file = write_lines(tmp_path / "x.jsonl.gz", *rows)
    flipped = bytearray(file.read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    file.write_bytes(flipped)
    assert "x.jsonl.gz" in refused(file)

    file.write_bytes(hh_row().encode())
    assert "x.jsonl.gz" in refused(file)


# ---- arrays ---------------------------------------------------------------------------------


def random_value(rng: random.Random):
    """A row with brackets and escapes in its text, perhaps longer than a block; or another type."""
    length = rng.choice([3, 90_000])
    letters = 'ab"\\[]{},: \n\u00e9\U0001f600'
    row = {"prompt": "".join(rng.choice(letters) for _ in range(length))}
    others = [[[], {"x": [1, {}]}], 12345678901234567890, -1.5, "", None, True]
    return rng.choice([row, *others])


def test_arrays_of_any_layout(tmp_path, seed):
    """Whatever the white space, and wherever the borders of the blocks are."""
    rng = random.Random(seed)
    file = tmp_path / "x.json"
    for _ in range(12):
        values = [random_value(rng) for _ in range(rng.randint(0, 6))]
        space = " \n\r\t" * rng.choice([0, 1, 20_000])
        if not values and len(space) > 10:
            continue  # an empty array is read as far as the first block only
        text = json.dumps(values, indent=rng.choice([None, 0, 3]), ensure_ascii=rng.random() < 0.5)
        inner = text.removeprefix("[").removesuffix("]")
        start = rng.choice(["", "\ufeff"]) + "\n" * rng.randint(0, 2)
        file.write_bytes(f"{start}[{space}{inner}{space}]{space}".encode())

        assert is_array(file)
        assert list(read_array(file)) == list(enumerate(values, start=1))


ROWS = [{"prompt": f"question {number}", "chosen": "a", "rejected": "b"} for number in range(5)]
ARRAY = json.dumps(ROWS)
TWO_ROWS = json.dumps(ROWS[:2])
# The text of a file, and what is said of it
BROKEN_ARRAYS = {
    "in a row": (ARRAY[:130], "row 3: is not valid JSON, or cut short"),
    "between rows": (TWO_ROWS[:-1], "row 2: is not valid JSON, or cut short"),
    "behind a comma": (TWO_ROWS[:-1] + ",", "row 3: is not valid JSON, or cut short"),
    "at once": ("[", "row 1: is not valid JSON"),
    "a comma too many": (ARRAY[:-1] + ",]", "row 6: is not valid JSON"),
    "no comma": (
        ARRAY.replace("}, {", "} {", 1),
        "row 1: is not valid JSON, or cut short (no comma",
    ),
    "two arrays": (ARRAY * 2, "after row 5: the array has ended"),
    "broken": (ARRAY.replace('"question 3"', "question 3"), "row 4: is not valid JSON"),
    "deep": (ARRAY[:-1] + "," + "[" * 100_000, "row 6: is"),
    "no rows": ("[]", "no usable row"),
}


@pytest.mark.parametrize("name", BROKEN_ARRAYS)
@pytest.mark.parametrize("skip_invalid", [False, True])
def test_a_broken_array_names_its_row(tmp_path, name, skip_invalid):
    text, words = BROKEN_ARRAYS[name]
    for file_name in ("x.json", "x.json.gz"):
        file = write_lines(tmp_path / file_name, text)
        with pytest.raises(UserError) as caught:
            read_data(str(file), skip_invalid=skip_invalid)
        assert words in str(caught.value)
        assert file_name in str(caught.value)
        assert len(str(caught.value)) < 400


def test_invalid_utf8_and_broken_gzip_in_an_array(tmp_path):
    content = json.dumps(ROWS * 500).encode()
    (tmp_path / "x.json").write_bytes(content[:-50] + b"\xff" + content[-50:])
    (tmp_path / "y.json.gz").write_bytes(gzip.compress(content)[:-40])
    for name, words in (("x.json", "no valid UTF-8"), ("y.json.gz", "cannot be read")):
        with pytest.raises(UserError, match=rf"{name}, after row \d+: {words}"):
            read_data(str(tmp_path / name))


# ---- memory ---------------------------------------------------------------------------------


def peak_memory(call) -> int:
    """Most bytes of Python's memory at one moment of a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def count_rows(file) -> int:
    """The usable rows of a file, of which no two are in memory."""
    report = LoadReport()
    pairs = read_file(file, report, preference_label="better", skip_invalid=False, max_rows=None)
    return sum(1 for _ in pairs)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz"])
def test_a_long_file_is_read_in_the_memory_of_a_short_one(tmp_path, name):
    rows = []
    for number in range(2_000):
        prompt = f"question {number} " * 100
        rows.append(json.dumps({"prompt": prompt, "chosen": "yes", "rejected": "no"}))
    if "jsonl" in name:
        file = write_lines(tmp_path / name, *rows)
    else:
        file = write_lines(tmp_path / name, "[" + ",\n".join(rows) + "]")

    def read() -> None:
        assert count_rows(file) == 2_000

    assert peak_memory(read) < 1_200_000 < sum(map(len, rows)) / 2


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz"])
@pytest.mark.parametrize("filler", [b"a", b" "])
def test_a_gzip_bomb_is_refused_before_it_fills_the_memory(tmp_path, name, filler):
    """A hundred megabytes of one row, or of white space."""
    is_array_file = name == "x.json.gz"
    start = b"[" if is_array_file else b""
    if filler == b"a":
        start += b'{"prompt": "'
    elif not is_array_file:
        start += b"{"
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as stream:
        stream.write(start)
        for _ in range(100):
            stream.write(filler * (1 << 20))
    assert (tmp_path / name).stat().st_size < 1 << 20

    def read() -> None:
        with pytest.raises(UserError, match=f"1: is longer than {ROW_LIMIT >> 20} MiB"):
            read_data(str(tmp_path / name), skip_invalid=True)

    assert peak_memory(read) < 6 * ROW_LIMIT


@pytest.mark.parametrize("name", [pytest.param("x.jsonl.gz", marks=pytest.mark.slow), "x.json.gz"])
def test_a_gzip_bomb_of_small_rows_is_refused(tmp_path, name):
    row = json.dumps({"prompt": "a" * 1000}).encode()
    with gzip.open(tmp_path / name, "wb", compresslevel=9) as stream:
        if name == "x.json.gz":
            stream.write(b"[")
            rows = (row + b",") * 1000
        else:
            rows = (row + b"\n") * 1000
        for _ in range(40):
            stream.write(rows)
    with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
        count_rows(tmp_path / name)
