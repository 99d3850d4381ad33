"""The records that flow between stages (.jsonl files of frozen dataclasses), and the reader of HH-RLHF files.

Reading is strict: a row that cannot be read is an error with file and line, one that cannot be used is
counted under its reason, nothing is dropped in silence. No torch here.
"""

import gzip
import json
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path

from minmacpo import UserError

SLICES = ("d0", "d1", "d2", "test")
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
EXPECTED = 'expected {"chosen": dialogue, "rejected": dialogue} as HH-RLHF publishes it'


@dataclass(frozen=True, slots=True)
class Message:
    role: str  # "user", "assistant", "system", or "tag": how the assistant is to speak next
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
    """A prompt with a better and a worse answer; logps (summed, end token included) once scored; a weight in
    the loss where pairs have weights."""

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
    """The record of class `kind` in one line of JSON; a dict stays as it is."""
    values = json.loads(line)
    if kind is dict:
        return values
    values["prompt"] = tuple(Message(**message) for message in values["prompt"])
    if "tokens" in values:
        values["tokens"] = tuple(values["tokens"])
    return kind(**values)


def example_id(prompt: tuple[Message, ...], occurrence: int = 0) -> str:
    """16 hex digits from the prompt's text and how often it occurred before."""
    text = json.dumps([[m.role, m.content] for m in prompt] + [occurrence], ensure_ascii=False)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def find_files(path: str) -> list[Path]:
    """The .jsonl and .jsonl.gz files at `path` (a file of any name, or a folder), sorted; runs that lie in the
    folder are passed over. UserError if there is none, or a folder cannot be read."""
    root, files, seen = Path(path), [], set()
    if not root.exists():
        raise UserError(f"data.path: {root} does not exist")
    if not root.is_dir():
        return [root]

    def unreadable(error: OSError) -> None:
        raise UserError(f"data.path: {error.filename} cannot be read ({error.strerror})")

    for folder, inner, names in os.walk(root, onerror=unreadable, followlinks=True):
        real, run = os.path.realpath(folder), "config.toml" in names and Path(folder) != root
        if run or real in seen:
            inner.clear()
        else:
            files += [Path(folder, name) for name in names if name.endswith((".jsonl", ".jsonl.gz"))]
        seen.add(real)
    if not files:
        raise UserError(f"data.path: no .jsonl or .jsonl.gz file in {root}")
    return sorted(files)


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of a file, gzipped or not; UserError where it cannot be read."""
    number = 0
    try:
        with file.open("rb") as stream:
            packed = file.name.endswith(".gz") or stream.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, line {number}: no valid UTF-8 ({error.reason}); save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}, after line {number}: cannot be read ({error})") from None


def split_dialogue(text: str) -> tuple[tuple[Message, ...], str]:
    """(prompt, last answer) of a dialogue, cut at its last assistant turn; ValueError if it is none."""
    head, mark, answer = text.rpartition("\n\nAssistant:")
    before, *rest = TURN.split(head)
    if not mark or before.strip():
        raise ValueError(r'no dialogue of "\n\nHuman: …" and "\n\nAssistant: …" turns')
    turns = zip(rest[::2], rest[1::2], strict=True)
    return tuple(Message(ROLES[role], content.strip()) for role, content in turns), answer.strip()


def parse_row(text: str, where: str) -> tuple[Pair | None, str]:
    """(pair, "kept") or (None, why it cannot be used); UserError for a row that cannot be read."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); {EXPECTED}") from None
    sides, keys = [], ("chosen", "rejected")
    for key in keys:
        if not isinstance(row, dict) or key not in row:
            raise UserError(f"{where}: no {key!r}; {EXPECTED}")
        if not isinstance(row[key], str):
            raise UserError(f"{where}: {key!r} is no text; {EXPECTED}")
    for key in keys:
        try:
            row[key].encode("utf-8")
            sides += split_dialogue(row[key])
        except UnicodeEncodeError:
            raise UserError(f"{where}: {key!r} holds half a surrogate pair, no valid text") from None
        except ValueError as error:
            raise UserError(f"{where}: {key!r} is {error}; {EXPECTED}") from None
    prompt, chosen, other, rejected = sides
    if prompt != other:
        return None, "prompts differ"
    if not prompt or prompt[-1].role != "user" or not prompt[-1].content:
        return None, "no human turn before the answer"
    if "Human" in [TURN.findall(row[key])[-1] for key in keys]:
        return None, "human turn at the end"
    if not chosen or not rejected:
        return None, "empty answer"
    if chosen == rejected:
        return None, "identical answers"
    return Pair(example_id(prompt), prompt, chosen, rejected), "kept"


def read_hh(path: str, most: int | None = None) -> tuple[list[Pair], dict[str, dict[str, int]]]:
    """All usable pairs of HH-RLHF files, and per file how many rows were read, kept, dropped why.
    Reads `most` rows at most, spread evenly over the files. A pair's meta["file"] is its file's name without
    endings. Raises UserError for an unreadable row, or when none is left."""
    files, pairs, counts, seen = find_files(path), [], {}, Counter()
    for index, file in enumerate(files):
        name = os.fsencode(file.name).decode("utf-8", "backslashreplace")
        label = re.sub(r"\.jsonl(\.gz)?$", "", name)
        label = label if label not in counts else str(file.relative_to(path))
        count = counts.setdefault(label, Counter(read=0, kept=0))
        limit = None if most is None else most // len(files) + (index < most % len(files))
        for number, text in islice(read_lines(file), limit):
            pair, reason = parse_row(text, f"{file}, line {number}") if text else (None, "blank line")
            count.update(("read", reason))
            if pair:
                name = example_id(pair.prompt, seen[pair.id])
                seen[pair.id] += 1
                pairs.append(replace(pair, id=name, meta={"file": label}))
    counts = {label: dict(count) for label, count in counts.items()}
    if not pairs:
        found = "; ".join(f"{label}: {count}" for label, count in counts.items())
        raise UserError(f"data.path: no usable row in {path} ({found})")
    return pairs, counts


def split_pairs(
    pairs: list[Pair], shares: tuple[float, ...], seed: int
) -> tuple[dict[str, list[Pair]], dict[str, int]]:
    """{"d0", "d1", "d2", "test"}: slices disjoint by first human turn (shares count first turns); and how
    many pairs were left out of d2 and test, because their prompt had occurred before."""
    first_turn = {pair.id: next(m.content for m in pair.prompt if m.role == "user") for pair in pairs}
    turns = sorted(set(first_turn.values()))
    random.Random(f"{seed}/split").shuffle(turns)
    ends = [round(sum(shares[:i]) * len(turns)) for i in range(5)]
    where = {turn: name for i, name in enumerate(SLICES) for turn in turns[ends[i] : ends[i + 1]]}
    slices, prompts, left_out = {name: [] for name in SLICES}, set(), Counter(d2=0, test=0)
    for pair in pairs:
        name = where.get(first_turn[pair.id])
        if name in ("d2", "test") and pair.prompt in prompts:
            left_out[name] += 1
        elif name:
            slices[name].append(pair)
        prompts.add(pair.prompt)
    return slices, dict(left_out)
