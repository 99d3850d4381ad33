"""The records that flow between stages (.jsonl files of frozen dataclasses), files of rows, and the slices.

What is read here are lines and arrays, a row at a time; what a row says is for forms.py. No torch here.
"""

import functools
import gzip
import io
import json
import os
import random
import re
import typing
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from minmacpo import UserError

SLICES = ("d0", "d1", "d2", "test")
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
UNPACKED = 200  # times smaller than its text a gzipped file can be; plain language reaches 10
ROW_LIMIT = 1 << 24  # bytes or characters; a longer row is no text for a model, but perhaps a gzip bomb
BLOCK = 1 << 16  # characters of an array that are read at once
SPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()
UNREADABLE = (UnicodeDecodeError, OSError, EOFError, zlib.error)


@dataclass(frozen=True, slots=True)
class Message:
    role: str  # "user", "assistant", "system", or "tag": how the assistant is to speak next (templates.py)
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with one answer: text to train on, or to score. `id` keys seeds and joins."""

    id: str
    prompt: tuple[Message, ...]
    response: str
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with a better and a worse answer ("" where a file has none); logps (summed, end token included)
    once scored; a weight in the loss where pairs have weights."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_by: str = "data"
    rejected_by: str = "data"
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None
    meta: dict = field(default_factory=dict)
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled answer. `tokens` keep the end token; `logp` is theirs, summed, at temperature 1."""

    id: str
    prompt: tuple[Message, ...]
    response: str
    finish: str  # "stop" or "length"
    tokens: tuple[int, ...]
    logp: float
    perplexity: float
    agent: str
    seed: int
    meta: dict = field(default_factory=dict)


def from_json(kind: type, line: str):
    """The record of class `kind` in one line of JSON; a dict stays as it is. ValueError, TypeError or KeyError where it
    is none, or holds half a surrogate pair, which no file made here does."""
    values = json.loads(line)
    if not isinstance(values, dict):
        raise TypeError(f"{type(values).__name__} instead of an object")
    if "\\u" in line:
        json.dumps(values, ensure_ascii=False).encode()
    if kind is dict:
        return values
    values["prompt"] = tuple(checked(Message(**message)) for message in values["prompt"])
    if "tokens" in values:
        values["tokens"] = tuple(values["tokens"])
    return checked(kind(**values))


@functools.cache
def types_of(kind: type) -> list[tuple[str, set[type], set[type]]]:
    """(field, types of its value, types of what a tuple holds) of a class of records."""
    found = []
    for name, said in typing.get_type_hints(kind).items():
        inner, many = {*typing.get_args(said)} - {...}, typing.get_origin(said) is tuple
        kinds = {tuple} if many else inner or {said}
        found.append((name, kinds | ({int} if float in kinds else set()), inner if many else set()))
    return found


def checked(record):
    """The record; TypeError where a field holds something else than its annotation says."""
    for name, kinds, held in types_of(type(record)):
        value = getattr(record, name)
        if type(value) not in kinds or (held and not {*map(type, value)} <= held):
            raise TypeError(name)
    return record


def example_id(prompt: tuple[Message, ...], occurrence: int = 0) -> str:
    """16 hex digits from the prompt's text and how often it occurred before."""
    text = json.dumps([[m.role, m.content] for m in prompt] + [occurrence], ensure_ascii=False)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def two_sides(path: str) -> list[str]:
    """The two paths of "GOOD,BAD"; none if it is one path."""
    return path.split(",") if "," in path and not Path(path).exists() else []


def find_files(path: str, key: str = "data.path") -> list[Path]:
    """The files with one of ENDINGS at `path` (a file of any name, or a folder), sorted; runs that lie in the
    folder are passed over; of "GOOD,BAD" the two, in that order. UserError, naming the setting `key`, if there is
    none or a folder cannot be read."""
    root, files, seen = Path(path), [], set()
    if sides := two_sides(path):
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
            raise UserError(f"{self.file}: unpacks to more than {UNPACKED} times its size, as no text does; unpack it first if it is sound")
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
                    raise UserError(f"{file}, line {number}: is longer than {ROW_LIMIT >> 20} MiB, too long for a row")
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
                        raise UserError(f"{file}, row {number + 1}: is {long * (len(text) > ROW_LIMIT)}{problem}") from None
                    text += more
                    continue
                number += 1
                yield number, value
            if (text + stream.read(BLOCK)).strip():
                raise UserError(f"{file}, after row {number}: the array has ended, but the file goes on")
    except UNREADABLE as error:
        raise unreadable(f"{file}, after row {number}", error) from None


def next_value(text: str) -> tuple[object, str, str]:
    """(the first value of what stands in an array, the mark behind it, the rest); ValueError if there is no whole one."""
    value, end = DECODER.raw_decode(text, SPACE.match(text).end())
    end = SPACE.match(text, end).end()
    if text[end : end + 1] not in (",", "]"):
        raise ValueError("no comma behind it")
    return value, text[end], text[end + 1 :]


def spoken(prompt: Sequence[Message], speakers: Mapping[str, str], between: str) -> str:
    """A prompt as one text: a single turn as it is, several with their speakers by role; what has none (a tag) is left out."""
    turns = [message for message in prompt if message.role in speakers]
    told = (f"{speakers[message.role]}: {message.content}" for message in turns)
    return turns[0].content if len(turns) == 1 else between.join(told)


def first_turn(pair: Pair) -> str:
    """What the human says first; slices have none in common."""
    return next(message.content for message in pair.prompt if message.role == "user")


def dealt(turns: Iterable[str], shares: Mapping[str, float], seed: str) -> dict[str, str]:
    """{turn: slice}: different first turns in random order, of which each slice gets its share."""
    order, sizes = sorted(turns), [*shares.values()]
    random.Random(seed).shuffle(order)
    ends = [round(sum(sizes[:i]) * len(order)) for i in range(len(sizes) + 1)]
    return {turn: name for i, name in enumerate(shares) for turn in order[ends[i] : ends[i + 1]]}


def join_sides(pairs: Sequence[Pair], path: str) -> tuple[list[Pair], int]:
    """(pairs of one file's answers as chosen and another's to the same prompts as rejected, how many answers found no
    other side), for `path` "GOOD,BAD": MACPO's authors released D1 as two such files. UserError if it names not two."""
    names = [*dict.fromkeys(pair.meta["file"] for pair in pairs)]
    if len(names) != 2:
        raise UserError(f"{path}: expected two files with usable rows, the good answers and the bad ones")
    sides: list[dict] = [{}, {}]
    for pair in pairs:
        sides[names.index(pair.meta["file"])].setdefault(pair.prompt, []).append(pair)
    joined = [replace(good, rejected=bad.chosen) for prompt, goods in sides[0].items()
              for good, bad in zip(goods, sides[1].get(prompt, ()), strict=False) if good.chosen != bad.chosen]  # fmt: skip
    return joined, len(pairs) - 2 * len(joined)


def split_pairs(
    pairs: Sequence[Pair], shares: Sequence[float], seed: int, own: Mapping[str, Sequence[Pair]] | None = None
) -> tuple[dict[str, list[Pair]], dict[str, int]]:
    """{"d0", "d1", "d2", "test"}: slices disjoint by first human turn (shares count first turns of `pairs`), those
    in `own` made of nothing but the rows given there; and how many pairs were left out: of d2 and test because
    their prompt had occurred before, and of any file because the test, or D1, has that first turn in its own."""
    own = own or {}
    where = {first_turn(pair): name for name in ("d2", "d1", "test") for pair in own.get(name, ())}
    shares = {name: 0 if name in own else share for name, share in zip(SLICES, shares, strict=True)}
    where |= dealt({first_turn(pair) for pair in pairs} - where.keys(), shares, f"{seed}/split")
    slices, prompts, left_out = {name: [] for name in SLICES}, set(), Counter(d2=0, test=0)
    rows = [(None, pair) for pair in pairs] + [(name, pair) for name, given in own.items() for pair in given]
    for source, pair in rows:
        name = where.get(first_turn(pair))
        if name in own and name != source:
            left_out["first turn of another slice"] += 1
        elif name in ("d2", "test") and pair.prompt in prompts:
            left_out[name] += 1
        elif name:
            slices[name].append(pair)
            prompts.add(pair.prompt)
    return slices, dict(left_out)
