"""Files that are whole or absent: atomic writes, JSON lines, hashes, hard links.

All files but the two that only grow (log.txt, metrics.jsonl) are written here. A file is written under a temporary name in the
same folder, flushed to the disk, and renamed; a kill leaves the old file, or the new one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from minmacpo import UserError
from minmacpo.data import from_json, to_json


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `path` whole, or leave it as it was; the temporary is removed if the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_records(path: Path, records: Iterable) -> None:
    """Records of data.py as .jsonl, atomically."""
    write_atomic(path, "".join(to_json(record) + "\n" for record in records))


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Plain dicts as .jsonl, atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path):
    """The content of a .json file; UserError where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def parse_lines(path: Path, parse: Callable, what: str) -> list:
    """Every line of a UTF-8 file through `parse` (only \\n ends a line); UserError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    found = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        try:
            found.append(parse(line))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: is no {what}; the file is damaged") from None
    return found


def read_rows(path: Path) -> list[dict]:
    """The dicts of a .jsonl file; UserError with file and line where it is broken."""
    return parse_lines(path, json.loads, "JSON")


def read_records(path: Path, kind) -> list:
    """The records of class `kind` in a .jsonl file; UserError with file and line where broken."""
    return parse_lines(path, lambda line: from_json(kind, line), kind.__name__)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(value) -> str:
    """32 hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def link_or_copy(source: Path, target: Path) -> None:
    """`target` becomes a hard link to `source`, or a copy where links fail."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def move_folder(folder: Path, target: Path) -> None:
    """Rename a whole folder to its place, for good."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(folder, target)
    sync_folder(target.parent)
