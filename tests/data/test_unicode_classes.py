"""The table of classes against what `tokenizers` answers; normalization too."""

import random
import unicodedata
from itertools import pairwise

import pytest

from minmacpo.data.unicode_classes import (
    NOT_NORMALIZED,
    RANGES,
    class_of,
    normalize_nfc,
    not_normalized,
    read_ranges,
)

tokenizers = pytest.importorskip("tokenizers")
import unicode_oracle  # noqa: E402  needs the package

pytestmark = pytest.mark.skipif(
    not tokenizers.__version__.startswith("0.23."), reason="the table is that of tokenizers 0.23"
)

# Marks of several classes, what they join with, and some that only newer versions of Unicode move
JOINING = (
    "aeo\u0301\u0323\u0334\u0344\u1e9b\u212b\ufb01\u1100\u1161\u11a8가각\u0b47\u0b3e\u09c7\u09be"
    "\u07fd\u1abf\U00011930\U00011935\U000113c2\U00016d67\U0001e4ec\u0898\U00011938\ue000\u0378"
)


def classes_here(codes: list[int]) -> dict[str, set[int]]:
    """{class: those of the code points that the table has in it}"""
    classes = {name: set() for name in RANGES}
    for code in codes:
        if class_of(code):
            classes[class_of(code)].add(code)
    return classes


def test_characters_have_the_class_that_the_package_gives_them(seed):
    codes = unicode_oracle.all_codes()
    bounds = set()
    for text in RANGES.values():
        for first, last in read_ranges(text):
            bounds.update({first - 1, first, last, last + 1})
    sample = sorted(bounds.intersection(codes) | set(random.Random(seed).sample(codes, 10_000)))
    assert classes_here(sample) == unicode_oracle.asked_classes(sample)


@pytest.mark.slow
def test_the_table_is_what_the_package_answers_for_every_character():
    codes = unicode_oracle.all_codes()
    assert classes_here(codes) == unicode_oracle.asked_classes(codes)
    pytest.importorskip("regex")
    assert not_normalized() == unicode_oracle.newer_than_normalization()


def test_the_table_does_not_depend_on_python():
    """These came with Unicode 16 and 17."""
    assert class_of(0x1C89) == "Lu"
    assert class_of(0x10D40) == "N"
    assert class_of(0x11DE0) == "new digit"
    assert class_of(0x0378) == ""
    assert class_of(0x80) == ""


def test_no_two_ranges_overlap():
    bounds = sorted(bounds for text in RANGES.values() for bounds in read_ranges(text))
    for (_, last), (first, _) in pairwise(bounds):
        assert last < first
    assert list(read_ranges("100-104/2 110")) == [(0x100, 0x100), (0x102, 0x102), (0x104, 0x104),
                                                  (0x110, 0x110)]  # fmt: skip


@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_texts_are_normalized_as_by_the_package(seed, count):
    rng = random.Random(seed)
    nfc = tokenizers.normalizers.NFC()
    codes = unicode_oracle.all_codes(0)
    newer = [chr(code) for code in sorted(not_normalized())]
    for _ in range(count):
        letters = rng.choices(JOINING, k=rng.randrange(12)) + rng.choices(newer, k=2)
        letters += map(chr, rng.sample(codes, 4))
        rng.shuffle(letters)
        text = "".join(letters)
        assert normalize_nfc(text) == nfc.normalize_str(text), ascii(text)


def test_what_newer_versions_move_stays():
    assert NOT_NORMALIZED
    assert normalize_nfc("e\u0301 \u07fd") == "é \u07fd"
    moved = "x\u0301\u1abf"  # U+1ABF, of Unicode 13, belongs before the accent
    assert normalize_nfc(moved) == moved != unicodedata.normalize("NFC", moved)
