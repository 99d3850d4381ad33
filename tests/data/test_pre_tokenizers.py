"""Words of the known pre-tokenizers against the package `tokenizers`, given the same steps."""

import random
import sys

import pytest
from byte_pairs import STYLES, empty_file, pre_tokenizer_json
from texts import ODD, random_unicode

from minmacpo.data import pre_tokenizers
from minmacpo.data.pre_tokenizers import KNOWN, find_known, unknown_steps

tokenizers = pytest.importorskip("tokenizers")
import unicode_oracle  # noqa: E402  needs the package

# What the expressions name, and what borders on it: ends of ranges, letters that look like others
NAMED = (
    "abzAZéÉÜ日本一龥鿿ࠀ가힣\ud7ff\uabff\u3040ゟ゠かカー\u3099、。〃！～“”‘’…\u0301\u0903²½٣Ⅷ①012"
    " '\u017f\u212astdmTSDMlLrRvVeE\r\n\t\x0b\x85\x1c\x00\u200b\u00a0\u2028\u3000.-<|>/_$+^`~¡¿"
    "«€\U0001f44d\U0001f3fd\u01c5\u02b0\u00aaªƻᏸꭰⳳ\U00010400\U0001e943"
    "\ue000\u0378\U00016ff4\U00011de0\U0001ccf0\u1c89"
)
FRAMES = ["{}", "a{}b", " {} ", "'{}", "'l{}", "1{}2", "!{}\n", "\n{}\r\n", "A{}é", "日{}"]


@pytest.fixture(scope="module", params=KNOWN, ids=lambda known: known.name)
def both(request):
    """(a known pre-tokenizer, text -> words by the package)"""
    content = empty_file(pre_tokenizer_json(request.param))
    splitter = tokenizers.Tokenizer.from_str(content).pre_tokenizer

    def words(text: str) -> list[str]:
        return [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]

    return request.param, words


def check_characters(both, count: int, rng: random.Random) -> None:
    """So many of all characters, each in a frame."""
    known, theirs = both
    codes = rng.sample(unicode_oracle.all_codes(0), count)
    for start in range(0, count, 8):
        framed = [rng.choice(FRAMES).format(chr(code)) for code in codes[start : start + 8]]
        text = "".join(framed)
        assert known.words(text) == theirs(text), ascii(text)


def check_texts(both, count: int, rng: random.Random) -> None:
    """So many texts of what the expressions name, and of anything."""
    known, theirs = both
    for _ in range(count // 2):
        for text in ("".join(rng.choices(NAMED, k=rng.randrange(50))), random_unicode(rng)):
            assert known.words(text) == theirs(text), ascii(text)


def test_words_are_those_of_the_package(both, seed):
    rng = random.Random(seed)
    check_characters(both, 4_000, rng)
    check_texts(both, 600, rng)
    known, theirs = both
    for text in ODD:
        assert known.words(text) == theirs(text), ascii(text)


@pytest.mark.slow
def test_words_of_200_000_characters_and_10_000_texts(both, seed):
    rng = random.Random(seed)
    check_characters(both, 200_000, rng)
    check_texts(both, 10_000, rng)


def test_long_runs_take_no_quadratic_time(both):
    """Cut at the end of a run, where expressions look back for what they may give up."""
    known, theirs = both
    for run in (" ", "\n", "a", "A", "1", "é", "日", "!", "\u0301", " \n"):
        text = run * 20_000 + "x"
        assert known.words(text) == theirs(text)


def test_the_sets_of_ascii_are_those_of_the_package():
    """The table of classes begins behind ASCII, which stands in the brackets."""
    sets = {
        r"\p{Lu}": pre_tokenizers.UPPER,
        r"\p{Ll}": pre_tokenizers.LOWER,
        r"\p{L}": pre_tokenizers.LETTERS,
        r"\p{M}": pre_tokenizers.MARKS,
        r"\p{N}": pre_tokenizers.NUMERALS,
        r"\p{P}": pre_tokenizers.PUNCTUATION,
        r"\p{S}": pre_tokenizers.SYMBOLS,
        r"\s": pre_tokenizers.SPACES,
    }
    for expression, characters in sets.items():
        theirs = unicode_oracle.matched_codes(expression, range(0x80))
        ours = pre_tokenizers.in_class_text(f"[{characters}]").expression
        assert {code for code in range(0x80) if ours.match(chr(code))} == theirs, expression


def test_every_space_is_one_of_the_package():
    theirs = unicode_oracle.matched_codes(r"\s", unicode_oracle.all_codes(0))
    ours = pre_tokenizers.in_text(f"[{pre_tokenizers.EVERY_SPACE}]").expression
    assert {code for code in range(sys.maxunicode + 1) if ours.match(chr(code))} == theirs


# ---- which files are known ------------------------------------------------------------------


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_a_file_is_known_by_its_steps(known):
    assert find_known(pre_tokenizer_json(known)) is known
    assert find_known({"type": "Sequence", "pretokenizers": [pre_tokenizer_json(known)]}) is known


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_a_file_that_differs_in_anything_is_not_known(known):
    for index, step in enumerate(known.steps):
        without = [*known.steps[:index], *known.steps[index + 1 :]]
        assert find_known({"type": "Sequence", "pretokenizers": without}) in (None, *KNOWN)
        for change in changes(step):
            changed = [*known.steps[:index], change, *known.steps[index + 1 :]]
            assert find_known({"type": "Sequence", "pretokenizers": changed}) is None
            assert unknown_steps({"type": "Sequence", "pretokenizers": changed}) == [change]


def changes(step: dict) -> list[dict]:
    """Steps that are nearly this one."""
    nearly = [step | {"more": 1}, step | {"type": "Metaspace"}]
    if step["type"] == "Split":
        expression = step["pattern"]["Regex"]
        nearly += [
            step | {"pattern": {"Regex": expression + "?"}},
            step | {"pattern": {"String": expression}},
            step | {"behavior": "MergedWithNext"},
            step | {"invert": not step["invert"]},
        ]
    if step["type"] == "ByteLevel":
        nearly.append(step | {"add_prefix_space": True})
    if step["type"] == "Digits":
        nearly.append(step | {"individual_digits": False})
    return nearly


@pytest.mark.parametrize("other", [None, [], "ByteLevel", {"type": "Sequence"}, {}, 7])
def test_what_is_none_is_not_known(other):
    assert find_known(other) is None
    assert unknown_steps(other) == [other]


def test_names_are_told_apart():
    assert len(STYLES) == len(KNOWN)
