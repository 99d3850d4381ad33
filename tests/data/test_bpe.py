"""Byte-level BPE against the `tokenizers` package, Llama 3's vectors, and the texts of HH-RLHF."""

import functools
import gzip
import json
import random
import sys
import time
import unicodedata
from itertools import islice

import pytest
from byte_pairs import NOTES, SPECIAL, STYLES, oracle, train_file
from conftest import TEXTS, shared
from texts import ODD, random_unicode
from tokenizers.normalizers import NFC

from minmacpo import UserError
from minmacpo.data.bpe import BytePairs, StandIns, compile_pattern
from minmacpo.data.readers import find_files, read_lines
from minmacpo.data.tokenizer import Tokenizer, load_tokenizer

LEARNED = [
    *TEXTS,
    "It's Bemir's; they'LL say: we've 12345 or 3.14 (or ½, x²) …",
    "naïve façade 日本語の文章です。 हिन्दी 👍🏽 \r\n\t x  y",
    "E\u0301",
]
TRAPS = [
    "it'S IT'LL I'm 'ſ '\u017fo don'T",
    "12345678 1,234.5 ①②½ ٣٤٥ ⅷ",
    "a\x1cb\x1d c\x1e\x1f d",
    "x\x85y\u2028z \u00a0 \u3000w",
    " \n \n  x\r\n\r\ny \t ",
    "<|eot_id|><|im_start|>user\n<|im_end|>",
    "<tool_call>",
    "<|begin_of_text|>",
    "e\u0301 \u1e9b\u0323 \u212b ﬁ",
    "\ue000\ue01d\uf8ff",
    "a\u0300\u0301 é\u0301",
]


def llama3_file() -> bytes:
    return gzip.decompress(shared("tokenizers/llama3-tokenizer.json.gz").read_bytes())


@pytest.fixture(scope="module", params=[*STYLES, "the real llama-3"])
def both(request):
    """(BytePairs, text -> ids by the `tokenizers` package)"""
    if request.param == "the real llama-3":
        file = llama3_file().decode()
    else:
        file = train_file(request.param, LEARNED * 3)
    return BytePairs(file.encode(), "here"), oracle(file)


def normalized(text: str, tokenizer: BytePairs) -> str:
    """The text as the tokenizer takes it."""
    if tokenizer.unicode_form is None:
        return text
    return unicodedata.normalize(tokenizer.unicode_form, text)


@functools.cache
def is_settled(letter: str) -> bool:
    """Whether this Python and the package's older tables know the letter, and place it alike."""
    if unicodedata.category(letter) == "Cn":
        return False
    with_marks = f"a\u0301{letter}\u0334"
    return NFC().normalize_str(with_marks) == unicodedata.normalize("NFC", with_marks)


def only_settled(text: str) -> str:
    """The text without characters that Unicode got after this Python or the package's tables."""
    return "".join(letter for letter in text if is_settled(letter))


# ---- ids ------------------------------------------------------------------------------------


def check_text(ours: BytePairs, theirs, text: str) -> None:
    """The ids are those of the package, and the text comes back."""
    ids = ours.encode(text)
    assert ids == theirs(text), text
    assert ours.decode(ids) == normalized(text, ours)


def test_ids_are_those_of_the_package(both, seed):
    rng = random.Random(seed)
    letters = "aé日\u0301²٣ 's'T\n\r\t\x85\u3000-.<|>\U0001f44d"
    mixed = ["".join(rng.choices(letters, k=rng.randrange(40))) for _ in range(1000)]
    anything = [random_unicode(rng) for _ in range(1000)]
    for text in ODD + TRAPS + LEARNED + mixed + anything:
        check_text(*both, only_settled(text))


@pytest.mark.parametrize("rows", [20, pytest.param(1250, marks=pytest.mark.slow)])  # of every file
def test_ids_of_real_dialogues(both, rows):
    """Of each file so many rows; the long form takes a quarter of a minute per tokenizer."""
    for file in find_files(str(shared("data/hh-rlhf"))):
        for _, line in islice(read_lines(file), rows):
            for text in json.loads(line).values():
                check_text(*both, text)


def test_llama3_vectors():
    ours = BytePairs(llama3_file(), "here")
    content = shared("tokenizers/llama-spm.vectors.inp").read_bytes().decode()
    texts = content.split("\n__ggml_vocab_test__\n")
    lines = shared("tokenizers/llama-bpe.vectors.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        assert ours.encode(text) == [int(word) for word in line.split()]


@pytest.mark.parametrize("word", ["a", "ab", "= ", " ", "\n", "日", "é", "1", "random"])
def test_a_single_word_of_100_kb(both, word, seed):
    """Time grows little faster than the length."""
    ours, theirs = both
    text = word * (100_000 // len(word))
    if word == "random":
        text = "".join(random.Random(seed).choices("abcdefgh", k=100_000))
    start = time.process_time()
    ids = ours.encode(text)
    assert time.process_time() - start < 5
    assert ids == theirs(text)


# ---- patterns -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", [r"\p{L}", r"\p{N}", r"\p{M}", r"\p{Lu}", r"\s", r"[^\s\p{L}\p{N}]"]
)
def test_patterns_tell_every_character_apart(pattern):
    """As the package does, but for characters that Unicode got after this Python."""
    tokenizers = pytest.importorskip("tokenizers")
    surrogates = range(0xD800, 0xE000)
    codes = [code for code in range(sys.maxunicode + 1) if code not in surrogates]
    letters = only_settled("".join(map(chr, codes)))

    ours = compile_pattern(pattern)
    stand_ins = StandIns()
    theirs = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed")
    for start in range(0, len(letters), 4096):
        part = letters[start : start + 4096]
        unmatched = []
        for letter, stand_in in zip(part, part.translate(stand_ins), strict=True):
            if not ours.fullmatch(stand_in):
                unmatched.append(letter)
        left = [piece for piece, _ in theirs.pre_tokenize_str(part)]
        assert "".join(unmatched) == "".join(left)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\[\p{L}+\]",
        r"[\\p{L}]",
        r"a\|b|c",
        r"\(+x",
        r"[\[\]]+",
        r"(?:a|b|\p{N})?x+",
        r"\{+|\S",
        r"[^\]\p{L}]+",
    ],
)
def test_escaped_marks_are_letters(pattern):
    """An escaped bracket, bar or backslash begins and divides nothing, as the package has it."""
    tokenizers = pytest.importorskip("tokenizers")
    text = "ab[xyé]p{L}\\pLLs (((x é|a|b c 1x {{"
    splitter = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    their_lengths = [len(piece) for piece, _ in splitter.pre_tokenize_str(text)]
    pieces = compile_pattern(pattern).split(text.translate(StandIns()))
    assert [len(piece) for piece in pieces if piece] == their_lengths


# ---- special tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_no_text_can_make_an_added_token(style, seed):
    ours = BytePairs(train_file(style, LEARNED * 3).encode(), "here")
    names = [*SPECIAL, "<tool_call>"]
    assert set(ours.added_tokens) == set(names)

    rng = random.Random(seed)
    mixed = ["".join(rng.choices([*names, " ", "<|", "x"], k=9)) for _ in range(200)]
    for text in names + mixed:
        ids = ours.encode(text)
        assert not set(ours.added_tokens.values()) & set(ids)
        assert ours.decode(ids) == text


def test_decoding_drops_special_tokens_and_shows_others():
    ours = BytePairs(train_file("llama-3", LEARNED).encode(), "here")
    ids = ours.encode("one two")
    unknown_id = 10**6
    begin = ours.added_tokens["<|begin_of_text|>"]
    tool_call = ours.added_tokens["<tool_call>"]
    assert ours.decode([begin, *ids, tool_call, unknown_id]) == "one two<tool_call>"


def test_broken_bytes_decode_to_a_replacement_character():
    ours = BytePairs(train_file("llama-3", LEARNED).encode(), "here")
    ids = ours.encode("\U0001f600")
    assert ours.decode(ids[:1]) == "\N{REPLACEMENT CHARACTER}"


def test_a_piece_that_spells_no_bytes_is_text_as_the_package_has_it():
    tokenizers = pytest.importorskip("tokenizers")
    file = json.loads(train_file("gpt-2", LEARNED))
    first = len(file["model"]["vocab"]) + 10
    file["model"]["vocab"] |= {"the fox": first, "Ġthe▁fox": first + 1, "Ġ日": first + 2}
    ours = BytePairs(json.dumps(file).encode(), "here")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(file))
    for ids in ([first], [first + 1, 70], [70, first + 2, 71]):
        assert ours.decode(ids) == theirs.decode(ids)


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "tokenizer.json").write_text(train_file("gpt-2", LEARNED))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NOTES["gpt-2"]))
    with pytest.raises(UserError, match="surrogate"):
        load_tokenizer(tmp_path).encode("a\ud800")


# ---- folders --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "bos", "eos"),
    [("gpt-2", 0, 0), ("smollm-2", 5, 6), ("qwen-2", -1, 6), ("llama-3", 1, 4)],
)
def test_a_folder_of_the_family(tmp_path, style, bos, eos):
    content = train_file(style, LEARNED)
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NOTES[style]))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos, loaded.eos) == (bos, eos)
    assert loaded.turn_marks == {}
    assert loaded.prefix_guard_ids == []
    assert loaded.size == loaded.special["<tool_call>"] + 1
    assert loaded.model == content.encode()

    ids = [1, *loaded.encode("a b\n\x1b"), 4]
    shown = "".join(loaded.piece(token_id) for token_id in ids)
    assert shown == "<|begin_of_text|>a b⏎\N{REPLACEMENT CHARACTER}<|eot_id|>"


def test_config_json_says_the_ends_where_nothing_names_them(tmp_path):
    (tmp_path / "tokenizer.json").write_text(train_file("llama-3", LEARNED))
    with pytest.raises(UserError, match="eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [4, 0]}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos, loaded.eos) == (1, 4)


def test_a_sentencepiece_model_comes_first(model_folder, tokenizer):
    (model_folder / "tokenizer.json").write_text(train_file("llama-3", LEARNED))
    assert load_tokenizer(model_folder).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


# ---- what is refused ------------------------------------------------------------------------


def check_refused(file: dict) -> None:
    """One sentence, which names the file and says what to do."""
    with pytest.raises(UserError, match="here/tokenizer") as caught:
        BytePairs(json.dumps(file).encode(), "here/tokenizer.json")
    assert "\n" not in str(caught.value)
    assert "tokenizer.model" in str(caught.value)


@pytest.fixture(scope="module")
def llama3_style() -> str:
    return train_file("llama-3", LEARNED)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "Sequence", "normalizers": []}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}],
            }
        },
        {"added_tokens": [{"id": 3, "content": "   ", "special": False}]},
        {"added_tokens": 3},
        {"model": 7},
    ],
)
def test_a_file_that_asks_for_more_is_refused(llama3_style, change):
    check_refused(json.loads(llama3_style) | change)


@pytest.mark.parametrize(
    "change",
    [
        {"type": "WordPiece", "vocab": {}},
        {"byte_fallback": True},
        {"dropout": 0.1},
        {"merges": ["a"]},
        {"merges": [["zzz", "y"]]},
    ],
)
def test_a_model_that_asks_for_more_is_refused(llama3_style, change):
    file = json.loads(llama3_style)
    file["model"] |= change
    check_refused(file)


@pytest.mark.parametrize(
    "change",
    [
        {"behavior": "Removed"},
        {"invert": True},
        {"pattern": {"String": "x"}},
        {"pattern": {"Regex": r"\w+"}},
        {"pattern": {"Regex": r"\d"}},
        {"pattern": {"Regex": r"[\S]"}},
        {"pattern": {"Regex": r"(a)"}},
        {"pattern": {"Regex": r"\p{Han}"}},
        {"pattern": {"Regex": r"[\p{Han}]"}},
        {"pattern": {"Regex": r"("}},
        {"pattern": {"Regex": r"[a&&b]"}},
        {"pattern": {"Regex": r"\P{L}"}},
        {"pattern": {"Regex": r"\pL"}},
    ],
)
def test_a_split_that_asks_for_more_is_refused(llama3_style, change):
    file = json.loads(llama3_style)
    file["pre_tokenizer"]["pretokenizers"][0] |= change
    check_refused(file)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_refused(content):
    with pytest.raises(UserError, match="here"):
        BytePairs(content, "here")


def test_an_end_that_is_no_token_is_looked_for_once(llama3_style):
    """A name among two thousand million ids would take a minute and a half."""
    file = json.loads(llama3_style)
    file["added_tokens"][0]["id"] = (1 << 31) - 1
    start = time.process_time()
    with pytest.raises(UserError, match="nosuch"):
        Tokenizer(json.dumps(file).encode(), "x/tokenizer.json", ends={"eos": "nosuch"})
    assert time.process_time() - start < 5


def test_a_byte_without_a_token_is_said():
    file = json.loads(train_file("gpt-2", LEARNED))
    del file["model"]["vocab"]["q"]
    file["model"]["merges"] = []
    ours = BytePairs(json.dumps(file).encode(), "here")
    assert ours.decode(ours.encode("a b")) == "a b"
    with pytest.raises(UserError, match="no token"):
        ours.encode("quick")
