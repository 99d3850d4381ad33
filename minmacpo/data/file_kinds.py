"""Files that hold rows, but not as JSON: what each is called, and the one command that converts it.

Nothing is converted here. A file is known by its first bytes, or else by the ending of its name.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HEAD = 1024  # bytes at a file's beginning that are looked at

# Files that describe a data set, beside its rows: `datasets` and LLaMA-Factory write them.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

TO_JSON_LINES = ".to_json(sys.argv[2], orient='records', lines=True)"


@dataclass(frozen=True, slots=True)
class FileKind:
    """A kind of file that is not read.

    Attributes:
        name: with its article, for a sentence.
        endings: of such files' names.
        starts: their first bytes; any of these.
        command: converts {file}, as {target} if it is asked where to; empty if no command can.
        verb: what the command does.
        is_text: whether a file with the ending may still hold JSON.
        is_data: whether such a file in a folder of rows is likely to hold more of them.
    """

    name: str
    endings: tuple[str, ...]
    starts: tuple[bytes, ...] = ()
    command: str = ""
    verb: str = "convert it"
    is_text: bool = False
    is_data: bool = True


def python_command(program: str) -> str:
    """The command that runs a line of Python on a file and the name of its new one."""
    return f'python -c "import sys; {program}" {{file}} {{target}}'


def datasets_command(reader: str) -> str:
    """The command that reads a file, or a saved data set, with `datasets`."""
    return python_command(f"import datasets; datasets.{reader}(sys.argv[1]).to_json(sys.argv[2])")


def table_command(options: str) -> str:
    """The command that writes the rows of a text table as JSON lines."""
    rows = f"csv.DictReader(open(sys.argv[1], newline='', encoding='utf-8-sig'){options})"
    return (
        f'python -c "import csv, json, sys; [print(json.dumps(row)) for row in {rows}]" '
        "{file} > {target}"
    )


PARQUET = FileKind(
    "a parquet file",
    (".parquet", ".pq"),
    (b"PAR1",),
    datasets_command("Dataset.from_parquet"),
)
# Whatever its name says
LFS_POINTER = FileKind(
    "a pointer of Git LFS to a file that has not been fetched",
    (),
    (b"version https://git-lfs.github.com/spec/",),
    "git lfs pull",
    verb="fetch it",
)
KINDS = (
    PARQUET,
    FileKind(
        "an Excel sheet",
        (".xlsx", ".xls", ".ods"),
        command=python_command(f"import pandas; pandas.read_excel(sys.argv[1]){TO_JSON_LINES}"),
    ),
    FileKind(
        "an arrow file of `datasets`",
        (".arrow",),
        (b"\xff\xff\xff\xff",),
        datasets_command("Dataset.from_file"),
    ),
    FileKind(
        "an arrow file",
        (".feather",),
        (b"ARROW1",),
        python_command(f"import pandas; pandas.read_feather(sys.argv[1]){TO_JSON_LINES}"),
    ),
    FileKind("a table of comma-separated values", (".csv",), (), table_command(""), is_text=True),
    FileKind(
        "a table of tab-separated values",
        (".tsv",),
        (),
        table_command(", delimiter='\\t'"),
        is_text=True,
    ),
    FileKind(
        "a YAML file",
        (".yaml", ".yml"),
        (),
        'python -c "import json, sys, yaml; '
        '[print(json.dumps(row)) for row in yaml.safe_load(open(sys.argv[1]))]" {file} > {target}',
        is_text=True,
        is_data=False,
    ),
    FileKind("packed with zstd", (".zst", ".zstd"), (b"\x28\xb5\x2f\xfd",), "zstd -dk {file}"),
    FileKind("packed with xz", (".xz",), (b"\xfd7zXZ\0",), "xz -dk {file}"),
    FileKind("packed with bzip2", (".bz2",), (b"BZh",), "bzip2 -dk {file}"),
    FileKind("packed with lz4", (".lz4",), (b"\x04\x22\x4d\x18",), "lz4 -dk {file}"),
    FileKind("packed with brotli", (".br",), (), "brotli -dk {file}"),
    FileKind("packed with 7-Zip", (".7z",), (b"7z\xbc\xaf\x27\x1c",), "7z x {file}"),
    FileKind(
        "a tar archive", (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst"), (), "tar -xf {file}"
    ),
    FileKind("a zip archive", (".zip",), (b"PK\x03\x04",), "unzip {file}"),
    FileKind("a numpy file", (".npy", ".npz"), (b"\x93NUMPY",)),
    FileKind("an HDF5 file", (".h5", ".hdf5"), (b"\x89HDF",)),
    FileKind("an Avro file", (".avro",), (b"Obj\x01",)),
    FileKind("an ORC file", (".orc",), (b"ORC",)),
    FileKind("a SQLite database", (".db", ".sqlite", ".sqlite3"), (b"SQLite format 3\0",)),
    FileKind("a pickle", (".pkl", ".pickle"), (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")),
    FileKind(
        "UTF-16 text",
        (),
        (b"\xff\xfe", b"\xfe\xff"),
        "iconv -f UTF-16 -t UTF-8 {file} > {target}",
    ),
    LFS_POINTER,
    FileKind("a gzipped table", (".csv.gz", ".tsv.gz"), (), "gunzip -k {file}", verb="unpack it"),
    FileKind(
        "a web page, not the file behind its address",
        (".html", ".htm"),
        (b"<!doctype html", b"<!DOCTYPE html", b"<html"),
        is_data=False,
    ),
)

# A tar archive says so behind the name of its first file
TAR_MARK = b"ustar"
TAR_MARK_START = 257


def kind_of(file: Path, head: bytes) -> FileKind | None:
    """The kind of a file that is not read; None if it may hold JSON.

    Args:
        head: its first HEAD bytes, unpacked if it is gzipped.
    """
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    holds_json = start.startswith((b"{", b"["))
    if start.startswith(LFS_POINTER.starts):
        return LFS_POINTER
    by_name = kind_by_name(file.name)
    if by_name is not None and not (by_name.is_text and holds_json):
        return by_name
    if head[TAR_MARK_START:].startswith(TAR_MARK):
        return kind_by_name("x.tar")
    for kind in KINDS:
        if kind.starts and (head.startswith(kind.starts) or start.startswith(kind.starts)):
            return kind
    return None


def kind_by_name(name: str) -> FileKind | None:
    """The kind with the longest ending that a file's name has."""
    fitting = []
    for kind in KINDS:
        for ending in kind.endings:
            if name.lower().endswith(ending):
                fitting.append((len(ending), kind))
    if not fitting:
        return None
    _, kind = max(fitting, key=lambda pair: pair[0])
    return kind


def conversion(kind: FileKind, file: Path) -> str:
    """What to do with a file: the command that converts it, if one can."""
    if not kind.command:
        return "write its rows as JSON lines with the program that made it"
    target = file.with_suffix(".jsonl")
    if target == file:
        target = file.with_name(f"{file.stem}-converted.jsonl")
    command = kind.command.format(file=shlex.quote(str(file)), target=shlex.quote(str(target)))
    return f"{kind.verb}: {command}"


def saved_dataset(folder: Path, names: Sequence[str]) -> str | None:
    """What to do with a folder that `datasets` has saved; None if it is none.

    Args:
        names: of the files in it.
    """
    quoted = shlex.quote(str(folder))
    target = shlex.quote(f"{folder}.jsonl")
    other_names = [name for name in names if name not in DESCRIPTIONS]
    if any(".json" in name for name in other_names):
        return None  # whatever else it is, it holds rows
    if "dataset_dict.json" in names:
        load = "datasets.load_from_disk(sys.argv[1]).items()"
        write = "rows.to_json(sys.argv[1] + '-' + name + '.jsonl')"
        return f'python -c "import sys, datasets; [{write} for name, rows in {load}]" {quoted}'
    if "state.json" in names and any(name.endswith(".arrow") for name in names):
        return datasets_command("load_from_disk").format(file=quoted, target=target)
    return None
