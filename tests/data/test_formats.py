"""What a row can look like, rows that cannot be used or read, the real files, and export."""

import gzip
import json
from collections import Counter

import pytest
from conftest import shared
from runs import invoke, rows_of, write_stub
from test_bad_input import HH, ROWS, check_sentence, refused, tree
from texts import hh_dialogue, hh_row, write_lines

from minmacpo import UserError
from minmacpo.data.dialogues import split_dialogue
from minmacpo.data.formats import parse_row, read_data, released
from minmacpo.data.readers import find_files, read_lines
from minmacpo.data.records import Message, Pair, Sample, example_id
from minmacpo.data.splits import split_pairs

SYSTEM = Message("system", "s")
Q = Message("user", "q")
A = Message("assistant", "a")
B = Message("assistant", "b")
R = Message("user", "r")
YES = Message("assistant", "yes")
NO = Message("assistant", "no")


def as_messages(*messages: Message) -> list[dict]:
    """A list of {"role", "content"}."""
    return [{"role": message.role, "content": message.content} for message in messages]


def as_share_gpt(*messages: Message) -> list[dict]:
    """A list of {"from", "value"}."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message.role], "value": message.content} for message in messages]


# ---- one dialogue of HH-RLHF ----------------------------------------------------------------


def test_a_dialogue_is_cut_at_its_last_assistant_turn():
    prompt, answer = split_dialogue(hh_dialogue("a", "b", "c", "d"))
    assert prompt == (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert answer == "d"


@pytest.mark.parametrize(
    ("text", "prompt", "answer"),
    [
        ("\n\nHuman: q\n\nAssistant: a", [Q], "a"),
        ("\n\nHuman: q\n\nAssistant:", [Q], ""),
        ("\n\nHuman:q\n\nAssistant:a", [Q], "a"),
        # colons, blank lines and the marks' words inside a turn start no turn
        (
            "\n\nHuman: x: y\n\nmore\nHuman: no\n\nAssistant: a\n\nb",
            [Message("user", "x: y\n\nmore\nHuman: no")],
            "a\n\nb",
        ),
        # a human turn behind the last answer belongs to it, as the files have it
        ("\n\nHuman: q\n\nAssistant: a\n\nHuman: r", [Q], "a\n\nHuman: r"),
        # two turns of one speaker
        ("\n\nHuman: q\n\nHuman: r\n\nAssistant: c", [Q, R], "c"),
        ("\n\nHuman: q\n\nAssistant: b\n\nAssistant: c", [Q, B], "c"),
        ("\n\nAssistant: a", [], "a"),
        ("\r\n  \n\nHuman: q\n\nAssistant:  a \n", [Q], "a"),
    ],
)
def test_odd_dialogues(text, prompt, answer):
    assert split_dialogue(text) == (tuple(prompt), answer)


@pytest.mark.parametrize(
    "text",
    ["", "hello", "\n\nHuman: q", "\nHuman: q\nAssistant: a", "intro\n\nHuman: q\n\nAssistant: a"],
)
def test_no_dialogue(text):
    with pytest.raises(ValueError):
        split_dialogue(text)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (hh_dialogue("q", "a"), hh_dialogue("q", "b"), "kept"),
        (hh_dialogue("q", "a", "r", "c"), hh_dialogue("q", "a", "r", "d"), "kept"),
        (hh_dialogue("q", "a"), hh_dialogue("p", "b"), "prompts differ"),
        (hh_dialogue("q", "a", "r", "c"), hh_dialogue("q", "b", "r", "c"), "prompts differ"),
        (hh_dialogue("q", ""), hh_dialogue("q", "b"), "empty answer"),
        (hh_dialogue("q", "a"), hh_dialogue("q", "  "), "empty answer"),
        (hh_dialogue("q", "a"), hh_dialogue("q", "a "), "identical answers"),
        (hh_dialogue("", "a"), hh_dialogue("", "b"), "no human turn before the answer"),
        (hh_dialogue("q", "a"), hh_dialogue("q", "b", "c"), "human turn at the end"),
        (hh_dialogue("q", "", "c"), hh_dialogue("q", "b"), "human turn at the end"),
        (hh_dialogue("q", "Human: a"), hh_dialogue("q", "\nHuman: b"), "kept"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "no human turn before the answer"),
        (
            "\n\nHuman: q\n\nAssistant: x\n\nAssistant: a",
            "\n\nHuman: q\n\nAssistant: x\n\nAssistant: b",
            "no human turn before the answer",
        ),
    ],
)
def test_why_a_row_is_used_or_not(chosen, rejected, reason):
    parsed = parse_row({"chosen": chosen, "rejected": rejected})
    pair = parsed.pair
    assert parsed.reason == reason
    if reason == "kept":
        assert (pair.prompt, pair.chosen) == split_dialogue(chosen)
        assert (pair.prompt, pair.rejected) == split_dialogue(rejected)
    else:
        assert pair is None


# ---- every format ---------------------------------------------------------------------------

# A row, and the prompt, chosen and rejected that it becomes
FORMATS = {
    "HH-RLHF": (
        {"chosen": hh_dialogue("q", "a", "r", "yes"), "rejected": hh_dialogue("q", "a", "r", "no")},
        (Q, A, R),
        "yes",
        "no",
    ),
    "strings": ({"prompt": "q", "chosen": " yes", "rejected": "no\n"}, (Q,), "yes", "no"),
    "implicit prompt": (
        {"chosen": as_messages(SYSTEM, Q, YES), "rejected": as_messages(SYSTEM, Q, NO)},
        (SYSTEM, Q),
        "yes",
        "no",
    ),
    "explicit prompt": (
        {
            "prompt": as_messages(Q, A, R),
            "chosen": as_messages(YES),
            "rejected": as_messages(NO),
        },
        (Q, A, R),
        "yes",
        "no",
    ),
    "explicit prompt, texts": (
        {"prompt": as_messages(Q), "chosen": "yes", "rejected": "no"},
        (Q,),
        "yes",
        "no",
    ),
    "prompt said twice": (  # as in ultrafeedback_binarized
        {
            "prompt": "q",
            "chosen": as_messages(Q, YES),
            "rejected": as_messages(Q, NO),
            "messages": as_messages(Q, YES),
            "score_chosen": 7.0,
        },
        (Q,),
        "yes",
        "no",
    ),
    "answers that begin alike": (
        {
            "chosen": as_messages(Q, A, R, YES),
            "rejected": as_messages(Q, A, R, Message("assistant", "yes, but")),
        },
        (Q, A, R),
        "yes",
        "yes, but",
    ),
    "PKU-SafeRLHF": (
        {
            "prompt": "q",
            "response_0": "no",
            "response_1": "yes",
            "better_response_id": 1,
            "safer_response_id": 0,
            "is_response_0_safe": True,
        },
        (Q,),
        "yes",
        "no",
    ),
    "PKU-SafeRLHF, pairs": ({"prompt": "q", "response": ["yes", "no"]}, (Q,), "yes", "no"),
    "ShareGPT": (
        {"conversations": as_share_gpt(SYSTEM, Q, A, R, YES)},
        (SYSTEM, Q, A, R),
        "yes",
        "",
    ),
    "ShareGPT, preference": (
        {
            "conversations": as_share_gpt(Q),
            "chosen": as_share_gpt(YES)[0],
            "rejected": as_share_gpt(NO)[0],
        },
        (Q,),
        "yes",
        "no",
    ),
    "Alpaca": ({"instruction": "q", "input": "", "output": "yes"}, (Q,), "yes", ""),
    "Alpaca, no input": ({"instruction": "q", "output": "yes", "input": None}, (Q,), "yes", ""),
    "Alpaca, input": (
        {"instruction": "q", "input": "more", "output": "yes"},
        (Message("user", "q\n\nmore"),),
        "yes",
        "",
    ),
    "MACPO": (
        {"instruction": "USER: q ASSISTANT: a USER: r", "input": "", "output": ["yes", "no"]},
        (Message("user", "USER: q ASSISTANT: a USER: r"),),
        "yes",
        "no",
    ),
    "prompt and completion": ({"prompt": "q", "completion": "yes"}, (Q,), "yes", ""),
    "messages": ({"messages": as_messages(Q, A, R, YES)}, (Q, A, R), "yes", ""),
    "prompts": ({"prompt": "q"}, (Q,), "", ""),
    "prompts, messages": ({"messages": as_messages(Q, A, R)}, (Q, A, R), "", ""),
    "prompts, list": ({"prompt": as_messages(SYSTEM, Q), "chosen": None}, (SYSTEM, Q), "", ""),
    "HH-RLHF, prompt column": (
        {
            "prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:",
            "response": " yes",
            "chosen": " yes",
            "rejected": " no",
        },
        (Q, A, R),
        "yes",
        "no",
    ),
    "Alpaca, marked dialogue": (
        {"instruction": "Human: q\n\nAssistant: a\n\nHuman: r", "output": "yes"},
        (Q, A, R),
        "yes",
        "",
    ),
    "prompt as first turn": (
        {
            "prompt": "q",
            "chosen": as_messages(SYSTEM, Q, A, R, YES),
            "rejected": as_messages(SYSTEM, Q, A, R, NO),
        },
        (SYSTEM, Q, A, R),
        "yes",
        "no",
    ),
    "system column": (
        {"system": " s", "prompt": "q", "chosen": "yes", "rejected": "no"},
        (SYSTEM, Q),
        "yes",
        "no",
    ),
    "system column, ShareGPT": (
        {"system": "s", "conversations": as_share_gpt(Q, YES)},
        (SYSTEM, Q),
        "yes",
        "",
    ),
    "history column": (
        {"history": [["q", "a"]], "query": "r", "response": "yes", "system": "s"},
        (SYSTEM, Q, A, R),
        "yes",
        "",
    ),
    "OpenOrca": (
        {"id": 7, "system_prompt": "s", "question": "q", "response": "yes"},
        (SYSTEM, Q),
        "yes",
        "",
    ),
    "Orca pairs": (
        {"system": "", "question": "q", "chosen": "yes", "rejected": "no"},
        (Q,),
        "yes",
        "no",
    ),
    "Dolly": (
        {"instruction": "q", "context": "more", "response": "yes", "category": "qa"},
        (Message("user", "q\n\nmore"),),
        "yes",
        "",
    ),
    "prompt and messages": (  # as in ultrachat_200k and no_robots
        {"prompt": "q", "prompt_id": "x", "messages": as_messages(SYSTEM, Q, YES)},
        (SYSTEM, Q),
        "yes",
        "",
    ),
    "rejected response": (
        {"messages": as_messages(Q, YES), "rejected_response": "no"},
        (Q,),
        "yes",
        "no",
    ),
    "UltraFeedback": (
        {
            "instruction": "q",
            "completions": [
                {"response": "no", "overall_score": "1"},
                {"response": "maybe", "overall_score": 2.5},
                {"response": "yes", "overall_score": 4},
            ],
        },
        (Q,),
        "yes",
        "no",
    ),
    "scored responses": (
        {"prompt": "q", "responses": ["no", "yes"], "scores": [-1, 0.5]},
        (Q,),
        "yes",
        "no",
    ),
    "Nectar": (
        {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "answers": [{"answer": "no", "rank": 2.0}, {"answer": "yes", "rank": 1.0}],
            "turns": 1,
        },
        (Q,),
        "yes",
        "no",
    ),
    "good answer": ({"prompt": "q", "completion": "yes", "label": True}, (Q,), "yes", ""),
    "parts of messages": (
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "s"}]},
                {"role": "prompter", "content": [{"type": "text", "text": "q"}]},
                {"role": "Assistant", "content": [{"type": "text", "text": "yes"}]},
            ]
        },
        (SYSTEM, Q),
        "yes",
        "",
    ),
    "ShareGPT, other names": (
        {"conversations": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "yes"}]},
        (Q,),
        "yes",
        "",
    ),
    "stack-exchange-paired": (
        {"qid": 1, "question": "q", "response_j": "yes", "response_k": "no"},
        (Q,),
        "yes",
        "no",
    ),
    "input": (
        {"input": "q", "chosen": "yes", "rejected": "no", "chosen_score": 9, "status": None},
        (Q,),
        "yes",
        "no",
    ),
    "bad answer": ({"prompt": "q", "completion": "no", "label": False}, (Q,), "", ""),
    "untrained earlier turn": (
        {
            "messages": [
                *as_messages(Q),
                {"role": "assistant", "content": "a", "weight": 0},
                *as_messages(R, YES),
            ]
        },
        (Q, A, R),
        "yes",
        "",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("file_name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.json.gz"])
def test_every_format_is_known_by_its_fields(tmp_path, name, file_name):
    values, prompt, chosen, rejected = FORMATS[name]
    line = json.dumps(values)
    contents = {
        "x.jsonl": f"{line}\n{line}",
        "x.json": json.dumps([values, values]),
        "x.jsonl.gz": f"{line}\n\n{line}",
        "x.json.gz": "\ufeff \n" + json.dumps([values, values], indent=2, ensure_ascii=False),
    }
    file = write_lines(tmp_path / file_name, contents[file_name])
    pairs, reports = read_data(str(file))

    meta = {"file": "x"}
    first = Pair(example_id(prompt), prompt, chosen, rejected, meta=meta)
    second = Pair(example_id(prompt, 1), prompt, chosen, rejected, meta=meta)
    assert pairs == [first, second]

    assert list(reports) == ["x"]
    report = reports["x"]
    expected = {"read": 2, "kept": 2}
    if file_name == "x.jsonl.gz":
        expected = {"read": 3, "kept": 2, "blank line": 1}
    assert report.counts == expected
    assert not report.unread
    assert report.fields.keys() <= values.keys()
    assert str(report).startswith(f"{next(iter(report.fields))}: ")
    assert "\n" not in str(report)


def test_the_label_of_pku_decides(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", json.dumps(FORMATS["PKU-SafeRLHF"][0]))
    (better,), _ = read_data(str(file), preference_label="better")
    (safer,), _ = read_data(str(file), preference_label="safer")
    assert (better.chosen, better.rejected) == ("yes", "no")
    assert (safer.chosen, safer.rejected) == ("no", "yes")


def test_files_of_a_folder_may_differ_in_format(tmp_path):
    write_lines(tmp_path / "a.jsonl", hh_row())
    write_lines(tmp_path / "b.json", json.dumps([FORMATS["MACPO"][0]]))
    pairs, reports = read_data(str(tmp_path))
    assert [pair.meta["file"] for pair in pairs] == ["a", "b"]
    assert list(reports) == ["a", "b"]


# ---- rows that cannot be used ---------------------------------------------------------------

GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
UNUSABLE = {
    "prompts differ": [
        {"chosen": as_messages(Q, A), "rejected": as_messages(R, B)},
        {"prompt": "q", "chosen": as_messages(R, A), "rejected": as_messages(R, B)},
        {"chosen": as_messages(Q, A, R, YES), "rejected": as_messages(R, NO)},
        {"prompt": "q", "messages": as_messages(R, A)},
        {"prompt": "q", "chosen": hh_dialogue("r", "a"), "rejected": hh_dialogue("r", "b")},
    ],
    "no human turn before the answer": [
        {"messages": as_messages(A)},
        {"conversations": as_share_gpt(Q, A, SYSTEM)},
        {"messages": as_messages(A, SYSTEM, B)},
    ],
    "human turn at the end": [
        {"chosen": as_messages(Q, R), "rejected": as_messages(Q, Message("user", "x"))}
    ],
    "empty answer": [
        {"instruction": "q", "input": "", "output": " "},
        {"prompt": "q", "response": ["a", ""]},
        {"messages": as_messages(Q, Message("assistant", "\n"))},
        {"chosen": as_messages(Q, A), "rejected": as_messages(Q, Message("assistant", ""))},
    ],
    "identical answers": [
        {"instruction": "q", "input": "", "output": ["a", "a "]},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"chosen": as_messages(Q, A), "rejected": as_messages(Q, A)},
        {"prompt": "q", "responses": ["a", "b", "c"], "scores": [2, 2, 2]},
    ],
    "rejected answer scored above the chosen one": [
        GOOD | {"score_chosen": 1, "score_rejected": 1.5},
        GOOD | {"chosen_score": "2", "rejected_score": "10"},
    ],
    "weight 0": [
        {"messages": [*as_messages(Q), {"role": "assistant", "content": "a", "weight": 0}]},
        {"conversations": [*as_share_gpt(Q), {"from": "gpt", "value": "a", "train": False}]},
        {"prompt": "q", "response": "a", "weight": 0},
    ],
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_rows_that_cannot_be_used_are_counted(tmp_path, reason):
    for values in UNUSABLE[reason]:
        parsed = parse_row(values)
        assert (parsed.pair, parsed.reason) == (None, reason)
        file = write_lines(tmp_path / "x.jsonl", json.dumps(values), json.dumps(values))
        with pytest.raises(UserError, match=f"no usable row .*2 {reason} .first in line 1"):
            read_data(str(file))


# ---- rows that cannot be read ---------------------------------------------------------------

# As the second row of a file
INVALID = {
    "not valid JSON": ["{", '{"prompt": "q"', "{'prompt': 'q'}", "[" * 100_000],
    "no object": ["[]", "7", "null", '"text"'],
    "another form": [
        {"prompt": "q", "chosen": "a"},
        {"prompt": "q", "chosen": ["a"], "rejected": "b"},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": 1, "chosen": "a", "rejected": "b"},
        GOOD | {"response": "c"},
        {},
    ],
    "empty turn": [GOOD | {"prompt": " \n"}],
    "no valid text": [
        '{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}',
        '{"prompt": "q", "chosen": "a", "rejected": "\\udc00"}',
    ],
}


@pytest.mark.parametrize("reason", INVALID)
def test_a_row_that_cannot_be_read_is_an_error_or_skipped(tmp_path, reason):
    good = json.dumps(GOOD)
    for values in INVALID[reason]:
        bad = values if isinstance(values, str) else json.dumps(values)
        file = write_lines(tmp_path / "x.jsonl", good, bad, good, bad)
        with pytest.raises(UserError) as caught:
            read_data(str(file))
        assert str(caught.value).startswith(f"{file}, line 2: {reason}: ")
        assert len(str(caught.value)) < 650

        pairs, reports = read_data(str(file), skip_invalid=True)
        assert len(pairs) == 2
        assert reports["x"].counts == {"read": 4, "kept": 2, f"skipped ({reason})": 2}
        assert f"2 skipped ({reason}) (first in line 2)" in str(reports["x"])


# As the first row of a file, and what is said of it
INVALID_FIRST = {
    "form not recognised": [
        ({"question": "q", "answer": "a"}, "'question', 'answer'"),
        ({}, "none"),
        ({"prompt\ud800": "q"}, r"\ud800"),
        ({"chosen": "a"}, "'chosen'"),
        ({"prompt": "q", "rejected": "a"}, "'prompt', 'rejected'"),
        ({"instruction": "q", "input": ""}, "understood are"),
        ({"a" * 10_000: 1}, "Alpaca"),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, "'history'"),
        ({"instruction": "q", "output": "a", "system": "be brief"}, "'system'"),
    ],
    "unknown role": [
        ({"messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
        ({"conversations": [{"from": "wizard", "value": "x"}]}, "wizard"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "user"),
        ({"messages": [{"role": "x" * 1000, "content": "x"}]}, "xxx"),
        ({"messages": [{"role": "tag", "content": "x"}]}, "tag"),
    ],
    "no role": [
        ({"messages": [{"content": "x"}]}, "'role' or 'from'; its keys are 'content'"),
        ({"messages": [{"role": None, "content": "x"}]}, "its keys are 'role', 'content'"),
        ({"conversation": [{"input": "q", "output": "a"}]}, "'input', 'output'"),
        ({"query": "q", "response": "a", "history": [{"user": "r", "bot": "b"}]}, "'user', 'bot'"),
    ],
    "answers not read": [
        ({"prompt": "q", "response_1": "b"}, "'response_1': no column"),
        (
            {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -2},
            "'response_1' and 'response_2'",
        ),
        ({"prompt": "q", "answer_a": "a", "answer_b": "b", "better": "a"}, "'answer_a'"),
        ({"prompt": "q", "response1": "a", "response2": "b"}, '"chosen" and "rejected"'),
        ({"prompt": "q", "responses": ["a", "b"], "labels": [1, 0]}, "'scores' or 'ranks'"),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, "'completions'"),
    ],
    "tool call": [
        (
            {
                "messages": [
                    *as_messages(Q),
                    {"role": "assistant", "content": "", "tool_calls": [1]},
                ]
            },
            "'tool_calls'",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "function_call": {"a": 1}}]}, "call"),
    ],
    "two system messages": [
        ({"system": "be kind", "messages": as_messages(SYSTEM, Q)}, "'be kind'"),
        ({"system": "s", "system_prompt": "t", "prompt": "q"}, "leave one"),
    ],
    "history not read": [
        ({"prompt": "q", "history": "we talked"}, "[question, answer] pairs"),
        ({"prompt": "q", "history": [["q"]]}, "[question, answer] pairs"),
        ({"prompt": "q", "history": {"q": "a"}}, "an object"),
    ],
    "unknown label": [
        ({"prompt": "q", "completion": "a", "label": "meh"}, "'meh'"),
        ({"prompt": "q", "completion": "a", "label": 3}, "rename the column"),
        ({"prompt": "q", "response": ["a", "b"], "label": 1}, "beside the two answers"),
        ({"prompt": "q", "response": "a", "label": 1, "kto_tag": False}, "contradict"),
    ],
    "no score": [
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, "N/A"]}, "'N/A'"),
        (GOOD | {"score_chosen": True, "score_rejected": 1}, "'score_chosen'"),
    ],
    "no message": [
        ({"messages": ["q", "a"]}, "text"),
        ({"prompt": 7}, "a number"),
        ({"prompt": "q", "chosen": [1], "rejected": [2]}, "number"),
        ({"chosen": 3, "rejected": 4}, "chosen"),
        ({"prompt": "q", "response": ["a", 3]}, "'response'"),
        ({"conversations": [None]}, "null"),
        ({"prompt": True}, "true or false"),
    ],
    "no text": [
        ({"messages": [{"role": "user", "content": None}]}, "null"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "null"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "a list that holds text"),
        ({"instruction": "q", "input": 3, "output": "a"}, "'input'"),
    ],
    "empty turn": [
        ({"messages": []}, "no turn"),
        ({"messages": as_messages(Q, Message("assistant", " "), R)}, "empty turn"),
        ({"messages": as_messages(Message("user", ""))}, "messages"),
        ({"messages": as_messages(Message("system", ""), Q)}, "messages"),
        ({"instruction": "", "input": "x", "output": "a"}, "instruction"),
    ],
    "no label": [
        ({"prompt": "q", "response_0": "a", "response_1": "b"}, "data.preference_label"),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": True}, "True"),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": -1}, "-1"),
    ],
    "no pair": [
        ({"prompt": "q", "response": ["a"]}, "1 texts"),
        ({"instruction": "q", "output": []}, "0 texts"),
    ],
    "no dialogue": [({"chosen": "good", "rejected": "bad"}, "Human")],
}


@pytest.mark.parametrize("reason", INVALID_FIRST)
@pytest.mark.parametrize("is_array", [False, True])
def test_a_first_row_that_cannot_be_read_says_why(tmp_path, reason, is_array):
    for values, words in INVALID_FIRST[reason]:
        if is_array:
            file = write_lines(tmp_path / "x.json", json.dumps([values], indent=1))
            where = f"{file}, row 1"
        else:
            file = write_lines(tmp_path / "x.jsonl", json.dumps(values))
            where = f"{file}, line 1"
        with pytest.raises(UserError) as caught:
            read_data(str(file))
        sentence = str(caught.value)
        assert sentence.startswith(f"{where}: {reason}: ")
        assert words in sentence
        assert len(sentence) < 650
        assert "\n" not in sentence
        assert sentence.encode()  # it can be printed

        with pytest.raises(UserError, match="no usable row"):
            read_data(str(file), skip_invalid=True)


def test_a_skipped_row_does_not_set_the_fields(tmp_path):
    good = json.dumps(GOOD)
    file = write_lines(tmp_path / "x.jsonl", '{"messages": []}', "{", good, good)
    pairs, reports = read_data(str(file), skip_invalid=True)
    assert len(pairs) == 2
    assert reports["x"].fields == {"prompt": "text", "chosen": "text", "rejected": "text"}


def test_a_folder_in_place_of_a_file_ends_a_program_with_one_sentence(place):
    folder = place / "x.json"
    folder.mkdir()
    preset = write_stub(place / "p")
    words = "no .jsonl or .json file"
    assert words in refused(place, preset, *HH, f"--data.path={folder}")
    flags = (f"--prompts={folder}", f"--out={place / 'o'}")
    assert words in refused(place, "nowhere", *flags, program="sample")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": 1}', "form not recognised"),
        ('[{"prompt": "q", "chosen": "a"}, {"prompt":', "cut short"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        ('{"messages": [{"role": "critic", "content": "x"}]}', "'critic'"),
    ],
)
def test_bad_files_end_a_program_with_one_sentence(place, content, words):
    preset = write_stub(place / "p")
    file = write_lines(place / "x.json", content)
    base = [preset, *HH, f"--data.path={file}"]
    assert words in refused(place, *base)
    assert words in refused(place, *base, "--dry_run")

    # when such rows are skipped, none is left
    ended = invoke("train", *base, "--data.on_invalid_row=skip", "--dry_run")
    check_sentence(ended.code, ended.err)


def test_a_file_of_two_formats_is_refused_or_read_in_part(place):
    preset = write_stub(place / "p")
    file = write_lines(place / "x.json", *ROWS, json.dumps(GOOD))
    base = [preset, *HH, f"--data.path={file}", "--dry_run"]
    assert "line 61: another form" in refused(place, *base)

    ended = invoke("train", *base, "--data.on_invalid_row=skip")
    assert ended.code == 0
    assert "1 skipped (another form) (first in line 61)" in ended.out
    assert not (place / "runs").exists()


# ---- the real files -------------------------------------------------------------------------


def test_the_counts_of_the_real_hh_rlhf():
    pairs, reports = read_data(str(shared("data/hh-rlhf")))
    assert dict(reports["helpful-base.test"].counts) == {
        "read": 2354,
        "kept": 2339,
        "empty answer": 4,
        "prompts differ": 9,
        "identical answers": 2,
    }
    assert dict(reports["harmless-base.test"].counts) == {
        "read": 2312,
        "kept": 2303,
        "empty answer": 4,
        "prompts differ": 5,
    }
    rows_by_file = Counter(pair.meta["file"] for pair in pairs)
    assert rows_by_file == {"helpful-base.test": 2339, "harmless-base.test": 2303}
    assert len({pair.id for pair in pairs}) == len(pairs)


def test_every_real_pair_is_the_text_of_its_row():
    folder = str(shared("data/hh-rlhf"))
    pairs = iter(read_data(folder)[0])
    speakers = {"user": "Human", "assistant": "Assistant"}
    for file in find_files(folder):
        for _, line in read_lines(file):
            row = json.loads(line)
            if parse_row(row).pair is None:
                continue
            pair = next(pairs)
            prompt = "".join(f"\n\n{speakers[turn.role]}: {turn.content}" for turn in pair.prompt)
            for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                text = f"{prompt}\n\nAssistant: {answer}"
                # white space around turns is not kept
                assert "".join(text.split()) == "".join(row[name].split())
            assert pair.prompt[-1].role == "user"
            assert "\n\nAssistant:" not in pair.chosen
    assert next(pairs, None) is None


def test_real_pku_saferlhf():
    folder = shared("data/pku-saferlhf")
    pairs, reports = read_data(str(folder))
    assert dict(reports["pku_saferlhf_dpo_5k"].counts) == {"read": 5135, "kept": 5135}
    assert len({pair.prompt for pair in pairs}) == 930
    assert len({(pair.prompt, pair.chosen, pair.rejected) for pair in pairs}) == 3590

    with gzip.open(folder / "pku_saferlhf_dpo_5k.json.gz") as stream:
        rows = json.load(stream)
    for pair, row in zip(pairs, rows, strict=True):
        assert [pair.chosen, pair.rejected] == [text.strip() for text in row["response"]]
        assert pair.prompt == (Message("user", row["prompt"].strip()),)

    # prompts repeat, and d2 and test have each of them once
    splits, left_out = split_pairs(pairs, (0.0, 0.4, 0.4, 0.2), 0)
    assert len(splits["d2"]) + len(splits["test"]) == 558
    assert left_out["d2"] > 1000


def test_real_alpaca():
    pairs, reports = read_data(str(shared("data/other")))
    counts = dict(reports["alpaca_5000"].counts)
    assert counts == {"read": 5000, "kept": 4998, "empty answer": 2}
    assert not any(pair.rejected for pair in pairs)
    with_input = [pair for pair in pairs if "\n\n" in pair.prompt[0].content]
    assert len(with_input) > 1900


# ---- export ---------------------------------------------------------------------------------


def make_sample(*prompt: Message) -> Sample:
    return Sample(
        id="i",
        prompt=prompt,
        response="yes",
        finish="stop",
        tokens=(1,),
        logp=-1.0,
        perplexity=2.0,
        agent="teacher1",
        seed=0,
    )


def test_records_in_the_shape_of_the_released_files():
    pair = Pair("i", (Q, A, R), "yes", "no")
    instruction = "USER: q ASSISTANT: a USER: r"
    assert released(pair) == {"instruction": instruction, "input": "", "output": ["yes", "no"]}
    assert released(make_sample(Q)) == {"instruction": "q", "input": "", "output": "yes"}

    tagged = make_sample(SYSTEM, Q, Message("tag", "t"))
    assert released(tagged)["instruction"] == "SYSTEM: s USER: q"

    # read again, the dialogue is one human turn
    prompt = (Message("user", instruction),)
    again = parse_row(released(pair)).pair
    assert again == Pair(example_id(prompt), prompt, "yes", "no")


@pytest.mark.parametrize(
    ("stage", "source"),
    [("round1/pairs_student", "pairs.jsonl"), ("round0/weak_labels", "samples.jsonl")],
)
def test_export_of_pairs_and_labels(stub, place, stage, source):
    target = place / "exported.json"
    assert invoke("eval", "export", stub, stage, target).code == 0
    records = rows_of(stub / stage / source)
    rows = json.loads(target.read_text())
    assert len(rows) == len(records) > 5

    chosen = []
    for record, row in zip(records, rows, strict=True):
        output = record.get("response")
        if "chosen" in record:
            output = [record["chosen"], record["rejected"]]
        instruction = record["prompt"][0]["content"]
        assert row == {"instruction": instruction, "input": "", "output": output}
        if output:
            chosen.append(record.get("chosen", output))

    # what was exported can be read
    pairs, _ = read_data(str(target))
    assert [pair.chosen for pair in pairs] == chosen


def test_export_of_what_is_not_there_is_refused(stub, place):
    target = place / "exported.json"
    target.write_text("[]")
    stage = "round1/pairs_student"
    before = tree(place)
    for words in (
        (stub, stage, target),  # it exists
        (stub, "round9/x", place / "y"),
        (stub, stage),
        (stub, "round0/teacher1_pos", place / "y"),
        (stub, stage, place / "no" / "y"),
    ):
        ended = invoke("eval", "export", *words)
        check_sentence(ended.code, ended.err)
    assert tree(place) == before
