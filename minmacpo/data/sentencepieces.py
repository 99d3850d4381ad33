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

SPACE = "▁"  # stands for a space in the names of pieces

# Numbers of fields in sentencepiece_model.proto
NORMALIZER_SPEC = 3  # of a model
ADD_DUMMY_PREFIX = 3  # of its normalizer_spec
REMOVE_EXTRA_WHITESPACES = 4

# Wire types, the lowest three bits of a field's key
VARINT = 0
BYTES = 2


class SentencePieces:
    """A sentencepiece model.

    Attributes:
        processor: writes the parts of a document, without a space before them.
        document_processor: writes the start of a document.
        adds_space: whether that one puts a space before a text.
        size: number of ids.
        control_ids: {name: id} of the pieces that no text becomes.
    """

    def __init__(self, content: bytes, where: str):
        """Load a model.

        Args:
            content: of its file.
            where: its path, for the error message.

        Raises:
            UserError: it is none.
        """
        try:
            self.load_variants(content)
        except (RuntimeError, UnicodeDecodeError, IndexError):
            raise UserError(f"{where}: is no sentencepiece model") from None

        self.size = len(self.processor)
        self.control_ids = {}
        for token_id in range(self.size):
            if self.processor.is_control(token_id):
                self.control_ids[self.processor.id_to_piece(token_id)] = token_id

    def load_variants(self, content: bytes) -> None:
        """Load the model as often as its settings differ for a document and for a part of one."""
        original = load(content)
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
        """The text of ids; control pieces give nothing, broken bytes give U+FFFD."""
        return self.exact_processor.decode(list(ids))

    def piece(self, token_id: int) -> str:
        """A piece by its name, where ▁ stands for a space."""
        return self.processor.id_to_piece(token_id).replace("<0x0A>", "\n")


def load(content: bytes) -> sentencepiece.SentencePieceProcessor:
    """The processor of a model; RuntimeError where it is none."""
    return sentencepiece.SentencePieceProcessor(model_proto=content)


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
