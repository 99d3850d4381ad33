"""The records that flow between stages: one JSON object a line, one frozen dataclass each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue.

    The role "tag" is no turn: it says how the assistant is to speak next ("an expert speaks"), and
    chat_template.py writes it where the template has a place for it.
    """

    role: str  # "user", "assistant", "system" or "tag"
    content: str
    # Whether data.train_on=all learns it; with and without, it says the same
    trained: bool = field(default=True, compare=False, metadata={"rare": True})


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with one answer: text to train on, or to score. Seeds and joins depend on `id`."""

    id: str
    prompt: tuple[Message, ...]
    response: str
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with a better and a worse answer; an answer that a file does not have is ""."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_by: str = "data"  # the agent that gave it
    rejected_by: str = "data"
    ref_chosen_logps: float | None = None  # summed over tokens, in nats; None until it is scored
    ref_rejected_logps: float | None = None
    meta: dict = field(default_factory=dict)
    weight: float | None = None  # in the loss; None where pairs have no weights


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled answer."""

    id: str
    prompt: tuple[Message, ...]
    response: str
    finish: str  # "stop", or "length" where the limit of new tokens was reached
    tokens: tuple[int, ...]  # the end token included
    logp: float  # of the tokens, summed, at temperature 1
    perplexity: float
    agent: str
    seed: int
    meta: dict = field(default_factory=dict)


def example_id(prompt: tuple[Message, ...], occurrence: int = 0) -> str:
    """16 hex digits that stand for a prompt.

    Args:
        occurrence: how often the prompt occurred before, so that repeated prompts differ.
    """
    # seeds and files depend on these very bytes
    turns = [[message.role, message.content] for message in prompt]
    text = json.dumps([*turns, occurrence], ensure_ascii=False)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def format_dialogue(prompt: Sequence[Message], speakers: Mapping[str, str], between: str) -> str:
    """A prompt as one text: a single turn as it is, several each behind their speaker's name.

    Args:
        speakers: the name of each role; messages of another role (a tag) are left out.
        between: what stands between two turns.
    """
    turns = [message for message in prompt if message.role in speakers]
    # a single question needs no name to tell who speaks
    if len(turns) == 1:
        return turns[0].content
    return between.join(f"{speakers[turn.role]}: {turn.content}" for turn in turns)
