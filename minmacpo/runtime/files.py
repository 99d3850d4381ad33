"""Files that are whole or absent: atomic writes, JSON lines, hashes.

All files but those that only grow (log.txt, metrics.jsonl, verdicts.jsonl, the answers of answers.py) are written here: under a temporary name
in the same folder, flushed to the disk, and renamed; a kill leaves the old file, or the new one.
"""

import contextlib
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
from dataclasses import asdict, dataclass, is_dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO

from minmacpo import UserError


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


EVERY = 16  # lines of which one place is remembered: half a byte a line


def replace_fsync(source: Path, target: Path) -> None:
    """Rename a file or folder to its place, and flush that to the disk, so that it survives a power cut."""
    os.replace(source, target)
    handle = os.open(target.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def open_locked(path: Path, mode: str, busy: str | None, shared: bool = False) -> IO:
    """The file in `mode`, locked while it is open: the kernel lets go of it however the process ends. UserError with the
    sentence `busy` if another process has it, None: waits for that one; does without a lock, and says so, where the file
    system knows none. `shared`: locked only against those who do not share it."""
    stream = path.open(mode, encoding=None if "b" in mode else "utf-8")
    try:
        fcntl.flock(
            stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if busy else 0)
        )
    except BlockingIOError:
        stream.close()
        raise UserError(busy) from None
    except OSError as error:
        if busy:
            print(
                f"no lock here ({error.strerror}): start no second process on {path}",
                file=sys.stderr,
            )
    return stream


def check_links(folder: Path) -> None:
    """UserError for what no run makes: a link, which could lead out of the folder, or a pipe and the like, which may be waited for."""
    for path in (Path(home, name) for home, *names in os.walk(folder) for name in chain(*names)):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise UserError(
                    f"{path}: is a link, which no run folder has; put what it stands for in its place, or delete it"
                )
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise UserError(f"{path}: is neither a file nor a folder; delete it")


@contextlib.contextmanager
def with_path(path: Path) -> Iterator[None]:
    """An OSError raised within says that it is about `path`: a failed write does not say where."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_atomic(path: Path, content: str | bytes | Iterable) -> None:
    """Write `path` whole, or leave it as it was, from a text, bytes, or one of them after the other; the temporary is removed if
    the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with with_path(path):
            with temporary.open("wb") as stream:
                for part in [content] if isinstance(content, str | bytes) else content:
                    stream.write(part.encode() if isinstance(part, str) else part)
                stream.flush()
                os.fsync(stream.fileno())
            replace_fsync(temporary, path)
    except BaseException:  # a full disk, Ctrl-C
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """A name for a folder that becomes `target` when it is whole; what a kill has left of one is removed. UserError if
    another process makes it."""
    place = target.with_name(f".{target.name}.partial")
    place.mkdir(parents=True, exist_ok=True)
    with open_locked(
        place / "lock",
        "w",
        f"{target}: another process is writing it; wait for it, or give another folder",
    ):
        try:
            shutil.rmtree(place / "whole", ignore_errors=True)
            yield place / "whole"
            replace_fsync(place / "whole", target)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def write_json(path: Path, value) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable) -> None:
    """Dicts, or records of data.py, as .jsonl, atomically; of rows that are made one by one no two are in memory."""
    write_atomic(path, (to_jsonl([row]) for row in rows))


def to_jsonl(rows: Iterable) -> str:
    """Dicts, or records of data.py, as the text of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False, default=asdict) + "\n" for row in rows)


def read_json(path: Path) -> dict:
    """The object in a .json file; UserError where it is missing, broken, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is damaged; expected an object")
    return found


def read_rows(path: Path, kind: type = dict) -> list:
    """The records of class `kind` in a .jsonl file (only \\n ends a line); UserError where one is broken."""
    return list(iter_rows(path, kind))


def iter_rows(path: Path, kind: type = dict) -> Iterator:
    """The records that `read_rows` reads, one by one."""
    number = 0
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):  # noqa: B007
                yield from_json(kind, line.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        what = "JSON" if kind is dict else kind.__name__
        raise UserError(f"{path}, line {number}: is no {what}; the file is damaged") from None


class JsonlView(Sequence):
    """The records of a .jsonl file as a list that is read where it is looked at: what it holds is one place in EVERY lines.
    `change`: what is made of a record."""

    def __init__(self, path: Path, kind: type = dict, change: Callable = lambda row: row):
        self.path, self.kind, self.change = path, kind, change
        self.places, self.count, place = array("q"), 0, 0
        try:
            with path.open("rb") as stream:
                for line in stream:
                    if self.count % EVERY == 0:
                        self.places.append(place)
                    self.count, place = self.count + 1, place + len(line)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error})") from None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator:
        return map(self.change, iter_rows(self.path, self.kind))

    def __getitem__(self, index: int):
        """The record of that number from 0; IndexError if there is none."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.places[index // EVERY])
                line = next(islice(stream, index % EVERY, None), b"")
            return self.change(from_json(self.kind, line.decode()))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{self.path}, line {index + 1}: cannot be read any more; the file has been damaged"
            ) from None


def batched(rows: Iterable, size: int) -> Iterator[list]:
    """The rows in lists of `size` of them, the last with what is left."""
    rest = iter(rows)
    return iter(lambda: list(islice(rest, size)), [])


def describe(path: Path) -> dict:
    """What stage.json says of a file."""
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_shard(folder: Path, number: int, rows: Iterable) -> Path:
    """The file with a block of samples, named after what is in it and where: no stage.json tells whether it is undamaged."""
    text = to_jsonl(rows).encode()
    file = folder / f"block{number}-{block_sum(folder, text)}.jsonl"
    write_atomic(file, text)
    return file


def block_sum(folder: Path, text: bytes) -> str:
    """Hex digest of a block of the unfinished stage in this folder, which is named after all that the stage depends on."""
    return hashlib.sha256(f"{folder.name}\n".encode() + text).hexdigest()


def finished_shards(folder: Path) -> dict[int, Path]:
    """The undamaged files that `write_shard` wrote, by number."""
    files = (
        file
        for file in folder.glob("block*-*.jsonl")
        if file.is_file() and file.stem.endswith(f"-{block_sum(folder, file.read_bytes())}")
    )
    return {int(file.stem.removeprefix("block").partition("-")[0]): file for file in files}


def fingerprint(value) -> str:
    """32 hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
