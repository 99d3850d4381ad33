"""Marked dialogues in place of a prompt, and prompts that a row states more than once."""

import json
import random

import pytest
from test_formats import SYSTEM, A, Q, R, as_messages
from texts import hh_dialogue, write_lines

from minmacpo.cli.batch_sampling import read_prompts
from minmacpo.config.schema import Config
from minmacpo.data.dialogues import merge_prompts, parse_messages
from minmacpo.data.formats import parse_row
from minmacpo.data.records import Message

# ---- marked dialogues -----------------------------------------------------------------------

# Ways in which files have the dialogue "q", "a", "r"
MARKED = [
    "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:",
    "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: ",
    "\n\nHuman: q\n\nAssistant: a\n\nHuman: r",
    "Human: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:",
    "Human: q\n\nAssistant: a\n\nHuman: r",
    "  \nHuman:q\n\nAssistant:a\n\nHuman:r\n\nAssistant:\n",
    "Human: q\nAssistant: a\nHuman: r\nAssistant:",
    "Human: q\r\n\r\nAssistant: a\r\n\r\nHuman: r\r\n\r\nAssistant:",
]


@pytest.mark.parametrize("text", MARKED)
def test_a_marked_dialogue_in_place_of_a_prompt_has_its_turns(text):
    rows = [
        {"prompt": text},
        {"prompt": text, "response": "yes"},
        {"prompt": text, "chosen": " yes", "rejected": "no"},
        {"instruction": text, "input": "", "output": "yes"},
        {"question": text, "response": "yes"},
        {"prompt": text, "chosen": "\n\nAssistant: yes", "rejected": "Assistant: no"},
        {
            "prompt": text,
            "chosen": hh_dialogue("q", "a", "r", "yes"),
            "rejected": hh_dialogue("q", "a", "r", "no"),
        },
    ]
    for row in rows:
        pair = parse_row(row).pair
        assert pair.prompt == (Q, A, R)
        assert pair.chosen in ("", "yes")
        assert pair.rejected in ("", "no")


@pytest.mark.parametrize(
    "text",
    [
        "q",
        "What does Human: mean?",
        "Go on with this:\n\nHuman: q\n\nAssistant: a\n\nHuman:",
        "Assistant: who is it?",
        "Humans: q\n\nAssistants: a",
        "human: q",
    ],
)
def test_other_texts_are_one_human_turn(text):
    assert parse_messages(text, "prompt") == (Message("user", text),)


def test_marks_of_a_line_within_turns_of_a_paragraph_start_no_turn():
    text = "Human: x\nHuman: no\n\nAssistant: a\nAssistant: still a\n\nHuman: r"
    turns = parse_messages(text, "prompt")
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert turns[0].content == "x\nHuman: no"


def test_a_dialogue_that_was_asked_for_stays_an_answer():
    answer = "Human: hello\n\nAssistant: good day"
    pair = parse_row({"prompt": "Write a dialogue.", "response": answer}).pair
    assert pair.chosen == answer
    assert pair.prompt == (Message("user", "Write a dialogue."),)


def test_marked_prompts_are_the_dialogues_that_hh_rlhf_publishes():
    """Every cut of random dialogues: prompt column and published form give the same pair."""
    rng = random.Random(0)
    for _ in range(200):
        turns = []
        for number in range(rng.choice((1, 3, 5))):
            turns.append(f"turn {number} {rng.random()}\nmore: {'x' * rng.randrange(9)}")
        chosen = hh_dialogue(*turns, "yes")
        rejected = hh_dialogue(*turns, "no")
        prompt = chosen.removesuffix(" yes")
        published = parse_row({"chosen": chosen, "rejected": rejected})
        marked = parse_row({"prompt": prompt, "chosen": " yes", "rejected": " no"})
        assert marked.pair == published.pair


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt"])
def test_prompts_to_sample_from_may_be_marked(tmp_path, name, capsys):
    text = MARKED[0]
    if name == "x.txt":
        lines = ["Human: q", "plain words"]
        expected = [(Q,), (Message("user", "plain words"),)]
    elif name == "x.json":
        lines = [json.dumps([{"prompt": text}])]
        expected = [(Q, A, R)]
    else:
        lines = [json.dumps({"prompt": text})]
        expected = [(Q, A, R)]
    pairs = read_prompts(write_lines(tmp_path / name, *lines), Config())
    assert [pair.prompt for pair in pairs] == expected


# ---- prompts that are stated more than once -------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "before", "merged"),
    [
        ((), (Q,), (Q,)),
        ((Q,), (), (Q,)),
        ((Q,), (Q,), (Q,)),
        ((R,), (SYSTEM, Q, A, R), (SYSTEM, Q, A, R)),
        ((Q,), (Q, A, R), (Q, A, R)),
        ((Q, A, R), (R,), (Q, A, R)),
        ((SYSTEM, Q), (Q,), (SYSTEM, Q)),
        ((R,), (Q,), None),
        ((Q, R), (Q, A, R), None),
        ((Q, A, R), (Q,), None),
    ],
)
def test_the_prompt_of_a_row_that_states_it_twice(stated, before, merged):
    repeated = [before, before] if before else []
    assert merge_prompts(stated, repeated) == merged


def test_what_both_answers_have_before_them_is_the_prompt_as_in_trl():
    data_utils = pytest.importorskip("trl.data_utils")
    rng = random.Random(1)
    for number in range(200):
        dialogue = [SYSTEM] if rng.random() < 0.5 else []
        for turn in range(rng.choice((1, 3, 5))):
            dialogue.append(Message("user" if turn % 2 == 0 else "assistant", f"t{turn} {number}"))
        row = {
            "prompt": rng.choice([turn for turn in dialogue if turn.role == "user"]).content,
            "chosen": as_messages(*dialogue, Message("assistant", "yes")),
            "rejected": as_messages(*dialogue, Message("assistant", "no")),
        }
        expected = data_utils.maybe_extract_prompt(row)
        pair = parse_row(row).pair
        assert as_messages(*pair.prompt) == expected["prompt"]
        assert pair.chosen == expected["chosen"][0]["content"]
        assert pair.rejected == expected["rejected"][0]["content"]
        assert parse_row({key: row[key] for key in ("chosen", "rejected")}).pair == pair


def test_the_text_before_both_answers_is_the_prompt_as_in_trl():
    data_utils = pytest.importorskip("trl.data_utils")
    texts = ("where is it ?", "in the house", "and now ?")
    row = {"chosen": hh_dialogue(*texts, "yes"), "rejected": hh_dialogue(*texts, "no")}
    prompt = data_utils.extract_prompt(row)["prompt"]
    assert parse_row({"prompt": prompt}).pair.prompt == parse_row(row).pair.prompt
