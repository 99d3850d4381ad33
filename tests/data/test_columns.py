"""What stands beside a known form: used, passed over for a reason, or named once with its count."""

import json
import random

import pytest
from runs import invoke, write_stub
from test_bad_input import HH, ROWS, check_sentence, refused
from test_formats import SYSTEM, A, Q, R, as_messages
from texts import write_lines

from minmacpo import UserError
from minmacpo.data.columns import (
    ANSWER_FIELDS,
    HARMLESS,
    HARMLESS_NAMES,
    LABEL_FIELDS,
    PROMPT_FIELDS,
    SYSTEM_FIELDS,
)
from minmacpo.data.formats import column_warnings, parse_row, read_data
from minmacpo.data.records import Message

PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}
YES = {"role": "assistant", "content": "yes"}


def read(tmp_path, *rows: dict, **options):
    """The pairs of these rows, and the report on them."""
    file = write_lines(tmp_path / "x.jsonl", *map(json.dumps, rows))
    pairs, reports = read_data(str(file), **options)
    return pairs, reports["x"]


# ---- system texts and earlier turns ---------------------------------------------------------


@pytest.mark.parametrize("name", SYSTEM_FIELDS)
@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"},
        {"messages": [*as_messages(Q), YES]},
        {"messages": [*as_messages(SYSTEM, Q), YES]},  # says the same
        {"question": "q", "response": "yes"},
        {"prompt": "q"},
    ],
)
def test_a_system_column_becomes_the_system_message(name, row):
    assert parse_row(row | {name: "s"}).pair.prompt == (SYSTEM, Q)
    without_text = parse_row(row | {name: " \n"}).pair.prompt
    assert without_text == parse_row(row).pair.prompt


@pytest.mark.parametrize(
    "history",
    [
        [["q", "a"]],
        as_messages(Q, A),
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        "\n\nHuman: q\n\nAssistant: a",
    ],
)
def test_a_history_column_holds_the_earlier_turns(history):
    row = {"prompt": "r", "history": history, "response": "yes"}
    assert parse_row(row).pair.prompt == (Q, A, R)
    assert parse_row(row | {"system": "s"}).pair.prompt == (SYSTEM, Q, A, R)
    # turns that the prompt has already are not said twice
    assert parse_row(row | {"prompt": as_messages(Q, A, R)}).pair.prompt == (Q, A, R)
    assert parse_row(row | {"prompt": as_messages(SYSTEM, R)}).pair.prompt == (SYSTEM, Q, A, R)


def test_a_history_may_begin_with_the_system_message():
    row = {"prompt": "r", "history": as_messages(SYSTEM, Q, A)}
    assert parse_row(row).pair.prompt == (SYSTEM, Q, A, R)


def test_a_context_is_earlier_turns_an_input_or_named():
    assert parse_row({"prompt": "r", "context": as_messages(Q, A)}).pair.prompt == (Q, A, R)
    dolly = parse_row({"instruction": "q", "context": "more", "response": "yes"})
    assert dolly.pair.prompt == (Message("user", "q\n\nmore"),)
    assert parse_row({"prompt": "q", "context": "more"}).unread == ["context"]
    with_input = {"instruction": "q", "input": "more", "context": "else", "output": "yes"}
    assert parse_row(with_input).unread == ["context"]


# ---- labels ---------------------------------------------------------------------------------

LABELS = [(True, False), (1, 0), (1.0, 0.0), ("true", "False"), ("1", "-1"), ("good", " Bad ")]


@pytest.mark.parametrize("name", LABEL_FIELDS)
@pytest.mark.parametrize(("good", "bad"), LABELS)
def test_labelled_answers_are_joined_to_pairs(tmp_path, name, good, bad):
    pairs, report = read(
        tmp_path,
        {"prompt": "q", "completion": "worse", name: bad},
        {"prompt": "q", "completion": "better", name: good},
        {"prompt": "q", "completion": "better too", name: good},
        {"prompt": "r", "completion": "bad alone", name: bad},
    )
    assert [(pair.prompt[0].content, pair.chosen, pair.rejected) for pair in pairs] == [
        ("q", "better", "worse"),
        ("q", "better too", ""),
        ("r", "", ""),
    ]
    assert "1 bad answers joined with a good one" in str(report)
    assert "1 bad answers without a good one" in str(report)
    assert not report.unread


@pytest.mark.parametrize(
    "form",
    [
        lambda answer: {"prompt": "q", "response": answer},
        lambda answer: {"instruction": "q", "input": "", "output": answer},
        lambda answer: {"messages": [*as_messages(Q), {"role": "assistant", "content": answer}]},
        lambda answer: {
            "prompt": as_messages(Q),
            "completion": [{"role": "assistant", "content": answer}],
        },
    ],
)
def test_a_bad_answer_is_never_taken_for_a_good_one(tmp_path, form):
    rng = random.Random(0)
    rows = []
    for number in range(40):
        is_good = rng.random() < 0.5
        rows.append(form(f"{'good' if is_good else 'bad'} {number}") | {"label": is_good})
    pairs, report = read(tmp_path, *rows)
    assert all("bad" not in pair.chosen and "good" not in pair.rejected for pair in pairs)
    goods = sum(row["label"] for row in rows)
    assert sum(bool(pair.chosen) for pair in pairs) == goods
    assert sum(report.joined.values()) == len(rows) - goods


def test_a_good_answer_is_not_joined_with_itself(tmp_path):
    rows = [{"prompt": "q", "response": answer, "label": good} for answer, good in
            (("a", True), ("a", False), ("b", False))]  # fmt: skip
    pairs, _ = read(tmp_path, *rows)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("a", "b"), ("", "")]


def test_a_file_has_labels_in_all_rows_or_in_none(tmp_path):
    labelled = {"prompt": "q", "response": "a", "label": False}
    plain = {"prompt": "q", "response": "b"}
    for rows in ((labelled, plain), (plain, labelled), (labelled, plain | {"label": None})):
        with pytest.raises(UserError, match="line 2: another form: 'label'"):
            read(tmp_path, *rows)


def test_labels_make_no_second_opinion_on_two_files(tmp_path):
    for name in ("good", "bad"):
        write_lines(tmp_path / name, json.dumps({"prompt": "q", "output": name, "label": True}))
    with pytest.raises(UserError, match="the files are to say which are good"):
        read_data(f"{tmp_path / 'good'},{tmp_path / 'bad'}")


def test_a_label_beside_two_answers_is_none(tmp_path):
    _, report = read(tmp_path, PAIR | {"label": 0}, PAIR | {"label": None})
    assert report.unread == {"label": 1}


# ---- what is not used -----------------------------------------------------------------------


def test_columns_that_are_not_used_are_named_once_with_their_rows(tmp_path):
    tools = [{"type": "function"}]
    rows = [PAIR | {"tools": tools, "id": 5}, PAIR | {"tools": []}, PAIR | {"tools": "t", "odd": 0}]
    pairs, report = read(tmp_path, *rows)
    assert len(pairs) == 3
    assert report.unread == {"tools": 2, "odd": 1}
    (warning,) = column_warnings({"x": report})
    assert "'tools' (in 2 rows), 'odd' (in 1 rows)" in warning
    assert "\n" not in warning


def test_keys_of_messages_that_are_not_used_are_named():
    messages = [*as_messages(Q), YES | {"thinking": "hm", "weight": 1, "tool_calls": None}]
    assert parse_row({"messages": messages}).unread == ["messages.thinking"]
    assert parse_row({"messages": [*as_messages(Q), YES | {"name": "bob"}]}).unread == []


def test_a_column_that_says_the_same_again_is_no_loss():
    messages = [*as_messages(Q), YES]
    for again in ({"response": " yes"}, {"messages": messages}, {"conversations": messages}):
        assert parse_row(PAIR | again).unread == []
    for other in ({"response": "else"}, {"messages": as_messages(Q, A)}, {"answer": "yes, 42"}):
        assert parse_row(PAIR | other).unread == list(other)


def test_a_long_list_of_columns_stays_short(tmp_path):
    _, report = read(tmp_path, PAIR | {f"column\n{number}" + "x" * 500: 1 for number in range(99)})
    (warning,) = column_warnings({"x": report})
    assert "and 89 more" in warning
    assert len(warning) < 1000
    assert "\n" not in warning


def test_harmless_columns_have_one_reason_and_are_nothing_else():
    names = [name for group in HARMLESS.values() for name in group]
    assert len(names) == len(set(names))
    used = {*PROMPT_FIELDS, *ANSWER_FIELDS, *LABEL_FIELDS, *SYSTEM_FIELDS}
    assert not used & HARMLESS_NAMES
    assert parse_row(PAIR | dict.fromkeys(names, "x")).unread == []


def test_the_programs_warn_of_columns_that_are_not_used(place):
    preset = write_stub(place / "p")
    rows = [json.dumps(json.loads(row) | {"tools": ["t"]}) for row in ROWS]
    file = write_lines(place / "x.jsonl", *rows)
    ended = invoke("train", preset, *HH, f"--data.path={file}", "--dry_run")
    assert ended.code == 0
    warnings = [line for line in ended.err.splitlines() if "'tools'" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("WARNING: x: columns that are not used: ")
    assert f"(in {len(ROWS)} rows)" in warnings[0]


def test_labelled_rows_without_two_sides_are_refused_with_the_reason(place):
    preset = write_stub(place / "p")
    rows = [{"prompt": f"q {n}", "response": f"a {n}", "label": n % 2} for n in range(60)]
    file = write_lines(place / "x.jsonl", *map(json.dumps, rows))
    words = [preset, *HH, f"--data.path={file}", "--dry_run"]
    assert "no row is left for d1" in refused(place, *words)
    ended = invoke("train", *words)
    check_sentence(ended.code, ended.err)
