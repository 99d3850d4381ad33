"""Templates: against the chat templates that the families publish, through jinja; masks; special tokens."""

import json
import re

import pytest
from byte_pairs import NOTES, train_file
from conftest import TEXTS, random_model, shared

from minmacpo import UserError
from minmacpo.config.schema import SETTINGS, Config, Data, Generate
from minmacpo.core.checkpoint import save_model
from minmacpo.data.chat_template import (
    ALPACA,
    HUMAN_MARK,
    TEMPLATES,
    VICUNA,
    dialogue_text,
    end_of_turn_ids,
    render,
    render_prompt,
    response_text,
    tokenizer_notes,
)
from minmacpo.data.records import Example, Message, example_id
from minmacpo.data.tokenizer import Tokenizer, load_tokenizer, show_mask
from minmacpo.pipeline import sample_stage
from minmacpo.pipeline.model_pool import LoadedModel

# ---- templates ------------------------------------------------------------------------------

DIALOGUES = [
    [Message("user", "where does kadol live ?")],
    [
        Message("user", "hi"),
        Message("assistant", "hello !"),
        Message("user", "what is </s> <user> ?\n\nx"),
    ],
    [
        Message("user", "a"),
        Message("user", "b"),
        Message("assistant", " c "),
        Message("assistant", "d"),
        Message("user", " "),
    ],
    [Message("assistant", "I begin."), Message("user", "é 🎉")],
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
        assert (
            ids[0] == tokenizer.bos
            and ids.count(tokenizer.bos) == 1
            and ids.count(tokenizer.eos) == 1
        )
        text = dialogue_text(messages, "yes")
        wanted = " " + text if tokenizer.prefix_guard_ids else text
        assert tokenizer.decode(ids) == wanted
        return
    marks = tokenizer.turn_marks
    assert tokenizer.bos not in ids and ids.count(tokenizer.eos) == earlier + 1
    assert (
        ids.count(marks["user"]) == len(messages) - earlier
        and ids.count(marks["assistant"]) == earlier + 1
    )
    found, inside = [], []
    for i in ids:  # cut at the marks, the turns must come back
        if i in marks.values():
            found.append((i, inside := []))
        else:
            inside.append(i)
    turns = [*messages, Message("assistant", "yes")]
    assert [(mark, tokenizer.decode(part)) for mark, part in found] == [
        (marks[m.role], m.content) for m in turns
    ]
    assert all(
        (part[-1:] == [tokenizer.eos]) == (mark == marks["assistant"]) for mark, part in found
    )


@pytest.mark.parametrize("way", ["plain", "plain, llama-2"], indirect=True)
def test_the_plain_prompt_is_the_text_of_hh_rlhf(way):
    text = way[0].decode(render_prompt(way[0], "plain", DIALOGUES[1]))
    assert (
        text.lstrip(" ")
        == "\n\nHuman: hi\n\nAssistant: hello !\n\nHuman: what is </s> <user> ?\n\nx\n\nAssistant:"
    )


def test_the_answer_ends_before_a_next_human_turn(way):
    tokenizer, template = way
    text = f" sure .{HUMAN_MARK} and then ?"
    wanted = "sure ." if template == "plain" else text.strip()
    assert response_text(tokenizer, template, tokenizer.encode(text)) == wanted
    assert (
        response_text(tokenizer, template, [])
        == response_text(tokenizer, template, [tokenizer.eos])
        == ""
    )


def test_turns_need_a_tokenizer_with_turn_marks(llama2, tokenizer):
    assert llama2.turn_marks == {} and set(tokenizer.turn_marks) == {"user", "assistant"}
    with pytest.raises(UserError, match=r"data\.template"):
        render_prompt(llama2, "turns", DIALOGUES[0])


def test_the_mask_is_shown(way):
    tokenizer, template = way
    shown = show_mask(tokenizer, render(tokenizer, template, DIALOGUES[0], "of course !"))
    before, inside = shown.split("⟦")
    assert (
        "where does kadol live ?" in before
        and inside == (" " if template == "plain" else "") + "of course !</s>⟧"
    )


def test_equal_prompts_have_equal_ids_and_others_not():
    found = {example_id(tuple(d)) for d in DIALOGUES} | {example_id(tuple(DIALOGUES[0]), 1)}
    assert len(found) == 5 and example_id(tuple(DIALOGUES[0])) in found


# ---- tags -----------------------------------------------------------------------------------------


def test_a_tag_says_how_the_next_turn_of_the_assistant_speaks(tokenizer):
    messages = [
        Message("user", "hi"),
        Message("tag", "rude"),
        Message("assistant", "what ?"),
        Message("user", "so"),
        Message("tag", "kind"),
    ]
    text = tokenizer.decode(render_prompt(tokenizer, "plain", messages))
    assert text.strip() == "Human: hi\n\nAssistant (rude): what ?\n\nHuman: so\n\nAssistant (kind):"
    assert (
        dialogue_text(messages, "yes")
        == "\n\nHuman: hi\n\nAssistant (rude): what ?\n\nHuman: so\n\nAssistant (kind): yes"
    )
    ids, marks = render_prompt(tokenizer, "turns", messages), tokenizer.turn_marks
    cut = len(ids) - ids[::-1].index(marks["assistant"])
    assert tokenizer.decode(ids[cut:]) == "( kind ) " and ids.count(tokenizer.eos) == 1
    first = ids.index(marks["assistant"])
    assert tokenizer.decode(ids[first + 1 : ids.index(tokenizer.eos)]) == "( rude ) what ?"
    rows = render(tokenizer, "turns", messages, "yes")
    assert rows.ids[: len(ids)] == ids and not any(rows.mask[: len(ids)]), "a tag is not trained on"


@pytest.mark.parametrize("name", ["vicuna", "alpaca"])
def test_text_templates_say_the_tag_as_plain_does(tokenizer, name):
    text = tokenizer.decode(
        render_prompt(
            tokenizer,
            name,
            [
                Message("user", "hi"),
                Message("tag", "kind"),
                Message("assistant", "yes"),
                Message("user", "so"),
                Message("tag", "rude"),
            ],
        )
    )
    assert text.count(" (kind):") == 1 and text.rstrip().endswith(" (rude):")


# ---- the families' own templates --------------------------------------------------------------

JINJA = {  # what the families publish, in few words
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama-3": "{% for m in messages %}{{ bos_token if loop.first }}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama-2": "{% if messages[0]['role'] == 'system' %}{% set said = messages[1:] %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set said = messages %}{% set system = '' %}{% endif %}{% for m in said %}{% set content = (system if loop.first else '') + m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral": "{% if messages[0]['role'] == 'system' %}{% set said = messages[1:] %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% else %}{% set said = messages %}{% set system = '' %}{% endif %}{{ bos_token }}{% for m in said %}{% set content = (system if loop.first else '') + m['content'] %}"
    "{% if m['role'] == 'user' %}{{ ' [INST] ' + content + ' [/INST]' }}{% else %}{{ ' ' + content + eos_token }}{% endif %}{% endfor %}",
    "zephyr": """{% for m in messages %}
{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
}
CHATS = [
    [Message("user", "where does kadol live ?")],
    [
        Message("user", "hi"),
        Message("assistant", "hello !"),
        Message("user", "two\n\nlines, été 🎉"),
    ],
    [
        Message("system", "Be kind."),
        Message("user", "a"),
        Message("assistant", "b  c"),
        Message("user", "d"),
        Message("assistant", "e"),
        Message("user", "f ?"),
    ],
    [Message("system", "Be\nbrief."), Message("user", "so ?")],
]
STYLE = {"chatml": "qwen-2", "llama-3": "llama-3"}
SENTENCEPIECE = {"llama-2": "llama2-tokenizer", "mistral": "mistral-v1", "zephyr": "mistral-v1"}


def folder_of(path, style: str, vocab: int = 700):
    """A folder with a tokenizer of the family and nothing else."""
    path.mkdir(exist_ok=True, parents=True)
    (path / "tokenizer.json").write_text(train_file(style, TEXTS * 3, vocab))
    (path / "tokenizer_config.json").write_text(json.dumps(NOTES[style]))
    return path


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """template -> a tokenizer that has what it needs"""

    def of(name: str) -> Tokenizer:
        if name in SENTENCEPIECE:
            return Tokenizer(shared(f"tokenizers/{SENTENCEPIECE[name]}.model").read_bytes())
        return load_tokenizer(
            folder_of(tmp_path_factory.mktemp("family"), STYLE.get(name, "smollm-2"))
        )

    return of


def jinja(name: str, path, messages, tokenize: bool, prompt: bool):
    """The text, or the ids, that transformers makes with the published template."""
    transformers = pytest.importorskip("transformers")
    ends = (
        {"bos_token": "<s>", "eos_token": "</s>"}
        if name in SENTENCEPIECE
        else {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}
    )
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), **ends
    )
    said = [{"role": m.role, "content": m.content} for m in messages]
    return theirs.apply_chat_template(
        said,
        chat_template=JINJA[name],
        tokenize=tokenize,
        add_generation_prompt=prompt,
        return_dict=False,
    )


@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("name", STYLE)
def test_byte_level_families_get_the_ids_of_transformers(name, chat, tmp_path):
    path = folder_of(tmp_path, STYLE[name])
    ours = load_tokenizer(path)
    assert render_prompt(ours, name, CHATS[chat]) == jinja(name, path, CHATS[chat], True, True)
    whole = jinja(name, path, [*CHATS[chat], Message("assistant", "of course !")], True, False)
    ids = render(ours, name, CHATS[chat], "of course !").ids
    assert whole[: len(ids)] == ids and ours.decode(whole[len(ids) :]) in ("", "\n")


@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_families_get_the_text_of_transformers(name, chat, families, tmp_path):
    """Their ids are sentencepiece's, for each stretch of text between special tokens."""
    path, ours = folder_of(tmp_path, "gpt-2"), families(name)

    def wanted(text: str) -> list[int]:
        ids = []
        for part in re.split("(</?s>)", text):
            begins = not ids or ids[-1] == ours.bos
            ids += (
                [ours.special[part]]
                if part in ours.special
                else ours.encode(part, start=begins and part[:1] != " ")
            )
        return ids

    assert render_prompt(ours, name, CHATS[chat]) == wanted(
        jinja(name, path, CHATS[chat], False, True)
    )
    text = jinja(name, path, [*CHATS[chat], Message("assistant", "of course !")], False, False)
    assert render(ours, name, CHATS[chat], "of course !").ids == wanted(text.rstrip("\n"))


@pytest.mark.parametrize(
    ("name", "opens", "closes"),
    [
        ("llama-2", [518, 25580, 29962], [518, 29914, 25580, 29962]),
        ("mistral", [733, 16289, 28793], [733, 28748, 16289, 28793]),
    ],
)
def test_instructions_are_in_the_ids_that_the_families_print(name, opens, closes, families):
    ours = families(name)
    ids = render(ours, name, CHATS[1], "yes").ids
    close = " " if name == "llama-2" else ""
    first = [1, *opens, *ours.encode(" hi"), *closes, *ours.encode(f" hello !{close}"), 2]
    again = [1, *opens] if name == "llama-2" else opens
    assert ids[: len(first) + len(again)] == [*first, *again]
    assert ids[-len([*closes, *ours.encode(f" yes{close}"), 2]) :] == [
        *closes,
        *ours.encode(f" yes{close}"),
        2,
    ]


def test_vicuna_and_alpaca(families):
    tokenizer = families("vicuna")  # its begin and end tokens are those of chatml
    said = [Message("user", "hi"), Message("assistant", "hello !"), Message("user", "so ?")]
    rows = {name: render(tokenizer, name, said, "yes") for name in ("vicuna", "alpaca")}
    shown = {name: show_mask(tokenizer, row).replace("⏎", "\n") for name, row in rows.items()}
    begin, end = "<|im_start|>", "<|im_end|>"
    assert (
        shown["vicuna"]
        == f"{begin}{VICUNA} USER: hi ASSISTANT: hello !{end} USER: so ? ASSISTANT:⟦ yes{end}⟧"
    )
    assert shown["alpaca"] == (
        f"{begin}{ALPACA}\n\n### Instruction:\nhi\n\n### Response:\nhello !{end}\n\n"
        f"### Instruction:\nso ?\n\n### Response:\n⟦yes{end}⟧"
    )


def test_macpos_own_vicuna_and_alpaca(llama2):
    """No begin token; each part begins with the space that sentencepiece puts before a text; USER: USER:."""
    said = [Message("user", "hi"), Message("assistant", "hello !"), Message("user", "so ?")]

    def of(*parts: str) -> list[int]:
        return [i for part in parts for i in llama2.processor.encode(part)]

    row = render(llama2, "vicuna-macpo", said, "yes")
    assert row.ids == [
        *of(VICUNA, "USER: USER: hi ASSISTANT: hello ! USER: so ? ASSISTANT:", "yes"),
        2,
    ]
    assert row.ids[row.mask.index(True) :] == [*of("yes"), 2]
    row = render(llama2, "alpaca-macpo", said[:1], "yes")
    first = of(ALPACA + "\n\n", "### Instruction:\nhi\n\n### Response:\n")
    assert row.ids == [*first, *of("yes"), 2]
    again = of("\n\n", "### Instruction:\nso ?\n\n### Response:\n")
    assert render_prompt(llama2, "alpaca-macpo", said) == [*first, *of("hello !"), 2, *again]
    system = render_prompt(llama2, "vicuna-macpo", [Message("system", "Be kind."), *said])
    assert system == of("Be kind.", "USER: USER: hi ASSISTANT: hello ! USER: so ? ASSISTANT:")


# ---- all templates ------------------------------------------------------------------------------


def test_the_setting_knows_all_templates():
    assert {*Data.__annotations__["template"].__args__} == {*TEMPLATES} and SETTINGS[
        "data.template"
    ]


@pytest.fixture(params=sorted({*TEMPLATES} - {"turns"}))
def family(request, families):
    return families(request.param), request.param


@pytest.mark.parametrize("response", RESPONSES)
def test_the_mask_of_every_template(response, family):
    tokenizer, name = family
    for messages in DIALOGUES:
        row, prompt = (
            render(tokenizer, name, messages, response),
            render_prompt(tokenizer, name, messages),
        )
        assert row.ids[: len(prompt)] == prompt and row.mask == [False] * len(prompt) + [True] * (
            len(row.ids) - len(prompt)
        )
        answer = row.ids[len(prompt) :]
        assert answer[-1] in end_of_turn_ids(tokenizer, name) and not end_of_turn_ids(
            tokenizer, name
        ) & {*answer[:-1]}
        assert (
            response_text(tokenizer, name, answer)
            == response_text(tokenizer, name, answer[:-1])
            == response
        )
        assert prompt and prompt == render(tokenizer, name, messages).ids


def test_no_content_can_forge_a_turn(family):
    """The special tokens of a dialogue are as many as those of one without their names in it."""
    tokenizer, name = family
    evil = " ".join(tokenizer.special) + " <bos> <eos> {} {tag} {0}"

    def marks(content: str) -> list[int]:
        said = [Message("user", content), Message("assistant", content), Message("user", content)]
        return [i for i in render(tokenizer, name, said, content).ids if i in tokenizer.names]

    assert marks(evil) == marks("x")
    assert evil in tokenizer.decode(render(tokenizer, name, [Message("user", evil)], "x").ids)


@pytest.mark.parametrize("role", ["system", "tag", "tool"])
def test_a_message_without_a_place_is_said(family, role):
    tokenizer, name = family
    messages = [Message(role, "odd words"), Message("user", "hi")]
    template = TEMPLATES[name]
    if {"system": template.system, "tag": template.tag}.get(role) is None:
        with pytest.raises(UserError, match=rf"data\.template = {name}.*{role}"):
            render(tokenizer, name, messages)
    else:
        assert "odd words" in tokenizer.decode(render(tokenizer, name, messages).ids)
    for wrong in ([Message("user", "hi"), Message("system", "late")], [Message("system", "only")]):
        if template.merge_system or wrong[0].role == "user":
            with pytest.raises(UserError, match=r"data\.template"):
                render(tokenizer, name, wrong)


def test_a_system_message_is_text_for_a_tokenizer_too():
    messages = [Message("system", "be brief"), Message("user", "hi")]
    assert dialogue_text(messages, "yes") == "be brief\n\nHuman: hi\n\nAssistant: yes"


@pytest.mark.parametrize("name", ["chatml", "llama-3"])
def test_a_template_needs_its_tokens(name, tokenizer):
    with pytest.raises(UserError, match=rf"data\.template = {name} needs the token <\|"):
        render(tokenizer, name, DIALOGUES[0])


# ---- in use -------------------------------------------------------------------------------------


def model_of(path, style: str, seed: int, vocab: int = 700):
    """A base folder with a random model and a tokenizer of the family."""
    folder_of(path, style, vocab)
    model = random_model(seed, vocab_size=load_tokenizer(path).size, max_position_embeddings=160)
    save_model(path, model.config, model.state_dict(), b"")
    (path / "tokenizer.model").unlink()
    return path


def test_the_end_of_turn_stops_an_answer(tmp_path, seed, monkeypatch):
    """Where the base's own end is another token: it is kept in the sample, and the sample is whole."""
    path = model_of(tmp_path / "base", "smollm-2", seed)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    config = Config(data=Data(template="llama-3"))
    loaded = LoadedModel(path, config)
    eot = loaded.tokenizer.special["<|eot_id|>"]
    assert eot not in loaded.stop_token_ids
    found = []

    def generate(model, prompts, seeds, settings, stops, *more):
        found.append(stops)
        return [[*loaded.tokenizer.encode("sure"), eot]], [-1.0]

    monkeypatch.setattr(sample_stage, "generate", generate)
    prompt = (Message("user", "hi"),)
    sampler = sample_stage.Sampler(loaded, Generate(max_new_tokens=8), agent="x", seed=0)
    [sample] = sampler([sample_stage.Request(Example(example_id(prompt), prompt, ""))])
    assert (
        found == [loaded.stop_token_ids | {eot}]
        and sample.finish == "stop"
        and sample.tokens[-1] == eot
        and sample.response == "sure"
    )


def test_teachers_and_student_may_have_different_tokenizers(tmp_path, seed, monkeypatch):
    """They exchange text: a round with three tokenizers, the template of which is in every adapter's stage.json."""
    from runs import train, write_stub

    monkeypatch.chdir(tmp_path)
    model_of(tmp_path / "student", "llama-3", seed)
    model_of(tmp_path / "one", "gpt-2", seed + 1, 500)
    model_of(tmp_path / "two", "qwen-2", seed + 2, 600)
    words = [
        "--model.student=student",
        "--model.teachers=one,two",
        "--data.template=chatml",
        "--data.max_length=140",
        "--data.max_prompt_length=128",
        "--macpo.rounds=1",
        "--run.name=mixed",
        "--run.root=runs",
    ]
    train(write_stub(tmp_path / "p"), *words)
    run = tmp_path / "runs/mixed"
    for folder in [path.parent for path in run.glob("round*/*/adapter_config.json")]:
        assert json.loads((folder / "stage.json").read_text())["settings"]["template"] == "chatml"
    log = (run / "log.txt").read_text()
    shown = [line for line in log.splitlines() if "first " in line and "⟦" in line]
    assert shown and all(
        "<|im_start|>assistant⏎⟦" in line and "<|im_end|>⟧" in line for line in shown
    ), shown


# ---- what is written beside a base made here ------------------------------------------------------


def theirs(folder, tokenizer: Tokenizer, name: str):
    """transformers' tokenizer of a folder that has our tokenizer.model and notes."""
    pytest.importorskip("google.protobuf")  # transformers reads a tokenizer.model with it
    transformers = pytest.importorskip("transformers")
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_notes(tokenizer, name, 128)))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_splits_text_as_a_tokenizer_made_here(tokenizer, tmp_path):
    from test_tokenizer import ODD

    other = theirs(tmp_path, tokenizer, "turns")
    for text in [
        text
        for text in TEXTS + ODD
        if not any(name in text for name in [*tokenizer.special, "<unk>"])
    ]:
        assert other.encode(text) == tokenizer.encode(text), text
        assert other.decode(tokenizer.encode(text)) == text
    mine = load_tokenizer(tmp_path)
    assert (mine.special, mine.bos, mine.eos, mine.size) == (
        tokenizer.special,
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.size,
    )


PLAIN_CHATS = [chat for chat in CHATS if chat[0].role == "user"]


@pytest.mark.parametrize("chat", PLAIN_CHATS)
@pytest.mark.parametrize("name", ["turns", "plain", "vicuna", "alpaca"])
def test_the_chat_template_beside_a_base_is_its_template(name, chat, tokenizer, tmp_path):
    """The same ids where special tokens part the pieces; elsewhere the same text, as a piece may go over their border."""
    other = theirs(tmp_path, tokenizer, name)
    for messages, prompt in ((chat, True), ([*chat, Message("assistant", "of course !")], False)):
        said = [{"role": m.role, "content": m.content} for m in messages]
        rows = render(tokenizer, name, chat, None if prompt else "of course !")
        text = other.apply_chat_template(said, tokenize=False, add_generation_prompt=prompt)
        assert text == decoded(tokenizer, rows.ids)
        if name == "turns":
            assert (
                other.apply_chat_template(said, add_generation_prompt=prompt, return_dict=False)
                == rows.ids
            )


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids, special tokens by name."""
    parts, run = [], []
    for i in [*ids, None]:
        if i is None or i in tokenizer.names:
            parts, run = [*parts, tokenizer.decode(run), tokenizer.names.get(i, "")], []
        else:
            run.append(i)
    return "".join(parts)


def test_a_template_that_is_more_than_frames_is_not_written(tokenizer):
    without = {
        name for name in TEMPLATES if "chat_template" not in tokenizer_notes(tokenizer, name, 9)
    }
    assert without == {"vicuna-macpo", "alpaca-macpo", "llama-2", "llama-3", "mistral"}


def test_an_export_has_all_that_its_base_says_of_text(tmp_path, seed):
    """Of a base that has a tokenizer.json only."""
    from runs import invoke

    transformers = pytest.importorskip("transformers")
    base = model_of(tmp_path / "base", "smollm-2", seed)
    (base / "chat_template.jinja").write_text(JINJA["chatml"])
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    ended = invoke("sample", base, "--export", tmp_path / "out", "--data.template=chatml")
    assert ended.code == 0, ended.err
    assert not (tmp_path / "out/tokenizer.model").exists()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    assert load_tokenizer(tmp_path / "out").encode("hi there") == load_tokenizer(base).encode(
        "hi there"
    )
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0
