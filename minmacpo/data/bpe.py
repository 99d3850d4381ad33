r"""Byte-level BPE as a tokenizer.json describes it: the kind of GPT-2, SmolLM2, Llama 3 and Qwen.

The file's patterns split a text into words: "it's 12" into "it", "'s", " 12". The bytes of each
word are then merged pair by pair, the pair that was learned first before all others. What a file
asks for and is not done here is refused, since ids would be silently wrong.

How patterns are matched: Python's `re` knows no \p{L} (all letters), and its \s differs from theirs
in four control characters. So a pattern is matched on a copy of the text in which every character
from FIRST_REPLACED on is replaced by a stand-in for its Unicode category, one character of private
use. \p{L} becomes a list of characters: the letters below FIRST_REPLACED, and the stand-ins of the
categories of letters.
"""

import heapq
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from minmacpo import UserError

# The pattern of GPT-2, which a pre-tokenizer of the type ByteLevel means.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Characters below stand for themselves, since patterns name some of them. The last one is "ſ",
# which (?i:'s) takes for an "s".
FIRST_REPLACED = 0x180
FIRST_STAND_IN = 0xE000
CATEGORIES = (
    "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Cs Co Cn"
).split()

SPACES_BY_CODE = "\t-\r\x85"  # what \s matches beside the category Z, as it stands in brackets

# A pattern's parts: brackets, a category, an escape. Everything else stays as it is.
PATTERN_PART = re.compile(r"\[\^?\]?(?:\\.|[^]\\])*\]|\\p\{\w+\}|\\.", re.DOTALL)
ESCAPE_IN_BRACKETS = re.compile(r"\\p\{\w+\}|\\[^S]")
# Not done here, or something else in Python
UNKNOWN_SYNTAX = re.compile(r"\\[dDwWbBhHXRP]|&&|\[\[")

MAX_TOKEN_ID = (1 << 31) - 1

# What comes up where JSON has another shape than expected, or none.
MALFORMED = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
)


# ---- patterns -------------------------------------------------------------------------------


class StandIns(dict):
    """{code point: code point that stands for it}, for str.translate; filled when it is used."""

    def __missing__(self, code: int) -> int:
        stand_in = code
        if code >= FIRST_REPLACED:
            category = unicodedata.category(chr(code))
            stand_in = FIRST_STAND_IN + CATEGORIES.index(category)
        self[code] = stand_in
        return stand_in


def characters_of(category: str) -> str:
    """All characters and stand-ins of a Unicode category such as "L" or "Lu", to stand in brackets.

    ValueError if there is no such category.
    """
    characters = []
    for code in range(FIRST_REPLACED):
        if unicodedata.category(chr(code)).startswith(category):
            characters.append(chr(code))
    for number, name in enumerate(CATEGORIES):
        if name.startswith(category):
            characters.append(chr(FIRST_STAND_IN + number))
    if not characters:
        raise ValueError(f"no category {category}")
    return "".join(re.escape(character) for character in characters)


def translate_escape(escape: str) -> str:
    r"""The characters of \s or \p{...}, to stand in brackets; another escape stays as it is."""
    if escape == r"\s":
        return characters_of("Z") + SPACES_BY_CODE
    if escape.startswith(r"\p"):
        category = escape.removeprefix(r"\p{").removesuffix("}")
        return characters_of(category)
    return escape


def translate_part(part: str) -> str:
    """One of a pattern's parts, in Python's syntax and for texts in stand-ins."""
    if part.startswith("["):
        return ESCAPE_IN_BRACKETS.sub(lambda match: translate_escape(match[0]), part)
    if part == r"\S":
        spaces = translate_escape(r"\s")
        return f"[^{spaces}]"
    return f"[{translate_escape(part)}]"


def compile_pattern(pattern: str) -> re.Pattern:
    """A pattern of a tokenizer.json, for texts in stand-ins; ValueError if it is not understood.

    It has one group, the whole of it, so that its `split` gives what is matched and what is not.
    """
    translated = PATTERN_PART.sub(lambda match: translate_part(match[0]), pattern)
    if UNKNOWN_SYNTAX.search(pattern) or r"\S" in translated:  # \S is left within brackets only
        raise ValueError(f"pattern {pattern}")
    try:
        compiled = re.compile(f"({translated})")
    except re.error as error:
        raise ValueError(f"pattern {pattern} ({error})") from None
    if compiled.groups > 1:
        raise ValueError(f"pattern {pattern}")
    return compiled


def read_patterns(pre_tokenizer: dict) -> list[re.Pattern]:
    """The patterns of a pre-tokenizer, to be used one after the other.

    {"type": "Split", "pattern": {"Regex": "..."}, "behavior": "Isolated", "invert": false} has one.
    ValueError if it is not understood.
    """
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": inner}:
            patterns = []
            for part in inner:
                patterns.extend(read_patterns(part))
            return patterns
        case {"type": "ByteLevel", "add_prefix_space": False}:
            uses_pattern = pre_tokenizer.get("use_regex", True)
            return [compile_pattern(GPT2_PATTERN)] if uses_pattern else []
        case {"type": "Digits", "individual_digits": bool(one_by_one)}:
            return [compile_pattern(r"\p{N}" if one_by_one else r"\p{N}+")]
        case {
            "type": "Split",
            "behavior": "Isolated",
            "invert": False,
            "pattern": {"Regex": pattern},
        }:
            return [compile_pattern(pattern)]
    raise ValueError(f"pre_tokenizer {pre_tokenizer}")


# ---- merging --------------------------------------------------------------------------------


@dataclass(slots=True)
class Merges:
    """The learned merges, numbered in the order in which they were learned.

    Attributes:
        ranks: {(left id, right id): number of the merge}.
        merged_ids: the id that each merge makes.
    """

    ranks: dict[tuple[int, int], int]
    merged_ids: list[int]

    def apply(self, ids: list[int]) -> list[int]:
        """The ids of a word after all merges: the lowest rank first, the leftmost of equals."""
        # The tokens as a linked list, so that a merge takes no time that grows with the word. A
        # token that was merged into its left neighbour is None; so is the one behind the end, and
        # before the start: None is in no pair of `ranks`.
        end = len(ids)
        tokens: list[int | None] = [*ids, None]
        left_of = [end, *range(end)]
        right_of = [*range(1, end + 1), end]

        # (rank, position of the left token) of all pairs that can be merged
        candidates = []
        for position, pair in enumerate(pairwise(ids)):
            if pair in self.ranks:
                candidates.append((self.ranks[pair], position))
        heapq.heapify(candidates)

        while candidates:
            rank, left = heapq.heappop(candidates)
            right = right_of[left]
            if self.ranks.get((tokens[left], tokens[right])) != rank:
                continue  # one of the two has been merged with its other neighbour

            tokens[left] = self.merged_ids[rank]
            tokens[right] = None
            after = right_of[right]
            right_of[left] = after
            left_of[after] = left

            # the merged token makes new pairs with its neighbours
            for position in (left_of[left], left):
                new_pair = (tokens[position], tokens[right_of[position]])
                if new_pair in self.ranks:
                    heapq.heappush(candidates, (self.ranks[new_pair], position))
        return [token for token in tokens if token is not None]


def read_merges(model: dict) -> Merges:
    """The merges of a tokenizer.json, which has them as ["a b", ...] or as [["a", "b"], ...]."""
    vocab = model["vocab"]
    merges = Merges({}, [])
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        merges.ranks[vocab[left], vocab[right]] = rank
        merges.merged_ids.append(vocab[left + right])
    return merges


# ---- the tokenizer --------------------------------------------------------------------------


def byte_letters() -> str:
    """The character that stands for each of the 256 bytes in a vocabulary, as GPT-2 chose them.

    A byte that is a printable character of Latin-1 stands for itself; the others are numbered from
    code point 256 on, so that a space is "Ġ".
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters = []
    next_code = 256
    for byte in range(256):
        if byte in printable:
            letters.append(chr(byte))
        else:
            letters.append(chr(next_code))
            next_code += 1
    return "".join(letters)


def check_ids(tokens: dict[str, int]) -> None:
    """ValueError where tokens are no texts, or their ids are none that a vocabulary could have."""
    for name, token_id in tokens.items():
        is_id = type(token_id) is int and 0 <= token_id <= MAX_TOKEN_ID
        if type(name) is not str or not is_id:
            raise ValueError(f"token {name!r:.60} with id {token_id!r:.60}")


def check_supported(file: dict) -> None:
    """ValueError where a tokenizer.json asks for something that is not done here."""
    model = file["model"]
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise ValueError(f"{option}: {model[option]}")

    pre_tokenizer = file["pre_tokenizer"]
    steps = [step["type"] for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])]
    if steps[-1] != "ByteLevel":
        raise ValueError(f"pre_tokenizer {steps}")

    normalizer = file["normalizer"] or {}
    if normalizer.get("type", "NFC") not in ("NFC", "NFKC"):
        raise ValueError(f"normalizer {normalizer}")

    for token in file["added_tokens"]:
        if not token["content"].strip():
            raise ValueError(f"added token {token}")  # is text, no mark


class BytePairs:
    """A byte-level BPE.

    Attributes:
        added_tokens: {name: id} of the tokens that no text becomes.
        size: number of ids.
        unicode_form: "NFC" or "NFKC" where texts are normalized, else None.
    """

    def __init__(self, content: bytes, where: str):
        """Read the content of a tokenizer.json.

        Args:
            where: its path, for the error message.

        Raises:
            UserError: it is none, or asks for something that is not done here.
        """
        self.letters = byte_letters()
        self.byte_of_letter = {letter: byte for byte, letter in enumerate(self.letters)}
        self.stand_ins = StandIns()
        self.encode_word_cached = lru_cache(1 << 16)(self.encode_word)  # words repeat
        try:
            self.read(json.loads(content))
        except MALFORMED as error:
            raise UserError(
                f"{where}: is no byte-level BPE that is understood here ({error!r:.200}); "
                "if the model has a tokenizer.model too, put that beside it"
            ) from None

    def read(self, file: dict) -> None:
        """Take over what the file says; one of MALFORMED where it is not understood."""
        check_supported(file)
        model = file["model"]
        self.unicode_form = file["normalizer"]["type"] if file["normalizer"] else None
        self.patterns = read_patterns(file["pre_tokenizer"])
        self.merges = read_merges(model)

        vocab = model["vocab"]
        self.added_tokens = {token["content"]: token["id"] for token in file["added_tokens"]}
        check_ids(vocab)
        check_ids(self.added_tokens)
        self.size = 1 + max([*vocab.values(), *self.added_tokens.values()])

        self.id_of_piece = {}
        for piece, piece_id in vocab.items():
            if piece not in self.added_tokens:
                self.id_of_piece[piece] = piece_id
        self.piece_of_id = {piece_id: piece for piece, piece_id in self.id_of_piece.items()}

        # An added token that is not special is shown as text
        self.visible_tokens = {}
        for token in file["added_tokens"]:
            if not token["special"]:
                self.visible_tokens[token["id"]] = token["content"].encode()

        # Llama 3 takes a word that is in the vocabulary as it is, without merging
        self.whole_words = self.id_of_piece if model.get("ignore_merges") else {}

    def encode(self, text: str) -> list[int]:
        """The ids of a text; UnicodeEncodeError where it is no valid text."""
        if self.unicode_form:
            text = unicodedata.normalize(self.unicode_form, text)
        ids = []
        for word in self.split_words(text):
            ids.extend(self.encode_word_cached(word))
        return ids

    def split_words(self, text: str) -> list[str]:
        """The text in words, each of which is merged by itself."""
        words = [text]
        for pattern in self.patterns:
            shorter_words = []
            for word in words:
                # stand-ins are as long as what they stand for: lengths in the copy are those here
                copy = word if word.isascii() else word.translate(self.stand_ins)
                start = 0
                for piece in pattern.split(copy):
                    if piece:
                        shorter_words.append(word[start : start + len(piece)])
                        start += len(piece)
            words = shorter_words
        return words

    def encode_word(self, word: str) -> list[int]:
        """The ids of one word."""
        spelled = "".join(self.letters[byte] for byte in word.encode())
        if spelled in self.whole_words:
            return [self.whole_words[spelled]]
        try:
            ids = [self.id_of_piece[letter] for letter in spelled]
        except KeyError:
            raise UserError(f"{word[:60]!a}: the tokenizer has no token for a byte of it") from None
        return self.merges.apply(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens give nothing, broken bytes give U+FFFD."""
        parts = []
        for token_id in ids:
            if token_id in self.visible_tokens:
                parts.append(self.visible_tokens[token_id])
            else:
                parts.append(self.piece_bytes(self.piece_of_id.get(token_id, "")))
        return b"".join(parts).decode("utf-8", "replace")

    def piece_bytes(self, piece: str) -> bytes:
        """The bytes that a piece of the vocabulary stands for.

        A piece with a character that stands for no byte is text itself, as `tokenizers` has it.
        """
        try:
            return bytes(self.byte_of_letter[letter] for letter in piece)
        except KeyError:
            return piece.encode("utf-8", "surrogatepass")
