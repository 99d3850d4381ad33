"""Reads a tokenizer.json: a known byte-level BPE by own means, others with `tokenizers`.

The package is optional. It is imported where a file needs it, and does all of that file's work, so
that ids are what it makes of the file.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from minmacpo import UserError
from minmacpo.data.bpe import MALFORMED, BytePairs, check_ids, find_unknown
from minmacpo.data.text_tokens import (
    TextTokens,
    parse_added_token,
    stripping_before_ids,
    stripping_ids,
)
from minmacpo.data.tokenizer_files import (
    NO_NOTES,
    TokenizerNotes,
    post_processor_begins,
    steps_of,
    where_space,
)

# Stands before a text that begins no document. Four characters that Unicode will never give out.
MARK = "\uffff\ufffe\uffff\ufffe"

# What a file may leave out without meaning anything else by it
OPTIONAL_PARTS = {"normalizer": None, "pre_tokenizer": None, "decoder": None, "added_tokens": []}


def read_tokenizer_json(
    content: bytes, where: str, notes: TokenizerNotes = NO_NOTES
) -> "BytePairs | PackageTokenizer":
    """The tokenizer in a tokenizer.json.

    Args:
        content: of the file.
        where: its path, for error messages.
        notes: what the files beside it say.

    Raises:
        UserError: it is none, or the package that it needs is not installed or cannot read it.
    """
    try:
        file = OPTIONAL_PARTS | json.loads(content)
        if file["model"].get("dropout"):
            raise ValueError(f"dropout {file['model']['dropout']}: ids would be random")
        file["added_tokens"] = tell_marks(file, notes)
        unknown = find_unknown(file)
        if unknown is None:
            tokenizer = BytePairs(file)
        else:
            check_continued_pieces(file["model"])
            check_ids({token["content"]: token["id"] for token in file["added_tokens"]})
            tokenizer = PackageTokenizer(file, where, unknown)
        tokenizer.adds_begin = bool(post_processor_begins(file))
        tokenizer.space_before = where_space({}, file)
        return tokenizer
    except MALFORMED as error:
        raise UserError(
            f"{where}: is no tokenizer that is understood here ({error!r:.200}); "
            "if the model has a tokenizer.model too, put that beside it"
        ) from None


def tell_marks(file: dict, notes: TokenizerNotes) -> list[dict]:
    """The added tokens of a tokenizer.json, "special" where no text is to become them.

    Those that are text by the files beside it are added to them.
    """
    raw_tokens = {raw["id"]: raw for raw in file["added_tokens"]}
    tokens = {number: parse_added_token(raw, number) for number, raw in raw_tokens.items()}
    tokens |= notes.added_tokens
    names = {token.name for token in tokens.values()}

    told = []
    for number, token in sorted(tokens.items()):
        is_mark = notes.is_mark(token, names)
        is_character = len(token.name) == 1 and token.name in file["model"]["vocab"]
        if is_character or (is_mark and number not in raw_tokens):
            continue
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word")}
        raw = {"normalized": False} | raw_tokens.get(number, {})
        told.append(raw | flags | {"id": number, "content": token.name, "special": is_mark})
    return told


def without_space_before(file: dict) -> dict:
    """A tokenizer.json that puts no space before a text, as is right within a document."""
    normalizers = [step for step in steps_of(file, "normalizer") if step["type"] != "Prepend"]
    splitters = []
    for step in steps_of(file, "pre_tokenizer"):
        if step["type"] == "ByteLevel":
            step = step | {"add_prefix_space": False}
        if step["type"] == "Metaspace":
            others = {key: value for key, value in step.items() if key != "add_prefix_space"}
            step = others | {"prepend_scheme": "never"}
        splitters.append(step)
    return file | {
        "normalizer": in_sequence(normalizers, "normalizers"),
        "pre_tokenizer": in_sequence(splitters, "pretokenizers"),
    }


def in_sequence(steps: list[dict], key: str) -> dict | None:
    """Steps of a tokenizer.json as one of its parts."""
    if len(steps) > 1:
        return {"type": "Sequence", key: steps}
    return steps[0] if steps else None


def check_continued_pieces(model: dict) -> None:
    """ValueError where a merge lacks its continuing_subword_prefix, at which the package aborts."""
    prefix = model.get("continuing_subword_prefix") or ""
    for pair in model.get("merges", []) if prefix else []:
        _, right = pair.split(" ") if isinstance(pair, str) else pair
        if not right.startswith(prefix):
            raise ValueError(f"merge {pair!r:.60} without the prefix {prefix!r:.60}")


def leaves_out_unknown(model: dict) -> bool:
    """Whether a tokenizer.json's model makes nothing of a character that has no token."""
    if model.get("type", "BPE") != "BPE" or model.get("unk_token") is not None:
        return False
    return not model.get("byte_fallback") and not model.get("continuing_subword_prefix")


class PackageTokenizer:
    """A tokenizer that the package `tokenizers` runs.

    Attributes:
        special_tokens: {name: id} of the tokens that no text becomes.
        stripping_ids: of the added tokens that take in the white space behind them.
        stripping_before_ids: of those that take in the white space before them.
        text_tokens: the other added tokens.
        size: number of ids.
        adds_begin: whether its file puts a begin token before a text.
        space_before: where its file puts a space before a text.
        part_package: the same without that space.
    """

    def __init__(self, file: dict, where: str, unknown: str):
        """Give a file to the package.

        Args:
            file: content of a tokenizer.json.
            where: its path, for error messages.
            unknown: what it asks for and is not done without the package.

        Raises:
            UserError: the package is not installed, or does not read the file.
        """
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"{where}: its {unknown} is not known here, but the package tokenizers reads it: "
                "pip install tokenizers"
            ) from None
        self.where = where
        with self.failures_as_sentences():
            self.package = tokenizers.Tokenizer.from_str(json.dumps(file))
            self.part_package = tokenizers.Tokenizer.from_str(
                json.dumps(without_space_before(file))
            )
        mark = tokenizers.AddedToken(MARK, normalized=False)
        for package in (self.package, self.part_package):
            package.no_truncation()
            package.no_padding()
            package.encode_special_tokens = True  # no text becomes one

        # the package itself finds those that are text
        self.special_tokens = {}
        self.stripping_ids = stripping_ids(file["added_tokens"])
        self.stripping_before_ids = stripping_before_ids(file["added_tokens"])
        text_tokens = [token for token in file["added_tokens"] if not token["special"]]
        self.text_tokens = TextTokens(
            parse_added_token(token, token["id"]) for token in text_tokens
        )
        for token in file["added_tokens"]:
            name = token["content"]
            if self.package.token_to_id(name) != token["id"]:
                raise ValueError(f"added token {name!r:.60} with id {token['id']}")
            if token["special"]:
                self.special_tokens[name] = token["id"]
        self.special_ids = {token["id"] for token in file["added_tokens"] if token["special"]}
        self.special_ids.discard(self.unknown_id(file["model"]))
        vocab = self.package.get_vocab()
        self.size = 1 + max(vocab.values())

        # Characters with a token, where others would be left out
        self.letters = set()
        if leaves_out_unknown(file["model"]):
            self.letters = {piece for piece in vocab if len(piece) == 1}

        self.shows_bytes = (file["decoder"] or {}).get("type") == "ByteLevel"
        self.part_package.add_tokens([mark])

    @contextmanager
    def failures_as_sentences(self) -> Iterator[None]:
        """Raise UserError for whatever the package raises.

        It has no narrower class than Exception, and its panics are not even that.
        """
        try:
            yield
        except BaseException as error:
            is_panic = type(error).__name__ == "PanicException"
            if not is_panic and not isinstance(error, Exception):
                raise
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.where}: the package tokenizers cannot work with it ({reason:.200}); "
                "if the model has a tokenizer.model too, put that beside it"
            ) from None

    def unknown_id(self, model: dict) -> int | None:
        """The id of the token for what has none in the vocabulary; None if there is none."""
        if model.get("unk_token") is not None:
            return self.package.token_to_id(model["unk_token"])
        return model.get("unk_id")

    def encode(self, text: str, start: bool = False) -> list[int]:
        """The ids of a text; UnicodeEncodeError where it is no valid text.

        Args:
            start: whether it begins a document, before which some put a space.
        """
        text.encode()
        if MARK in text:
            raise UserError(f"{text[:60]!a}: holds U+FFFF and U+FFFE, which are no characters")
        with self.failures_as_sentences():
            if start:
                ids = self.package.encode(text, add_special_tokens=False).ids
            else:
                ids = self.part_package.encode(MARK + text, add_special_tokens=False).ids[1:]
        if self.special_ids.isdisjoint(ids):
            return ids
        return self.encode_names(text, start)

    def encode_names(self, text: str, start: bool) -> list[int]:
        """The ids of a text that holds the name of a special token, which is cut in two."""
        for token_id in self.special_ids:
            name = self.package.id_to_token(token_id)
            cut = text.find(name) + 1
            if cut > 0 and len(name) > 1:
                return self.encode(text[:cut], start) + self.encode(text[cut:])
        raise UserError(f"{text[:60]!a}: cannot be written without a special token")

    def count_left_out(self, text: str) -> int:
        """How many characters of a text have no token and leave no trace."""
        if not self.letters:
            return 0
        if self.package.normalizer is not None:
            text = self.package.normalizer.normalize_str(text)
        words = [text]
        if self.package.pre_tokenizer is not None:
            words = [word for word, _ in self.package.pre_tokenizer.pre_tokenize_str(text)]
        return sum(letter not in self.letters for word in words for letter in word)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens give nothing, broken bytes give U+FFFD."""
        known_ids = [token_id for token_id in ids if token_id < self.size]
        with self.failures_as_sentences():
            return self.package.decode(known_ids, skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """One token as text, or as the vocabulary has it where words begin with a mark."""
        if self.shows_bytes:
            return self.decode([token_id])
        return self.package.id_to_token(token_id) or ""
