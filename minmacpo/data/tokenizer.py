"""Text to ids and back: the tokenizers of model folders, and those trained here.

Special tokens are never parsed from text, and each segment of a dialogue is tokenized by itself, so
that the border of prompt and answer never shifts. chat_template.py makes segments of dialogues.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minmacpo import UserError
from minmacpo.data.sentencepieces import SentencePieces, train_pieces
from minmacpo.data.tokenizer_files import FILES, NO_NOTES, TokenizerNotes, read_notes
from minmacpo.data.tokenizer_json import read_tokenizer_json

# Special tokens of the tokenizers trained here: each stands before a turn of that role.
TURN_MARKS = {"user": "<user>", "assistant": "<bot>"}

AS_SHOWN = str.maketrans({"▁": " ", "\n": "⏎", "\r": "⏎"})  # how a log shows pieces


@dataclass(slots=True)
class Tokens:
    """The ids of one text, and which of them are trained on or scored; both of T entries."""

    ids: list[int]
    mask: list[bool]


class Tokenizer:
    """A sentencepiece model, or what a tokenizer.json describes.

    Attributes:
        model: the content of the tokenizer.model or tokenizer.json.
        processor: what does the work: a SentencePieces, a BytePairs or a PackageTokenizer.
        where: the path of its file.
        special: {name: id} of all tokens that no text becomes.
        names: {id: name} of them.
        bos, eos: ids of begin and end; bos is -1 where there is none.
        size: number of ids.
        begin: id that stands before a text; -1 where none does, though there may be a `bos`.
        stop_ids: all ids that end an answer.
        adds_space: whether a text that begins a document gets a space before it.
        space_before: where a text gets it.
        stripping_ids: of the special tokens that take in the white space behind them.
        stripping_before_ids: of those that take in the white space before them.
        turn_marks: {role: id} of TURN_MARKS; empty unless the tokenizer has them.
    """

    def __init__(
        self,
        model: bytes,
        where: str = "tokenizer.model",
        notes: TokenizerNotes = NO_NOTES,
    ):
        """Read a tokenizer.

        Args:
            model: the content of its file.
            where: the path of its file; one that ends with .json is read as a tokenizer.json.
            notes: what the files beside it say.

        Raises:
            UserError: the file is damaged or not supported, or no end token is known.
        """
        self.model = model
        self.where = where
        self.bos = -1
        self.eos = -1
        if where.endswith(".json"):
            self.read_json(notes)
        else:
            self.read_sentencepiece(notes)
        self.names = {token_id: name for name, token_id in self.special.items()}
        self.size = max(
            [
                self.num_pieces,
                *(token_id + 1 for token_id in self.names),
                *(token_id + 1 for token_id in self.processor.text_tokens.names),
            ]
        )

        if "bos" in notes.ends:
            self.bos = self.end_id("bos", notes.ends["bos"], where)
        if "eos" in notes.ends:
            self.eos = self.end_id("eos", notes.ends["eos"], where)
        if self.eos < 0:
            raise UserError(
                f"{where}: has no end token; tokenizer_config.json beside it should name an "
                "eos_token"
            )
        self.begin = self.bos if self.adds_begin else -1
        self.stop_ids = notes.stop_ids | {self.eos}

        stripping_ids = set(self.processor.stripping_ids)
        stripping_before_ids = set(self.processor.stripping_before_ids)
        for token_id, token in notes.added_tokens.items():
            if token.rstrip:
                stripping_ids.add(token_id)
            if token.lstrip:
                stripping_before_ids.add(token_id)
        self.stripping_ids = stripping_ids & self.names.keys()
        self.stripping_before_ids = stripping_before_ids & self.names.keys()

        self.turn_marks = {}
        if all(mark in self.special for mark in TURN_MARKS.values()):
            self.turn_marks = {role: self.special[mark] for role, mark in TURN_MARKS.items()}

    def forget_special_from(self, rows: int) -> None:
        """Forget the special tokens with ids from `rows` on, for which a model has no row.

        Begin and end token stay, and so does all that a text can become.
        """
        forgotten = {token_id for token_id in self.names if token_id >= rows}
        forgotten -= {self.bos, self.eos}
        for token_id in forgotten:
            del self.names[token_id]
        self.special = {
            name: token_id for name, token_id in self.special.items() if token_id in self.names
        }
        # an id without a piece, between others, is nothing either
        used = set(range(min(rows, self.num_pieces))) | self.names.keys()
        for token_id in range(rows, self.num_pieces):
            if token_id not in forgotten and self.piece(token_id):
                used.add(token_id)
        self.size = 1 + max(used)

    def end_id(self, end: str, token: str | int, where: str) -> int:
        """The id of a begin or end token that is given by name or id."""
        token_id = self.special.get(token, token)
        if type(token_id) is not int or not 0 <= token_id < self.size:
            raise UserError(
                f"{where}: the {end} token is {token!r}, which is no special token of it"
            )
        return token_id

    def read_json(self, notes: TokenizerNotes) -> None:
        """Take over a tokenizer.json; begin and end are in no field of it."""
        self.processor = read_tokenizer_json(self.model, self.where, notes)
        self.num_pieces = self.processor.size
        self.special = dict(self.processor.special_tokens)
        for token_id, token in notes.added_tokens.items():
            if token_id not in self.processor.text_tokens.names and len(token.name) > 1:
                self.special[token.name] = token_id
        self.space_before = self.processor.space_before
        self.adds_space = self.space_before in ("first", "always")
        self.adds_begin = self.processor.adds_begin
        if notes.adds_begin is not None:
            self.adds_begin = notes.adds_begin

    def read_sentencepiece(self, notes: TokenizerNotes) -> None:
        """Take over a tokenizer.model; its control pieces are special."""
        self.processor = SentencePieces(self.model, self.where, notes)
        self.num_pieces = self.processor.size
        self.special = dict(self.processor.special_tokens)
        self.adds_space = self.processor.adds_space
        self.space_before = notes.space_before if self.adds_space else "never"
        self.adds_begin = notes.adds_begin is not False
        self.bos = self.processor.processor.bos_id()
        self.eos = self.processor.processor.eos_id()

    def encode(self, text: str, start: bool = False) -> list[int]:
        """The ids of a text, without special tokens; UserError for broken text.

        Args:
            start: whether the text begins a document.
        """
        try:
            return self.processor.encode(text, start)
        except (RuntimeError, UnicodeEncodeError):
            raise UserError(f"{text[:60]!a}: is no valid text (half a surrogate pair)") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens and a model's spare rows give nothing.

        Broken bytes give U+FFFD.
        """
        return self.processor.decode([token_id for token_id in ids if token_id < self.size])

    def find_token(self, name: str) -> int | None:
        """The id of a token that stands beside the vocabulary, a mark or a text; None without."""
        if name in self.special:
            return self.special[name]
        for token_id, other in self.processor.text_tokens.names.items():
            if other == name:
                return token_id
        return None

    def count_left_out(self, texts: Iterable[str]) -> int:
        """How many characters of the texts have no token and leave no trace in the ids."""
        return sum(map(self.processor.count_left_out, texts))

    def piece(self, token_id: int) -> str:
        """A token as a log shows it, a special one by its name."""
        if token_id in self.names:
            text = self.names[token_id]
        else:
            text = self.processor.piece(token_id)
        shown = text.translate(AS_SHOWN)
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


# ---- model folders --------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Begin and end token are those that tokenizer_config.json or special_tokens_map.json names, or
    else those of the tokenizer's own file, or of config.json.

    Raises:
        UserError: the folder has no tokenizer, or one of its files is damaged.
    """
    folder = Path(folder)
    model_file = find_tokenizer_file(folder)
    return Tokenizer(model_file.read_bytes(), str(model_file), read_notes(folder))


def find_tokenizer_file(folder: Path) -> Path:
    """The folder's tokenizer.model, or else its tokenizer.json; UserError if it has neither."""
    for name in FILES[:2]:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder}: has no {FILES[0]} (sentencepiece) and no {FILES[1]} (byte-level BPE)"
    )


# ---- training -------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab: int) -> bytes:
    """A sentencepiece BPE model of at most `vocab` pieces, the same bytes for the same texts.

    It loses nothing of a text, and no text can make the turn marks, which are control pieces.

    Raises:
        UserError: the texts are too few for so many pieces, or the pieces too few for them.
    """
    try:
        return train_pieces(texts, vocab, control_pieces=list(TURN_MARKS.values()))
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"model.vocab = {vocab}: the text yields no such tokenizer ({reason})"
        ) from None


def show_mask(tokenizer: Tokenizer, tokens: Tokens) -> str:
    """The text of tokens on one line, what is trained on between ⟦ and ⟧, special tokens by name.

    "<user>where does kadol live ?<bot>⟦of course !</s>⟧"
    """
    parts = []
    for token_id, is_trained in zip(tokens.ids, tokens.mask, strict=True):
        piece = tokenizer.piece(token_id)
        parts.append(f"⟦{piece}⟧" if is_trained else piece)
    return "".join(parts).replace("⟧⟦", "")
