"""Asks `tokenizers` which class it puts every character into; prints minmacpo's table of them.

    python tests/data/unicode_oracle.py    # prints the RANGES and NOT_NORMALIZED of unicode_classes

In version 0.23 its expressions follow Unicode 16, its digits Unicode 17, and its normalization
Unicode 9. test_unicode_classes.py asks again and compares.
"""

import sys
from collections.abc import Iterable

from tokenizers import Regex, normalizers, pre_tokenizers

# {name of a class: the expression that matches its characters}
EXPRESSIONS = {
    "Lu": r"\p{Lu}",
    "Ll": r"\p{Ll}",
    "Lt": r"\p{Lt}",
    "Lm": r"\p{Lm}",
    "Lo": r"\p{Lo}",
    "M": r"\p{M}",
    "N": r"\p{N}",
    "P": r"\p{P}",
    "S": r"\p{S}",
    "space": r"\s",
}
NEW_DIGIT = "new digit"  # numerals of the pre-tokenizer Digits alone
SURROGATES = range(0xD800, 0xE000)
# Letters that join with a vowel sign or jamo behind them: one for each of the scripts that do so
FIRST_LETTERS = (
    "\u1100\uac00\u09c7\u0b47\u0b92\u0bc6\u0bc7\u0cc6\u0cca\u0d46\u0d47\u0dd9\u0ddc\u1025\u1b05"
    "\U000110a5\U00011131\U00011347\U000114b9\U000115b8"
)
LINE = 88  # characters in a line of the table


def all_codes(start: int = 0x80) -> list[int]:
    """All code points from `start` on but the surrogates."""
    return [code for code in range(start, sys.maxunicode + 1) if code not in SURROGATES]


def matched_codes(expression: str, codes: Iterable[int]) -> set[int]:
    """The code points that an expression of the package matches."""
    letters = "".join(map(chr, codes))
    splitter = pre_tokenizers.Split(Regex(expression), "removed")
    unmatched = set()
    for start in range(0, len(letters), 4096):
        for piece, _ in splitter.pre_tokenize_str(letters[start : start + 4096]):
            unmatched.update(piece)
    return {ord(letter) for letter in set(letters) - unmatched}


def digit_codes(codes: Iterable[int]) -> set[int]:
    """The code points that the package's Digits takes for numerals."""
    splitter = pre_tokenizers.Digits(individual_digits=True)
    codes = list(codes)
    digits = set()
    for start in range(0, len(codes), 2048):
        # an "x" behind each, so that only a numeral is a piece of its own
        text = "".join(f"{chr(code)}x" for code in codes[start : start + 2048])
        for piece, _ in splitter.pre_tokenize_str("x" + text):
            if len(piece) == 1:
                digits.add(ord(piece))
    return digits - {ord("x")}


def asked_classes(codes: list[int]) -> dict[str, set[int]]:
    """{class: those of the code points that are in it}"""
    classes = {name: matched_codes(text, codes) for name, text in EXPRESSIONS.items()}
    classes[NEW_DIGIT] = digit_codes(codes) - classes["N"]
    return classes


def is_normalized_away(letter: str) -> bool:
    """Whether the package's NFC changes the letter, or moves or joins it with its neighbours."""
    nfc = normalizers.NFC()
    between_marks = f"x\u0301{letter}\u0334"  # the last mark moves to the front if it may
    return nfc.normalize_str(letter) != letter or nfc.normalize_str(between_marks) != between_marks


def newer_than_normalization() -> set[int]:
    """Code points that NFC changes or moves in Unicode 17, but not in the package's Unicode 9."""
    import regex  # knows Unicode 17

    moved = regex.compile(r"[^\p{Canonical_Combining_Class=0}]|[^\p{NFC_Quick_Check=Yes}]")
    newer = set()
    for code in all_codes():
        letter = chr(code)
        if moved.match(letter) and not is_normalized_away(letter) and not joins(letter):
            newer.add(code)
    return newer


def joins(letter: str) -> bool:
    """Whether the package's NFC makes one character of some letter and this one behind it."""
    nfc = normalizers.NFC()
    pairs = [first + letter for first in FIRST_LETTERS]
    return any(nfc.normalize_str(pair) != pair for pair in pairs)


def as_ranges(codes: Iterable[int]) -> list[str]:
    """Code points as "41-5A" or "100-136/2" (every second one), in order."""
    left = sorted(codes)
    ranges = []
    while left:
        for step in (1, 2):
            length = 1
            while length < len(left) and left[length] == left[length - 1] + step:
                length += 1
            if step == 2 and length < len(left) and left[length] == left[length - 1] + 1:
                length -= 1  # the last one begins a range without gaps
            if length > step:
                break
        if length <= step:
            length = 1
        text = f"{left[0]:X}"
        if length > 1:
            text += f"-{left[length - 1]:X}" + ("/2" if step == 2 else "")
        ranges.append(text)
        left = left[length:]
    return ranges


def print_ranges(codes: Iterable[int], indent: str) -> None:
    """Print ranges as strings in lines."""
    line = ""
    for text in as_ranges(codes):
        if len(line) + len(text) >= LINE:
            print(f'{indent}"{line}"')
            line = ""
        line += f"{text} "
    print(f'{indent}"{line.strip()}"')


def main() -> None:
    """Print the table as it stands in minmacpo/data/unicode_classes.py."""
    print("RANGES = {")
    for name, codes in asked_classes(all_codes()).items():
        print(f'    "{name}": (')
        print_ranges(codes, indent=" " * 8)
        print("    ),")
    print("}\n\nNOT_NORMALIZED = (")
    print_ranges(newer_than_normalization(), indent=" " * 4)
    print(")")


if __name__ == "__main__":
    main()
