"""Text to ids and back: the tokenizers of base folders, and those made here.

Special tokens are never parsed from text, and each segment is tokenised by itself: the border of prompt and
answer never shifts. templates.py makes dialogues into segments.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from minmacpo import UserError
from minmacpo.data.bpe import BytePairs, check_ids
from minmacpo.runtime.files import read_json

TURN_MARKS = {"user": "<user>", "assistant": "<bot>"}


SHOWN = str.maketrans({"▁": " ", "\n": "⏎", "\r": "⏎"})  # pieces as a log shows them


# All that a base folder may say of its tokenizer; the first two hold one, the first is used where both are.
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(slots=True)
class Tokens:
    """ids [T] of one text; mask [T], True where the token is trained on or scored."""

    ids: list[int]
    mask: list[bool]


class Tokenizer:
    """A sentencepiece model or a byte-level BPE; `model` is the bytes of a tokenizer.model or tokenizer.json,
    `added` the tokens {name: id} beside it, `ends` {"bos": name or id, "eos": …} where they are not the model's.
    `special` are all tokens that no text becomes. Raises UserError."""

    def __init__(
        self,
        model: bytes,
        where: str = "tokenizer.model",
        added: Mapping[str, int] | None = None,
        ends: Mapping[str, str | int] | None = None,
    ):
        self.model, self.guard, self.bos, self.eos = model, [], -1, -1
        if where.endswith(".json"):
            self.pieces = BytePairs(model, where)
            self.known, special = self.pieces.size, self.pieces.added
        else:
            try:
                self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
                special = self.read_pieces()
            except (
                RuntimeError,
                UnicodeDecodeError,
                IndexError,
            ):  # it may load, and then know no letter
                raise UserError(f"{where}: is no sentencepiece model") from None
        self.special = special | dict(added or {})
        self.names = {i: name for name, i in self.special.items()}
        self.size = max([self.known, *(i + 1 for i in self.names)])
        for key, end in (ends or {}).items():
            if type(found := self.special.get(end, end)) is not int or not 0 <= found < self.size:
                raise UserError(
                    f"{where}: the {key} token is {end!r}, which is no special token of it"
                )
            setattr(self, key, found)
        if self.eos < 0:
            raise UserError(
                f"{where}: has no end token; tokenizer_config.json beside it should name an eos_token"
            )
        marks = {role: self.special.get(mark) for role, mark in TURN_MARKS.items()}
        self.marks = {} if None in marks.values() else marks  # {}: not made here

    def read_pieces(self) -> dict[str, int]:
        """Take over what the sentencepiece model says of itself; returns its control pieces."""
        self.bos, self.eos, self.known = (
            self.pieces.bos_id(),
            self.pieces.eos_id(),
            len(self.pieces),
        )
        # Llama's models put a space before every text; a line break, which never merges with what
        # follows, keeps that space away from segments that do not start a text.
        adds_space = self.pieces.id_to_piece(self.pieces.encode("a")[0]).startswith("▁")
        self.guard = self.pieces.encode("\n") if adds_space else []
        return {
            self.pieces.id_to_piece(i): i for i in range(self.known) if self.pieces.is_control(i)
        }

    def encode(self, text: str, start: bool = False) -> list[int]:
        """ids of `text`, without special tokens; `start`: it begins a document. UserError for broken text."""
        guard = [] if start else self.guard
        try:
            return self.pieces.encode("\n" + text if guard else text)[len(guard) :]
        except (RuntimeError, UnicodeEncodeError):
            raise UserError(f"{text[:60]!a}: is no valid text (half a surrogate pair)") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens and spare rows of a model give nothing, broken bytes give U+FFFD."""
        text = self.pieces.decode(self.guard + [i for i in ids if i < self.known])
        return text[1:] if self.guard else text

    def piece(self, i: int) -> str:
        """Token `i` as a log shows it, a special one by its name."""
        if i in self.names or isinstance(self.pieces, BytePairs):
            shown = self.names.get(i) or self.pieces.decode([i])
        else:
            shown = self.pieces.id_to_piece(i).replace("<0x0A>", "⏎")
        return "".join(c if c.isprintable() else "�" for c in shown.translate(SHOWN))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an HF folder: its tokenizer.model, or else its tokenizer.json; UserError if it has neither.
    Begin and end token are those that its tokenizer_config.json or special_tokens_map.json names, or else the
    model's, or those of config.json."""
    folder = Path(folder)
    file = next((folder / name for name in FILES[:2] if (folder / name).is_file()), None)
    if file is None:
        raise UserError(
            f"{folder}: has no {FILES[0]} (sentencepiece) and no {FILES[1]} (byte-level BPE)"
        )
    config, named, added, model = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in (*FILES[2:], "config.json")
    )
    try:
        added |= {
            token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()
        }
        ends = {key: (named | config).get(f"{key}_token") for key in ("bos", "eos")}
        ends = {key: end["content"] if isinstance(end, dict) else end for key, end in ends.items()}
        if file.suffix == ".json" and not ends["eos"]:
            ends = {key: model.get(f"{key}_token_id") for key in ends}
            ends = {key: end[0] if isinstance(end, list) else end for key, end in ends.items()}
        check_ids(added)
        if not all(end is None or type(end) in (str, int) for end in ends.values()):
            raise TypeError
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError):
        said = "tokens are text, and their ids whole numbers"
        raise UserError(
            f"{folder}: {', '.join(FILES[2:])} or an id in config.json is damaged; {said}"
        ) from None
    return Tokenizer(
        file.read_bytes(), str(file), added, {k: v for k, v in ends.items() if v is not None}
    )


def train_tokenizer(texts: Iterable[str], vocab: int) -> bytes:
    """A sentencepiece BPE model of at most `vocab` pieces, the same bytes for the same texts.
    Lossless; no text can make the turn marks (control pieces). UserError if the texts cannot fill `vocab`."""
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab,
            hard_vocab_limit=False,
            character_coverage=0.9995,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            control_symbols=[*TURN_MARKS.values()],
            max_sentence_length=1 << 24,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"model.vocab = {vocab}: the text yields no such tokenizer ({reason})"
        ) from None
    return out.getvalue()


def show_mask(tokenizer: Tokenizer, tokens: Tokens) -> str:
    """The text of `tokens` on one line, the trained part between ⟦ and ⟧, special pieces by name."""
    pieces = map(tokenizer.piece, tokens.ids)
    marked = [
        f"⟦{piece}⟧" if trained else piece
        for piece, trained in zip(pieces, tokens.mask, strict=True)
    ]
    return "".join(marked).replace("⟧⟦", "")
