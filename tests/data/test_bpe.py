"""Byte-level BPE against the `tokenizers` package, Llama 3's vectors, and the texts of HH-RLHF."""

import gzip
import json
import random
import time
from collections.abc import Callable
from itertools import islice

import pytest
from byte_pairs import (
    NOTES,
    SMOLLM_2_LACKS,
    SPECIAL,
    STYLES,
    lacking_bytes,
    oracle,
    train_file,
)
from conftest import TEXTS, shared
from texts import ODD, random_unicode
from tokenizers.normalizers import NFC

from minmacpo import UserError
from minmacpo.data.bpe import BytePairs
from minmacpo.data.readers import find_files, read_lines
from minmacpo.data.tokenizer import load_tokenizer
from minmacpo.data.tokenizer_json import read_tokenizer_json

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


REAL = "the real llama-3"


def byte_pairs(content: str | bytes) -> BytePairs:
    """The tokenizer in a tokenizer.json that needs no package."""
    tokenizer = read_tokenizer_json(content if type(content) is bytes else content.encode(), "here")
    assert isinstance(tokenizer, BytePairs)
    return tokenizer


def llama3_file() -> bytes:
    return gzip.decompress(shared("tokenizers/llama3-tokenizer.json.gz").read_bytes())


@pytest.fixture(scope="module", params=[*STYLES, REAL])
def both(request):
    """(a BytePairs, text -> ids by the `tokenizers` package)"""
    if request.param == REAL:
        file = llama3_file().decode()
    else:
        file = train_file(request.param, LEARNED * 3)
    return byte_pairs(file), oracle(file)


def normalized(text: str, tokenizer: BytePairs) -> str:
    """The text as the tokenizer takes it."""
    return NFC().normalize_str(text) if tokenizer.normalizes else text


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
        check_text(*both, text)


@pytest.mark.parametrize("rows", [20, pytest.param(1250, marks=pytest.mark.slow)])  # of every file
def test_ids_of_real_dialogues(both, rows):
    """Of each file so many rows; the long form takes a quarter of a minute per tokenizer."""
    for file in find_files(str(shared("data/hh-rlhf"))):
        for _, line in islice(read_lines(file), rows):
            for text in json.loads(line).values():
                check_text(*both, text)


def test_llama3_vectors():
    ours = byte_pairs(llama3_file())
    content = shared("tokenizers/llama-spm.vectors.inp").read_bytes().decode()
    texts = content.split("\n__ggml_vocab_test__\n")
    lines = shared("tokenizers/llama-bpe.vectors.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        assert ours.encode(text) == [int(word) for word in line.split()]


@pytest.mark.parametrize("both", ["gpt-2", "llama-3", "deepseek-v3", REAL], indirect=True)
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


# ---- special tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_no_text_can_make_a_special_token(style, seed):
    ours = byte_pairs(train_file(style, LEARNED * 3))
    assert set(ours.special_tokens) == set(SPECIAL)
    assert list(ours.text_tokens.names.values()) == ["<tool_call>"]

    rng = random.Random(seed)
    mixed = [
        "".join(rng.choices([*SPECIAL, "<tool_call>", " ", "<|", "x"], k=9)) for _ in range(200)
    ]
    for text in SPECIAL + mixed:
        ids = ours.encode(text)
        assert not set(ours.special_tokens.values()) & set(ids)
        tool_calls = [token_id for token_id in ids if token_id in ours.text_tokens.names]
        assert len(tool_calls) == text.count("<tool_call>")
        assert ours.decode(ids) == text


def test_decoding_drops_special_tokens_and_shows_others():
    ours = byte_pairs(train_file("llama-3", LEARNED))
    ids = ours.encode("one two<tool_call>")
    unknown_id = 10**6
    begin = ours.special_tokens["<|begin_of_text|>"]
    assert ours.decode([begin, *ids, unknown_id]) == "one two<tool_call>"


def test_broken_bytes_decode_to_a_replacement_character():
    ours = byte_pairs(train_file("llama-3", LEARNED))
    ids = ours.encode("\U0001f600")
    assert ours.decode(ids[:1]) == "\N{REPLACEMENT CHARACTER}"


def test_a_piece_that_spells_no_bytes_is_text_as_the_package_has_it():
    tokenizers = pytest.importorskip("tokenizers")
    file = json.loads(train_file("gpt-2", LEARNED))
    first = len(file["model"]["vocab"]) + 10
    file["model"]["vocab"] |= {"the fox": first, "Ġthe▁fox": first + 1, "Ġ日": first + 2}
    ours = byte_pairs(json.dumps(file))
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
    assert loaded.adds_space is False
    assert loaded.encode("<tool_call>") == [loaded.size - 1]
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


# ---- bytes without a token ------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_six() -> tuple[BytePairs, Callable[[str], list[int]]]:
    """SmolLM2's vocabulary lacks six control characters, and here "é" lacks one of its bytes."""
    file = lacking_bytes(train_file("smollm-2", LEARNED * 3), SMOLLM_2_LACKS + b"\xa9")
    return byte_pairs(file), oracle(file)


def test_bytes_without_a_token_are_left_out_as_by_the_package(without_six, seed):
    ours, theirs = without_six
    rng = random.Random(seed)
    for _ in range(500):
        text = "".join(rng.choices("the of\x04\x06\x13\x14\x16\x1d\x07é!- ", k=20))
        ids = ours.encode(text)
        assert ids == theirs(text)
        control = sum(map(text.count, SMOLLM_2_LACKS.decode()))
        assert ours.count_left_out(text) == control + text.count("é")


def test_pieces_beside_a_left_out_byte_are_merged(without_six):
    """As the package does: the merges see what is left of a word."""
    ours, theirs = without_six
    assert ours.encode(" \x04..") == theirs(" \x04..") == ours.encode(" ..")
    assert ours.encode("\x04") == theirs("\x04") == []


def test_nothing_is_left_out_where_all_bytes_have_tokens():
    ours = byte_pairs(train_file("gpt-2", LEARNED))
    assert ours.count_left_out("".join(map(chr, range(300)))) == 0
