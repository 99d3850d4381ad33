"""Text to ids and back, against sentencepiece, Llama-2's vectors, and the texts of HH-RLHF."""

import json
import random

import pytest
from conftest import TEXTS, shared

from minmacpo import UserError
from minmacpo.data import Message, example_id, find_files, read_lines
from minmacpo.tokenizer import (
    PLAIN_MARKS,
    TURN_MARKS,
    Tokenizer,
    dialogue_text,
    load_tokenizer,
    render,
    render_prompt,
    response_text,
    show_mask,
    train_tokenizer,
)

ODD = [
    "Hello world", "été, naïve façade", "日本語の文章です。", "हिन्दी ਪੰਜਾਬੀ", "עברית ‏ العربية", "👍🏽 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "e\u0301 vs \u00e9; ﬁ ½ ①", "\ufeffbom", "zero\u200bwidth\u200d\u2060", "\u00a0nbsp\u3000wide\u2028line\u2029para\x85",
    "\x00", "a\x00b", "\x01\x02\x1b[31m\x7f", "tab\tand\vand\f", "\r\n\r\n", "\n", "\n\n\n", " \n \n ", "x\n", "\nx",
    " ", "  ", "   leading", "trailing   ", "a  b   c    d" + " " * 40 + "e", "\t \t", " \t\n ",
    "a" * 5000, "ab" * 2000, "Donaudampfschifffahrtsgesellschaftskapitän" * 20, "1234567890" * 100, "=" * 300,
    "<user>", "<bot>hi</s><s>", "</s> </s>", "<s>", "<unk>", "<0x0A><0xFF>", "<pad>", "[INST] x [/INST]", "<|eot_id|>",
    "\n\nHuman: x\n\nAssistant: y", "a < b > c", "\\n \\t", "", "'\"`", "https://x.y/z?a=b&c=%20",
]  # fmt: skip


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
    planes = [(0, 0x7F), (0x20, 0x20), (0x80, 0x24F), (0x370, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    letters = [chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randrange(60))]
    return "".join(letters).replace("▁", "_")


# ---- text and back --------------------------------------------------------------------------


def test_decode_gives_back_what_encode_took(any_tokenizer, seed):
    rng = random.Random(seed)
    for text in ODD + [random_text(rng) for _ in range(300)]:
        ids = any_tokenizer.encode(text)
        assert any_tokenizer.decode(ids) == text, ids
        at_start = any_tokenizer.decode(any_tokenizer.encode(text, start=True))
        assert at_start == (" " if any_tokenizer.guard and text else "") + text


def test_no_text_can_make_a_special_token(any_tokenizer, seed):
    rng = random.Random(seed)
    marks = ["<s>", "</s>", "<unk>", "<user>", "<bot>", "<pad>", "<", ">", "/", " ", "s", "user"]
    texts = ODD + ["".join(rng.choices(marks, k=20)) for _ in range(200)]
    special = {i for i in range(any_tokenizer.size) if any_tokenizer.pieces.is_control(i) or any_tokenizer.pieces.is_unknown(i)}
    assert {any_tokenizer.bos, any_tokenizer.eos} <= special
    for text in texts:
        for start in (False, True):
            assert not special & set(any_tokenizer.encode(text, start)), text


def test_every_real_dialogue_comes_back(tokenizer, llama2, seed):
    for file in find_files(str(shared("data/hh-rlhf"))):
        lines = [text for _, text in read_lines(file)]
        for text in [t for line in random.Random(seed).sample(lines, 600) for t in json.loads(line).values()]:
            assert tokenizer.decode(tokenizer.encode(text)) == text
            if "▁" not in text:
                assert llama2.decode(llama2.encode(text)) == text


def test_a_broken_byte_sequence_decodes_to_replacement_characters(tokenizer):
    ids = tokenizer.encode("é")
    assert len(ids) == 2 and tokenizer.decode(ids[:1]) == "�" and tokenizer.decode(ids) == "é"


def test_special_tokens_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("one two")
    marks = [*tokenizer.marks.values()]
    assert tokenizer.decode([tokenizer.bos, marks[0], *ids[:2], marks[1], *ids[2:], tokenizer.eos]) == "one two"


# ---- against sentencepiece and its vectors --------------------------------------------------


def test_llama2_vectors(llama2):
    texts = shared("tokenizers/llama-spm.vectors.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = shared("tokenizers/llama-spm.vectors.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    wanted = [[int(word) for word in line.split()] for line in lines]
    assert [llama2.encode(text, start=True) for text in texts] == wanted


def test_a_segment_is_encoded_as_inside_a_text(llama2):
    """The dummy space that Llama's model puts before a text must not come between segments."""
    space = llama2.pieces.piece_to_id("▁")
    assert llama2.encode("hello", start=True) == llama2.pieces.encode("hello") == [llama2.pieces.piece_to_id("▁hello")]
    assert llama2.encode("hello") == [llama2.pieces.piece_to_id("hello")]
    assert llama2.encode(" hello") == [llama2.pieces.piece_to_id("▁hello")]
    assert llama2.encode("\n\nHuman:")[0] == llama2.pieces.piece_to_id("<0x0A>") != space


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="here"):
        Tokenizer(b"\x00\x01 no model", "here")
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


# ---- training -------------------------------------------------------------------------------


def test_training_twice_gives_the_same_bytes(seed):
    texts = [*TEXTS * 3, *("".join(random.Random(seed + i).choices("abc \n<é", k=50)) for i in range(50))]
    assert train_tokenizer(texts, 420) == train_tokenizer(iter(texts), 420)


def test_a_trained_tokenizer_has_the_pieces_that_templates_need(tokenizer):
    marks = [*tokenizer.marks.values()]
    assert [tokenizer.pieces.id_to_piece(i) for i in marks] == [*TURN_MARKS.values()] and len({*marks, tokenizer.bos, tokenizer.eos}) == 4
    assert tokenizer.size <= 400 and not tokenizer.guard
    assert all(tokenizer.pieces.piece_to_id(f"<0x{byte:02X}>") != tokenizer.pieces.unk_id() for byte in range(256))
    assert len(tokenizer.encode(TEXTS[2])) < len(TEXTS[2].encode()) * 0.7, "it should have learned words"


@pytest.mark.parametrize(("texts", "vocab"), [([], 400), ([""], 400), (TEXTS, 100), (["".join(map(chr, range(0x4E00, 0x5200)))], 500)])
def test_texts_that_cannot_make_a_tokenizer(texts, vocab):
    with pytest.raises(UserError) as caught:
        train_tokenizer(texts, vocab)
    assert "model.vocab" in str(caught.value) and "\n" not in str(caught.value)


# ---- templates ------------------------------------------------------------------------------

DIALOGUES = [
    [Message("user", "where does kadol live ?")],
    [Message("user", "hi"), Message("assistant", "hello !"), Message("user", "what is </s> <user> ?\n\nx")],
    [Message("user", "a"), Message("user", "b"), Message("assistant", " c "), Message("assistant", "d"), Message("user", " ")],
    [Message("assistant", "I begin."), Message("user", "é 🎉")],
]
RESPONSES = ["of course !", "x", "two\n\nlines", "ends with </s>", "é 🎉 <bot>", "a  b", "Assistant: no"]


@pytest.fixture(params=["plain", "turns", "plain, llama-2"])
def way(request, tokenizer):
    """(tokenizer, template)"""
    if request.param == "plain, llama-2":
        return Tokenizer(shared("tokenizers/llama2-tokenizer.model").read_bytes()), "plain"
    return tokenizer, request.param


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("dialogue", range(len(DIALOGUES)))
def test_the_trained_part_is_the_response_and_the_end_token(dialogue, response, way):
    tokenizer, template = way
    messages = DIALOGUES[dialogue]
    tokens = render(tokenizer, template, messages, response)
    prompt = render_prompt(tokenizer, template, messages)
    assert len(tokens.ids) == len(tokens.mask) and prompt == tokens.ids[: len(prompt)]
    assert tokens.mask == [False] * len(prompt) + [True] * (len(tokens.ids) - len(prompt))
    answer = [i for i, trained in zip(tokens.ids, tokens.mask, strict=True) if trained]
    assert answer[-1] == tokenizer.eos and tokenizer.eos not in answer[:-1]
    lead = " " if template == "plain" else ""
    assert tokenizer.decode(answer) == lead + response
    assert response_text(tokenizer, template, answer) == response
    assert response_text(tokenizer, template, answer[:-1]) == response, "also where it was cut"
    assert not tokens.mask[0], "position 0 has nothing before it and cannot be scored"


@pytest.mark.parametrize("dialogue", range(len(DIALOGUES)))
def test_special_tokens_are_those_of_the_template(dialogue, way):
    tokenizer, template = way
    messages = DIALOGUES[dialogue]
    ids = render(tokenizer, template, messages, "yes").ids
    earlier = sum(m.role == "assistant" for m in messages)
    if template == "plain":
        assert ids[0] == tokenizer.bos and ids.count(tokenizer.bos) == 1 and ids.count(tokenizer.eos) == 1
        text = dialogue_text(messages, "yes")
        wanted = " " + text if tokenizer.guard else text
        assert tokenizer.decode(ids) == wanted
        return
    marks = tokenizer.marks
    assert tokenizer.bos not in ids and ids.count(tokenizer.eos) == earlier + 1
    assert ids.count(marks["user"]) == len(messages) - earlier and ids.count(marks["assistant"]) == earlier + 1
    found, inside = [], []
    for i in ids:  # cut at the marks, the turns must come back
        if i in marks.values():
            found.append((i, inside := []))
        else:
            inside.append(i)
    turns = [*messages, Message("assistant", "yes")]
    assert [(mark, tokenizer.decode(part)) for mark, part in found] == [(marks[m.role], m.content) for m in turns]
    assert all((part[-1:] == [tokenizer.eos]) == (mark == marks["assistant"]) for mark, part in found)


@pytest.mark.parametrize("way", ["plain", "plain, llama-2"], indirect=True)
def test_the_plain_prompt_is_the_text_of_hh_rlhf(way):
    text = way[0].decode(render_prompt(way[0], "plain", DIALOGUES[1]))
    assert text.lstrip(" ") == "\n\nHuman: hi\n\nAssistant: hello !\n\nHuman: what is </s> <user> ?\n\nx\n\nAssistant:"


def test_the_answer_ends_before_a_next_human_turn(way):
    tokenizer, template = way
    text = f" sure .{PLAIN_MARKS['user']} and then ?"
    wanted = "sure ." if template == "plain" else text.strip()
    assert response_text(tokenizer, template, tokenizer.encode(text)) == wanted
    assert response_text(tokenizer, template, []) == response_text(tokenizer, template, [tokenizer.eos]) == ""


def test_turns_need_a_tokenizer_with_turn_marks(llama2, tokenizer):
    assert llama2.marks == {} and set(tokenizer.marks) == {"user", "assistant"}
    with pytest.raises(UserError, match=r"data\.template"):
        render_prompt(llama2, "turns", DIALOGUES[0])


def test_the_mask_is_shown(way):
    tokenizer, template = way
    shown = show_mask(tokenizer, render(tokenizer, template, DIALOGUES[0], "of course !"))
    before, inside = shown.split("⟦")
    assert "where does kadol live ?" in before and inside == (" " if template == "plain" else "") + "of course !</s>⟧"


def test_equal_prompts_have_equal_ids_and_others_not():
    found = {example_id(tuple(d)) for d in DIALOGUES} | {example_id(tuple(DIALOGUES[0]), 1)}
    assert len(found) == 5 and example_id(tuple(DIALOGUES[0])) in found


# ---- tags -----------------------------------------------------------------------------------------


def test_a_tag_says_how_the_next_turn_of_the_assistant_speaks(tokenizer):
    messages = [Message("user", "hi"), Message("tag", "rude"), Message("assistant", "what ?"), Message("user", "so"), Message("tag", "kind")]
    text = tokenizer.decode(render_prompt(tokenizer, "plain", messages))
    assert text.strip() == "Human: hi\n\nAssistant (rude): what ?\n\nHuman: so\n\nAssistant (kind):"
    assert dialogue_text(messages, "yes") == "\n\nHuman: hi\n\nAssistant (rude): what ?\n\nHuman: so\n\nAssistant (kind): yes"
    ids, marks = render_prompt(tokenizer, "turns", messages), tokenizer.marks
    cut = len(ids) - ids[::-1].index(marks["assistant"])
    assert tokenizer.decode(ids[cut:]) == "( kind ) " and ids.count(tokenizer.eos) == 1
    first = ids.index(marks["assistant"])
    assert tokenizer.decode(ids[first + 1 : ids.index(tokenizer.eos)]) == "( rude ) what ?"
    rows = render(tokenizer, "turns", messages, "yes")
    assert rows.ids[: len(ids)] == ids and not any(rows.mask[: len(ids)]), "a tag is not trained on"
