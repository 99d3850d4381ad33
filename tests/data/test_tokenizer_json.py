"""tokenizer.json files that the package `tokenizers` reads, and what is said of them without it."""

import copy
import json
import random
import sys
import time

import pytest
from byte_pairs import empty_file, train_file
from texts import ODD, random_unicode

from minmacpo import UserError
from minmacpo.data.bpe import BytePairs
from minmacpo.data.tokenizer import Tokenizer
from minmacpo.data.tokenizer_files import TokenizerNotes
from minmacpo.data.tokenizer_json import MARK, PackageTokenizer, read_tokenizer_json

tokenizers = pytest.importorskip("tokenizers")

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]
LEARNED = ["the quick brown fox “jumps” over … 12 dogs", "naïve 日本語 한국어 Été", "x  y\n\nz"]
TEXTS = [
    *LEARNED,
    "",
    " ",
    " a b ",
    "\n",
    "he said “no” … 한국어hello",
    "hello世界 的 中国 123",
    "<|im_start|>user</s><s>",
    "<tool> <TOOL><unk>",
]


def byte_level(**settings: bool) -> dict:
    """The step of a tokenizer.json that makes bytes."""
    usual = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"type": "ByteLevel"} | usual | settings


def split(pattern: dict, behavior: str = "Isolated") -> dict:
    """A Split of a tokenizer.json before the step that makes bytes."""
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False},
            byte_level(use_regex=False),
        ],
    }


# Byte-level files that cut texts into words in a way of their own
OTHER_WORDS = {
    "curly quotes": split({"Regex": "[“”‘’…]|[^“”‘’…]+"}),
    "a line's end": split({"Regex": r"\s+$"}),
    "a repeat of repeats": split({"Regex": r"\p{N}{1,3}+"}),
    "a plain string": split({"String": r"\p{N}{1,3}"}),
    "removed": split({"Regex": " "}, "Removed"),
    "merged with the next": split({"Regex": r"\s"}, "MergedWithNext"),
    "cases beyond ASCII": split({"Regex": r"(?i:été|ſ)|\p{L}+"}),
    "a prefix": byte_level(add_prefix_space=True),
    "bytes alone": byte_level(use_regex=False),
    "none": None,
}


def byte_level_file(pre_tokenizer: dict | None, **parts) -> dict:
    """A tokenizer.json that was trained with a pre-tokenizer."""
    tokenizer = tokenizers.Tokenizer.from_str(empty_file(pre_tokenizer))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(LEARNED * 9, trainer)
    tokenizer.add_tokens(["<tool>"])
    return json.loads(tokenizer.to_str()) | parts


def spaced_file(normalizer: dict | None, pre_tokenizer: dict | None) -> dict:
    """A tokenizer.json as sentencepiece models are converted to: "▁" for a space, bytes at need."""
    content = empty_file(pre_tokenizer, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    file = json.loads(content) | {"normalizer": normalizer}
    file["decoder"] = {"type": "Sequence", "decoders": steps}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(file))
    bytes_in_vocab = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[*SPECIAL, *bytes_in_vocab],
        limit_alphabet=40,
        show_progress=False,
    )
    tokenizer.train_from_iterator(LEARNED * 9, trainer)
    file = json.loads(tokenizer.to_str())
    file["added_tokens"] = file["added_tokens"][: len(SPECIAL)]  # the bytes are no marks
    return file


def unigram_file() -> dict:
    """A tokenizer.json whose vocabulary holds the names of its marks, likelier than all else."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    pieces = [[name, 0.0] for name in SPECIAL]
    pieces += [["▁the", -2.0], ["the", -3.0], *([letter, -5.0] for letter in "▁abehistu<>/|_m")]
    marks = ("single_word", "lstrip", "rstrip", "normalized")
    added = []
    for token_id, name in enumerate(SPECIAL):
        added.append(
            {"id": token_id, "content": name, "special": True} | dict.fromkeys(marks, False)
        )
    return json.loads(empty_file(metaspace)) | {
        "added_tokens": added,
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces},
    }


SPACES_AS_MARKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LLAMA_2_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES_AS_MARKS],
}
GEMMA_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
FILES = {
    **{name: lambda step=step: byte_level_file(step) for name, step in OTHER_WORDS.items()},
    "lower case": lambda: byte_level_file(byte_level(), normalizer={"type": "Lowercase"}),
    "NFKC": lambda: byte_level_file(byte_level(), normalizer={"type": "NFKC"}),
    "Gemma": lambda: spaced_file(SPACES_AS_MARKS, GEMMA_SPLIT),
    "Llama 2": lambda: spaced_file(LLAMA_2_NORMALIZER, None),
    "Unigram": unigram_file,
}


@pytest.fixture(scope="module", params=FILES)
def both(request):
    """(a PackageTokenizer, the package's own tokenizer, which makes marks of their names)"""
    content = json.dumps(FILES[request.param]())
    ours = read_tokenizer_json(content.encode(), "here")
    assert isinstance(ours, PackageTokenizer)
    return ours, tokenizers.Tokenizer.from_str(content)


def without_marks(text: str) -> str:
    """The text without names of special tokens, of which the package makes ids."""
    for name in SPECIAL:
        text = text.replace(name, "")
    return text


def check_text(ours: PackageTokenizer, theirs, text: str) -> None:
    """Ids and decoded texts are those of the package, at the start of a document and within it."""
    start_ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, start=True) == start_ids, ascii(text)
    later_ids = theirs.encode("<s>" + text, add_special_tokens=False).ids[1:]
    behind_token = ours.encode(text, start=ours.space_before == "always")
    assert behind_token == later_ids, ascii(text)
    for ids in (start_ids, later_ids):
        assert ours.decode(ids) == theirs.decode(ids)


def test_ids_and_texts_are_those_of_the_package(both, seed):
    rng = random.Random(seed)
    texts = [*TEXTS, *ODD, *(random_unicode(rng) for _ in range(100))]
    for text in texts:
        check_text(*both, without_marks(text))


def test_no_space_is_put_before_a_part_of_a_document(both):
    """The parts of a text have the ids of the whole, if they are cut where words are."""
    ours, theirs = both
    whole = "the quick brown fox jumps over"
    for length in (3, 9, 19):
        ids = ours.encode(whole[:length], start=True) + ours.encode(whole[length:])
        assert theirs.decode(ids) == theirs.decode(theirs.encode(whole).ids)


def test_no_text_can_make_a_special_token(both, seed):
    ours, theirs = both
    rng = random.Random(seed)
    special_ids = {theirs.token_to_id(name) for name in SPECIAL} - {theirs.token_to_id("<unk>")}
    texts = ["".join(rng.choices([*SPECIAL, "a", " ", "<"], k=6)) for _ in range(100)]
    for text in SPECIAL + texts:
        for start in (True, False):
            assert not special_ids.intersection(ours.encode(text, start)), text


def test_ids_of_tokens_and_their_number(both):
    ours, theirs = both
    assert ours.size == theirs.get_vocab_size()
    for name, token_id in ours.special_tokens.items():
        assert theirs.token_to_id(name) == token_id
    assert set(SPECIAL) == ours.special_tokens.keys()
    assert ours.decode([ours.special_tokens["</s>"], ours.size, ours.size + 7]) == ""


def test_an_added_token_that_is_not_special_is_text(both):
    """As the package has it: made from text, and shown."""
    ours, theirs = both
    for token_id, name in ours.text_tokens.names.items():
        ids = ours.encode(f"the {name}")
        assert token_id in ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_a_file_may_say_that_texts_are_cut_or_padded():
    """transformers takes no notice of either."""
    file = byte_level_file(OTHER_WORDS["curly quotes"])
    file["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    ours = read_tokenizer_json(json.dumps(file).encode(), "here")
    assert len(ours.encode("zebras, " * 9)) > 4


def test_the_mark_before_a_text_is_no_text(both):
    with pytest.raises(UserError, match="no characters"):
        both[0].encode(f"a{MARK}b")


def test_half_a_surrogate_pair_is_no_text():
    content = json.dumps(byte_level_file(OTHER_WORDS["curly quotes"])).encode()
    tokenizer = Tokenizer(content, "x/tokenizer.json", notes=TokenizerNotes(ends={"eos": "</s>"}))
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("a\ud800")
    assert tokenizer.decode(tokenizer.encode("the quick")) == "the quick"
    assert "".join(map(tokenizer.piece, [*tokenizer.encode("the fox\n"), 2])) == "the fox⏎</s>"


def test_pieces_of_words_are_shown_with_their_space():
    content = json.dumps(FILES["Gemma"]()).encode()
    tokenizer = Tokenizer(content, "x/tokenizer.json", notes=TokenizerNotes(ends={"eos": "</s>"}))
    assert "".join(map(tokenizer.piece, tokenizer.encode("the over"))) == "the over"


def test_characters_without_a_token_are_counted():
    """A byte-level file whose vocabulary lacks a letter, and one of whole characters."""
    file = byte_level_file(OTHER_WORDS["curly quotes"])
    vocab = file["model"]["vocab"]
    vocab["unused"] = vocab.pop("q")
    merges = [pair for pair in file["model"]["merges"] if "q" not in "".join(pair)]
    file["model"]["merges"] = merges
    ours = read_tokenizer_json(json.dumps(file).encode(), "here")
    assert ours.count_left_out("quick “quiz”") == 2
    assert ours.decode(ours.encode("quick")) == "uick"

    letters = {letter: token_id for token_id, letter in enumerate("abc")}
    file = json.loads(empty_file(None, vocab=letters))
    ours = read_tokenizer_json(json.dumps(file).encode(), "here")
    assert (ours.encode("abxc"), ours.count_left_out("abxcé")) == ([0, 1, 2], 2)


# ---- without the package, and what it does not read -----------------------------------------


@pytest.fixture(scope="module")
def llama3_style() -> dict:
    return json.loads(train_file("llama-3", LEARNED))


def changed(file: dict, *keys: str | int, to: object) -> dict:
    """A copy of the file with one value changed."""
    copied = copy.deepcopy(file)
    inner = copied
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    return copied


SPLIT = ("pre_tokenizer", "pretokenizers", 0)
ASKS_FOR_MORE = [
    (("normalizer",), {"type": "Lowercase"}, "Lowercase"),
    (("normalizer",), {"type": "NFKC"}, "NFKC"),
    (("pre_tokenizer",), None, "None"),
    (("pre_tokenizer",), {"type": "Metaspace", "replacement": "▁"}, "Metaspace"),
    ((*SPLIT, "behavior"), "Removed", "Removed"),
    ((*SPLIT, "invert"), True, "True"),
    ((*SPLIT, "pattern"), {"String": "x"}, "String"),
    ((*SPLIT, "pattern"), {"Regex": r"\w+"}, "w+"),
    (("decoder",), None, "decoder"),
    (("added_tokens",), [{"id": 3, "content": "   ", "special": False}], "added token"),
    (("model", "type"), "WordPiece", "WordPiece"),
    (("model", "byte_fallback"), True, "byte_fallback"),
    (("model", "end_of_word_suffix"), "</w>", "</w>"),
]


@pytest.mark.parametrize(("keys", "value", "named"), ASKS_FOR_MORE)
def test_without_the_package_a_sentence_says_how_to_install_it(
    llama3_style, keys, value, named, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    content = json.dumps(changed(llama3_style, *keys, to=value)).encode()
    with pytest.raises(UserError, match="here/tokenizer") as caught:
        read_tokenizer_json(content, "here/tokenizer.json")
    sentence = str(caught.value)
    assert sentence.endswith("pip install tokenizers")
    assert named in sentence and "\n" not in sentence


def test_a_known_file_needs_no_package(llama3_style, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for normalizer in (None, {"type": "Sequence", "normalizers": []}, {"type": "NFC"}):
        file = llama3_style | {"normalizer": normalizer}
        ours = read_tokenizer_json(json.dumps(file).encode(), "here")
        assert isinstance(ours, BytePairs)
        assert ours.normalizes == (normalizer == {"type": "NFC"})


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("added_tokens",), 3),
        (("model",), 7),
        (("model", "dropout"), 0.1),
        (("model", "merges"), ["a"]),
        (("model", "merges"), [["zzz", "y"]]),
        (("model", "vocab", "a"), 7.5),
        ((*SPLIT, "pattern"), {"Regex": "("}),
        ((*SPLIT, "behavior"), "Sideways"),
        (("pre_tokenizer",), {"type": "Nonsense"}),
        (("normalizer",), {"type": "Nonsense"}),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(llama3_style, keys, value):
    content = json.dumps(changed(llama3_style, *keys, to=value)).encode()
    with pytest.raises(UserError, match="here/tokenizer") as caught:
        read_tokenizer_json(content, "here/tokenizer.json")
    assert "\n" not in str(caught.value)
    assert "tokenizer.model" in str(caught.value)


def test_what_the_package_fails_at_is_said_in_a_sentence():
    """It raises at the first, panics at the second, and would abort the program at the third."""
    without_unknown = changed(FILES["Unigram"](), "model", "unk_id", to=None)
    ours = read_tokenizer_json(json.dumps(without_unknown).encode(), "here")
    with pytest.raises(UserError, match="here: the package tokenizers cannot"):
        ours.encode("zzz")

    strip = {"type": "Strip", "content": "q", "start": 0, "stop": 9}
    ours = read_tokenizer_json(json.dumps(FILES["Gemma"]() | {"decoder": strip}).encode(), "here")
    with pytest.raises(UserError, match="here: the package tokenizers cannot"):
        ours.decode(ours.encode("q"))

    prefixed = changed(FILES["curly quotes"](), "model", "continuing_subword_prefix", to="日日")
    with pytest.raises(UserError, match="prefix"):
        read_tokenizer_json(json.dumps(prefixed).encode(), "here")


def test_an_id_that_the_package_would_not_give_is_refused():
    file = changed(FILES["curly quotes"](), "added_tokens", 4, "id", to=99_999)
    with pytest.raises(UserError, match="99999"):
        read_tokenizer_json(json.dumps(file).encode(), "here")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_tokenizer_is_refused(content):
    with pytest.raises(UserError, match="here"):
        read_tokenizer_json(content, "here")


def test_an_end_that_is_no_token_is_looked_for_once(llama3_style):
    """A name among two thousand million ids would take a minute and a half."""
    file = changed(llama3_style, "added_tokens", 0, "id", to=(1 << 31) - 1)
    start = time.process_time()
    with pytest.raises(UserError, match="nosuch"):
        Tokenizer(
            json.dumps(file).encode(),
            "x/tokenizer.json",
            notes=TokenizerNotes(ends={"eos": "nosuch"}),
        )
    assert time.process_time() - start < 5
