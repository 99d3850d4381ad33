"""sentencepiece models: the tokenizers of Llama 2, Mistral, Yi and Gemma.

A model may put a space before each text, its dummy prefix, and drop spaces around it and between
words. That is meant for whole documents. A dialogue is tokenized part by part, so a model is loaded
in variants: the settings that a file ends with override those before, which is how protocol buffers
are merged.
"""

import io
from collections.abc import Iterable, Sequence

import sentencepiece

from minmacpo import UserError
from minmacpo.data.text_tokens import AddedToken, TextTokens
from minmacpo.data.tokenizer_files import TokenizerNotes

SPACE = "▁"  # stands for a space in the names of pieces

# Numbers of fields in sentencepiece_model.proto
PIECES = 1  # of a model
NORMALIZER_SPEC = 3  # of a model
ADD_DUMMY_PREFIX = 3  # of its normalizer_spec
REMOVE_EXTRA_WHITESPACES = 4

# Wire types, the lowest three bits of a field's key
VARINT = 0
BYTES = 2

CONTROL_TYPE = bytes([3 << 3 | VARINT, 3])  # the end of a piece that makes it a control piece


class SentencePieces:
    """A sentencepiece model.

    Attributes:
        processor: writes the parts of a document, without a space before them.
        document_processor: writes the start of a document.
        adds_space: whether that one puts a space before a text.
        size: number of ids.
        special_tokens: {name: id} of the tokens that no text becomes.
        stripping_ids, stripping_before_ids: none here; the files beside the model may name some.
        text_tokens: added tokens that are text.
    """

    def __init__(self, content: bytes, where: str, notes: TokenizerNotes):
        """Load a model.

        Args:
            content: of its file.
            where: its path, for the error message.
            notes: what the files beside it say.

        Raises:
            UserError: it is none.
        """
        if notes.adds_space is not None:
            content += overriding({ADD_DUMMY_PREFIX: notes.adds_space})
        try:
            original = load(content)
            marks = self.sort_tokens(original, notes)
            if marks:
                content = with_control_pieces(content, marks)
                original = load(content)
            self.load_variants(original, content)
        except (RuntimeError, UnicodeDecodeError, IndexError):
            raise UserError(f"{where}: is no sentencepiece model") from None
        self.size = len(self.processor)
        self.is_always_spaced = notes.space_before == "always"

    def sort_tokens(
        self, original: sentencepiece.SentencePieceProcessor, notes: TokenizerNotes
    ) -> set[int]:
        """Part the tokens into special ones and text; returns pieces that are not yet special."""
        pieces = [original.id_to_piece(number) for number in range(len(original))]
        names = {token.name for token in notes.added_tokens.values()}.union(pieces)
        self.special_tokens = {}
        self.stripping_ids = set()
        self.stripping_before_ids = set()
        marks = set()
        for number, piece in enumerate(pieces):
            token = notes.added_tokens.get(number) or AddedToken(piece, number)
            if original.is_control(number):
                self.special_tokens[piece] = number
            elif original.is_unknown(number) or original.is_byte(number):
                continue
            elif notes.is_mark(token, names, is_piece=True):
                self.special_tokens[token.name] = number
                marks.add(number)

        text_tokens = []
        for number, token in notes.added_tokens.items():
            if number < len(original):
                if token.special is not False or number in marks:
                    continue
                text_tokens.append(token)
            elif notes.is_mark(token, names):
                self.special_tokens[token.name] = number
            else:
                text_tokens.append(token)
        self.text_tokens = TextTokens(text_tokens)
        return marks

    def load_variants(self, original: sentencepiece.SentencePieceProcessor, content: bytes) -> None:
        """Load the model as often as its settings differ for a document and for a part of one."""
        if not original.encode("a"):
            raise RuntimeError("knows no letter")  # a damaged model may load
        letter = original.normalize("a")
        spaced_letter = original.normalize(" a")
        self.adds_space = letter.startswith(SPACE)
        expected_spaces = 2 if self.adds_space else 1
        self.drops_spaces = not spaced_letter.startswith(SPACE * expected_spaces)

        self.document_processor = self.processor = self.exact_processor = original
        if SPACE in letter:
            self.processor = load(content + overriding({ADD_DUMMY_PREFIX: False}))
            self.exact_processor = self.processor
        if not self.adds_space:
            # some put their space behind a text, which no part of a document is to have
            self.document_processor = self.processor
        if self.drops_spaces:
            self.spaced_processor = load(content + overriding({ADD_DUMMY_PREFIX: True}))
            as_it_is = {ADD_DUMMY_PREFIX: False, REMOVE_EXTRA_WHITESPACES: False}
            self.exact_processor = load(content + overriding(as_it_is))

    def encode(self, text: str, start: bool = False) -> list[int]:
        """The ids of a text.

        A model that drops spaces drops those around a document. Of the spaces before a part of one
        it keeps one, as of any spaces between words.

        Args:
            start: whether it begins a document.
        """
        ids = []
        for part in self.text_tokens.split(text):
            if isinstance(part, AddedToken):
                ids.append(part.token_id)
                start = self.is_always_spaced
            else:
                ids.extend(self.encode_part(part, start))
                start = False
        return ids

    def encode_part(self, text: str, start: bool) -> list[int]:
        """The ids of a text in which no added token is looked for."""
        if start:
            return self.document_processor.encode(text)
        if self.drops_spaces and self.would_drop_first_space(text):
            return self.spaced_processor.encode(text)
        return self.processor.encode(text)

    def would_drop_first_space(self, text: str) -> bool:
        """Whether a text begins with a space that the model drops as one around a document."""
        begins_with_space = self.exact_processor.normalize(text).startswith(SPACE)
        return begins_with_space and not self.processor.normalize(text).startswith(SPACE)

    def count_left_out(self, text: str) -> int:
        """How many characters of a text leave no trace: none, since unknown ones have a token."""
        return 0

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens give nothing, broken bytes give U+FFFD."""
        parts = []
        for group in self.text_tokens.group(ids):
            if isinstance(group, list):
                pieces = [token_id for token_id in group if token_id < self.size]
                parts.append(self.exact_processor.decode(pieces))
            else:
                parts.append(self.text_tokens.names[group])
        return "".join(parts)

    def piece(self, token_id: int) -> str:
        """A token by its name, where ▁ stands for a space."""
        if token_id in self.text_tokens.names:
            return self.text_tokens.names[token_id]
        return self.processor.id_to_piece(token_id).replace("<0x0A>", "\n")


def load(content: bytes) -> sentencepiece.SentencePieceProcessor:
    """The processor of a model; RuntimeError where it is none."""
    return sentencepiece.SentencePieceProcessor(model_proto=content)


def with_control_pieces(content: bytes, ids: set[int]) -> bytes:
    """A model in which the pieces with these ids are control pieces, which no text becomes."""
    parts = []
    number = 0
    position = 0
    while position < len(content):
        start = position
        key, position = read_varint(content, position)
        length, position = read_varint(content, position)
        if key & 7 == BYTES:
            position += length
        if key == PIECES << 3 | BYTES:
            if number in ids:
                piece = content[position - length : position] + CONTROL_TYPE
                parts.append(bytes([key]) + varint(len(piece)) + piece)
                start = position
            number += 1
        parts.append(content[start:position])
    return b"".join(parts)


def read_varint(content: bytes, position: int) -> tuple[int, int]:
    """A number at a position of a protocol buffer, and the position behind it."""
    number = 0
    shift = 0
    while True:
        byte = content[position]
        number |= (byte & 0x7F) << shift
        shift += 7
        position += 1
        if byte < 0x80:
            return number, position


def varint(number: int) -> bytes:
    """A number as a protocol buffer has it: seven bits a byte, the lowest first."""
    encoded = []
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def overriding(settings: dict[int, bool]) -> bytes:
    """The end of a model that overrides settings of its normalizer.

    Args:
        settings: {number of a field of normalizer_spec: its value}
    """
    spec = b""
    for number, value in settings.items():
        spec += bytes([number << 3 | VARINT, value])
    return bytes([NORMALIZER_SPEC << 3 | BYTES, len(spec)]) + spec


def train_pieces(texts: Iterable[str], vocab: int, control_pieces: list[str]) -> bytes:
    """A BPE model that loses nothing of a text, the same bytes for the same texts.

    RuntimeError or OSError where the texts are too few for `vocab` pieces, or the pieces for them.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab,
        hard_vocab_limit=False,
        character_coverage=0.9995,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        control_symbols=control_pieces,
        max_sentence_length=1 << 24,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
