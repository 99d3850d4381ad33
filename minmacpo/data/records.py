"""The records that flow between stages (.jsonl files of frozen dataclasses), files of rows, and the slices.

What is read here are lines and arrays, a row at a time; what a row says is for forms.py. No torch here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256


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


def example_id(prompt: tuple[Message, ...], occurrence: int = 0) -> str:
    """16 hex digits from the prompt's text and how often it occurred before."""
    text = json.dumps([[m.role, m.content] for m in prompt] + [occurrence], ensure_ascii=False)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def format_dialogue(prompt: Sequence[Message], speakers: Mapping[str, str], between: str) -> str:
    """A prompt as one text: a single turn as it is, several with their speakers by role; what has none (a tag) is left out."""
    turns = [message for message in prompt if message.role in speakers]
    told = (f"{speakers[message.role]}: {message.content}" for message in turns)
    return turns[0].content if len(turns) == 1 else between.join(told)
