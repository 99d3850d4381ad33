"""Text to ids and back, against sentencepiece, Llama 2's vectors, and the texts of HH-RLHF."""

import json
import random
from pathlib import Path

import pytest
from conftest import TEXTS, shared
from texts import ODD, random_unicode

from minmacpo import UserError
from minmacpo.core.checkpoint import check_model_folder, stop_ids
from minmacpo.data.readers import find_files, read_lines
from minmacpo.data.tokenizer import TURN_MARKS, Tokenizer, load_tokenizer, train_tokenizer


@pytest.fixture(params=["trained here", "llama-2", "mistral", "stories"])
def any_tokenizer(request, tokenizer) -> Tokenizer:
    if request.param == "trained here":
        return tokenizer
    if request.param == "stories":
        return load_tokenizer(shared("weights/stories260K-hf"))
    name = {"llama-2": "llama2-tokenizer", "mistral": "mistral-v1"}[request.param]
    return Tokenizer(shared(f"tokenizers/{name}.model").read_bytes())


# ---- text and back --------------------------------------------------------------------------


def test_decode_gives_back_what_encode_took(any_tokenizer, seed):
    rng = random.Random(seed)
    for text in ODD + [random_unicode(rng) for _ in range(300)]:
        assert any_tokenizer.decode(any_tokenizer.encode(text)) == text
        # at the start of a document, Llama's models put a space before the text
        has_prefix = any_tokenizer.adds_space and text
        at_start = any_tokenizer.decode(any_tokenizer.encode(text, start=True))
        assert at_start == (f" {text}" if has_prefix else text)


def test_no_text_can_make_a_special_token(any_tokenizer, seed):
    rng = random.Random(seed)
    marks = ["<s>", "</s>", "<unk>", "<user>", "<bot>", "<pad>", "<", ">", "/", " ", "s", "user"]
    texts = ODD + ["".join(rng.choices(marks, k=20)) for _ in range(200)]
    special = set()
    for token_id in range(any_tokenizer.size):
        processor = any_tokenizer.processor.processor
        if processor.is_control(token_id) or processor.is_unknown(token_id):
            special.add(token_id)
    assert {any_tokenizer.bos, any_tokenizer.eos} <= special

    for text in texts:
        for start in (False, True):
            assert not special & set(any_tokenizer.encode(text, start)), text


def test_real_dialogues_come_back(tokenizer, llama2, seed):
    rng = random.Random(seed)
    for file in find_files(str(shared("data/hh-rlhf"))):
        lines = [line for _, line in read_lines(file)]
        for line in rng.sample(lines, 600):
            for text in json.loads(line).values():
                assert tokenizer.decode(tokenizer.encode(text)) == text
                if "▁" not in text:  # which stands for a space in Llama's models
                    assert llama2.decode(llama2.encode(text)) == text


def test_a_broken_byte_sequence_decodes_to_replacement_characters(tokenizer):
    ids = tokenizer.encode("é")
    assert len(ids) == 2
    assert tokenizer.decode(ids) == "é"
    assert tokenizer.decode(ids[:1]) == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("one two")
    user, bot = tokenizer.turn_marks.values()
    with_special = [tokenizer.bos, user, *ids[:2], bot, *ids[2:], tokenizer.eos]
    assert tokenizer.decode(with_special) == "one two"


# ---- against sentencepiece and its vectors --------------------------------------------------


def test_llama2_vectors(llama2):
    content = shared("tokenizers/llama-spm.vectors.inp").read_bytes().decode()
    texts = content.split("\n__ggml_vocab_test__\n")
    lines = shared("tokenizers/llama-spm.vectors.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        assert llama2.encode(text, start=True) == [int(word) for word in line.split()]


def test_a_segment_is_encoded_as_inside_a_text(llama2):
    """The dummy space that Llama's model puts before a text must not come between segments."""

    def piece_id(piece: str) -> int:
        return llama2.processor.processor.piece_to_id(piece)

    assert llama2.encode("hello", start=True) == [piece_id("▁hello")]
    assert llama2.encode("hello") == [piece_id("hello")]
    assert llama2.encode(" hello") == [piece_id("▁hello")]
    first = llama2.encode("\n\nHuman:")[0]
    assert first == piece_id("<0x0A>") != piece_id("▁")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="here"):
        Tokenizer(b"\x00\x01 no model", "here")
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


# ---- training -------------------------------------------------------------------------------


def test_training_twice_gives_the_same_bytes(seed):
    rng = random.Random(seed)
    texts = TEXTS * 3 + ["".join(rng.choices("abc \n<é", k=50)) for _ in range(50)]
    assert train_tokenizer(texts, 420) == train_tokenizer(iter(texts), 420)


def test_a_trained_tokenizer_has_the_pieces_that_templates_need(tokenizer):
    processor = tokenizer.processor.processor
    marks = list(tokenizer.turn_marks.values())
    assert [processor.id_to_piece(mark) for mark in marks] == list(TURN_MARKS.values())
    assert len({*marks, tokenizer.bos, tokenizer.eos}) == 4
    assert tokenizer.size <= 400
    assert tokenizer.adds_space is False
    for byte in range(256):
        assert processor.piece_to_id(f"<0x{byte:02X}>") != processor.unk_id()
    # it has learned words
    assert len(tokenizer.encode(TEXTS[2])) < 0.7 * len(TEXTS[2].encode())


@pytest.mark.parametrize(
    ("texts", "vocab"),
    [([], 400), ([""], 400), (TEXTS, 100), (["".join(map(chr, range(0x4E00, 0x5200)))], 500)],
)
def test_texts_that_cannot_make_a_tokenizer(texts, vocab):
    with pytest.raises(UserError) as caught:
        train_tokenizer(texts, vocab)
    assert "model.vocab" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- model folders --------------------------------------------------------------------------


def load_with(folder: Path, **files) -> Tokenizer:
    """The tokenizer of the folder with more JSON files in it."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return load_tokenizer(folder)


def test_begin_and_end_are_the_models_where_no_file_names_others(model_folder, tokenizer):
    loaded = load_tokenizer(model_folder)
    assert (loaded.bos, loaded.eos) == (tokenizer.bos, tokenizer.eos)
    assert loaded.size == tokenizer.size
    assert loaded.model == tokenizer.model

    token = {"content": "<user>", "lstrip": False, "special": True}
    loaded = load_with(model_folder, special_tokens_map={"eos_token": token})
    assert loaded.eos == tokenizer.turn_marks["user"]

    # tokenizer_config.json comes first
    config = {"eos_token": "<bot>", "bos_token": None, "legacy": True}
    loaded = load_with(model_folder, tokenizer_config=config)
    assert loaded.eos == tokenizer.turn_marks["assistant"]
    assert loaded.bos == tokenizer.bos


def test_added_tokens_are_special_and_count(model_folder, tokenizer):
    size = tokenizer.size
    im_end = {"content": "<|im_end|>", "special": True}
    begin = {"content": "<s>", "special": True}
    config = {
        "added_tokens_decoder": {str(size + 1): im_end, "1": begin},
        "eos_token": "<|im_end|>",
    }
    loaded = load_with(model_folder, tokenizer_config=config, added_tokens={"<|im_start|>": size})
    assert loaded.size == size + 2
    assert loaded.eos == size + 1

    # no text becomes one, and they decode to nothing; so do a model's spare rows
    text = "<|im_start|>x<|im_end|>"
    assert loaded.encode(text) == tokenizer.encode(text)
    ids = [size, *loaded.encode("x y"), size + 1, size + 7]
    assert loaded.decode(ids) == "x y"

    # the embedding has rows for `size` pieces
    with pytest.raises(UserError, match=f"{size + 2} pieces"):
        check_model_folder(model_folder)


def test_every_end_stops(model_folder, tokenizer):
    loaded = load_with(
        model_folder,
        generation_config={"eos_token_id": [7, 9]},
        tokenizer_config={"eos_token": "<bot>"},
    )
    config = json.loads((model_folder / "config.json").read_text())
    ends = {7, 9, tokenizer.turn_marks["assistant"], config["eos_token_id"]}
    assert stop_ids(model_folder, loaded) == ends


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
        load_with(model_folder, **{file: content})
    assert str(model_folder) in str(caught.value)
    assert "\n" not in str(caught.value)
