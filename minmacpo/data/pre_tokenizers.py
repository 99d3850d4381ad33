r"""How published byte-level tokenizers cut a text into words, which are then merged one by one.

A tokenizer.json gives this as regular expressions of an engine that is not Python's: it knows \p{L}
(all letters), `$` ends a line, and `{1,3}+` repeats twice. So nothing is translated: each way that
is known stands below twice, as files have it and as Python's `re` does the same. Tests hold the two
equal against `tokenizers` for every character and many texts. Other ways are not guessed.

Class text: Python's `re` knows no \p{L}, and large sets of characters are slow in it. So most
expressions are matched on a copy of the text in which one letter for each class stands for all
characters beyond ASCII: "øø: ütü" for "日本: été". The copy is as long as the text, so that the
lengths of its words are those of the text's.
"""

import re
from dataclasses import dataclass

from minmacpo.data.unicode_classes import class_of

# ---- class text -----------------------------------------------------------------------------

CLASS_LETTERS = {
    "Lu": "Ü",
    "Ll": "ü",
    "Lt": "Þ",
    "Lm": "ª",
    "Lo": "ø",
    "M": "¨",
    "N": "²",
    "new digit": "¼",
    "P": "¿",
    "S": "¤",
    "space": "\xa0",
    "": "¬",  # control characters, private use, and what has no meaning yet
}
LONG_S = "ſ"
LONG_S_LETTER = "ß"  # (?i:'s) takes a long s too


class ClassText(dict):
    """{code point: that of its class letter}, for str.translate; filled when it is used."""

    def __missing__(self, code: int) -> int:
        letter = CLASS_LETTERS[class_of(code)]
        if code < 0x80:
            letter = chr(code)
        elif code == ord(LONG_S):
            letter = LONG_S_LETTER
        self[code] = ord(letter)
        return self[code]


CLASS_TEXT = ClassText()

# The classes of ASCII and the class letters, to stand in brackets
UPPER = "A-ZÜ"
LOWER = "a-züß"
CASELESS = "ªø"
LETTERS = UPPER + LOWER + "Þ" + CASELESS
MARKS = "¨"
NUMERALS = "0-9²"
DIGITS = NUMERALS + "¼"  # as Digits has them, whose Unicode is newer
PUNCTUATION = r"!-#%-*,-/:;?@\[-\]_{}¿"
SYMBOLS = "$+<->^`|~¤"
SPACES = "\t-\r \xa0"


# ---- expressions ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """One step: what the expression matches are words, and what is left between them too.

    Attributes:
        expression: of Python, with one group, the whole of it.
        in_class_text: whether it is matched on class text rather than on the text itself.
    """

    expression: re.Pattern
    in_class_text: bool = True

    def words(self, text: str) -> list[str]:
        """The text in words, in order; they are the whole of it."""
        if not self.in_class_text or text.isascii():
            return [word for word in self.expression.split(text) if word]
        words = []
        start = 0
        for copy in self.expression.split(text.translate(CLASS_TEXT)):
            if copy:
                end = start + len(copy)
                words.append(text[start:end])
                start = end
        return words


def in_class_text(*alternatives: str) -> Split:
    """A step of these alternatives, matched on class text."""
    return Split(re.compile(f"({'|'.join(alternatives)})"))


def in_text(expression: str) -> Split:
    """A step that is matched on the text itself, since its characters stand in it one by one."""
    return Split(re.compile(f"({expression})"), in_class_text=False)


CONTRACTION = "'(?:[sStTmMdDß]|[rR][eE]|[vV][eE]|[lL][lL])"  # in both cases
BLANKS = rf"[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+"  # all but the one before a word, or all
LINE_ENDS = rf"[{SPACES}]*[\r\n]+"

ONE_DIGIT = in_class_text(rf"[{DIGITS}]")
THREE_NUMERALS = in_class_text(rf"[{NUMERALS}]{{1,3}}")

GPT_2_WORDS = in_class_text(
    "'(?:[stmd]|re|ve|ll)",
    rf" ?[{LETTERS}]+",
    rf" ?[{NUMERALS}]+",
    rf" ?[^{SPACES}{LETTERS}{NUMERALS}]+",
    BLANKS,
)
LLAMA_3_WORDS = in_class_text(
    CONTRACTION,
    rf"[^\r\n{LETTERS}{NUMERALS}]?[{LETTERS}]+",
    rf"[{NUMERALS}]{{1,3}}",
    rf" ?[^{SPACES}{LETTERS}{NUMERALS}]+[\r\n]*",
    LINE_ENDS,
    BLANKS,
)
QWEN_2_WORDS = in_class_text(
    CONTRACTION,
    rf"[^\r\n{LETTERS}{NUMERALS}]?[{LETTERS}]+",
    rf"[{NUMERALS}]",
    rf" ?[^{SPACES}{LETTERS}{NUMERALS}]+[\r\n]*",
    LINE_ENDS,
    BLANKS,
)
QWEN_3_5_WORDS = in_class_text(
    CONTRACTION,
    rf"[^\r\n{LETTERS}{NUMERALS}]?[{LETTERS}{MARKS}]+",
    rf"[{NUMERALS}]",
    rf" ?[^{SPACES}{LETTERS}{MARKS}{NUMERALS}]+[\r\n]*",
    LINE_ENDS,
    BLANKS,
)

# o200k and Mistral's Tekken cut "HTMLPage" before a capital that a small letter follows
FIRST_PART = f"{UPPER}Þ{CASELESS}{MARKS}"
LAST_PART = f"{LOWER}{CASELESS}{MARKS}"
SMALL_END = rf"[^\r\n{LETTERS}{NUMERALS}]?[{FIRST_PART}]*[{LAST_PART}]+"
CAPITAL_END = rf"[^\r\n{LETTERS}{NUMERALS}]?[{FIRST_PART}]+[{LAST_PART}]*"
O200K_WORDS = in_class_text(
    rf"{SMALL_END}(?:{CONTRACTION})?",
    rf"{CAPITAL_END}(?:{CONTRACTION})?",
    rf"[{NUMERALS}]{{1,3}}",
    rf" ?[^{SPACES}{LETTERS}{NUMERALS}]+[\r\n/]*",
    LINE_ENDS,
    BLANKS,
)
TEKKEN_WORDS = in_class_text(
    SMALL_END,
    CAPITAL_END,
    rf"[{NUMERALS}]",
    rf" ?[^{SPACES}{LETTERS}{NUMERALS}]+[\r\n/]*",
    LINE_ENDS,
    BLANKS,
)

DEEPSEEK_V3_WORDS = in_class_text(
    r"[!-/:-@\[-`{-~][A-Za-z]+",
    rf"[^\r\n{LETTERS}{PUNCTUATION}{SYMBOLS}]?[{LETTERS}{MARKS}]+",
    rf" ?[{PUNCTUATION}{SYMBOLS}]+[\r\n]*",
    LINE_ENDS,
    BLANKS,
)
LINE_BREAK = in_text(r"[\r\n]")
CHINESE_OR_KANA = in_text("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+")
CHINESE_OR_HANGUL = in_text("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")

# DeepSeek's first models and V2 have lists of characters. Some look like others (K is the sign of
# kelvin), so they are written as numbers.
DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DEEPSEEK_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
EVERY_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


# ---- the known ones, as files have them -----------------------------------------------------


def split_step(expression: str, keeps_matches_only: bool = False) -> dict:
    """A step of a tokenizer.json that splits by an expression.

    Args:
        keeps_matches_only: as tiktoken's files have it; the same where nothing is left between
            matches.
    """
    return {
        "type": "Split",
        "pattern": {"Regex": expression},
        "behavior": "Removed" if keeps_matches_only else "Isolated",
        "invert": keeps_matches_only,
    }


DIGITS_STEP = {"type": "Digits", "individual_digits": True}
GPT_2_STEP = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES_STEP = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (  # its line ends are the characters themselves
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A known way to cut a text into words.

    Attributes:
        steps: of a tokenizer.json, without "trim_offsets", which changes no id.
        splits: the same by hand, to be done one after the other.
    """

    name: str
    steps: tuple[dict, ...]
    splits: tuple[Split, ...]

    def words(self, text: str) -> list[str]:
        """The text in words, each of which is merged by itself."""
        words = [text] if text else []
        for split in self.splits:
            shorter_words = []
            for word in words:
                shorter_words.extend(split.words(word))
            words = shorter_words
        return words


KNOWN = (
    PreTokenizer("GPT-2", (GPT_2_STEP,), (GPT_2_WORDS,)),
    PreTokenizer("SmolLM 2", (DIGITS_STEP, GPT_2_STEP), (ONE_DIGIT, GPT_2_WORDS)),
    PreTokenizer("Llama 3", (split_step(LLAMA_3), BYTES_STEP), (LLAMA_3_WORDS,)),  # and SmolLM3
    PreTokenizer(
        "OLMo 2",
        (split_step(LLAMA_3, keeps_matches_only=True), BYTES_STEP),
        (LLAMA_3_WORDS,),
    ),
    PreTokenizer("Qwen 2", (split_step(QWEN_2), BYTES_STEP), (QWEN_2_WORDS,)),  # 2.5 and 3 too
    PreTokenizer("Qwen 3.5", (split_step(QWEN_3_5), BYTES_STEP), (QWEN_3_5_WORDS,)),
    PreTokenizer("GPT-OSS", (split_step(O200K), BYTES_STEP), (O200K_WORDS,)),
    PreTokenizer(
        "GPT-4o",
        (split_step(O200K, keeps_matches_only=True), BYTES_STEP),
        (O200K_WORDS,),
    ),
    PreTokenizer("Mistral Nemo", (split_step(TEKKEN), BYTES_STEP), (TEKKEN_WORDS,)),
    PreTokenizer(
        "DeepSeek LLM",  # and V2
        (
            split_step("[\r\n]"),
            split_step(rf"\s?[{DEEPSEEK_LETTERS}]+"),
            split_step(rf"\s?[{DEEPSEEK_PUNCTUATION}]+"),
            split_step(r"\s+$"),
            split_step("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
            DIGITS_STEP,
            BYTES_STEP,
        ),
        (
            LINE_BREAK,
            in_text(rf"[{EVERY_SPACE}]?[{DEEPSEEK_LETTERS}]+"),
            in_text(rf"[{EVERY_SPACE}]?[{DEEPSEEK_PUNCTUATION}]+"),
            in_text(rf"[{EVERY_SPACE}]+\Z"),
            CHINESE_OR_HANGUL,
            ONE_DIGIT,
        ),
    ),
    PreTokenizer(
        "DeepSeek Coder",
        (
            split_step("[\r\n]"),
            split_step(r"\s?\p{L}+"),
            split_step(r"\s?\p{P}+"),
            split_step("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
            DIGITS_STEP,
            BYTES_STEP,
        ),
        (
            LINE_BREAK,
            in_class_text(rf"[{SPACES}]?[{LETTERS}]+"),
            in_class_text(rf"[{SPACES}]?[{PUNCTUATION}]+"),
            CHINESE_OR_HANGUL,
            ONE_DIGIT,
        ),
    ),
    PreTokenizer(
        "DeepSeek V3",  # and R1
        (
            split_step(r"\p{N}{1,3}"),
            split_step("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
            split_step(DEEPSEEK_V3),
            BYTES_STEP,
        ),
        (THREE_NUMERALS, CHINESE_OR_KANA, DEEPSEEK_V3_WORDS),
    ),
)


def find_known(pre_tokenizer: object) -> PreTokenizer | None:
    """The known one that a tokenizer.json has as its pre_tokenizer; None if it has another."""
    steps = tuple(flat_steps(pre_tokenizer))
    for known in KNOWN:
        if known.steps == steps:
            return known
    return None


def flat_steps(pre_tokenizer: object) -> list[object]:
    """The steps of a pre_tokenizer one after the other, with what may be left out spelled."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": list(inner)}:
            steps = []
            for part in inner:
                steps.extend(flat_steps(part))
            return steps
        case {"type": "ByteLevel"}:
            step = {"use_regex": True} | pre_tokenizer
            step.pop("trim_offsets", None)
            return [step]
    return [pre_tokenizer]


def unknown_steps(pre_tokenizer: object) -> list[object]:
    """Those of a pre_tokenizer's steps that no known one has, or all of them."""
    known_steps = [step for known in KNOWN for step in known.steps]
    steps = flat_steps(pre_tokenizer)
    return [step for step in steps if step not in known_steps] or steps
