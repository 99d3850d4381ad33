"""Texts that published chat templates have written, taken apart again; and what only looks so."""

import json
import random

import pytest
from published_templates import JINJA, SWITCHES
from runs import invoke
from test_formats import SYSTEM, A, Q, R
from texts import write_lines

from minmacpo.cli.chat import parse_prompt
from minmacpo.data.dialogues import parse_messages
from minmacpo.data.formats import ODD_ANSWER, ODD_PROMPT, ODD_START, parse_row
from minmacpo.data.records import Message
from minmacpo.data.rendered import looks_rendered, parse_rendered

# Whose texts can be taken apart; "merged": a system message becomes a part of the human turn
FAMILIES = {
    "chatml": "", "qwen2": "", "qwen2.5": "", "smollm2": "", "qwen3": "", "llama-3": "",
    "llama-2": "", "zephyr": "", "phi-3": "", "gemma": "merged", "mistral": "merged",
    "mistral-v3": "merged",
}  # fmt: skip
WORDS = ["hi", "what is 2 < 3 ?", "a\nb", "[x]", "###", "e.g.", "“quoted”", "<b>", "user"]


def rendered(name: str, messages: list[Message], is_prompt: bool) -> str:
    """What a published template writes."""
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(JINJA[name]).render(
        messages=[{"role": turn.role, "content": turn.content} for turn in messages],
        bos_token="<s>" if "llama-3" not in name else "<|begin_of_text|>",
        eos_token="</s>",
        add_generation_prompt=is_prompt,
        **SWITCHES.get(name, {}),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_published_template_writes_is_taken_apart(name, seed):
    rng = random.Random(seed)
    for _ in range(60):
        messages = []
        if rng.random() < 0.5 and not FAMILIES[name]:
            messages.append(Message("system", " ".join(rng.choices(WORDS[:4], k=2))))
        for number in range(rng.choice((1, 3, 5))):
            text = " ".join(rng.choices(WORDS, k=3))
            messages.append(Message("assistant" if number % 2 else "user", text))
        given = tuple(messages)
        turns = parse_messages(rendered(name, messages, is_prompt=True), "prompt")
        if given[0].role == "user" and turns[0].role == "system":
            turns = turns[1:]  # its own system message
        assert turns == given

        # and the whole dialogue, as chosen and rejected side
        whole = {}
        for side, answer in (("chosen", "yes"), ("rejected", "no")):
            dialogue = [*messages, Message("assistant", answer)]
            whole[side] = rendered(name, dialogue, is_prompt=False)
        if name not in ("llama-2", "mistral", "mistral-v3"):  # nothing is known behind the answer
            pair = parse_row(whole).pair
            assert pair.prompt[-len(given) :] == given
            assert (pair.chosen, pair.rejected) == ("yes", "no")


# Forms without a published template among ours, of "q", "a", "r"
FORMS = {
    "Guanaco": "### Human: q### Assistant: a### Human: r### Assistant:",
    "Guanaco, in lines": "### Human: q\n### Assistant: a\n### Human: r\n### Assistant:",
    "Orca": "### User:\nq\n\n### Assistant:\na\n\n### User:\nr\n\n### Assistant:\n",
    "Tulu": "<|user|>\nq\n<|assistant|>\na</s>\n<|user|>\nr\n<|assistant|>\n",
    "OpenAssistant": "<|prompter|>q<|endoftext|><|assistant|>a<|endoftext|>"
    "<|prompter|>r<|endoftext|><|assistant|>",
    "without a begin token": "[INST] q [/INST] a</s>[INST] r [/INST]",
    "without its last mark": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    "<|im_start|>user\nr<|im_end|>",
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms(form):
    rows = [
        {"prompt": FORMS[form], "chosen": "yes", "rejected": "no"},
        {"instruction": FORMS[form], "input": "", "output": "yes"},
        {"question": FORMS[form], "response": " yes"},
        {"prompt": FORMS[form], "system": "s"},
    ]
    for row in rows:
        parsed = parse_row(row)
        assert parsed.pair.prompt == ((SYSTEM, Q, A, R) if "system" in row else (Q, A, R))
        assert parsed.pair.chosen in ("", "yes") and not parsed.odd
    assert parse_prompt(FORMS[form]) == (Q, A, R)


@pytest.mark.parametrize(
    "answer",
    ["yes", "yes<|im_end|>", " yes<|im_end|>\n", "<|im_start|>assistant\nyes<|im_end|>\n"],
)
def test_an_answer_may_bring_the_marks_of_its_prompt(answer):
    start = "<|im_start|>user\nq<|im_end|>\n"
    for prompt in (start, start + "<|im_start|>assistant\n"):
        pair = parse_row({"prompt": prompt, "response": answer}).pair
        if prompt == start or not answer.startswith("<|im_start|>"):
            assert (pair.prompt, pair.chosen) == ((Q,), "yes")
    repeated = parse_row(
        {"prompt": "q", "response": start + "<|im_start|>assistant\nyes<|im_end|>"}
    )
    assert (repeated.pair.prompt, repeated.pair.chosen) == ((Q,), "yes")


# Not certain: each stays one human turn, with a warning
LOOKS_RENDERED = [
    "<|im_start|>user\nq",
    "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na",
    "<|im_start|>user\nq\n<|im_start|>assistant\n",
    "<|im_start|>tool\nq<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>assistant\nq<|im_end|>\n<|im_start|>user\nr<|im_end|>",
    "<s>[INST] q",
    "[INST] q [/INST] a [INST] r [/INST]",
    "Below is an instruction.\n\n### Instruction:\nq\n\n### Response:",
    "A chat between a user and an assistant. USER: q ASSISTANT:",
    "User: q\n\nAssistant:",
    "You are kind.\n\nHuman: q\n\nAssistant:",
    "[{'role': 'user', 'content': 'q'}]",
    '[{"from": "human", "value": "q"}]',
    "<|begin▁of▁sentence|>q<|user|>\n<|assistant|>",
    "### Human: q",
]
PLAIN = [
    "What does <|im_start|>user mean?",
    "Is [INST] a token? And [/INST]?",
    "What is </s> for?",
    "### Heading\nsome text",
    "Question: q\nAnswer:",
    "USER: q ASSISTANT: a USER: r",
    "Who is the assistant: you or me?",
    "[{'a': 1}]",
]


def test_what_is_not_certain_stays_a_text_and_is_warned_of():
    for text in LOOKS_RENDERED:
        parsed = parse_row({"prompt": text, "response": "yes"})
        assert parsed.pair.prompt == (Message("user", text.strip()),), text
        assert parsed.odd == [ODD_PROMPT], text
    for text in PLAIN:
        parsed = parse_row({"prompt": text, "response": "yes"})
        assert parsed.pair.prompt == (Message("user", text),)
        assert not parsed.odd, text
        assert not looks_rendered(text) and not parse_rendered(text)


def test_marks_within_a_turn_make_nothing_certain():
    start = "<|im_start|>user\nq <|im_end|> q<|im_end|>\n<|im_start|>assistant\n"
    assert not parse_rendered(start)
    assert not parse_rendered("[INST] <<SYS>>s<</SYS>> q <<SYS>> [/INST]")
    assert not parse_rendered("<|user|>\n[INST] q [/INST]\n<|assistant|>\n")


def test_odd_answers_are_counted():
    assert parse_row({"prompt": "q", "response": "yes</s>"}).odd == [ODD_ANSWER]
    assert parse_row({"prompt": "q", "chosen": "a", "rejected": "b<|eot_id|>"}).odd == [ODD_ANSWER]
    question = "What is two and two?"
    row = {"prompt": question, "chosen": f"{question} Four.", "rejected": f"{question} Five."}
    assert parse_row(row).odd == [ODD_START]
    assert parse_row(row | {"rejected": "Five."}).odd == []


def test_programs_say_how_many_prompts_look_rendered(tmp_path, stub):
    rows = [{"prompt": f"<|im_start|>user\nq {number}", "response": "a"} for number in range(9)]
    file = write_lines(tmp_path / "rows.jsonl", *map(json.dumps, rows))
    base = stub / "bases/strong"
    measured = invoke("eval", "ppl", base, file, "--data.template=turns")
    assert measured.code == 0 and measured.err.count("9 prompts that look as if") == 1
    words = [base, LOOKS_RENDERED[0], "--data.template=turns", "--generate.max_new_tokens=2"]
    asked = invoke("sample", *words)
    assert asked.code == 0 and "WARNING: PROMPT looks as if" in asked.err
