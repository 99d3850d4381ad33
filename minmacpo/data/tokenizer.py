"""Text to ids and back: the tokenizers of model folders, and those trained here.

Special tokens are never parsed from text, and each segment of a dialogue is tokenized by itself, so
that the border of prompt and answer never shifts. chat_template.py makes segments of dialogues.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minmacpo import UserError
from minmacpo.data.bpe import MALFORMED, check_ids
from minmacpo.data.sentencepieces import SentencePieces, train_pieces
from minmacpo.data.tokenizer_json import read_tokenizer_json
from minmacpo.runtime.files import read_json

# Special tokens of the tokenizers trained here: each stands before a turn of that role.
TURN_MARKS = {"user": "<user>", "assistant": "<bot>"}

# All that a model folder may say of its tokenizer. The first two hold one; where both are there,
# the first is used.
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

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
        adds_space: whether a text that begins a document gets a space before it.
        turn_marks: {role: id} of TURN_MARKS; empty unless the tokenizer has them.
    """

    def __init__(
        self,
        model: bytes,
        where: str = "tokenizer.model",
        added_tokens: Mapping[str, int] | None = None,
        ends: Mapping[str, str | int] | None = None,
    ):
        """Read a tokenizer.

        Args:
            model: the content of its file.
            where: the path of its file; one that ends with .json is read as a tokenizer.json.
            added_tokens: {name: id} of tokens that the file does not have.
            ends: name or id of "bos" and "eos", where they are not those of the file.

        Raises:
            UserError: the file is damaged or not supported, or no end token is known.
        """
        self.model = model
        self.where = where
        self.bos = -1
        self.eos = -1
        if where.endswith(".json"):
            self.read_json(where)
        else:
            self.read_sentencepiece(where)

        self.special |= added_tokens or {}
        self.names = {token_id: name for name, token_id in self.special.items()}
        self.size = max([self.num_pieces, *(token_id + 1 for token_id in self.names)])

        ends = ends or {}
        if "bos" in ends:
            self.bos = self.end_id("bos", ends["bos"], where)
        if "eos" in ends:
            self.eos = self.end_id("eos", ends["eos"], where)
        if self.eos < 0:
            raise UserError(
                f"{where}: has no end token; tokenizer_config.json beside it should name an "
                "eos_token"
            )

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
        pieces = set(range(self.num_pieces)) - forgotten
        self.size = 1 + max(pieces | self.names.keys())

    def end_id(self, end: str, token: str | int, where: str) -> int:
        """The id of a begin or end token that is given by name or id."""
        token_id = self.special.get(token, token)
        if type(token_id) is not int or not 0 <= token_id < self.size:
            raise UserError(
                f"{where}: the {end} token is {token!r}, which is no special token of it"
            )
        return token_id

    def read_json(self, where: str) -> None:
        """Take over a tokenizer.json; begin and end are in no field of it."""
        self.processor = read_tokenizer_json(self.model, where)
        self.num_pieces = self.processor.size
        self.special = dict(self.processor.added_tokens)
        self.adds_space = False

    def read_sentencepiece(self, where: str) -> None:
        """Take over a tokenizer.model; its control pieces are special."""
        self.processor = SentencePieces(self.model, where)
        self.num_pieces = self.processor.size
        self.special = dict(self.processor.control_ids)
        self.adds_space = self.processor.adds_space
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
        return self.processor.decode([token_id for token_id in ids if token_id < self.num_pieces])

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
    config, special_map, added_tokens = (read_optional(folder / name) for name in FILES[2:])
    try:
        for token_id, token in config.get("added_tokens_decoder", {}).items():
            added_tokens[token["content"]] = int(token_id)
        check_ids(added_tokens)
        ends = named_ends(special_map | config)
        if model_file.suffix == ".json" and not ends.get("eos"):
            ends = numbered_ends(read_optional(folder / "config.json"))
    except MALFORMED:
        names = ", ".join(FILES[2:])
        raise UserError(
            f"{folder}: {names} or an id in config.json is damaged; tokens are text, and their "
            "ids whole numbers"
        ) from None
    return Tokenizer(model_file.read_bytes(), str(model_file), added_tokens, ends)


def find_tokenizer_file(folder: Path) -> Path:
    """The folder's tokenizer.model, or else its tokenizer.json; UserError if it has neither."""
    for name in FILES[:2]:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder}: has no {FILES[0]} (sentencepiece) and no {FILES[1]} (byte-level BPE)"
    )


def read_optional(file: Path) -> dict:
    """The object in a JSON file; an empty one where there is no file."""
    return read_json(file) if file.is_file() else {}


def named_ends(config: dict) -> dict[str, str | int]:
    """{"bos", "eos"} of a tokenizer_config.json, as far as it names them.

    {"eos_token": "</s>"} or {"eos_token": {"content": "</s>", "special": true}}
    """
    ends = {}
    for end in ("bos", "eos"):
        token = config.get(f"{end}_token")
        if isinstance(token, dict):
            token = token["content"]
        if token is not None:
            ends[end] = check_end(token)
    return ends


def numbered_ends(config: dict) -> dict[str, str | int]:
    """{"bos", "eos"} of a model's config.json; of several ids the first."""
    ends = {}
    for end in ("bos", "eos"):
        token_id = config.get(f"{end}_token_id")
        if isinstance(token_id, list):
            token_id = token_id[0]
        if token_id is not None:
            ends[end] = check_end(token_id)
    return ends


def check_end(token: object) -> str | int:
    """The name or id of a token; TypeError for something else."""
    if type(token) not in (str, int):
        raise TypeError(f"token {token!r:.60}")
    return token


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
