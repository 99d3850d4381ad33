"""Templates against those that the families publish, through jinja; masks; special tokens."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from byte_pairs import NOTES, train_file
from conftest import TEXTS, random_model, shared
from published_templates import JINJA, SWITCHES
from runs import invoke, train, write_stub
from texts import ODD, write_lines

from minmacpo import UserError
from minmacpo.config.schema import Config, Data
from minmacpo.core.checkpoint import save_model
from minmacpo.data.chat_template import (
    HUMAN_MARK,
    count_thoughts,
    dialogue_text,
    end_of_turn_ids,
    render,
    render_prompt,
    render_whole,
    response_text,
    tokenizer_notes,
)
from minmacpo.data.formats import read_data
from minmacpo.data.records import Example, Message, Pair, Sample, example_id
from minmacpo.data.templates import ALPACA, TEMPLATES, TODAY, VICUNA
from minmacpo.data.tokenizer import Tokenizer, Tokens, load_tokenizer, show_mask
from minmacpo.pipeline import sample_stage
from minmacpo.pipeline.model_pool import LoadedModel
from minmacpo.pipeline.prepare_data import cut_prompt
from minmacpo.pipeline.sample_stage import Request, Sampler
from minmacpo.runtime.files import read_rows, write_rows


def user(content: str) -> Message:
    return Message("user", content)


def bot(content: str) -> Message:
    return Message("assistant", content)


def system(content: str) -> Message:
    return Message("system", content)


def tag(content: str) -> Message:
    return Message("tag", content)


HI = [user("hi"), bot("hello !"), user("so ?")]
DIALOGUES = [
    [user("where does kadol live ?")],
    [user("hi"), bot("hello !"), user("what is </s> <user> ?\n\nx")],
    [user("a"), user("b"), bot(" c "), bot("d"), user(" ")],
    [bot("I begin."), user("é 🎉")],
]
RESPONSES = [
    "of course !",
    "x",
    "two\n\nlines",
    "ends with </s>",
    "é 🎉 <bot>",
    "a  b",
    "Assistant: no",
]


def check_row(tokenizer: Tokenizer, template: str, messages, response: str) -> list[int]:
    """The answer's ids of a rendered row, of which the mask is right."""
    row = render(tokenizer, template, messages, response)
    prompt = render_prompt(tokenizer, template, messages)
    start = row.mask.index(True)
    answer = row.ids[start:]
    assert row.ids[: len(prompt)] == prompt
    assert row.mask == [False] * start + [True] * len(answer)
    block = tokenizer.decode(row.ids[len(prompt) : start])
    assert block == TEMPLATES[template].no_thoughts
    assert render(tokenizer, template, messages).ids == prompt
    assert prompt  # what stands at position 0 has nothing before it and cannot be scored

    # the text of the answer is the response, also where the end token was not reached
    assert response_text(tokenizer, template, answer) == response
    assert response_text(tokenizer, template, answer[:-1]) == response
    return answer


def show_tokens(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids, special tokens by name."""
    text = ""
    stretch = []  # of ordinary tokens
    for token_id in ids:
        if token_id in tokenizer.names:
            text += tokenizer.decode(stretch) + tokenizer.names[token_id]
            stretch = []
        else:
            stretch.append(token_id)
    return text + tokenizer.decode(stretch)


# ---- plain and turns ------------------------------------------------------------------------


@pytest.fixture(params=["plain", "turns", "plain, llama-2"])
def tokenizer_and_template(request, tokenizer, llama2) -> tuple[Tokenizer, str]:
    if request.param == "plain, llama-2":
        return llama2, "plain"
    return tokenizer, request.param


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("messages", DIALOGUES)
def test_the_trained_part_is_the_response_and_the_end_token(
    messages, response, tokenizer_and_template
):
    tokenizer, template = tokenizer_and_template
    answer = check_row(tokenizer, template, messages, response)
    assert answer[-1] == tokenizer.eos
    assert tokenizer.eos not in answer[:-1]
    expected = f" {response}" if template == "plain" else response
    assert tokenizer.decode(answer) == expected


@pytest.mark.parametrize("messages", DIALOGUES)
def test_a_plain_row_is_the_text_between_begin_and_end_token(messages, tokenizer, llama2):
    for each in (tokenizer, llama2):
        ids = render(each, "plain", messages, "yes").ids
        assert ids[0] == each.bos
        assert ids[-1] == each.eos
        assert not {each.bos, each.eos} & set(ids[1:-1])
        text = dialogue_text(messages, "yes")
        expected = f" {text}" if each.adds_space else text
        assert each.decode(ids) == expected


@pytest.mark.parametrize("messages", DIALOGUES)
def test_turns_are_parted_by_the_tokens_of_their_roles(messages, tokenizer):
    ids = render(tokenizer, "turns", messages, "yes").ids
    assert tokenizer.bos not in ids

    # cut at the marks, the turns must come back
    roles = {mark: role for role, mark in tokenizer.turn_marks.items()}
    turns: list[tuple[str, list[int]]] = []
    for token_id in ids:
        if token_id in roles:
            turns.append((roles[token_id], []))
        else:
            turns[-1][1].append(token_id)
    expected = [*messages, bot("yes")]
    assert [Message(role, tokenizer.decode(part)) for role, part in turns] == expected
    for role, part in turns:
        num_ends = 1 if role == "assistant" else 0
        assert part.count(tokenizer.eos) == num_ends
        assert (part[-1:] == [tokenizer.eos]) == (role == "assistant")


def test_the_plain_prompt_is_the_text_of_hh_rlhf(tokenizer, llama2):
    expected = (
        "\n\nHuman: hi\n\nAssistant: hello !\n\nHuman: what is </s> <user> ?\n\nx\n\nAssistant:"
    )
    for each in (tokenizer, llama2):
        text = each.decode(render_prompt(each, "plain", DIALOGUES[1]))
        assert text.lstrip(" ") == expected


def test_the_answer_ends_before_a_next_human_turn(tokenizer_and_template):
    tokenizer, template = tokenizer_and_template
    text = f" sure .{HUMAN_MARK} and then ?"
    expected = "sure ." if template == "plain" else text.strip()
    assert response_text(tokenizer, template, tokenizer.encode(text)) == expected
    assert response_text(tokenizer, template, []) == ""
    assert response_text(tokenizer, template, [tokenizer.eos]) == ""


def test_turns_need_a_tokenizer_with_turn_marks(llama2, tokenizer):
    assert llama2.turn_marks == {}
    assert set(tokenizer.turn_marks) == {"user", "assistant"}
    with pytest.raises(UserError, match=r"data\.template"):
        render_prompt(llama2, "turns", DIALOGUES[0])


def test_the_mask_is_shown(tokenizer_and_template):
    tokenizer, template = tokenizer_and_template
    row = render(tokenizer, template, DIALOGUES[0], "of course !")
    before, trained = show_mask(tokenizer, row).split("⟦")
    assert "where does kadol live ?" in before
    expected = " of course !</s>⟧" if template == "plain" else "of course !</s>⟧"
    assert trained == expected


def test_equal_prompts_have_equal_ids_and_others_not():
    ids = [example_id(tuple(messages)) for messages in DIALOGUES]
    ids.append(example_id(tuple(DIALOGUES[0]), occurrence=1))
    assert len(set(ids)) == 5
    assert example_id(tuple(DIALOGUES[0])) == ids[0]


def test_a_system_message_is_text_for_a_tokenizer_too():
    text = dialogue_text([system("be brief"), user("hi")], "yes")
    assert text == "be brief\n\nHuman: hi\n\nAssistant: yes"


# ---- tags -----------------------------------------------------------------------------------

TAGGED = [user("hi"), tag("rude"), bot("what ?"), user("so"), tag("kind")]


def test_a_tag_says_how_the_next_turn_of_the_assistant_speaks(tokenizer):
    expected = "\n\nHuman: hi\n\nAssistant (rude): what ?\n\nHuman: so\n\nAssistant (kind):"
    text = tokenizer.decode(render_prompt(tokenizer, "plain", TAGGED))
    assert text.strip() == expected.strip()
    assert dialogue_text(TAGGED, "yes") == f"{expected} yes"


def test_a_tag_stands_behind_the_token_of_its_turn_and_is_not_trained_on(tokenizer):
    prompt = render_prompt(tokenizer, "turns", TAGGED)
    assert (
        show_tokens(tokenizer, prompt) == "<user>hi<bot>( rude ) what ?</s><user>so<bot>( kind ) "
    )
    row = render(tokenizer, "turns", TAGGED, "yes")
    assert row.ids[: len(prompt)] == prompt
    assert not any(row.mask[: len(prompt)])


@pytest.mark.parametrize("name", ["vicuna", "alpaca"])
def test_text_templates_say_the_tag_as_plain_does(tokenizer, name):
    text = tokenizer.decode(render_prompt(tokenizer, name, TAGGED))
    assert text.count(" (rude):") == 1
    assert text.rstrip().endswith(" (kind):")


# ---- the families' own templates ------------------------------------------------------------

CHATS = [
    [user("where does kadol live ?")],
    [user("hi"), bot("hello !"), user("two\n\nlines, été 🎉")],
    [system("Be kind."), user("a"), bot("b  c"), user("d"), bot("e"), user("f ?")],
    [system("Be\nbrief."), user("so ?")],
]
STYLES = {"chatml": "qwen-2", "llama-3": "llama-3", "llama-3.1": "llama-3"}
for other in JINJA:
    STYLES.setdefault(other, "qwen-2")
# Tokens that some families have beside those of all test tokenizers
MORE_MARKS = ["[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>"]
MORE_MARKS += ["<|assistant|>", "<|end|>"]
SENTENCEPIECE = {"llama-2": "llama2-tokenizer", "mistral": "mistral-v1", "zephyr": "mistral-v1"}


def tokenizer_folder(folder: Path, style: str, vocab: int = 700) -> Path:
    """A folder with a tokenizer of the family and nothing else."""
    folder.mkdir(exist_ok=True, parents=True)
    package = pytest.importorskip("tokenizers")
    tokenizer = package.Tokenizer.from_str(train_file(style, TEXTS * 3, vocab))
    tokenizer.add_special_tokens(MORE_MARKS)
    tokenizer.add_tokens(["<think>", "</think>"])
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(NOTES[style]))
    return folder


@pytest.fixture(scope="module")
def tokenizer_for(tmp_path_factory) -> Callable[[str], Tokenizer]:
    """template -> a tokenizer that has what it needs"""
    byte_level = {}

    def find(name: str) -> Tokenizer:
        if name in SENTENCEPIECE:
            return Tokenizer(shared(f"tokenizers/{SENTENCEPIECE[name]}.model").read_bytes())
        style = STYLES.get(name, "smollm-2")
        if style not in byte_level:
            folder = tokenizer_folder(tmp_path_factory.mktemp("family"), style)
            byte_level[style] = load_tokenizer(folder)
        return byte_level[style]

    return find


def as_rows(messages) -> list[dict]:
    return [{"role": message.role, "content": message.content} for message in messages]


def apply_published(name: str, folder: Path, messages, tokenize: bool, is_prompt: bool):
    """The text, or the ids, that transformers makes with the published template.

    Args:
        folder: has a tokenizer.json.
        is_prompt: whether an answer is to follow.
    """
    transformers = pytest.importorskip("transformers")
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}
    if name in SENTENCEPIECE:
        ends = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), **ends
    )
    return tokenizer.apply_chat_template(
        as_rows(messages),
        chat_template=JINJA[name],
        tokenize=tokenize,
        add_generation_prompt=is_prompt,
        return_dict=False,
        **SWITCHES.get(name, {}),
    )


MARKS_IN_TEXT = ["<|im_end|>", "[INST]", "<|user|>", "<end_of_turn>", "<|eot_id|>"]
WORDS = [
    *MARKS_IN_TEXT,
    "where",
    "does",
    "Kadol ",
    "live ?",
    "été",
    "🎉",
    "x\n\ny",
    "a  b",
    "12",
    "ok   ",
    "so\n",
]


def random_dialogue(rng: random.Random) -> tuple[list[Message], str]:
    """One to six turns, the last one a human's, and an answer; spaces and line ends anywhere."""

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 4))).lstrip()

    messages = [system(text())] if rng.random() < 0.5 else []
    turns = rng.choice((1, 3, 5))
    for number in range(turns):
        messages.append(user(text()) if number % 2 == 0 else bot(text()))
    return messages, text()


@pytest.mark.parametrize("name", JINJA)
def test_200_dialogues_get_the_ids_of_transformers(name, tmp_path, seed):
    """Marks that the tokenizer has are tokens; the mask is the answer and its end of turn."""
    folder = tokenizer_folder(tmp_path, STYLES[name])
    notes = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(notes))
    if name == "phi-3":
        strip_behind_marks(folder / "tokenizer.json")
    theirs = published_tokenizer(folder)
    ours = load_tokenizer(folder)
    rng = random.Random(seed)
    for _ in range(200):
        messages, answer = random_dialogue(rng)

        def published(rows: list[dict], is_prompt: bool) -> list[int]:
            return encode_published(theirs, render_published(name, theirs, rows, is_prompt))

        rows = as_rows(messages)
        prompt = published(rows, is_prompt=True)
        assert render_prompt(ours, name, messages) == prompt

        whole = published([*rows, {"role": "assistant", "content": answer}], is_prompt=False)
        row = render(ours, name, messages, answer)
        assert row.ids == whole[: len(row.ids)]
        check_spans(name, trained_spans(ours, row), [answer])

        # every assistant's turn, if all are trained on: the ids stay what they are
        row = render(ours, name, messages, answer, "all")
        assert row.ids == whole[: len(row.ids)]
        earlier = [turn.content for turn in messages if turn.role == "assistant"]
        check_spans(name, trained_spans(ours, row), [*earlier, answer])


@pytest.mark.parametrize("name", JINJA)
def test_a_whole_dialogue_ends_as_transformers_ends_it(name, tmp_path, seed):
    """A reward model is read at its last token."""
    folder = tokenizer_folder(tmp_path, STYLES[name])
    notes = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(notes))
    theirs = published_tokenizer(folder)
    ours = load_tokenizer(folder)
    rng = random.Random(seed)
    for _ in range(20):
        messages, answer = random_dialogue(rng)
        rows = [*as_rows(messages), {"role": "assistant", "content": answer}]
        text = render_published(name, theirs, rows, is_prompt=False)
        assert render_whole(ours, name, messages, answer) == encode_published(theirs, text)


def check_spans(name: str, spans: list[str], answers: list[str]) -> None:
    """Each stretch that is trained on is an answer and its end of turn."""
    end = TEMPLATES[name].end.replace("<eos>", "<|im_end|>")
    prefix = TEMPLATES[name].assistant_prefix
    expected = []
    for answer in answers:
        text = answer if TEMPLATES[name].strip == "nothing" else answer.strip()
        expected.append(prefix + text + end)
    assert spans == expected


def published_tokenizer(folder: Path):
    """transformers' tokenizer of a folder with a tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<|begin_of_text|>",
        eos_token="<|im_end|>",
    )


def strip_behind_marks(file: Path) -> None:
    """Let the marks take in the white space behind them, as those of Phi 3 do."""
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token["rstrip"] = token["content"] in MORE_MARKS
    file.write_text(json.dumps(content))


HIDDEN = {"<": "\ue000", "[": "\ue001"}  # in marks that a content holds


def hide_marks(text: str) -> str:
    """A content whose marks transformers does not take for tokens."""
    for mark in MARKS_IN_TEXT:
        text = text.replace(mark, HIDDEN[mark[0]] + mark[1:])
    return text


def encode_published(tokenizer, text: str) -> list[int]:
    """The ids of a text with the template's marks as tokens, those of contents as text."""
    backend = tokenizer.backend_tokenizer
    names = [token.content for token in backend.get_added_tokens_decoder().values()]
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    ids = []
    strips = False
    for part in parts:
        if part in names:
            token_id = backend.token_to_id(part)
            strips = backend.get_added_tokens_decoder()[token_id].rstrip
            ids.append(token_id)
            continue
        part = part.lstrip() if strips else part
        for letter, hidden in HIDDEN.items():
            part = part.replace(hidden, letter)
        backend.encode_special_tokens = True
        ids += backend.encode(part, add_special_tokens=False).ids
    return ids


def render_published(name: str, tokenizer, rows: list[dict], is_prompt: bool) -> str:
    """The text of a dialogue by transformers, in a published template, on the day of ours."""
    text = tokenizer.apply_chat_template(
        [row | {"content": hide_marks(row["content"])} for row in rows],
        chat_template=JINJA[name],
        tokenize=False,
        add_generation_prompt=is_prompt,
        **SWITCHES.get(name, {}),
    )
    return re.sub(r"(?<=Today Date: )\d+ [A-Z][a-z]{3,} \d{4}", TODAY["%d %B %Y"], text)


def trained_spans(tokenizer: Tokenizer, row: Tokens) -> list[str]:
    """The stretches of a row that are trained on, as text, special tokens by name."""
    spans = []
    ids: list[int] = []
    for token_id, is_trained in zip([*row.ids, 0], [*row.mask, False], strict=True):
        if is_trained:
            ids.append(token_id)
        elif ids:
            spans.append(show_tokens(tokenizer, ids))
            ids = []
    return spans


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_families_get_the_text_of_transformers(
    name, messages, tokenizer_for, tmp_path
):
    """Their ids are sentencepiece's, for each stretch of text between special tokens."""
    folder = tokenizer_folder(tmp_path, "gpt-2")
    ours = tokenizer_for(name)

    def encode(text: str) -> list[int]:
        ids = []
        for part in re.split("(</?s>)", text):
            if part in ours.special:
                ids.append(ours.special[part])
                continue
            begins = not ids or ids[-1] == ours.bos
            ids += ours.encode(part, start=begins and not part.startswith(" "))
        return ids

    prompt = apply_published(name, folder, messages, tokenize=False, is_prompt=True)
    assert render_prompt(ours, name, messages) == encode(prompt)
    answered = [*messages, bot("of course !")]
    text = apply_published(name, folder, answered, tokenize=False, is_prompt=False)
    assert render(ours, name, messages, "of course !").ids == encode(text.rstrip("\n"))


def test_instructions_of_llama_2_are_in_the_ids_that_it_prints(tokenizer_for):
    ours = tokenizer_for("llama-2")
    opens = [518, 25580, 29962]  # [INST]
    closes = [518, 29914, 25580, 29962]  # [/INST]
    ids = render(ours, "llama-2", CHATS[1], "yes").ids
    hi = ours.encode(" hi")
    hello = ours.encode(" hello ! ")
    start = [1, *opens, *hi, *closes, *hello, 2, 1, *opens]
    assert ids[: len(start)] == start
    end = [*closes, *ours.encode(" yes "), 2]
    assert ids[-len(end) :] == end


def test_instructions_of_mistral_are_in_the_ids_that_it_prints(tokenizer_for):
    ours = tokenizer_for("mistral")
    opens = [733, 16289, 28793]  # [INST]
    closes = [733, 28748, 16289, 28793]  # [/INST]
    ids = render(ours, "mistral", CHATS[1], "yes").ids
    hi = ours.encode(" hi")
    hello = ours.encode(" hello !")
    start = [1, *opens, *hi, *closes, *hello, 2, *opens]
    assert ids[: len(start)] == start
    end = [*closes, *ours.encode(" yes"), 2]
    assert ids[-len(end) :] == end


def test_vicuna_and_alpaca(tokenizer_for):
    tokenizer = tokenizer_for("vicuna")
    begin = ""  # this tokenizer puts no token before a text
    end = "<|im_end|>"

    def shown(name: str) -> str:
        return show_mask(tokenizer, render(tokenizer, name, HI, "yes")).replace("⏎", "\n")

    assert shown("vicuna") == (
        f"{begin}{VICUNA} USER: hi ASSISTANT: hello !{end} USER: so ? ASSISTANT:⟦ yes{end}⟧"
    )
    assert shown("alpaca") == (
        f"{begin}{ALPACA}\n\n### Instruction:\nhi\n\n### Response:\nhello !{end}\n\n"
        f"### Instruction:\nso ?\n\n### Response:\n⟦yes{end}⟧"
    )


def test_the_vicuna_of_the_released_runs(llama2):
    """No begin token; each part begins with sentencepiece's space before a text; USER: USER:."""

    def encode(*parts: str) -> list[int]:
        ids = []
        for part in parts:
            ids += llama2.processor.document_processor.encode(part)
        return ids

    turns = "USER: USER: hi ASSISTANT: hello ! USER: so ? ASSISTANT:"
    row = render(llama2, "vicuna-macpo", HI, "yes")
    assert row.ids == [*encode(VICUNA, turns, "yes"), llama2.eos]
    assert row.ids[row.mask.index(True) :] == [*encode("yes"), llama2.eos]
    prompt = render_prompt(llama2, "vicuna-macpo", [system("Be kind."), *HI])
    assert prompt == encode("Be kind.", turns)


def test_the_alpaca_of_the_released_runs(llama2):
    def encode(text: str) -> list[int]:
        return llama2.processor.document_processor.encode(text)

    instruction = "### Instruction:\nhi\n\n### Response:\n"
    first = encode(ALPACA + "\n\n") + encode(instruction)
    row = render(llama2, "alpaca-macpo", HI[:1], "yes")
    assert row.ids == [*first, *encode("yes"), llama2.eos]

    second = encode("\n\n") + encode("### Instruction:\nso ?\n\n### Response:\n")
    prompt = render_prompt(llama2, "alpaca-macpo", HI)
    assert prompt == [*first, *encode("hello !"), llama2.eos, *second]


# ---- all templates --------------------------------------------------------------------------


def test_the_setting_knows_all_templates():
    (choices, _) = Data.__annotations__["template"].__args__
    assert set(choices.__args__) == {"own", *TEMPLATES}


@pytest.fixture(params=sorted(set(TEMPLATES) - {"turns"}))
def family(request, tokenizer_for) -> tuple[Tokenizer, str]:
    return tokenizer_for(request.param), request.param


@pytest.mark.parametrize("response", RESPONSES)
def test_the_mask_of_every_template(response, family):
    tokenizer, name = family
    ends = end_of_turn_ids(tokenizer, name)
    for messages in DIALOGUES:
        answer = check_row(tokenizer, name, messages, response)
        assert answer[-1] in ends
        assert not ends & set(answer[:-1])


def test_no_content_can_forge_a_turn(family):
    """The special tokens of a dialogue are as many as those of one without their names in it."""
    tokenizer, name = family
    evil = " ".join(tokenizer.special) + " <bos> <eos> {} {tag} {0}"

    def special_tokens(content: str) -> list[int]:
        messages = [user(content), bot(content), user(content)]
        ids = render(tokenizer, name, messages, content).ids
        return [token_id for token_id in ids if token_id in tokenizer.names]

    assert special_tokens(evil) == special_tokens("x")
    assert evil in tokenizer.decode(render(tokenizer, name, [user(evil)], "x").ids)


@pytest.mark.parametrize("role", ["system", "tag", "tool"])
def test_a_message_without_a_place_is_said(family, role):
    tokenizer, name = family
    template = TEMPLATES[name]
    messages = [Message(role, "odd words"), user("hi")]
    has_place = {
        "system": template.system is not None,
        "tag": template.tag is not None,
        "tool": False,
    }
    if has_place[role]:
        assert "odd words" in tokenizer.decode(render(tokenizer, name, messages).ids)
    else:
        with pytest.raises(UserError, match=rf"data\.template = {name}.*{role}"):
            render(tokenizer, name, messages)


def test_a_late_system_message_is_said(family):
    tokenizer, name = family
    with pytest.raises(UserError, match=r"data\.template"):
        render(tokenizer, name, [user("hi"), system("late")])


@pytest.mark.parametrize("name", ["llama-2", "mistral"])
def test_a_system_message_that_has_no_turn_to_stand_in_is_said(tokenizer_for, name):
    with pytest.raises(UserError, match=r"data\.template"):
        render(tokenizer_for(name), name, [system("only")])


@pytest.mark.parametrize("name", ["chatml", "llama-3"])
def test_a_template_needs_its_tokens(name, tokenizer):
    with pytest.raises(UserError, match=rf"data\.template = {name} needs the token <\|"):
        render(tokenizer, name, DIALOGUES[0])


# ---- marks, thoughts and earlier answers ----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "marks"),
    [("zephyr", ["<|user|>", "<|assistant|>"]), ("mistral", ["[INST]", "[/INST]"])],
)
def test_a_mark_is_a_token_where_the_tokenizer_has_it(name, marks, tmp_path, llama2):
    ours = load_tokenizer(tokenizer_folder(tmp_path, "qwen-2"))
    ids = render_prompt(ours, name, HI)
    for mark in marks:
        assert ours.special[mark] in ids
        assert mark not in ours.decode(ids)
        # a tokenizer without it spells it
        assert mark in llama2.decode(render_prompt(llama2, name, HI))
        # and a content does not make it
        assert render_prompt(ours, name, [user(mark)]).count(ours.special[mark]) == 1


def test_thoughts_are_no_part_of_an_answer(tmp_path):
    ours = load_tokenizer(tokenizer_folder(tmp_path, "qwen-2"))
    think, end_think = (ours.find_token(mark) for mark in ("<think>", "</think>"))
    thoughts = [think, *ours.encode("\nlet me see\n"), end_think]
    answer = ours.encode("\n\nof course")
    name = "qwen3-thinking"
    for ids, text in [
        ([*thoughts, *answer, ours.eos], "of course"),
        (answer, "of course"),
        (thoughts, ""),
        (thoughts[:-1], ""),  # cut before their end
        ([end_think, *answer], "of course"),  # the prompt has opened them
    ]:
        assert response_text(ours, name, ids) == text
        assert response_text(ours, name, ids, whole=False) == text
    assert count_thoughts(ours, [*thoughts, *answer]) == len(thoughts)
    assert count_thoughts(ours, thoughts[:-1]) == len(thoughts) - 1
    assert count_thoughts(ours, answer) == 0


def test_an_answer_without_thoughts_is_trained_behind_an_empty_block(tmp_path):
    """Of a model that may think, too: the block says that it does not, and is not trained on."""
    ours = load_tokenizer(tokenizer_folder(tmp_path, "qwen-2"))
    block = "<think>⏎⏎</think>⏎⏎"
    thinking = show_mask(ours, render(ours, "qwen3-thinking", HI, "yes"))
    assert thinking == show_mask(ours, render(ours, "qwen3", HI, "yes"))
    assert thinking.endswith(f"assistant⏎{block}⟦yes<|im_end|>⟧")
    assert thinking.count("<think>") == 1
    for name, expected in (("qwen3", 1), ("qwen3-thinking", 0)):
        ids = render_prompt(ours, name, HI)
        assert ids.count(ours.find_token("<think>")) == expected


# ---- in use ---------------------------------------------------------------------------------


def base_folder(folder: Path, style: str, seed: int, vocab: int = 700) -> Path:
    """A folder with a random model and a tokenizer of the family."""
    tokenizer_folder(folder, style, vocab)
    size = load_tokenizer(folder).size
    model = random_model(seed, vocab_size=size, max_position_embeddings=160)
    save_model(folder, model.config, model.state_dict(), b"")
    (folder / "tokenizer.model").unlink()
    return folder


def test_the_end_of_turn_stops_an_answer(tmp_path, seed, monkeypatch):
    """Where the base's own end is another token: the sample has it, and is whole."""
    folder = base_folder(tmp_path / "base", "smollm-2", seed)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    config = Config()
    loaded = LoadedModel(folder, config, "llama-3")
    end_of_turn = loaded.tokenizer.special["<|eot_id|>"]
    assert end_of_turn not in loaded.stop_token_ids
    stops_seen = []

    def generate(model, prompts, seeds, params, stops, **others):
        stops_seen.append(stops)
        return [[*loaded.tokenizer.encode("sure"), end_of_turn]], [-1.0]

    monkeypatch.setattr(sample_stage, "generate", generate)
    settings = replace(config.generate, max_new_tokens=8)
    prompt = (user("hi"),)
    request = Request(Example(example_id(prompt), prompt, ""), 0)
    (sample,) = Sampler(loaded, settings, agent="x", seed=0)([request])

    assert stops_seen == [loaded.stop_token_ids | {end_of_turn}]
    assert sample.finish == "stop"
    assert sample.tokens[-1] == end_of_turn
    assert sample.response == "sure"


def three_bases(place: Path, seed: int) -> tuple[str, str]:
    """A student and two teachers with a tokenizer each, and the settings that name them."""
    base_folder(place / "student", "llama-3", seed)
    base_folder(place / "one", "gpt-2", seed + 1, 500)
    base_folder(place / "two", "qwen-2", seed + 2, 600)
    return "--model.student=student", "--model.teachers=one,two"


def test_teachers_and_student_may_have_different_tokenizers(place, seed):
    """They exchange text: a round with three tokenizers and one template."""
    flags = (
        *three_bases(place, seed),
        "--data.template=chatml",
        "--data.max_length=140",
        "--data.max_prompt_length=128",
        "--macpo.rounds=1",
        "--run.name=mixed",
    )
    train(write_stub(place / "p"), *flags)
    run = place / "runs/mixed"

    for file in run.glob("round*/*/adapter_config.json"):
        stage = json.loads(file.with_name("stage.json").read_text())
        assert stage["settings"]["template"] == "chatml"
    lines = (run / "log.txt").read_text().splitlines()
    first_rows = [line for line in lines if "first " in line and "⟦" in line]
    assert first_rows
    for line in first_rows:
        assert "<|im_start|>assistant⏎⟦" in line
        assert "<|im_end|>⟧" in line


def test_every_base_may_have_a_template_of_its_own(place, seed):
    """Given in the order strong, weak1, weak2; a token that is missing is said with its owner."""
    flags = (
        *three_bases(place, seed),
        "--data.max_length=140",
        "--data.max_prompt_length=128",
        "--macpo.rounds=0",
        "--run.name=mixed",
    )
    refused = invoke("train", write_stub(place / "p"), *flags, "--data.template=plain,turns,own")
    assert refused.code == 2
    assert "<user>, which one/tokenizer.json lacks" in refused.err
    assert not (place / "runs").exists()

    train(write_stub(place / "p"), *flags, "--data.template=llama-3,plain,own")
    templates = {}
    for agent in ("student", "teacher1", "teacher2"):
        stage = json.loads((place / f"runs/mixed/round0/{agent}_pos/stage.json").read_text())
        templates[agent] = stage["settings"]["template"]
    assert templates == {"student": "llama-3", "teacher1": "plain", "teacher2": "plain"}
    rows = (place / "runs/mixed/log.txt").read_text().splitlines()
    rows = [line for line in rows if "first row" in line]
    assert any("assistant<|end_header_id|>⏎⏎⟦" in line for line in rows)
    assert any("Assistant:⟦" in line for line in rows)


def test_as_many_templates_as_bases(place):
    ended = invoke("train", "@tiny", "--data.template=plain,turns")
    assert ended.code == 2
    assert "data.template" in ended.err and "the strong base, then the weak ones" in ended.err


def test_all_answers_of_a_dialogue_may_be_trained_on(place, seed):
    """By agents that learn good answers; a negative agent learns the last one alone."""
    base_folder(place / "base", "qwen-2", seed)
    rows = []
    for number in range(60):
        turns = [user(f"hello {number}"), bot("hi there"), user("?"), bot("no"), user("and now ?")]
        prompt = as_rows(turns)
        prompt[3]["weight"] = 0
        rows.append({"prompt": prompt, "chosen": "all good", "rejected": "not at all"})
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        "--model.student=base",
        "--model.teachers=base,base",
        "--data.path=rows.jsonl",
        "--data.shares=0,0.3,0.4,0.3",
        "--data.template=chatml",
        "--data.train_on=all",
        "--data.max_length=140",
        "--data.max_prompt_length=120",
        "--macpo.rounds=1",
        "--macpo.controls=false",
        "--run.name=all",
    )
    train(write_stub(place / "p"), *flags)
    trained = {}  # answers in the first row of each training
    stage = ""
    for line in (place / "runs/all/log.txt").read_text().splitlines():
        found = re.search(r"round\d/\w+", line)
        stage = found[0] if found else stage
        if "first row" in line and stage.endswith(("_pos", "_neg")):
            trained[stage] = line.count("⟦")
            assert "⟦no<" not in line
    assert trained["round0/teacher1_pos"] == 2
    assert trained["round0/student_pos"] == 2
    assert trained["round0/teacher1_neg"] == 1


@pytest.mark.parametrize("form", ["messages", "prompt", "history", "stated twice", "ShareGPT"])
def test_earlier_answers_of_weight_0_are_not_trained_on(form, tokenizer, tmp_path):
    """Exactly: the mask of a row that has been read, written, and cut from the left."""
    rows = as_rows([user("a"), bot("b"), user("c"), bot("b"), user("d"), bot("e"), user("f")])
    last = {"role": "assistant", "content": "g"}
    rows[1]["weight"] = 0  # says the same as the next answer, which is trained on
    rows[5]["weight"] = 0.0
    row = {
        "messages": {"messages": [*rows, last]},
        "prompt": {"prompt": rows, "response": "g"},
        "history": {"history": rows[:6], "query": "f", "response": "g"},
        "stated twice": {
            "prompt": as_rows([user("f")]),
            "chosen": [*rows, last],
            "rejected": [*rows, last | {"content": "no"}],
        },
        "ShareGPT": {"conversations": [from_role(turn) for turn in (*rows, last)]},
    }[form]
    file = write_lines(tmp_path / "x.jsonl", json.dumps(row))
    (pair,), reports = read_data(str(file))
    assert not reports["x"].unread
    write_rows(tmp_path / "d1.jsonl", [pair])
    (pair,) = read_rows(tmp_path / "d1.jsonl", Pair)

    def shown(train_on: str, prompt) -> str:
        return show_mask(tokenizer, render(tokenizer, "turns", prompt, pair.chosen, train_on))

    end = "<user>f<bot>⟦g</s>⟧"
    whole = "<user>a<bot>b</s><user>c<bot>{}<user>d<bot>e</s>" + end
    assert shown("last", pair.prompt) == whole.format("b</s>")
    assert shown("all", pair.prompt) == whole.format("⟦b</s>⟧")
    shorter = cut_prompt(pair.prompt, lambda messages: len(messages) <= 5)
    assert shown("all", shorter) == whole.format("⟦b</s>⟧").removeprefix("<user>a<bot>b</s>")


def from_role(turn: dict) -> dict:
    """A message as ShareGPT has it."""
    names = {"user": "human", "assistant": "gpt"}
    turn = dict(turn)
    weight = turn.pop("weight", 1)
    return {"from": names[turn["role"]], "value": turn["content"], "train": bool(weight)}


def test_an_export_says_that_it_has_another_template(tmp_path, seed):
    base = base_folder(tmp_path / "base", "qwen-2", seed)
    words = ("sample", base, "--export")
    without = invoke(*words, tmp_path / "a", "--data.template=vicuna")
    assert "the exported model has no chat template" in without.err
    (base / "chat_template.jinja").write_text(JINJA["chatml"])
    other = invoke(*words, tmp_path / "b", "--data.template=vicuna")
    assert "the exported model keeps the chat template of its base" in other.err
    same = invoke(*words, tmp_path / "c")
    assert same.code == 0
    assert "WARNING" not in same.err
    assert f"{base}: dialogues are written as chatml" in same.err


def test_thoughts_are_counted(tmp_path):
    ours = load_tokenizer(tokenizer_folder(tmp_path, "qwen-2"))
    think, end_think = (ours.find_token(mark) for mark in ("<think>", "</think>"))
    samples = []
    for tokens in ([think, 5, end_think, 7, ours.eos], [7, ours.eos], [think, 5]):
        response = response_text(ours, "qwen3-thinking", tokens)
        samples.append(
            Sample("x", (user("hi"),), response, "stop", tuple(tokens), -1.0, 1.0, "a", 0)
        )
    counts = {"answers": 3, "tokens": 0, "hit_length": 0, "empty": 0}
    assert list(sample_stage.count_samples(iter(samples), counts, ours)) == samples
    assert counts["thoughts"] == 2 and counts["thought_tokens"] == 5 and counts["empty"] == 1
    assert sample_stage.describe_thoughts(counts) == (
        "2 of 3 answers begin with thoughts, which are left out: 5 of 9 tokens; 1 answers are "
        "empty, see generate.max_new_tokens"
    )


# ---- what is written beside a base made here ------------------------------------------------


def load_in_transformers(folder: Path, tokenizer: Tokenizer, name: str):
    """transformers' tokenizer of a folder that has our tokenizer.model and notes."""
    pytest.importorskip("google.protobuf")  # transformers reads a tokenizer.model with it
    transformers = pytest.importorskip("transformers")
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    notes = tokenizer_notes(tokenizer, name, context=128)
    (folder / "tokenizer_config.json").write_text(json.dumps(notes))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_splits_text_as_a_tokenizer_made_here(tokenizer, tmp_path):
    theirs = load_in_transformers(tmp_path, tokenizer, "turns")
    for text in TEXTS + ODD:
        if any(name in text for name in [*tokenizer.special, "<unk>"]):
            continue  # which transformers parses
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids, text
        assert theirs.decode(ids) == text

    again = load_tokenizer(tmp_path)
    assert again.special == tokenizer.special
    assert (again.bos, again.eos) == (tokenizer.bos, tokenizer.eos)
    assert again.size == tokenizer.size


@pytest.mark.parametrize("messages", CHATS[:2])  # without a system message
@pytest.mark.parametrize("name", ["turns", "plain", "vicuna", "alpaca"])
def test_the_chat_template_beside_a_base_is_its_template(name, messages, tokenizer, tmp_path):
    """The same text; and the same ids where special tokens part the pieces."""
    theirs = load_in_transformers(tmp_path, tokenizer, name)
    answered = as_rows([*messages, bot("of course !")])
    cases = [
        (as_rows(messages), True, render(tokenizer, name, messages)),
        (answered, False, render(tokenizer, name, messages, "of course !")),
    ]
    for rows, is_prompt, ours in cases:
        text = theirs.apply_chat_template(rows, tokenize=False, add_generation_prompt=is_prompt)
        assert text == show_tokens(tokenizer, ours.ids)
        if name == "turns":
            ids = theirs.apply_chat_template(
                rows, add_generation_prompt=is_prompt, return_dict=False
            )
            assert ids == ours.ids


def test_a_template_that_is_more_than_frames_is_not_written(tokenizer):
    without = set()
    for name in TEMPLATES:
        if "chat_template" not in tokenizer_notes(tokenizer, name, context=9):
            without.add(name)
    assert without == {
        "vicuna-macpo", "alpaca-macpo", "llama-2", "llama-3", "llama-3.1", "mistral", "mistral-v3",
        "gemma", "qwen3", "qwen3-thinking", "smollm3", "smollm3-thinking",
    }  # fmt: skip


def test_an_export_has_all_that_its_base_says_of_text(tmp_path, seed):
    """Of a base that has a tokenizer.json only."""
    transformers = pytest.importorskip("transformers")
    base = base_folder(tmp_path / "base", "smollm-2", seed)
    out = tmp_path / "out"
    (base / "chat_template.jinja").write_text(JINJA["chatml"])
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    ended = invoke("sample", base, "--export", out, "--data.template=chatml")
    assert ended.code == 0, ended.err

    assert not (out / "tokenizer.model").exists()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert load_tokenizer(out).encode("hi there") == load_tokenizer(base).encode("hi there")
    assert transformers.AutoModelForCausalLM.from_pretrained(out).num_parameters() > 0
