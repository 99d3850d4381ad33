"""Text to ids and back: sentencepiece models, and the templates that turn messages into ids.

Only here a prompt becomes ids, so training, scoring and sampling cannot differ. Special tokens are never
parsed from text, and each segment is tokenised by itself: the border of prompt and answer never shifts.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from minmacpo import UserError
from minmacpo.data import Message

TURN_MARKS = {"user": "<user>", "assistant": "<bot>"}
PLAIN_MARKS = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
SHOWN = str.maketrans({"▁": " ", "\n": "⏎", "\r": "⏎"})  # pieces as a log shows them


@dataclass(slots=True)
class Tokens:
    """ids [T] of one text; mask [T], True where the token is trained on or scored."""

    ids: list[int]
    mask: list[bool]


class Tokenizer:
    """A sentencepiece model; `model` is the bytes of a tokenizer.model. Raises UserError."""

    def __init__(self, model: bytes, where: str = "tokenizer.model"):
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError(f"{where}: is no sentencepiece model") from None
        self.model, self.size = model, self.pieces.vocab_size()
        self.bos, self.eos = self.pieces.bos_id(), self.pieces.eos_id()
        if self.eos < 0:
            raise UserError(f"{where}: has no end token")
        marks = {role: self.pieces.piece_to_id(mark) for role, mark in TURN_MARKS.items()}
        self.marks = marks if all(map(self.pieces.is_control, marks.values())) else {}  # {}: not made here
        # Llama's models put a space before every text; a line break, which never merges with what
        # follows, keeps that space away from segments that do not start a text.
        adds_space = self.pieces.id_to_piece(self.pieces.encode("a")[0]).startswith("▁")
        self.guard = self.pieces.encode("\n") if adds_space else []

    def encode(self, text: str, start: bool = False) -> list[int]:
        """ids of `text`, without special tokens; `start`: it begins a document. UserError for broken text."""
        guard = [] if start else self.guard
        try:
            return self.pieces.encode("\n" + text if guard else text)[len(guard) :]
        except RuntimeError:
            raise UserError(f"{text[:60]!a}: is no valid text (half a surrogate pair)") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens give nothing, broken bytes give U+FFFD."""
        text = self.pieces.decode(self.guard + list(ids))
        return text[1:] if self.guard else text


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an HF folder that holds a tokenizer.model; UserError otherwise."""
    file = Path(folder) / "tokenizer.model"
    if not file.is_file():
        raise UserError(f"{folder}: has no tokenizer.model (only sentencepiece models are read)")
    return Tokenizer(file.read_bytes(), str(file))


def train_tokenizer(texts: Iterable[str], vocab: int) -> bytes:
    """A sentencepiece BPE model of at most `vocab` pieces, the same bytes for the same texts.
    Lossless; no text can make the turn marks (control pieces). UserError if the texts cannot fill `vocab`."""
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, model_type="bpe", vocab_size=vocab,
            hard_vocab_limit=False, character_coverage=0.9995, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            control_symbols=[*TURN_MARKS.values()], max_sentence_length=1 << 24, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"model.vocab = {vocab}: the text yields no such tokenizer ({reason})") from None
    return out.getvalue()


def turns(messages: Sequence[Message]) -> list[tuple[str, str, str]]:
    """(role, tag, content) of every turn, the open one of the assistant last. A message with the role "tag" is no
    turn: it says beforehand how the assistant's next one speaks (RLCD, Yang et al. 2024)."""
    found, tag = [], ""
    for message in [*messages, Message("assistant", "")]:
        if message.role != "tag":
            found.append((message.role, tag, message.content))
        tag = message.content if message.role == "tag" else ""
    return found


def plain_mark(role: str, tag: str) -> str:
    """"\n\nAssistant:", or with a tag "\n\nAssistant (harmless response):"."""
    return f"{PLAIN_MARKS[role][:-1]} ({tag}):" if tag else PLAIN_MARKS[role]


def dialogue_text(messages: Sequence[Message], response: str) -> str:
    """A dialogue as one text of the HH-RLHF kind, for training a tokenizer."""
    *before, (role, tag, _) = turns(messages)
    return "".join(f"{plain_mark(r, t)} {content}" for r, t, content in [*before, (role, tag, response)])


def render_prompt(tokenizer: Tokenizer, template: str, messages: Sequence[Message]) -> list[int]:
    """ids of the prompt, up to where the answer begins: after "\n\nAssistant:" (plain) or <bot> (turns).
    plain: a begin token, then text as in HH-RLHF. turns: none; earlier answers close with the end token; a tag
    stands behind its <bot>, in parentheses."""
    *before, (role, tag, _) = turns(messages)
    if template == "plain":
        ids = [tokenizer.bos] if tokenizer.bos >= 0 else []
        for number, (r, t, content) in enumerate(before):
            ids += tokenizer.encode(f"{plain_mark(r, t)} {content}", start=number == 0)
        return ids + tokenizer.encode(plain_mark(role, tag), start=not before)
    if not tokenizer.marks:
        raise UserError("data.template = turns needs a tokenizer made here; use data.template=plain")
    ids = []
    for number, (r, t, content) in enumerate([*before, (role, tag, "")]):
        said = tokenizer.encode(f"( {t} ) {content}" if t else content)
        end = [tokenizer.eos] if r == "assistant" and number < len(before) else []
        ids += [tokenizer.marks[r], *said, *end]
    return ids


def render(
    tokenizer: Tokenizer, template: str, messages: Sequence[Message], response: str | None = None
) -> Tokens:
    """The prompt and, if given, the response (plain: after a space) and its end token; the mask is True on
    these two alone."""
    prompt, answer = render_prompt(tokenizer, template, messages), []
    if response is not None:
        answer = [*tokenizer.encode(" " + response if template == "plain" else response), tokenizer.eos]
    return Tokens(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def response_text(tokenizer: Tokenizer, template: str, ids: Sequence[int]) -> str:
    """The answer's text behind sampled `ids`: no end token, no space around, and no next human turn, which a
    base model that has read whole dialogues may go on with (in the plain template)."""
    text = tokenizer.decode([i for i in ids if i != tokenizer.eos])
    return (text.partition(PLAIN_MARKS["user"])[0] if template == "plain" else text).strip()


def show_mask(tokenizer: Tokenizer, tokens: Tokens) -> str:
    """The text of `tokens` on one line, the trained part between ⟦ and ⟧, special pieces by name."""
    pieces = [tokenizer.pieces.id_to_piece(i).translate(SHOWN).replace("<0x0A>", "⏎") for i in tokens.ids]
    marked = [f"⟦{piece}⟧" if trained else piece for piece, trained in zip(pieces, tokens.mask, strict=True)]
    return "".join(marked).replace("⟧⟦", "")
