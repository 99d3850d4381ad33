"""Byte-level BPE against the `tokenizers` package, Llama-3's vectors, and the texts of HH-RLHF."""

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
from test_tokenizer import ODD, random_text
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


@pytest.fixture(scope="module", params=[*STYLES, "the real llama-3"])
def both(request):
    """(BytePairs, text -> ids by the `tokenizers` package)"""
    if request.param == "the real llama-3":
        file = gzip.decompress(shared("tokenizers/llama3-tokenizer.json.gz").read_bytes()).decode()
    else:
        file = train_file(request.param, LEARNED * 3)
    return BytePairs(file.encode(), "here"), oracle(file)


@functools.cache
def settled(letter: str) -> bool:
    """Whether this Python knows the letter, and the package's older tables place it among other marks as this Python does."""
    marked = f"a\u0301{letter}\u0334"
    return unicodedata.category(letter) != "Cn" and NFC().normalize_str(
        marked
    ) == unicodedata.normalize("NFC", marked)


def normalized(text: str, tokenizer: BytePairs) -> str:
    """The text as the tokenizer takes it."""
    if tokenizer.unicode_form is None:
        return text
    return unicodedata.normalize(tokenizer.unicode_form, text)


def known(text: str) -> str:
    """The text without characters that Unicode got after this Python or after the package's tables."""
    return "".join(filter(settled, text))


# ---- ids ------------------------------------------------------------------------------------


def test_ids_are_those_of_the_package(both, seed):
    ours, theirs = both
    rng = random.Random(seed)
    letters = "aé日\u0301²٣ 's'T\n\r\t\x85\u3000-.<|>\U0001f44d"
    mixed = ["".join(rng.choices(letters, k=rng.randrange(40))) for _ in range(1000)]
    for text in map(known, ODD + TRAPS + LEARNED + mixed + [random_text(rng) for _ in range(1000)]):
        ids = ours.encode(text)
        assert ids == theirs(text), text
        assert ours.decode(ids) == (
            unicodedata.normalize("NFC", text) if ours.unicode_form else text
        )


@pytest.mark.parametrize("rows", [80, pytest.param(1250, marks=pytest.mark.slow)])
def test_ids_of_real_dialogues(both, rows):
    """Of each file so many rows; the long form takes a quarter of a minute per tokenizer."""
    ours, theirs = both
    for file in find_files(str(shared("data/hh-rlhf"))):
        for _, line in islice(read_lines(file), rows):
            for text in json.loads(line).values():
                ids = ours.encode(text)
                assert ids == theirs(text)
                assert ours.decode(ids) == normalized(text, ours)


def test_llama3_vectors():
    ours = BytePairs(
        gzip.decompress(shared("tokenizers/llama3-tokenizer.json.gz").read_bytes()), "here"
    )
    texts = (
        shared("tokenizers/llama-spm.vectors.inp")
        .read_bytes()
        .decode()
        .split("\n__ggml_vocab_test__\n")
    )
    lines = shared("tokenizers/llama-bpe.vectors.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    assert [ours.encode(text) for text in texts] == [
        [int(word) for word in line.split()] for line in lines
    ]


@pytest.mark.parametrize("word", ["a", "ab", "= ", " ", "\n", "日", "é", "1", "random"])
def test_a_single_word_of_100_kb(both, word, seed):
    ours, theirs = both
    text = (
        "".join(random.Random(seed).choices("abcdefgh", k=100_000))
        if word == "random"
        else word * (100_000 // len(word))
    )
    start = time.process_time()
    ids = ours.encode(text)
    assert time.process_time() - start < 5
    assert ids == theirs(text)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (r"\p{L}", "L"),
        (r"\p{N}", "N"),
        (r"\p{M}", "M"),
        (r"\p{Lu}", "Lu"),
        (r"\s", ""),
        (r"[^\s\p{L}\p{N}]", ""),
    ],
)
def test_patterns_tell_every_character_apart(pattern, name):
    """As the package does, but for characters that Unicode got after this Python."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = known(
        "".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    )
    ours, stand_ins = compile_pattern(pattern), StandIns()
    theirs = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed")
    for start in range(0, len(letters), 4096):
        part = letters[start : start + 4096]
        left = "".join(piece for piece, _ in theirs.pre_tokenize_str(part))
        mine = "".join(
            c
            for c, stand_in in zip(part, part.translate(stand_ins), strict=True)
            if not ours.fullmatch(stand_in)
        )
        assert mine == left


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
    """A bracket, bar or backslash that is escaped begins and divides nothing, as the package has it."""
    tokenizers = pytest.importorskip("tokenizers")
    text = "ab[xyé]p{L}\\pLLs (((x é|a|b c 1x {{"
    theirs = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(pattern), "isolated"
    ).pre_tokenize_str(text)
    assert [
        len(piece) for piece in compile_pattern(pattern).split(text.translate(StandIns())) if piece
    ] == [len(piece) for piece, _ in theirs]


# ---- special tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_no_text_can_make_an_added_token(style, seed):
    rng = random.Random(seed)
    ours = BytePairs(train_file(style, LEARNED * 3).encode(), "here")
    assert set(ours.added_tokens) == {*SPECIAL, "<tool_call>"}
    for text in [
        *SPECIAL,
        "<tool_call>",
        *("".join(rng.choices([*SPECIAL, "<tool_call>", " ", "<|", "x"], k=9)) for _ in range(200)),
    ]:
        ids = ours.encode(text)
        assert not set(ours.added_tokens.values()) & set(ids) and ours.decode(ids) == text


def test_decoding_drops_special_tokens_shows_others_and_minds_broken_bytes():
    ours = BytePairs(train_file("llama-3", LEARNED).encode(), "here")
    ids = ours.encode("one two")
    assert (
        ours.decode([1, *ids[:2], 4, *ids[2:], ours.added_tokens["<tool_call>"], 10**6])
        == "one two<tool_call>"
    )
    assert ours.decode(ours.encode("\U0001f600")[:1]) == "�"


def test_a_piece_that_spells_no_bytes_is_text_as_the_package_has_it():
    file = json.loads(train_file("gpt-2", LEARNED))
    first = len(file["model"]["vocab"]) + 10
    file["model"]["vocab"] |= {"the fox": first, "Ġthe▁fox": first + 1, "Ġ日": first + 2}
    ours, theirs = (
        BytePairs(json.dumps(file).encode(), "here"),
        pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(file)),
    )
    for ids in ([first], [first + 1, 70], [70, first + 2, 71]):
        assert ours.decode(ids) == theirs.decode(ids)


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "tokenizer.json").write_text(train_file("gpt-2", LEARNED))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NOTES["gpt-2"]))
    with pytest.raises(UserError, match="surrogate"):
        load_tokenizer(tmp_path).encode("a\ud800")


# ---- folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_a_folder_of_the_family(tmp_path, style):
    (tmp_path / "tokenizer.json").write_text(train_file(style, LEARNED))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NOTES[style]))
    found = load_tokenizer(tmp_path)
    wanted = {"gpt-2": (0, 0), "smollm-2": (5, 6), "qwen-2": (-1, 6), "llama-3": (1, 4)}[style]
    assert (
        (found.bos, found.eos) == wanted and found.turn_marks == {} and found.prefix_guard_ids == []
    )
    assert found.size == found.special["<tool_call>"] + 1
    assert found.model == (tmp_path / "tokenizer.json").read_bytes()
    assert (
        "".join(map(found.piece, [1, *found.encode("a b\n\x1b"), 4]))
        == "<|begin_of_text|>a b⏎�<|eot_id|>"
    )


def test_config_json_says_the_ends_where_nothing_names_them(tmp_path):
    (tmp_path / "tokenizer.json").write_text(train_file("llama-3", LEARNED))
    with pytest.raises(UserError, match="eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [4, 0]}))
    found = load_tokenizer(tmp_path)
    assert (found.bos, found.eos) == (1, 4)


def test_a_sentencepiece_model_comes_first(model_folder, tokenizer):
    (model_folder / "tokenizer.json").write_text(train_file("llama-3", LEARNED))
    assert load_tokenizer(model_folder).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "WordPiece", "vocab": {}}},
        {"model": {"byte_fallback": True}},
        {"model": {"dropout": 0.1}},
        {"model": {"merges": ["a"]}},
        {"model": {"merges": [["zzz", "y"]]}},
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
        *(
            {"pattern": pattern}
            for pattern in [
                r"\w+",
                r"\d",
                r"[\S]",
                r"(a)",
                r"\p{Han}",
                r"[\p{Han}]",
                r"(",
                r"[a&&b]",
                r"\P{L}",
                r"\pL",
            ]
        ),
        {"split": {"behavior": "Removed"}},
        {"split": {"invert": True}},
        {"split": {"pattern": {"String": "x"}}},
    ],
)
def test_what_is_not_done_here_is_refused(change):
    file = json.loads(train_file("llama-3", LEARNED))
    split = file["pre_tokenizer"]["pretokenizers"][0]
    if "pattern" in change:
        split["pattern"] = {"Regex": change["pattern"]}
    elif "split" in change:
        split |= change["split"]
    elif isinstance(change.get("model"), dict):
        file["model"] |= change["model"]
    else:
        file |= change
    with pytest.raises(UserError, match="here/tokenizer") as caught:
        BytePairs(json.dumps(file).encode(), "here/tokenizer.json")
    assert "\n" not in str(caught.value) and "tokenizer.model" in str(caught.value)


def test_an_end_that_is_no_token_is_looked_for_once():
    """A name among two thousand million ids would take a minute and a half."""
    file = json.loads(train_file("llama-3", LEARNED))
    file["added_tokens"][0]["id"] = (1 << 31) - 1
    start = time.process_time()
    with pytest.raises(UserError, match="nosuch"):
        Tokenizer(json.dumps(file).encode(), "x/tokenizer.json", ends={"eos": "nosuch"})
    assert time.process_time() - start < 5


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_refused(content):
    with pytest.raises(UserError, match="here"):
        BytePairs(content, "here")


def test_a_byte_without_a_token_is_said(tmp_path):
    file = json.loads(train_file("gpt-2", LEARNED))
    file["model"] |= {
        "vocab": {k: v for k, v in file["model"]["vocab"].items() if k != "q"},
        "merges": [],
    }
    ours = BytePairs(json.dumps(file).encode(), "here")
    assert ours.decode(ours.encode("a b")) == "a b"
    with pytest.raises(UserError, match="no token"):
        ours.encode("quick")
