"""Rows in files that are no JSON: parquet is read, others are named with what converts them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import shared
from runs import invoke, write_stub
from test_bad_input import HH, refused
from test_formats import FORMATS
from texts import hh_row, write_lines

from minmacpo import UserError
from minmacpo.data.file_kinds import DESCRIPTIONS, KINDS, PARQUET, conversion, kind_by_name
from minmacpo.data.formats import column_warnings, read_data

ROWS = [{"prompt": f"q {n}", "chosen": 'yes, \n"so"', "rejected": "no\té"} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def sentence_on(path) -> str:
    """The sentence with which a file or folder is refused."""
    with pytest.raises(UserError) as caught:
        read_data(str(path))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def write_table(delimiter: str) -> bytes:
    """The rows as a text table."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue().encode()


def write_tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("inner.jsonl")
        entry.size = len(LINES.encode())
        archive.addfile(entry, io.BytesIO(LINES.encode()))
    return stream.getvalue()


def write_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("inner.jsonl", LINES)
    return stream.getvalue()


# A file's name and content, and what is said of it
FILES = {
    "csv": ("x.csv", write_table(","), "a table of comma-separated values", "csv.DictReader"),
    "tsv": ("x.tsv", write_table("\t"), "a table of tab-separated values", "csv.DictReader"),
    "xz": ("x.jsonl.xz", lzma.compress(LINES.encode()), "packed with xz", "xz -dk"),
    "xz by its bytes": ("x.jsonl", lzma.compress(LINES.encode()), "packed with xz", "xz -dk"),
    "bzip2": ("x.jsonl.bz2", bz2.compress(LINES.encode()), "packed with bzip2", "bzip2 -dk"),
    "zstd": ("x.jsonl.zst", b"\x28\xb5\x2f\xfd\x00", "packed with zstd", "zstd -dk"),
    "zstd by its bytes": ("x.jsonl", b"\x28\xb5\x2f\xfd\x00", "packed with zstd", "zstd -dk"),
    "lz4": ("x.jsonl.lz4", b"\x04\x22\x4d\x18\x00", "packed with lz4", "lz4 -dk"),
    "zip": ("x.zip", write_zip(), "a zip archive", "unzip"),
    "zip by its bytes": ("x.json", write_zip(), "a zip archive", "unzip"),
    "tar": ("x.tar", write_tar(), "a tar archive", "tar -xf"),
    "tar, gzipped": ("x.tar.gz", gzip.compress(write_tar()), "a tar archive", "tar -xf"),
    "tar by its bytes": ("x.jsonl.gz", gzip.compress(write_tar()), "a tar archive", "tar -xf"),
    "Excel": ("x.xlsx", write_zip(), "an Excel sheet", "pandas.read_excel"),
    "YAML": ("x.yaml", b"- prompt: q\n", "a YAML file", "yaml.safe_load"),
    "SQLite": ("x.db", b"SQLite format 3\0", "a SQLite database", "write its rows"),
    "pickle": ("x.pkl", b"\x80\x04]", "a pickle", "write its rows"),
    "arrow": ("x.arrow", b"\xff\xff\xff\xff", "an arrow file of `datasets`", "Dataset.from_file"),
    "feather": ("x.feather", b"ARROW1\0\0", "an arrow file", "pandas.read_feather"),
    "UTF-16": ("x.jsonl", LINES.encode("utf-16"), "UTF-16 text", "iconv -f UTF-16"),
    "Git LFS": (
        "x.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "a pointer of Git LFS",
        "git lfs pull",
    ),
    "Git LFS, whatever its name": (
        "x.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "a pointer of Git LFS",
        "git lfs pull",
    ),
    "csv, gzipped": ("x.csv.gz", gzip.compress(write_table(",")), "a gzipped table", "gunzip -k"),
    "numpy": ("x.npy", b"\x93NUMPY\x01", "a numpy file", "write its rows"),
    "HDF5": ("x.h5", b"\x89HDF\r\n", "an HDF5 file", "write its rows"),
    "web page": ("x.jsonl", b"\n<!DOCTYPE html>\n<html>", "a web page", "write its rows"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_read_are_named_with_what_converts_them(tmp_path, name):
    file_name, content, kind, advice = FILES[name]
    file = tmp_path / file_name
    file.write_bytes(content)
    sentence = sentence_on(file)
    assert sentence.startswith(f"{file}: is {kind}")
    assert advice in sentence
    if "convert it: " in sentence:
        assert str(file) in sentence.partition("convert it: ")[2]


@pytest.mark.parametrize("name", [name for name in FILES if "by its bytes" not in name])
def test_a_folder_of_such_files_is_refused_alike(tmp_path, name):
    file_name, content, kind, advice = FILES[name]
    (tmp_path / file_name).write_bytes(content)
    if file_name.endswith((".jsonl", ".yaml")):
        advice = kind = ""  # a row file by its name; no likely one
    sentence = sentence_on(tmp_path)
    assert kind in sentence
    assert advice in sentence


def test_json_under_the_name_of_a_table_is_read(tmp_path):
    for name in ("x.csv", "x.tsv", "x.yaml", "x.dat"):
        pairs, _ = read_data(str(write_lines(tmp_path / name, LINES)))
        assert len(pairs) == len(ROWS)


def test_hidden_files_of_a_folder_are_passed_over(tmp_path):
    """Copies of notebooks, notes of downloads, what macOS puts into archives."""
    (tmp_path / "x.ndjson").write_text(LINES)
    for name in (".ipynb_checkpoints/x.jsonl", ".cache/huggingface/x.json", "._x.jsonl", ".x.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(LINES)
    pairs, reports = read_data(str(tmp_path))
    assert list(reports) == ["x"] and len(pairs) == LINES.count("\n")
    hidden = tmp_path / ".cache"
    assert len(read_data(str(hidden))[0]) == len(pairs), "asked for by its name it is read"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps({"data": [{"prompt": "q"}]}, indent=1), "a row is one line, as jq -c makes it"),
        (json.dumps({"train": [{"prompt": "q"}], "test": []}), "in 'train', give that array alone"),
        ("Entry not found", "it begins with 'Entry not found'"),
        ("{'prompt': 'q'}", "it begins with \"{'prompt': 'q'}\""),
        ('{"prompt": "q"},\n{"prompt": "r"}', "Extra data"),
    ],
)
def test_json_of_another_shape_is_told_from_what_is_none(tmp_path, content, words):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        read_data(str(file))
    assert words in str(caught.value)


def test_files_beside_the_rows_that_are_not_read_are_named(tmp_path):
    write_lines(tmp_path / "a.jsonl", LINES)
    (tmp_path / "b.csv").write_bytes(write_table(","))
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "index.html").write_text("<html>")
    pairs, reports = read_data(str(tmp_path))
    assert len(pairs) == len(ROWS)
    (warning,) = column_warnings(reports)
    assert warning.startswith("b.csv: is a table of comma-separated values and not read")
    assert "not read" in str(reports["b.csv"])


# The commands that need no package
CONVERTED = ["csv", "tsv", "xz", "bzip2", "zip", "tar", "tar, gzipped", "UTF-16"]


@pytest.mark.parametrize("name", CONVERTED)
def test_the_command_converts(tmp_path, name):
    file_name, content, *_ = FILES[name]
    file = tmp_path / "a folder" / file_name
    file.parent.mkdir()
    file.write_bytes(content)
    command = sentence_on(file).partition("convert it: ")[2]
    program = command.split()[0]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    run_command(command.replace("python ", f"{sys.executable} ", 1), file.parent)
    (new,) = [path for path in file.parent.iterdir() if path != file]
    assert [json.loads(line) for line in new.read_text().splitlines()] == ROWS


def run_command(command: str, folder: Path) -> None:
    """Run a line of a shell."""
    subprocess.run(["bash", "-c", command], cwd=folder, check=True, capture_output=True)


# ---- data sets of `datasets` ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("is_dict", [False, True])
def test_a_saved_data_set_is_refused_with_the_command_that_converts_it(tmp_path, is_dict):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    folder = tmp_path / "saved"
    saved = datasets.DatasetDict(train=rows, test=rows) if is_dict else rows
    saved.save_to_disk(folder)

    sentence = sentence_on(folder)
    assert "as save_to_disk of `datasets` writes it" in sentence
    command = sentence.partition("convert it: ")[2].replace("python ", f"{sys.executable} ", 1)
    run_command(command, tmp_path)
    for name in ("saved-train", "saved-test") if is_dict else ("saved",):
        pairs, _ = read_data(str(tmp_path / f"{name}.jsonl"))
        assert [pair.prompt[0].content for pair in pairs] == [row["prompt"] for row in ROWS]


@pytest.mark.slow
def test_arrow_files_and_parquet_are_converted_by_the_command(tmp_path):
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.rename(tmp_path / "a.arrow")
    pandas.DataFrame(ROWS).to_feather(tmp_path / "b.feather")
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "c.parquet")
    for name in ("a.arrow", "b.feather", "c.parquet"):
        file = tmp_path / name
        command = conversion(kind_by_name(name), file).removeprefix("convert it: ")
        run_command(command.replace("python ", f"{sys.executable} ", 1), tmp_path)
        new = file.with_suffix(".jsonl").read_text().splitlines()
        assert [json.loads(line) for line in new] == ROWS


def test_descriptions_of_a_data_set_are_no_rows(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", hh_row())
    for name in DESCRIPTIONS:
        (tmp_path / name).write_text('{\n  "splits": {}\n}')
    pairs, reports = read_data(str(tmp_path))
    assert len(pairs) == 1
    assert list(reports) == [file.stem]
    for name in DESCRIPTIONS:
        assert "describes a data set and has no rows" in sentence_on(tmp_path / name)

    # an array of rows under such a name holds rows
    (tmp_path / "state.json").write_text(json.dumps(ROWS))
    assert len(read_data(str(tmp_path))[0]) == 1 + len(ROWS)


def test_the_saved_data_set_of_the_cases_ends_a_program_with_one_sentence(place):
    preset = write_stub(place / "p")
    path = shared("cases/05-datasets-folder/saved")
    assert "load_from_disk" in refused(place, preset, *HH, f"--data.path={path}")


# ---- parquet --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_parquet_gives_the_same_pairs_as_json_lines(tmp_path, name):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [FORMATS[name][0]] * 3
    if name == "UltraFeedback":  # a column has one type
        rows = [json.loads(json.dumps(rows[0]).replace('"1"', "1"))] * 3
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    write_lines(tmp_path / "x.jsonl", *map(json.dumps, rows))
    expected, _ = read_data(str(tmp_path / "x.jsonl"))
    pairs, reports = read_data(str(tmp_path / "x.parquet"))
    assert pairs == expected
    assert reports["x"].unit == "row"
    assert reports["x"].counts == {"read": 3, "kept": 3}

    (tmp_path / "x.jsonl").unlink()
    assert read_data(str(tmp_path))[0] == expected


def test_rows_of_parquet_are_numbered_and_limited(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": f"q {n}", "response": "a" if n != 700 else ""} for n in range(1000)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=300)
    _, reports = read_data(str(tmp_path))
    assert "1 empty answer (first in row 701)" in str(reports["x"])
    assert len(read_data(str(tmp_path), max_rows=10)[0]) == 10


def test_values_that_json_does_not_have_are_named(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"prompt": arrow.array([b"q"]), "response": ["a"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert "x.parquet, row 1: no message: 'prompt' holds bytes" in sentence_on(tmp_path)


@pytest.mark.parametrize("content", [b"PAR1", b"PAR1" + b"\0" * 99 + b"PAR1", b"no parquet"])
def test_broken_parquet_is_named(tmp_path, content):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(content)
    assert "x.parquet, after row 0: cannot be read" in sentence_on(tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    sentence = sentence_on(tmp_path)
    assert "pip install pyarrow" in sentence
    assert "Dataset.from_parquet" in sentence
    assert PARQUET in KINDS


def test_a_run_reads_parquet(place):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": f"question {n}", "chosen": "yes", "rejected": "no"} for n in range(60)]
    parquet.write_table(arrow.Table.from_pylist(rows), place / "x.parquet")
    preset = write_stub(place / "p")
    ended = invoke("train", preset, *HH, f"--data.path={place / 'x.parquet'}", "--dry_run")
    assert ended.code == 0, ended.err
    assert "60 rows, 60 kept" in ended.out
