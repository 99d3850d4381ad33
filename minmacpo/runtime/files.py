"""Files that are whole or absent: atomic writes, locks, JSON lines, digests.

A file is written under a temporary name in its own folder, flushed to the disk and renamed, so that
a kill leaves the old file or the new one. Only logs that grow line by line are written elsewhere.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import stat
import sys
import typing
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from minmacpo import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # of an OSError

INDEXED_EVERY = 16  # lines of a JsonlView; it keeps the position of the first: half a byte a line


# --- Writing


def write_atomic(path: Path, content: str | bytes | Iterable[str | bytes]) -> None:
    """Write a file whole, or leave it as it was; on a full disk the temporary is removed.

    Args:
        content: the text or bytes, or parts of it that are made one after the other.
    """
    parts = [content] if isinstance(content, str | bytes) else content
    temporary = path.with_name(path.name + ".tmp")
    try:
        with with_path(path):
            with temporary.open("wb") as stream:
                for part in parts:
                    stream.write(part.encode() if isinstance(part, str) else part)
                stream.flush()
                os.fsync(stream.fileno())
            replace_fsync(temporary, path)
    except BaseException:  # Ctrl-C as well
        temporary.unlink(missing_ok=True)
        raise


def replace_fsync(source: Path, target: Path) -> None:
    """Rename a file or folder and flush that to the disk, so that it survives a power cut."""
    with with_path(target):
        os.replace(source, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def with_path(path: Path) -> Iterator[None]:
    """Let an OSError raised within say that it is about `path`; a failed write does not say so."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when it is whole; what a kill has left is removed.

    Raises:
        UserError: another process is making the same folder.
    """
    home = target.with_name(f".{target.name}.partial")
    home.mkdir(parents=True, exist_ok=True)
    busy = f"{target}: another process is writing it; wait for it, or give another folder"
    with open_locked(home / "lock", "w", busy):
        try:
            shutil.rmtree(home / "whole", ignore_errors=True)
            yield home / "whole"
            replace_fsync(home / "whole", target)
        finally:
            shutil.rmtree(home, ignore_errors=True)


def write_json(path: Path, value) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable) -> None:
    """Write dicts or dataclasses as .jsonl, atomically; one row is in memory at a time."""
    write_atomic(path, (to_jsonl([row]) for row in rows))


def to_jsonl(rows: Iterable) -> str:
    """Dicts or dataclasses as the text of a .jsonl file."""
    lines = [json.dumps(row, ensure_ascii=False, default=to_values) + "\n" for row in rows]
    return "".join(lines)


def to_values(record) -> dict:
    """The fields of a dataclass by name; TypeError for anything else.

    Records within it come when json asks for them. A field with the metadata "rare" is left out
    where it has its default.
    """
    values = {}
    for field in record_fields(type(record)):
        value = getattr(record, field.name)
        if "rare" not in field.metadata or value != field.default:
            values[field.name] = value
    return values


record_fields = functools.cache(fields)


# --- Locks and links


def open_locked(path: Path, mode: str, busy: str | None, shared: bool = False) -> IO:
    """Open a file that is locked while it is open; the kernel lets go however the process ends.

    Where the file system knows no locks, that is said on stderr, and the file is opened all the
    same.

    Args:
        busy: the error's sentence if another process has the lock; None: wait for it.
        shared: lock the file only against those who do not share it.

    Raises:
        UserError: another process has the lock.
    """
    stream = path.open(mode, encoding=None if "b" in mode else "utf-8")
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    if busy is not None:
        operation |= fcntl.LOCK_NB
    try:
        fcntl.flock(stream, operation)
    except BlockingIOError:
        stream.close()
        raise UserError(busy) from None
    except OSError as error:
        if busy is not None:
            print(
                f"no lock here ({error.strerror}): start no second process on {path}",
                file=sys.stderr,
            )
    return stream


def check_links(folder: Path) -> None:
    """Raise UserError for what no run makes: links, pipes and the like.

    A link could lead out of the folder, and a pipe could be waited for for ever.
    """
    for home, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(home, name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # another process has removed it
                continue
            if stat.S_ISLNK(mode):
                raise UserError(
                    f"{path}: is a link, which no run folder has; put what it stands for in its "
                    "place, or delete it"
                )
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise UserError(f"{path}: is neither a file nor a folder; delete it")


# --- Records in lines of JSON


@dataclass(frozen=True, slots=True)
class FieldType:
    """What a field of a record may hold, read from its type hint.

    `types` are those of the value or, for a tuple, of each of its items; `record` is the dataclass
    among them, whose values stand in JSON as an object.
    """

    is_tuple: bool
    types: frozenset[type]
    record: type | None


@functools.cache
def field_types(record_type: type) -> dict[str, FieldType]:
    """The types of a dataclass's fields, by name."""
    fields = {}
    for name, hint in typing.get_type_hints(record_type).items():
        # "str", "float | None" or "tuple[Message, ...]"
        is_tuple = typing.get_origin(hint) is tuple
        types = set(typing.get_args(hint)) - {...} or {hint}
        if float in types:
            types.add(int)  # JSON has one kind of number: 1.0 may be written as 1
        records = [kind for kind in types if is_dataclass(kind)]
        fields[name] = FieldType(
            is_tuple=is_tuple,
            types=frozenset(types),
            record=records[0] if records else None,
        )
    return fields


def from_json(record_type: type, line: str):
    """The record in one line of JSON, its nested records and tuples built from the type hints.

    Args:
        record_type: a dataclass, or dict for the object as it stands.

    Raises:
        ValueError: if the line is no JSON, or holds half a surrogate pair.
        TypeError, KeyError: if the object is no such record.
    """
    values = json.loads(line)
    if "\\u" in line:
        # An escape may stand for half a surrogate pair, which no file made here has
        json.dumps(values, ensure_ascii=False).encode()
    return build_record(record_type, values)


def build_record(record_type: type, values: dict):
    """The record with these values of JSON; TypeError or KeyError where they are not its own."""
    if type(values) is not dict:
        raise TypeError(f"{type(values).__name__} instead of an object")
    if record_type is dict:
        return values
    fields = field_types(record_type)
    converted = {name: convert(fields[name], value) for name, value in values.items()}
    return record_type(**converted)


def convert(field: FieldType, value):
    """A field's value from its JSON; TypeError where it is of another type."""
    if field.is_tuple:
        if type(value) is not list:
            raise TypeError(f"{type(value).__name__} instead of a list")
        if field.record:
            return tuple(build_record(field.record, item) for item in value)
        if not set(map(type, value)) <= field.types:
            raise TypeError("a list that holds something else")
        return tuple(value)
    if field.record and type(value) is dict:
        return build_record(field.record, value)
    if type(value) not in field.types:
        raise TypeError(f"{type(value).__name__} instead of another type")
    return value


# --- Reading


def read_json(path: Path) -> dict:
    """The object in a .json file; UserError where it is missing, broken, or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is damaged; expected an object")
    return value


def read_rows(path: Path, record_type: type = dict) -> list:
    """All records of a .jsonl file; UserError, with the line's number, where one is broken."""
    return list(iter_rows(path, record_type))


def iter_rows(path: Path, record_type: type = dict) -> Iterator:
    """The records of a .jsonl file one by one; only \\n ends a line."""
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield parse_row(path, number, line, record_type)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def parse_row(path: Path, number: int, line: bytes, record_type: type):
    """The record in one line of a file; whatever is wrong with it becomes one sentence."""
    try:
        return from_json(record_type, line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        name = "JSON" if record_type is dict else record_type.__name__
        raise UserError(f"{path}, line {number}: is no {name}; the file is damaged") from None


class JsonlView(Sequence):
    """The records of a .jsonl file as a list whose items are read where they are looked at."""

    def __init__(self, path: Path, record_type: type = dict, change: Callable | None = None):
        """Args:
        change: makes something else of every record.
        """
        self.path = path
        self.record_type = record_type
        self.change = change
        self.count = 0
        self.positions = array("q")  # bytes before every INDEXED_EVERY-th line
        position = 0
        try:
            with path.open("rb") as stream:
                for line in stream:
                    if self.count % INDEXED_EVERY == 0:
                        self.positions.append(position)
                    self.count += 1
                    position += len(line)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error})") from None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator:
        rows = iter_rows(self.path, self.record_type)
        return rows if self.change is None else map(self.change, rows)

    def __getitem__(self, index: int):
        """The record of that number from 0; IndexError if there is none."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.positions[index // INDEXED_EVERY])
                line = next(islice(stream, index % INDEXED_EVERY, None), b"")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read any more ({error})") from None
        row = parse_row(self.path, index + 1, line, self.record_type)
        return row if self.change is None else self.change(row)


def batched(rows: Iterable, size: int) -> Iterator[list]:
    """The rows in lists of `size` of them, the last with what is left."""
    rest = iter(rows)
    while batch := list(islice(rest, size)):
        yield batch


# --- Digests


def describe(path: Path) -> dict:
    """What stage.json says of a file."""
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(value) -> str:
    """32 hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


# --- Shards of an unfinished stage


def write_shard(folder: Path, number: int, rows: Iterable) -> Path:
    """Write a part of the samples of an unfinished stage.

    No stage.json tells yet whether the file is undamaged, so its name holds a digest of its content
    and of the folder, which is named after all that the stage depends on.
    """
    text = to_jsonl(rows).encode()
    file = folder / f"block{number}-{shard_digest(folder, text)}.jsonl"
    write_atomic(file, text)
    return file


def shard_digest(folder: Path, text: bytes) -> str:
    """Hex digest of a shard's content and of the unfinished stage that it belongs to."""
    return hashlib.sha256(f"{folder.name}\n".encode() + text).hexdigest()


def finished_shards(folder: Path) -> dict[int, Path]:
    """The undamaged files that `write_shard` wrote, by number."""
    shards = {}
    for file in folder.glob("block*-*.jsonl"):
        number, _, digest = file.stem.removeprefix("block").partition("-")
        if file.is_file() and digest == shard_digest(folder, file.read_bytes()):
            shards[int(number)] = file
    return shards
