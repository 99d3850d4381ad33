"""Text to ids and back, against sentencepiece, Llama-2's vectors, and the texts of HH-RLHF."""

import json
import random

import pytest
from conftest import TEXTS, shared

from minmacpo import UserError
from minmacpo.core.checkpoint import check_model_folder, stop_ids
from minmacpo.data.readers import find_files, read_lines
from minmacpo.data.tokenizer import TURN_MARKS, Tokenizer, load_tokenizer, train_tokenizer

ODD = [
    "Hello world",
    "été, naïve façade",
    "日本語の文章です。",
    "हिन्दी ਪੰਜਾਬੀ",
    "עברית ‏ العربية",
    "👍🏽 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "e\u0301 vs \u00e9; ﬁ ½ ①",
    "\ufeffbom",
    "zero\u200bwidth\u200d\u2060",
    "\u00a0nbsp\u3000wide\u2028line\u2029para\x85",
    "\x00",
    "a\x00b",
    "\x01\x02\x1b[31m\x7f",
    "tab\tand\vand\f",
    "\r\n\r\n",
    "\n",
    "\n\n\n",
    " \n \n ",
    "x\n",
    "\nx",
    " ",
    "  ",
    "   leading",
    "trailing   ",
    "a  b   c    d" + " " * 40 + "e",
    "\t \t",
    " \t\n ",
    "a" * 5000,
    "ab" * 2000,
    "Donaudampfschifffahrtsgesellschaftskapitän" * 20,
    "1234567890" * 100,
    "=" * 300,
    "<user>",
    "<bot>hi</s><s>",
    "</s> </s>",
    "<s>",
    "<unk>",
    "<0x0A><0xFF>",
    "<pad>",
    "[INST] x [/INST]",
    "<|eot_id|>",
    "\n\nHuman: x\n\nAssistant: y",
    "a < b > c",
    "\\n \\t",
    "",
    "'\"`",
    "https://x.y/z?a=b&c=%20",
]


@pytest.fixture(params=["trained here", "llama-2", "mistral", "stories"])
def any_tokenizer(request, tokenizer) -> Tokenizer:
    if request.param == "trained here":
        return tokenizer
    if request.param == "stories":
        return load_tokenizer(shared("weights/stories260K-hf"))
    name = {"llama-2": "llama2-tokenizer", "mistral": "mistral-v1"}[request.param]
    return Tokenizer(shared(f"tokenizers/{name}.model").read_bytes())


def random_text(rng: random.Random) -> str:
    """Characters from everywhere, control characters and spaces among them (no surrogates, no U+2581)."""
    planes = [
        (0, 0x7F),
        (0x20, 0x20),
        (0x80, 0x24F),
        (0x370, 0x2FFF),
        (0x3000, 0xD7FF),
        (0xE000, 0xFFFF),
        (0x10000, 0x10FFFF),
    ]
    letters = [chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randrange(60))]
    return "".join(letters).replace("▁", "_")


# ---- text and back --------------------------------------------------------------------------


def test_decode_gives_back_what_encode_took(any_tokenizer, seed):
    rng = random.Random(seed)
    for text in ODD + [random_text(rng) for _ in range(300)]:
        ids = any_tokenizer.encode(text)
        assert any_tokenizer.decode(ids) == text, ids
        at_start = any_tokenizer.decode(any_tokenizer.encode(text, start=True))
        assert at_start == (" " if any_tokenizer.prefix_guard_ids and text else "") + text


def test_no_text_can_make_a_special_token(any_tokenizer, seed):
    rng = random.Random(seed)
    marks = ["<s>", "</s>", "<unk>", "<user>", "<bot>", "<pad>", "<", ">", "/", " ", "s", "user"]
    texts = ODD + ["".join(rng.choices(marks, k=20)) for _ in range(200)]
    special = {
        i
        for i in range(any_tokenizer.size)
        if any_tokenizer.processor.is_control(i) or any_tokenizer.processor.is_unknown(i)
    }
    assert {any_tokenizer.bos, any_tokenizer.eos} <= special
    for text in texts:
        for start in (False, True):
            assert not special & set(any_tokenizer.encode(text, start)), text


def test_every_real_dialogue_comes_back(tokenizer, llama2, seed):
    for file in find_files(str(shared("data/hh-rlhf"))):
        lines = [text for _, text in read_lines(file)]
        for text in [
            t for line in random.Random(seed).sample(lines, 600) for t in json.loads(line).values()
        ]:
            assert tokenizer.decode(tokenizer.encode(text)) == text
            if "▁" not in text:
                assert llama2.decode(llama2.encode(text)) == text


def test_a_broken_byte_sequence_decodes_to_replacement_characters(tokenizer):
    ids = tokenizer.encode("é")
    assert len(ids) == 2 and tokenizer.decode(ids[:1]) == "�" and tokenizer.decode(ids) == "é"


def test_special_tokens_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("one two")
    marks = [*tokenizer.turn_marks.values()]
    assert (
        tokenizer.decode([tokenizer.bos, marks[0], *ids[:2], marks[1], *ids[2:], tokenizer.eos])
        == "one two"
    )


# ---- against sentencepiece and its vectors --------------------------------------------------


def test_llama2_vectors(llama2):
    texts = (
        shared("tokenizers/llama-spm.vectors.inp")
        .read_bytes()
        .decode()
        .split("\n__ggml_vocab_test__\n")
    )
    lines = shared("tokenizers/llama-spm.vectors.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    wanted = [[int(word) for word in line.split()] for line in lines]
    assert [llama2.encode(text, start=True) for text in texts] == wanted


def test_a_segment_is_encoded_as_inside_a_text(llama2):
    """The dummy space that Llama's model puts before a text must not come between segments."""
    space = llama2.processor.piece_to_id("▁")
    assert (
        llama2.encode("hello", start=True)
        == llama2.processor.encode("hello")
        == [llama2.processor.piece_to_id("▁hello")]
    )
    assert llama2.encode("hello") == [llama2.processor.piece_to_id("hello")]
    assert llama2.encode(" hello") == [llama2.processor.piece_to_id("▁hello")]
    assert llama2.encode("\n\nHuman:")[0] == llama2.processor.piece_to_id("<0x0A>") != space


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="here"):
        Tokenizer(b"\x00\x01 no model", "here")
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


# ---- training -------------------------------------------------------------------------------


def test_training_twice_gives_the_same_bytes(seed):
    texts = [
        *TEXTS * 3,
        *("".join(random.Random(seed + i).choices("abc \n<é", k=50)) for i in range(50)),
    ]
    assert train_tokenizer(texts, 420) == train_tokenizer(iter(texts), 420)


def test_a_trained_tokenizer_has_the_pieces_that_templates_need(tokenizer):
    marks = [*tokenizer.turn_marks.values()]
    assert [tokenizer.processor.id_to_piece(i) for i in marks] == [*TURN_MARKS.values()] and len(
        {*marks, tokenizer.bos, tokenizer.eos}
    ) == 4
    assert tokenizer.size <= 400 and not tokenizer.prefix_guard_ids
    assert all(
        tokenizer.processor.piece_to_id(f"<0x{byte:02X}>") != tokenizer.processor.unk_id()
        for byte in range(256)
    )
    assert len(tokenizer.encode(TEXTS[2])) < len(TEXTS[2].encode()) * 0.7, (
        "it should have learned words"
    )


@pytest.mark.parametrize(
    ("texts", "vocab"),
    [([], 400), ([""], 400), (TEXTS, 100), (["".join(map(chr, range(0x4E00, 0x5200)))], 500)],
)
def test_texts_that_cannot_make_a_tokenizer(texts, vocab):
    with pytest.raises(UserError) as caught:
        train_tokenizer(texts, vocab)
    assert "model.vocab" in str(caught.value) and "\n" not in str(caught.value)


# ---- folders --------------------------------------------------------------------------------


def beside(folder, **files) -> Tokenizer:
    """The tokenizer of the folder with more JSON files in it."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return load_tokenizer(folder)


def test_begin_and_end_are_the_models_where_no_file_names_others(model_folder, tokenizer):
    found = load_tokenizer(model_folder)
    assert (found.bos, found.eos, found.size, found.model) == (
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.size,
        tokenizer.model,
    )
    named = {"content": "<user>", "lstrip": False, "special": True}
    assert (
        beside(model_folder, special_tokens_map={"eos_token": named}).eos
        == tokenizer.turn_marks["user"]
    )
    changed = beside(
        model_folder, tokenizer_config={"eos_token": "<bot>", "bos_token": None, "legacy": True}
    )
    assert (changed.bos, changed.eos) == (tokenizer.bos, tokenizer.turn_marks["assistant"]), (
        "tokenizer_config.json comes first"
    )


def test_added_tokens_are_special_and_count(model_folder, tokenizer):
    size = tokenizer.size
    decoder = {
        str(size + 1): {"content": "<|im_end|>", "special": True},
        "1": {"content": "<s>", "special": True},
    }
    config = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}
    found = beside(model_folder, tokenizer_config=config, added_tokens={"<|im_start|>": size})
    assert found.size == size + 2 and found.eos == size + 1
    assert found.encode("<|im_start|>x<|im_end|>") == tokenizer.encode("<|im_start|>x<|im_end|>")
    assert found.decode([size, *found.encode("x y"), size + 1, size + 7]) == "x y", (
        "nor do a model's spare rows say anything"
    )
    with pytest.raises(
        UserError, match=f"{size + 2} pieces"
    ):  # the embedding has rows for `size` of them
        check_model_folder(model_folder)


def test_every_end_stops(model_folder, tokenizer):
    found = beside(
        model_folder,
        generation_config={"eos_token_id": [7, 9]},
        tokenizer_config={"eos_token": "<bot>"},
    )
    config = json.loads((model_folder / "config.json").read_text())
    assert stop_ids(model_folder, found) == {
        7,
        9,
        tokenizer.turn_marks["assistant"],
        config["eos_token_id"],
    }


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config", {"eos_token": "<|nowhere|>"}),
        ("tokenizer_config", {"eos_token": 10**9}),
        ("tokenizer_config", {"eos_token": {"text": "</s>"}}),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "y"}}}),
        ("tokenizer_config", {"added_tokens_decoder": [1]}),
        ("tokenizer_config", {"added_tokens_decoder": {"5": "y"}}),
        ("added_tokens", [1]),
    ],
)
def test_damaged_files_beside_a_tokenizer(model_folder, file, content):
    with pytest.raises(UserError) as caught:
        beside(model_folder, **{file: content})
    assert str(model_folder) in str(caught.value) and "\n" not in str(caught.value)
