"""Byte-level BPE: the tokenizers of GPT-2, SmolLM, Llama 3, Qwen and DeepSeek, on Python alone.

A text is cut into words ("it's 12" into "it", "'s", " 12"; see pre_tokenizers.py). The bytes of
each word are then merged pair by pair, the pair that was learned first before all others. What a
file asks for and is not done here is named by `find_unknown`; tokenizer_json.py reads such files in
another way, since ids would be silently wrong.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from minmacpo.data.pre_tokenizers import find_known, unknown_steps
from minmacpo.data.text_tokens import (
    AddedToken,
    TextTokens,
    parse_added_token,
    stripping_before_ids,
    stripping_ids,
)
from minmacpo.data.unicode_classes import normalize_nfc

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


def find_unknown(file: dict) -> str | None:
    """What a tokenizer.json asks for and BytePairs does not do; None if it is a BytePairs."""
    model = file["model"]
    if model.get("type", "BPE") != "BPE":
        return f"model {model['type']!r:.60}"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            return f"{option} {model[option]!r:.60}"
    if model.get("unk_token") is not None and missing_bytes(model["vocab"]):
        return f"unk_token {model['unk_token']!r:.60}"

    if find_known(file["pre_tokenizer"]) is None:
        return f"pre_tokenizer {unknown_steps(file['pre_tokenizer'])!r:.300}"
    if normalizations(file["normalizer"]) not in ([], ["NFC"]):
        return f"normalizer {file['normalizer']!r:.100}"
    decoder = file["decoder"] or {}
    if decoder.get("type") != "ByteLevel":
        return f"decoder {file['decoder']!r:.100}"

    for token in file["added_tokens"]:
        if not token["content"].strip() or not finds_as_package(token, file["normalizer"]):
            return f"added token {token['content']!r:.60}"  # is text, no mark
    return None


def finds_as_package(token: dict, normalizer: dict | None) -> bool:
    """Whether an added token that is text is found in one here as `tokenizers` finds it.

    What a word is made of is not quite the same there, nor is a character that is normalised.
    """
    if token["special"]:
        return True
    is_changed = bool(normalizations(normalizer)) and not token["content"].isascii()
    return not token.get("single_word") and not is_changed


def normalizations(normalizer: dict | None) -> list[str]:
    """The names of the steps of a tokenizer.json's normalizer."""
    if normalizer is None:
        return []
    if normalizer["type"] != "Sequence":
        return [normalizer["type"]]
    names = []
    for part in normalizer["normalizers"]:
        names.extend(normalizations(part))
    return names


def missing_bytes(vocab: dict[str, int]) -> bytes:
    """The bytes that have no token, such as six control characters in SmolLM2's vocabulary."""
    return bytes(byte for byte, letter in enumerate(byte_letters()) if letter not in vocab)


class BytePairs:
    """A byte-level BPE.

    Attributes:
        special_tokens: {name: id} of the tokens that no text becomes.
        stripping_ids: of the added tokens that take in the white space behind them.
        stripping_before_ids: of those that take in the white space before them.
        text_tokens: the other added tokens.
        size: number of ids.
        adds_begin: whether its file puts a begin token before a text.
        space_before: where its file puts a space before a text.
    """

    def __init__(self, file: dict):
        """Take over a tokenizer.json of which `find_unknown` finds nothing.

        Raises:
            Exception: one of MALFORMED, where the file is none.
        """
        self.letters = byte_letters()
        self.byte_of_letter = {letter: byte for byte, letter in enumerate(self.letters)}
        self.encode_word_cached = lru_cache(1 << 16)(self.encode_word)  # words repeat

        model = file["model"]
        self.normalizes = normalizations(file["normalizer"]) == ["NFC"]
        self.pre_tokenizer = find_known(file["pre_tokenizer"])
        self.merges = read_merges(model)

        vocab = model["vocab"]
        added_tokens = {token["content"]: token["id"] for token in file["added_tokens"]}
        check_ids(vocab)
        check_ids(added_tokens)
        self.size = 1 + max([*vocab.values(), *added_tokens.values()])

        self.special_tokens = {}
        self.stripping_ids = stripping_ids(file["added_tokens"])
        self.stripping_before_ids = stripping_before_ids(file["added_tokens"])
        text_tokens = []
        for raw in file["added_tokens"]:
            if raw["special"]:
                self.special_tokens[raw["content"]] = raw["id"]
            else:
                text_tokens.append(parse_added_token(raw, raw["id"]))
        self.text_tokens = TextTokens(text_tokens)

        self.id_of_piece = {}
        for piece, piece_id in vocab.items():
            if piece not in added_tokens:
                self.id_of_piece[piece] = piece_id
        self.piece_of_id = {piece_id: piece for piece, piece_id in self.id_of_piece.items()}
        self.missing_bytes = missing_bytes(self.id_of_piece)

        # Llama 3 takes a word that is in the vocabulary as it is, without merging
        self.whole_words = self.id_of_piece if model.get("ignore_merges") else {}

    def encode(self, text: str, start: bool = False) -> list[int]:
        """The ids of a text; UnicodeEncodeError where it is no valid text.

        Bytes without a token are left out, as `tokenizers` does; `count_left_out` counts them.

        Args:
            start: whether it begins a document, which is all the same here.
        """
        ids = []
        for part in self.text_tokens.split(text):
            if isinstance(part, AddedToken):
                ids.append(part.token_id)
                continue
            if self.normalizes:
                part = normalize_nfc(part)
            for word in self.pre_tokenizer.words(part):
                ids.extend(self.encode_word_cached(word))
        return ids

    def encode_word(self, word: str) -> list[int]:
        """The ids of one word."""
        spelled = "".join([self.letters[byte] for byte in word.encode()])
        if spelled in self.whole_words:
            return [self.whole_words[spelled]]
        ids = [self.id_of_piece[letter] for letter in spelled if letter in self.id_of_piece]
        return self.merges.apply(ids)

    def count_left_out(self, text: str) -> int:
        """How many bytes of a text have no token."""
        if not self.missing_bytes:
            return 0
        return sum(map(text.encode().count, self.missing_bytes))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens give nothing, broken bytes give U+FFFD."""
        parts = []
        for token_id in ids:
            if token_id in self.text_tokens.names:
                parts.append(self.text_tokens.names[token_id].encode())
            else:
                parts.append(self.piece_bytes(self.piece_of_id.get(token_id, "")))
        return b"".join(parts).decode("utf-8", "replace")

    def piece(self, token_id: int) -> str:
        """The text of one token."""
        return self.decode([token_id])

    def piece_bytes(self, piece: str) -> bytes:
        """The bytes that a piece of the vocabulary stands for.

        A piece with a character that stands for no byte is text itself, as `tokenizers` has it.
        """
        try:
            return bytes(self.byte_of_letter[letter] for letter in piece)
        except KeyError:
            return piece.encode("utf-8", "surrogatepass")
