"""Byte-level BPE as a tokenizer.json describes it: the kind of GPT-2, SmolLM2, Llama-3 and Qwen.

The file's patterns cut a text into words, and the bytes of each word are merged pair by pair, the pair learned
first before all others. What a file asks for and is not done here is refused, for ids would be silently wrong.
"""

import heapq
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

from minmacpo import UserError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# re knows no \p{L}, and its \s has four control characters too many. So patterns are matched on a copy of the
# text where one character of private use stands for all of a category; the first 384 characters, of which
# patterns name some, stand for themselves (the last is ſ, which (?i:'s) takes for an s).
CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Cs Co Cn".split()


OWN, STAND_INS = 0x180, 0xE000


MOST_IDS = 1 << 31


UNKNOWN = re.compile(r"\\[dDwWbBhHXRP]|&&|\[\[")  # not done here, or something else in Python


class StandIns(dict):
    """For str.translate: the stand-in of every character, found when it first occurs."""

    def __missing__(self, code: int) -> int:
        category = CATEGORIES.index(unicodedata.category(chr(code)))
        return self.setdefault(code, code if code < OWN else STAND_INS + category)


def members(token: str) -> str:
    r"""All characters and stand-ins of \p{L}, \s and the like, to stand in brackets; ValueError if none. An escape stays one."""
    if not token.startswith((r"\p{", r"\s", r"\S")):
        return token
    category, space = token[3:-1] or "Z", "" if token[3:] else "\t-\r\x85"
    known = {chr(code): unicodedata.category(chr(code)) for code in range(OWN)}
    known |= {chr(STAND_INS + i): name for i, name in enumerate(CATEGORIES)}
    found = "".join(re.escape(c) for c, name in known.items() if name.startswith(category))
    if not found:
        raise ValueError(token)
    return found + space


def compile_pattern(pattern: str) -> re.Pattern:
    """A pattern of a tokenizer.json, for copies in stand-ins; ValueError or re.error if it is
    not understood."""

    def translated(found: re.Match) -> str:
        if found[0][0] == "[":
            return re.sub(r"\\p\{\w+\}|\\[^S]", lambda inner: members(inner[0]), found[0])
        return f"[{'^' * (found[0][1] == 'S')}{members(found[0])}]"

    whole = PART.sub(translated, pattern)
    if UNKNOWN.search(pattern) or r"\S" in whole:
        raise ValueError(f"pattern {pattern}")
    compiled = re.compile(f"({whole})")
    check_ways(pattern, repeats=2, long=True)
    if compiled.groups > 1:
        raise ValueError(f"pattern {pattern}")
    return compiled


def read_cuts(part: dict) -> list[re.Pattern]:
    """The patterns of a pre-tokenizer, to be used one after the other; ValueError if it is not understood."""
    kind = part["type"]
    if kind == "Sequence":
        return [pattern for inner in part["pretokenizers"] for pattern in read_cuts(inner)]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return [compile_pattern(GPT2)] if part.get("use_regex", True) else []
    if kind == "Digits":
        return [compile_pattern(r"\p{N}" if part["individual_digits"] else r"\p{N}+")]
    if (
        kind == "Split"
        and part["behavior"] == "Isolated"
        and not part["invert"]
        and "Regex" in part["pattern"]
    ):
        return [compile_pattern(part["pattern"]["Regex"])]
    raise ValueError(f"pre_tokenizer {part}")


def byte_letters() -> str:
    """The character that stands for each of the 256 bytes in a vocabulary, as GPT-2 chose them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return "".join(
        chr(b if b in shown else 256 + sum(c not in shown for c in range(b))) for b in range(256)
    )


def check_ids(tokens: dict[str, int]) -> None:
    """ValueError where tokens are no texts, or their ids no whole numbers that a vocabulary could have."""
    if odd := [
        name
        for name, i in tokens.items()
        if type(name) is not str or type(i) is not int or not 0 <= i < MOST_IDS
    ]:
        raise ValueError(f"token {odd[0]!r:.60} with id {tokens[odd[0]]!r:.60}")


class BytePairs:
    """`file` is the content of a tokenizer.json; `added` its added tokens {name: id}, which no text becomes.
    Raises UserError if it is none, or asks for something that is not done here."""

    def __init__(self, file: bytes, where: str):
        try:
            self.read(json.loads(file))
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            RecursionError,
            re.error,
        ) as error:
            raise UserError(
                f"{where}: is no byte-level BPE that is understood here ({error!r:.200}); if the model "
                "has a tokenizer.model too, put that beside it"
            ) from None
        self.letters, self.stand_ins = byte_letters(), StandIns()
        self.byte_of = {letter: byte for byte, letter in enumerate(self.letters)}
        self.merge = lru_cache(1 << 16)(self.merge_word)  # words repeat

    def read(self, file: dict) -> None:
        """Take over what the file says; ValueError, KeyError and the like where it is not understood."""
        model, cutter, normalizer = file["model"], file["pre_tokenizer"], file["normalizer"] or {}
        odd = {
            key: model[key]
            for key in (
                "dropout",
                "continuing_subword_prefix",
                "end_of_word_suffix",
                "byte_fallback",
            )
            if model.get(key)
        }
        steps = [step["type"] for step in cutter.get("pretokenizers", [cutter])]
        blank = [
            token for token in file["added_tokens"] if not token["content"].strip()
        ]  # is text, no mark
        if (
            odd
            or blank
            or steps[-1] != "ByteLevel"
            or normalizer.get("type", "NFC") not in ("NFC", "NFKC")
        ):
            raise ValueError(odd or blank or f"{steps} {normalizer}")
        self.form, self.cuts, vocab = normalizer.get("type"), read_cuts(cutter), model["vocab"]
        self.added = {token["content"]: token["id"] for token in file["added_tokens"]}
        check_ids(vocab)
        check_ids(self.added)
        self.visible = {
            t["id"]: t["content"].encode() for t in file["added_tokens"] if not t["special"]
        }
        self.ids = {name: i for name, i in vocab.items() if name not in self.added}
        self.names = {i: name for name, i in self.ids.items()}
        self.whole = self.ids if model.get("ignore_merges") else {}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        self.merges = {
            (vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in enumerate(pairs)
        }
        self.size = 1 + max([*vocab.values(), *self.added.values()])

    def split(self, text: str) -> list[str]:
        """The text in words, which are merged each by itself."""
        words = [text]
        for cut in self.cuts:
            pieces = (cut.split(w if w.isascii() else w.translate(self.stand_ins)) for w in words)
            ends = accumulate(
                (len(piece) for found in pieces for piece in found if piece), initial=0
            )
            words = [text[start:end] for start, end in pairwise(ends)]
        return words

    def merge_word(self, word: str) -> list[int]:
        """ids of one word: the pair with the lowest rank is merged, the leftmost first, until there is none."""
        spelled = word.encode().decode("latin-1").translate(self.letters)
        if spelled in self.whole:
            return [self.whole[spelled]]
        try:
            ids = [
                *map(self.ids.__getitem__, spelled),
                None,
            ]  # None at the end: what pairs with nothing
        except KeyError:
            raise UserError(f"{word[:60]!a}: the tokenizer has no token for a byte of it") from None
        before, after = [*range(-1, len(ids) - 1)], [*range(1, len(ids)), -1]
        heap = [
            (self.merges[pair][0], i) for i, pair in enumerate(pairwise(ids)) if pair in self.merges
        ]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            gone = after[i]
            merged = self.merges.get((ids[i], ids[gone]))
            if not merged or merged[0] != rank:
                continue  # one of the two has been merged with its other neighbour
            ids[i], ids[gone], after[i] = merged[1], None, after[gone]
            before[after[i]] = i
            for left in (before[i], i):
                if merged := self.merges.get((ids[left], ids[after[left]])):
                    heapq.heappush(heap, (merged[0], left))
        return [i for i in ids if i is not None]

    def encode(self, text: str) -> list[int]:
        """ids of `text`; UnicodeEncodeError where it is no valid text."""
        text = unicodedata.normalize(self.form, text) if self.form else text
        return [i for word in self.split(text) for i in self.merge(word)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens give nothing, broken bytes give U+FFFD."""
        return b"".join(
            self.visible.get(i) or self.spelled(self.names.get(i, "")) for i in ids
        ).decode("utf-8", "replace")

    def spelled(self, name: str) -> bytes:
        """What a name of the vocabulary stands for: bytes, or itself where a character of it is none, as `tokenizers` has it."""
        try:
            return bytes(self.byte_of[letter] for letter in name)
        except KeyError:
            return name.encode("utf-8", "surrogatepass")


PART = re.compile(
    r"\[\^?\]?(?:\\.|[^]\\])*\]|\\p\{\w+\}|\\.", re.DOTALL
)  # brackets, a category, an escape


HIDING = re.compile(
    r"\(\?(#|[a-zA-Z]*x)"
)  # a comment, or the flag that allows some: marks in them are none


MOST_WAYS = 4096  # that matching may go at one place beside repeats; the tokenizers of 2025 have 28, the layers of a model 448


def check_ways(pattern: str, repeats: int, long: bool = False) -> None:
    """re.error where matching `pattern`, which compiles, may take for ever: a repeated group, more repeats (* + {}) than these in
    one of its alternatives (time goes with the length of the text to that power), or too many choices (? and |). In `long` texts
    nothing may have to follow two repeats, either, as time would go with the length to the power of three."""
    if HIDING.search(pattern):
        raise re.error("a comment, or the flag x")
    ways, repeated, choices, plain = 1, 0, [], PART.sub("x", pattern)
    for found in re.finditer(r"\)[*+{]|\(\??|[)|]|[*+{?][+?]?", plain + "|"):
        match found[0][0]:
            case "(":
                choices.append(1)
            case "|" if choices:
                choices[-1] += 1
            case "|":
                if long and repeated > 1 and plain[found.start() - 1] not in "*+?}":
                    raise re.error("two repeats, and something that must follow")
                ways, repeated = 1, 0
            case ")":
                ways *= choices.pop()
                repeated += (repeats + 1) * (len(found[0]) > 1)
            case "?":
                ways *= 2
            case _:
                repeated += 1
        if repeated > repeats or ways > MOST_WAYS:
            raise re.error(f"a repeated group, more than {repeats} repeats, or too many choices")
