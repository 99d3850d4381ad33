"""Files of rows, read one at a time: JSON lines and JSON arrays, gzipped or not."""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from minmacpo import UserError

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


UNPACKED = 200  # times smaller than its text a gzipped file can be; plain language reaches 10


ROW_LIMIT = (
    1 << 24
)  # bytes or characters; a longer row is no text for a model, but perhaps a gzip bomb


BLOCK = 1 << 16  # characters of an array that are read at once


SPACE = re.compile(r"[ \t\n\r]*")


DECODER = json.JSONDecoder()


UNREADABLE = (UnicodeDecodeError, OSError, EOFError, zlib.error)


def split_pair_paths(path: str) -> list[str]:
    """The two paths of "GOOD,BAD"; none if it is one path."""
    return path.split(",") if "," in path and not Path(path).exists() else []


def find_files(path: str, key: str = "data.path") -> list[Path]:
    """The files with one of ENDINGS at `path` (a file of any name, or a folder), sorted; runs that lie in the
    folder are passed over; of "GOOD,BAD" the two, in that order. UserError, with_path the setting `key`, if there is
    none or a folder cannot be read."""
    root, files, seen = Path(path), [], set()
    if sides := split_pair_paths(path):
        return [file for part in sides for file in find_files(part, key)]
    if not root.exists():
        raise UserError(f"{key}: {root} does not exist")
    if not root.is_dir():
        return [root]

    def unreadable(error: OSError) -> None:
        raise UserError(f"{key}: {error.filename} cannot be read ({error.strerror})")

    for folder, inner, names in os.walk(root, onerror=unreadable, followlinks=True):
        real, run = os.path.realpath(folder), "config.toml" in names and Path(folder) != root
        if run or real in seen:
            inner.clear()
        else:
            files += [Path(folder, name) for name in names if name.endswith(ENDINGS)]
        seen.add(real)
    if not files:
        raise UserError(f"{key}: no .jsonl or .json file, gzipped or not, in {root}")
    return sorted(files)


def open_binary(file: Path) -> BinaryIO:
    """The bytes of a file, unpacked if it is gzipped."""
    with file.open("rb") as stream:
        packed = file.name.endswith(".gz") or stream.read(2) == b"\x1f\x8b"
    return io.BufferedReader(Unpacked(file)) if packed else file.open("rb")


class Unpacked(io.RawIOBase):
    """The bytes of a gzipped file; UserError where they are so many more than it has itself that it is no text."""

    def __init__(self, file: Path):
        self.file, self.stream = file, gzip.GzipFile(file)
        self.left = max(ROW_LIMIT, UNPACKED * file.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.stream.readinto(buffer)
        self.left -= count
        if self.left < 0:
            raise UserError(
                f"{self.file}: unpacks to more than {UNPACKED} times its size, as no text does; unpack it first if it is sound"
            )
        return count

    def close(self) -> None:
        self.stream.close()
        super().close()


def unreadable(place: str, error: Exception) -> UserError:
    """One of UNREADABLE as a sentence."""
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{place}: no valid UTF-8 ({error.reason}); save it as UTF-8")
    return UserError(f"{place}: cannot be read ({error})")


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of a file, gzipped or not; UserError where it cannot be read."""
    number = 0
    try:
        with open_binary(file) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(ROW_LIMIT + 1), b""), 1):
                if len(line) > ROW_LIMIT:
                    raise UserError(
                        f"{file}, line {number}: is longer than {ROW_LIMIT >> 20} MiB, too long for a row"
                    )
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UNREADABLE as error:
        after = "" if isinstance(error, UnicodeDecodeError) else "after "
        raise unreadable(f"{file}, {after}line {number}", error) from None


def is_array(file: Path) -> bool:
    """Whether a file holds a JSON array (else it has a row per line): its first character tells."""
    try:
        with open_binary(file) as stream:
            return stream.peek(1024)[:1024].removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except UNREADABLE as error:
        raise unreadable(str(file), error) from None


def read_array(file: Path) -> Iterator[tuple[int, object]]:
    """(row number from 1, value) of the rows of a JSON array, gzipped or not; no more than a row and a block of
    text are in memory. UserError where it cannot be read: behind a broken row nobody knows where the next begins."""
    number, mark = 0, ","
    try:
        with io.TextIOWrapper(open_binary(file), "utf-8-sig", newline="") as stream:
            text = stream.read(BLOCK).lstrip().removeprefix("[")
            if text.lstrip().startswith("]"):
                mark, text = "]", text.lstrip()[1:]
            while mark == ",":
                try:
                    value, mark, text = next_value(text)
                except (ValueError, RecursionError) as error:  # broken, or not yet read to its end
                    more = stream.read(max(BLOCK, len(text))) if len(text) <= ROW_LIMIT else ""
                    if not more:
                        long = f"longer than {ROW_LIMIT >> 20} MiB, or "
                        problem = f"not valid JSON, or cut short ({getattr(error, 'msg', error)})"
                        raise UserError(
                            f"{file}, row {number + 1}: is {long * (len(text) > ROW_LIMIT)}{problem}"
                        ) from None
                    text += more
                    continue
                number += 1
                yield number, value
            if (text + stream.read(BLOCK)).strip():
                raise UserError(
                    f"{file}, after row {number}: the array has ended, but the file goes on"
                )
    except UNREADABLE as error:
        raise unreadable(f"{file}, after row {number}", error) from None


def next_value(text: str) -> tuple[object, str, str]:
    """(the first value of what stands in an array, the mark behind it, the rest); ValueError if there is no whole one."""
    value, end = DECODER.raw_decode(text, SPACE.match(text).end())
    end = SPACE.match(text, end).end()
    if text[end : end + 1] not in (",", "]"):
        raise ValueError("no comma behind it")
    return value, text[end], text[end + 1 :]
