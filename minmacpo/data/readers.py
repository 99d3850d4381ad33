"""Files of rows, read one row at a time: JSON lines and JSON arrays, gzipped or not, and parquet.

Memory stays bounded whatever a file holds: a row may be ROW_LIMIT long, and a gzipped file may
unpack to MAX_UNPACKING times its size.
"""

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
from minmacpo.data.file_kinds import (
    DESCRIPTIONS,
    HEAD,
    PARQUET,
    conversion,
    kind_by_name,
    kind_of,
    saved_dataset,
)

JSON_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson", ".ndjson.gz")
ENDINGS = (*JSON_ENDINGS, *PARQUET.endings)

MAX_UNPACKING = 200  # times its size that a gzipped file may unpack to; plain language reaches 10
ROW_LIMIT = 1 << 24  # bytes or characters; a longer row is no text for a model
BLOCK = 1 << 16  # characters of an array that are read at once

GZIP_MAGIC = b"\x1f\x8b"
UTF8_BOM = b"\xef\xbb\xbf"
WHITE_SPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()

# What reading a broken file raises.
READ_ERRORS = (UnicodeDecodeError, OSError, EOFError, zlib.error)


# ---- which files ----------------------------------------------------------------------------


def split_pair_paths(path: str) -> list[str]:
    """The two paths of "GOOD,BAD"; an empty list if it is one path."""
    if "," in path and not Path(path).exists():
        return path.split(",")
    return []


def find_files(path: str, setting: str = "data.path") -> list[Path]:
    """The files of rows at a path, sorted.

    Args:
        path: a file of any name; or a folder, of which the files with one of ENDINGS are taken,
            but not those of runs that lie in it; or "GOOD,BAD", which gives the files of GOOD
            before those of BAD.
        setting: the setting that holds the path, for error messages.

    Raises:
        UserError: there is no such file, or a folder cannot be read.
    """
    sides = split_pair_paths(path)
    if sides:
        files = []
        for side in sides:
            files.extend(find_files(side, setting))
        return files

    root = Path(path)
    if not root.exists():
        raise UserError(f"{setting}: {root} does not exist")
    if not root.is_dir():
        return [root]
    files = sorted(files_of_folder(root, setting))
    rows = [file for file in files if is_row_file(file)]
    if rows:
        return rows
    if files:
        kind = kind_by_name(files[0].name)
        raise UserError(
            f"{setting}: no .jsonl, .json or .parquet file in {root}, but {files[0].name}, which "
            f"is {kind.name}; {conversion(kind, files[0])}"
        )
    raise UserError(f"{setting}: no .jsonl or .json file, gzipped or not, in {root}")


def files_left_aside(path: str) -> list[Path]:
    """The files of a folder that hold rows in a form that is not read."""
    root = Path(path)
    if split_pair_paths(path) or not root.is_dir():
        return []
    return sorted(file for file in files_of_folder(root, path) if not is_row_file(file))


def is_row_file(file: Path) -> bool:
    """Whether a file of a folder is read."""
    return file.name.endswith(ENDINGS)


def files_of_folder(root: Path, setting: str) -> list[Path]:
    """The files of rows in a folder and the folders in it, links included; some are not read.

    Hidden ones are passed over: their names begin with a dot.

    Raises:
        UserError: the folder, or one in it, cannot be read, or `datasets` has saved it.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{setting}: {error.filename} cannot be read ({error.strerror})")

    files = []
    visited = set()  # links may lead in a circle
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        real_path = os.path.realpath(folder)
        is_run = "config.toml" in names and Path(folder) != root
        if is_run or real_path in visited:
            subfolders.clear()  # os.walk then goes no deeper
        else:
            refuse_saved_dataset(Path(folder), names, setting)
            # what is hidden is a copy or a note of some program, such as a notebook or a download
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for name in names:
                if name.startswith("."):
                    continue
                kind = kind_by_name(name)
                holds_rows = name.endswith(ENDINGS) or (kind is not None and kind.is_data)
                if holds_rows and not is_description(Path(folder, name)):
                    files.append(Path(folder, name))
        visited.add(real_path)
    return files


def refuse_saved_dataset(folder: Path, names: list[str], setting: str) -> None:
    """UserError for a folder that the `save_to_disk` of `datasets` has written."""
    command = saved_dataset(folder, names)
    if command is not None:
        raise UserError(
            f"{setting}: {folder} is a data set as save_to_disk of `datasets` writes it, in arrow "
            f"files, which are not read; convert it: {command}"
        )


def is_description(file: Path) -> bool:
    """Whether a JSON file describes a data set, and so has no rows."""
    return file.name in DESCRIPTIONS and not is_array(file)


def check_kind(file: Path) -> None:
    """UserError for a file that is not read, with the command that converts it."""
    if is_description(file):
        raise UserError(
            f"{file}: describes a data set and has no rows; give the files with the rows"
        )
    kind = kind_of(file, read_head(file))
    if kind is not None and kind is not PARQUET:
        raise UserError(f"{file}: is {kind.name}, which is not read; {conversion(kind, file)}")


def is_parquet(file: Path) -> bool:
    """Whether a file is read by pyarrow."""
    return kind_of(file, read_head(file)) is PARQUET


# ---- bytes ----------------------------------------------------------------------------------


def open_binary(file: Path) -> BinaryIO:
    """The bytes of a file, unpacked if it is gzipped."""
    with file.open("rb") as stream:
        is_gzipped = file.name.endswith(".gz") or stream.read(2) == GZIP_MAGIC
    if is_gzipped:
        return io.BufferedReader(UnpackedFile(file))
    return file.open("rb")


class UnpackedFile(io.RawIOBase):
    """The bytes of a gzipped file; UserError where they are too many for a text."""

    def __init__(self, file: Path):
        self.file = file
        self.stream = gzip.GzipFile(file)
        self.bytes_left = max(ROW_LIMIT, MAX_UNPACKING * file.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.stream.readinto(buffer)
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise UserError(
                f"{self.file}: unpacks to more than {MAX_UNPACKING} times its size, as no text "
                "does; unpack it first if it is sound"
            )
        return count

    def close(self) -> None:
        self.stream.close()
        super().close()


def read_error(where: str, error: Exception) -> UserError:
    """One of READ_ERRORS as a sentence."""
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{where}: no valid UTF-8 ({error.reason}); save it as UTF-8")
    return UserError(f"{where}: cannot be read ({error})")


# ---- rows -----------------------------------------------------------------------------------


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of every line, without the white space around it.

    Raises:
        UserError: a line is too long or no UTF-8, or the file cannot be read to its end.
    """
    number = 0
    try:
        with open_binary(file) as stream:
            while line := stream.readline(ROW_LIMIT + 1):
                number += 1
                if len(line) > ROW_LIMIT:
                    limit = f"{ROW_LIMIT >> 20} MiB"
                    raise UserError(
                        f"{file}, line {number}: is longer than {limit}, too long for a row"
                    )
                encoding = "utf-8-sig" if number == 1 else "utf-8"  # drops a byte order mark
                yield number, line.decode(encoding).strip()
    except UnicodeDecodeError as error:
        raise read_error(f"{file}, line {number}", error) from None
    except READ_ERRORS as error:
        raise read_error(f"{file}, after line {number}", error) from None


def is_array(file: Path) -> bool:
    """Whether a file holds a JSON array, told by its first character; else a row is a line."""
    return read_head(file).removeprefix(UTF8_BOM).lstrip().startswith(b"[")


def read_head(file: Path) -> bytes:
    """The first bytes of a file, unpacked if it is gzipped."""
    try:
        with open_binary(file) as stream:
            return stream.peek(HEAD)[:HEAD]
    except READ_ERRORS as error:
        raise read_error(str(file), error) from None


def read_array(file: Path) -> Iterator[tuple[int, object]]:
    """(number from 1, value) of the rows of a JSON array; a row and a block are in memory.

    Raises:
        UserError: the file is broken. No row behind a broken one is read, since nobody knows where
            the next one begins.
    """
    number = 0
    try:
        with io.TextIOWrapper(open_binary(file), "utf-8-sig", newline="") as stream:
            array = ArrayText(file, stream)
            while array.has_next():
                value = array.next_value(number + 1)
                number += 1
                yield number, value
            array.check_end(number)
    except READ_ERRORS as error:
        raise read_error(f"{file}, after row {number}", error) from None


class ArrayText:
    """The text of a JSON array, read in blocks.

    Attributes:
        text: what has been read and is not yet decoded.
        mark: what stood before `text`: "," if a value follows, "]" if the array has ended.
    """

    def __init__(self, file: Path, stream: io.TextIOBase):
        self.file = file
        self.stream = stream
        self.text = stream.read(BLOCK).lstrip().removeprefix("[")
        self.mark = ","
        # an empty array has no value before its end
        if self.text.lstrip().startswith("]"):
            self.mark = "]"
            self.text = self.text.lstrip()[1:]

    def has_next(self) -> bool:
        """Whether another value follows."""
        return self.mark == ","

    def next_value(self, number: int) -> object:
        """The next value; as much of the file is read as it takes.

        Args:
            number: of the row, for the error message.
        """
        while True:
            try:
                return self.take_value()
            except (ValueError, RecursionError) as error:
                # the value is broken, or has not been read to its end
                if not self.read_more():
                    reason = getattr(error, "msg", error)
                    problem = f"not valid JSON, or cut short ({reason})"
                    if len(self.text) > ROW_LIMIT:
                        problem = f"longer than {ROW_LIMIT >> 20} MiB, or {problem}"
                    raise UserError(f"{self.file}, row {number}: is {problem}") from None

    def take_value(self) -> object:
        """Decode the value at the head of the text; ValueError if no whole one stands there."""
        start = WHITE_SPACE.match(self.text).end()
        value, end = DECODER.raw_decode(self.text, start)
        end = WHITE_SPACE.match(self.text, end).end()
        mark = self.text[end : end + 1]
        if mark not in (",", "]"):
            raise ValueError("no comma behind it")
        self.mark = mark
        self.text = self.text[end + 1 :]
        return value

    def read_more(self) -> bool:
        """Read as much again as there is; False at the file's end, or behind a row's limit."""
        if len(self.text) > ROW_LIMIT:
            return False
        more = self.stream.read(max(BLOCK, len(self.text)))
        self.text += more
        return more != ""

    def check_end(self, number: int) -> None:
        """UserError if something follows the array."""
        if (self.text + self.stream.read(BLOCK)).strip():
            raise UserError(
                f"{self.file}, after row {number}: the array has ended, but the file goes on"
            )
