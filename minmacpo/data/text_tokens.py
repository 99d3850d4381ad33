"""Added tokens that are text, such as <think>: how they are found in one."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that stands beside the vocabulary, and how it is found in a text.

    Attributes:
        special: as its file has it; None where the file does not say it.
        lstrip, rstrip: whether it takes in the white space before or behind it.
        single_word: whether it is none within a word.
    """

    name: str
    token_id: int
    special: bool | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def __post_init__(self):
        self.name.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair


def parse_added_token(raw: dict, token_id: int) -> AddedToken:
    """A token as tokenizer.json and tokenizer_config.json have it."""
    return AddedToken(
        name=raw["content"],
        token_id=token_id,
        special=raw.get("special"),
        lstrip=bool(raw.get("lstrip")),
        rstrip=bool(raw.get("rstrip")),
        single_word=bool(raw.get("single_word")),
    )


def stripping_ids(added_tokens: Iterable[dict]) -> set[int]:
    """The ids of a tokenizer.json's added tokens that take in the white space behind them."""
    return {raw["id"] for raw in added_tokens if raw.get("rstrip")}


def stripping_before_ids(added_tokens: Iterable[dict]) -> set[int]:
    """The ids of those that take in the white space before them."""
    return {raw["id"] for raw in added_tokens if raw.get("lstrip")}


class TextTokens:
    """Added tokens that are made from text and shown in it.

    Attributes:
        names: {id: name}
    """

    def __init__(self, tokens: Iterable[AddedToken]):
        # of two tokens at one place the longer one counts
        self.tokens = sorted(tokens, key=lambda token: len(token.name), reverse=True)
        self.names = {token.token_id: token.name for token in self.tokens}
        self.pattern = re.compile("|".join(map(token_pattern, self.tokens)))

    def split(self, text: str) -> list[str | AddedToken]:
        """A text cut at its tokens; no part is empty."""
        if not self.tokens:
            return [text] if text else []
        parts = []
        start = 0
        for match in self.pattern.finditer(text):
            parts.append(text[start : match.start()])
            parts.append(self.tokens[match.lastindex - 1])
            start = match.end()
        parts.append(text[start:])
        return [part for part in parts if part != ""]

    def group(self, ids: Sequence[int]) -> list[int | list[int]]:
        """Ids with those between two tokens of these put together."""
        groups = []
        between = []
        for token_id in ids:
            if token_id in self.names:
                groups += [between, token_id]
                between = []
            else:
                between.append(token_id)
        return [*groups, between]


def token_pattern(token: AddedToken) -> str:
    """A pattern for a token with the white space that it takes in; its group is the name."""
    before = r"\s*" if token.lstrip else ""
    behind = r"\s*" if token.rstrip else ""
    name = f"({re.escape(token.name)})"
    if token.single_word:
        name = rf"(?<!\w){name}(?!\w)"
    return before + name + behind
