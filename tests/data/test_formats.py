"""What a row can look like, arrays and lines, bad rows, bounded memory, slices with files of their own, export."""

import gzip
import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from conftest import shared
from runs import invoke, rows_of, stages_of, train, write_stub
from test_bad_input import HH, ROWS, check_sentence, refused, tree
from test_records import dialogue, row, write

from minmacpo import UserError
from minmacpo.config.parse import parse
from minmacpo.data.formats import LoadReport, parse_row, read_data, read_file, released
from minmacpo.data.readers import ROW_LIMIT, is_array, read_array
from minmacpo.data.records import Message, Pair, Sample, example_id
from minmacpo.data.splits import split_pairs
from minmacpo.pipeline.prepare_data import identify_source

Q, A, B = Message("user", "q"), Message("assistant", "a"), Message("assistant", "b")
R, S = Message("user", "r"), Message("system", "s")


def said(*messages: Message) -> list[dict]:
    return [{"role": m.role, "content": m.content} for m in messages]


def shared_gpt(*messages: Message) -> list[dict]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m.role], "value": m.content} for m in messages]


FORMS = {
    "HH-RLHF": (
        {"chosen": dialogue("q", "a", "r", "yes"), "rejected": dialogue("q", "a", "r", "no")},
        (Q, A, R),
        "yes",
        "no",
    ),
    "strings": ({"prompt": "q", "chosen": " yes", "rejected": "no\n"}, (Q,), "yes", "no"),
    "implicit prompt": (
        {
            "chosen": said(S, Q, Message("assistant", "yes")),
            "rejected": said(S, Q, Message("assistant", "no")),
        },
        (S, Q),
        "yes",
        "no",
    ),
    "explicit prompt": (
        {
            "prompt": said(Q, A, R),
            "chosen": said(Message("assistant", "yes")),
            "rejected": said(Message("assistant", "no")),
        },
        (Q, A, R),
        "yes",
        "no",
    ),
    "explicit prompt, texts": (
        {"prompt": said(Q), "chosen": "yes", "rejected": "no"},
        (Q,),
        "yes",
        "no",
    ),
    "prompt said twice": (  # as in ultrafeedback_binarized
        {
            "prompt": "q",
            "chosen": said(Q, Message("assistant", "yes")),
            "rejected": said(Q, Message("assistant", "no")),
            "messages": said(Q, Message("assistant", "yes")),
            "score_chosen": 7.0,
        },
        (Q,),
        "yes",
        "no",
    ),
    "a shared beginning of the answers": (
        {
            "chosen": said(Q, A, R, Message("assistant", "yes")),
            "rejected": said(Q, A, R, Message("assistant", "yes, but")),
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
        {"conversations": shared_gpt(S, Q, A, R, Message("assistant", "yes"))},
        (S, Q, A, R),
        "yes",
        "",
    ),
    "ShareGPT, preference": (
        {
            "conversations": shared_gpt(Q),
            "chosen": shared_gpt(Message("assistant", "yes"))[0],
            "rejected": shared_gpt(Message("assistant", "no"))[0],
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
    "messages": ({"messages": said(Q, A, R, Message("assistant", "yes"))}, (Q, A, R), "yes", ""),
    "prompts": ({"prompt": "q"}, (Q,), "", ""),
    "prompts, messages": ({"messages": said(Q, A, R)}, (Q, A, R), "", ""),
    "prompts, list": ({"prompt": said(S, Q), "chosen": None}, (S, Q), "", ""),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_known_by_its_keys(tmp_path, name):
    values, prompt, chosen, rejected = FORMS[name]
    wanted = Pair(example_id(prompt), prompt, chosen, rejected, meta={"file": "x"})
    again = Pair(example_id(prompt, 1), prompt, chosen, rejected, meta={"file": "x"})
    for file, content in [
        ("x.jsonl", json.dumps(values) + "\n" + json.dumps(values)),
        ("x.json", json.dumps([values, values])),
        ("x.jsonl.gz", json.dumps(values) + "\n\n" + json.dumps(values)),
        ("x.json.gz", "\ufeff \n" + json.dumps([values, values], indent=2, ensure_ascii=False)),
    ]:
        write(tmp_path / file, content)
        pairs, reports = read_data(str(tmp_path / file))
        assert pairs == [wanted, again] and list(reports) == ["x"]
        report, blank = reports["x"], file == "x.jsonl.gz"
        assert report.counts == Counter(read=2 + blank, kept=2) + Counter({"blank line": blank})
        assert report.fields.keys() <= values.keys() and str(report).startswith(
            f"{next(iter(report.fields))}: "
        )
        assert len(str(report).splitlines()) == 1


def test_the_label_of_pku_decides(tmp_path):
    values = FORMS["PKU-SafeRLHF"][0]
    path = write(tmp_path / "x.jsonl", json.dumps(values))
    assert [
        (p.chosen, p.rejected)
        for p in read_data(str(path), "better")[0] + read_data(str(path), "safer")[0]
    ] == [("yes", "no"), ("no", "yes")]


UNUSABLE = {
    "prompts differ": [
        {"chosen": said(Q, A), "rejected": said(R, B)},
        {"prompt": "q", "chosen": said(R, A), "rejected": said(R, B)},
    ],
    "no human turn before the answer": [
        {"messages": said(A)},
        {"conversations": shared_gpt(Q, A, S)},
        {"messages": said(A, S, B)},
    ],
    "human turn at the end": [{"chosen": said(Q, R), "rejected": said(Q, Message("user", "x"))}],
    "empty answer": [
        {"instruction": "q", "input": "", "output": " "},
        {"prompt": "q", "response": ["a", ""]},
        {"messages": said(Q, Message("assistant", "\n"))},
        {"chosen": said(Q, A), "rejected": said(Q, Message("assistant", ""))},
    ],
    "identical answers": [
        {"instruction": "q", "input": "", "output": ["a", "a "]},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"chosen": said(Q, A), "rejected": said(Q, A)},
    ],
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_rows_that_cannot_be_used_are_counted(tmp_path, reason):
    for values in UNUSABLE[reason]:
        assert parse_row(values) == (None, reason)
        path = write(tmp_path / "x.jsonl", json.dumps(values), json.dumps(values))
        with pytest.raises(UserError, match=f"no usable row .*2 {reason} .first in line 1"):
            read_data(str(path))


GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
BAD = {
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


@pytest.mark.parametrize("reason", BAD)
def test_a_row_that_cannot_be_read_is_an_error_or_skipped(tmp_path, reason):
    good = json.dumps(GOOD)
    for values in BAD[reason]:
        bad = values if isinstance(values, str) else json.dumps(values)
        path = write(tmp_path / "x.jsonl", good, bad, good, bad)
        with pytest.raises(UserError) as caught:
            read_data(str(path))
        assert (
            str(caught.value).startswith(f"{path}, line 2: {reason}: ")
            and len(str(caught.value)) < 650
        )
        pairs, reports = read_data(str(path), skip_invalid=True)
        assert len(pairs) == 2 and reports["x"].counts == {
            "read": 4,
            "kept": 2,
            f"skipped ({reason})": 2,
        }
        assert f"2 skipped ({reason}) (first in line 2)" in str(reports["x"])


FIRST = {  # as the first row of a file: what is told
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
        ({"conversations": [{"from": "bard", "value": "x"}]}, "bard"),
        ({"messages": [{"role": None, "content": "x"}]}, "None"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "user"),
        ({"messages": [{"content": "x"}]}, "None"),
        ({"messages": [{"role": "x" * 1000, "content": "x"}]}, "xxx"),
        ({"messages": [{"role": "tag", "content": "x"}]}, "tag"),
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
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a list"),
        ({"instruction": "q", "input": 3, "output": "a"}, "'input'"),
    ],
    "empty turn": [
        ({"messages": []}, "no turn"),
        ({"messages": said(Q, Message("assistant", " "), R)}, "empty turn"),
        ({"messages": said(Message("user", ""))}, "messages"),
        ({"messages": said(Message("system", ""), Q)}, "messages"),
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


@pytest.mark.parametrize("reason", FIRST)
@pytest.mark.parametrize("array", [False, True])
def test_a_first_row_that_cannot_be_read_says_why(tmp_path, reason, array):
    for values, says in FIRST[reason]:
        text = json.dumps([values], indent=1) if array else json.dumps(values)
        path = write(tmp_path / f"x.json{'' if array else 'l'}", text)
        with pytest.raises(UserError) as caught:
            read_data(str(path))
        told = str(caught.value)
        assert (
            told.startswith(f"{path}, {'row' if array else 'line'} 1: {reason}: ") and says in told
        ), told
        assert len(told) < 650 and "\n" not in told and told.encode()
        with pytest.raises(UserError, match="no usable row"):
            read_data(str(path), skip_invalid=True)


def test_a_skipped_row_does_not_set_the_form(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"messages": []}', "{", json.dumps(GOOD), json.dumps(GOOD))
    pairs, reports = read_data(str(path), skip_invalid=True)
    assert len(pairs) == 2 and reports["x"].fields == dict.fromkeys(
        ("prompt", "chosen", "rejected"), "text"
    )


def test_files_of_a_folder_may_differ_in_form(tmp_path):
    write(tmp_path / "a.jsonl", row())
    write(tmp_path / "b.json", json.dumps([FORMS["MACPO"][0]]))
    pairs, reports = read_data(str(tmp_path))
    assert [p.meta["file"] for p in pairs] == list(reports) == ["a", "b"]


# ---- arrays ---------------------------------------------------------------------------------


def test_arrays_of_any_layout(tmp_path, seed):
    """Strings with brackets and escapes, odd white space, borders of blocks anywhere."""
    rng = random.Random(seed)
    for _ in range(12):
        values = [
            rng.choice(
                [
                    {
                        "prompt": "".join(
                            rng.choice('ab"\\[]{},: \n\u00e9\U0001f600')
                            for _ in range(rng.choice([3, 90_000]))
                        )
                    },
                    [[], {"x": [1, {}]}],
                    12345678901234567890,
                    -1.5,
                    "",
                    None,
                    True,
                ]
            )
            for _ in range(rng.randint(0, 6))
        ]
        text = json.dumps(values, indent=rng.choice([None, 0, 3]), ensure_ascii=rng.random() < 0.5)
        space = " \n\r\t" * rng.choice([0, 1, 20_000])
        text = (
            rng.choice(["", "\ufeff"])
            + "\n" * rng.randint(0, 2)
            + text.replace("[", "[" + space, 1)[:-1]
            + space
            + "]"
            + space
        )
        if values or len(space) < 10:
            (tmp_path / "x.json").write_bytes(text.encode())
            assert is_array(tmp_path / "x.json")
            assert list(read_array(tmp_path / "x.json")) == list(enumerate(values, 1))


ARRAY = [{"prompt": f"question {i}", "chosen": "a", "rejected": "b"} for i in range(5)]
CUT = {
    "in a row": (json.dumps(ARRAY)[:130], "row 3: is not valid JSON, or cut short"),
    "between rows": (json.dumps(ARRAY[:2])[:-1], "row 2: is not valid JSON, or cut short"),
    "behind a comma": (json.dumps(ARRAY[:2])[:-1] + ",", "row 3: is not valid JSON, or cut short"),
    "at once": ("[", "row 1: is not valid JSON"),
    "a comma too many": (json.dumps(ARRAY)[:-1] + ",]", "row 6: is not valid JSON"),
    "no comma": (
        json.dumps(ARRAY).replace("}, {", "} {", 1),
        "row 1: is not valid JSON, or cut short (no comma",
    ),
    "two arrays": (json.dumps(ARRAY) * 2, "after row 5: the array has ended"),
    "broken": (json.dumps(ARRAY).replace('"question 3"', "question 3"), "row 4: is not valid JSON"),
    "deep": (json.dumps(ARRAY)[:-1] + "," + "[" * 100_000, "row 6: is"),
    "no rows": ("[]", "no usable row"),
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("skip", [False, True])
def test_a_broken_array_names_its_row(tmp_path, name, skip):
    text, says = CUT[name]
    for file in ("x.json", "x.json.gz"):
        with pytest.raises(UserError) as caught:
            read_data(str(write(tmp_path / file, text)), skip_invalid=skip)
        assert (
            says in str(caught.value) and file in str(caught.value) and len(str(caught.value)) < 400
        )


def test_invalid_utf8_and_broken_gzip_in_an_array(tmp_path):
    raw = json.dumps(ARRAY * 500).encode()
    (tmp_path / "x.json").write_bytes(raw[:-50] + b"\xff" + raw[-50:])
    (tmp_path / "y.json.gz").write_bytes(gzip.compress(raw)[:-40])
    for name, says in (("x.json", "no valid UTF-8"), ("y.json.gz", "cannot be read")):
        with pytest.raises(UserError, match=rf"{name}, after row \d+: {says}"):
            read_data(str(tmp_path / name))


# ---- memory ---------------------------------------------------------------------------------


def peak(read) -> int:
    """Most bytes of Python's memory at one moment of `read`."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz"])
def test_a_long_file_is_read_in_the_memory_of_a_short_one(tmp_path, name):
    rows = [
        json.dumps({"prompt": f"question {i} " * 40, "chosen": "yes", "rejected": "no"})
        for i in range(5_000)
    ]
    path = (
        write(tmp_path / name, *rows)
        if "jsonl" in name
        else write(tmp_path / name, "[" + ",\n".join(rows) + "]")
    )
    size, report = sum(map(len, rows)), LoadReport()

    def read() -> None:
        assert sum(1 for _ in read_file(path, report, "better", False, None)) == 5_000

    assert peak(read) < 1_200_000 < size / 2


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz"])
@pytest.mark.parametrize("filler", [b"a", b" "])
def test_a_gzip_bomb_is_refused_before_it_fills_the_memory(tmp_path, name, filler):
    start = b'[{"prompt": "' if "json." in name else b'{"prompt": "'
    start = start if filler == b"a" else start[:1]
    with gzip.open(tmp_path / name, "wb", 1) as stream:
        stream.write(start)
        for _ in range(100):
            stream.write(filler * (1 << 20))
    assert (tmp_path / name).stat().st_size < 1 << 20

    def read() -> None:
        with pytest.raises(UserError, match=f"1: is longer than {ROW_LIMIT >> 20} MiB"):
            read_data(str(tmp_path / name), skip_invalid=True)

    assert peak(read) < 6 * ROW_LIMIT


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz"])
def test_a_gzip_bomb_of_small_rows_is_refused(tmp_path, name):
    row = json.dumps({"prompt": "a" * 1000}).encode()
    rows = b",".join([row] * 1000) if "json." in name else (row + b"\n") * 1000
    with gzip.open(tmp_path / name, "wb", 9) as stream:
        stream.write(b"[" * ("json." in name))
        for _ in range(40):
            stream.write(rows + b"," * ("json." in name))
    report = LoadReport()
    with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
        for _ in read_file(tmp_path / name, report, "better", False, None):
            pass


# ---- the real files -------------------------------------------------------------------------


def test_real_pku_saferlhf():
    pairs, reports = read_data(str(shared("data/pku-saferlhf")))
    assert len(pairs) == 5135 and dict(reports["pku_saferlhf_dpo_5k"].counts) == {
        "read": 5135,
        "kept": 5135,
    }
    assert (
        len({p.prompt for p in pairs}) == 930
        and len({(p.prompt, p.chosen, p.rejected) for p in pairs}) == 3590
    )
    with gzip.open(shared("data/pku-saferlhf/pku_saferlhf_dpo_5k.json.gz")) as stream:
        raw = json.load(stream)
    for pair, values in zip(pairs, raw, strict=True):
        assert [pair.chosen, pair.rejected] == [text.strip() for text in values["response"]]
        assert pair.prompt == (Message("user", values["prompt"].strip()),)
    slices, left_out = split_pairs(pairs, (0.0, 0.4, 0.4, 0.2), 0)
    assert (
        len(slices["d2"]) + len(slices["test"]) == 558 and left_out["d2"] > 1000
    )  # each prompt once


def test_real_alpaca():
    pairs, reports = read_data(str(shared("data/other")))
    assert dict(reports["alpaca_5000"].counts) == {"read": 5000, "kept": 4998, "empty answer": 2}
    assert (
        not any(p.rejected for p in pairs)
        and sum("\n\n" in p.prompt[0].content for p in pairs) > 1900
    )


# ---- slices with files of their own ---------------------------------------------------------


def test_slices_of_their_own_files_share_no_first_turn_with_others(seed):
    rng = random.Random(seed)

    def some(count: int, answer: str) -> list[Pair]:
        prompts = [
            (
                Message("user", f"first {rng.randrange(60)}"),
                A,
                Message("user", f"{rng.randrange(2)}"),
            )
            for _ in range(count)
        ]
        return [Pair(f"{answer}{i}", prompt, answer, "no") for i, prompt in enumerate(prompts)]

    path, own = (
        some(80, "path"),
        {name: some(25, name) for name in rng.sample(["d1", "d2", "test"], rng.randint(1, 3))},
    )
    slices, left_out = split_pairs(path, (0.4, 0.2, 0.2, 0.2), 0, own)
    first = {name: {p.prompt[0] for p in part} for name, part in slices.items()}
    assert all(not first[a] & first[b] for a in first for b in first if a < b)
    for name, part in slices.items():
        assert {p.chosen for p in part} <= {name if name in own else "path"}
    outside = (
        len(path)
        + sum(map(len, own.values()))
        - sum(map(len, slices.values()))
        - sum(left_out.values())
    )
    assert outside >= 0
    for name in ("test", "d1", "d2"):  # what stands in a test of its own stays there, and so on
        if name in own:
            assert first[name] == {p.prompt[0] for p in own[name]}
            break


def files(place: Path) -> list[str]:
    """D1 of pairs, D2 of prompts, a test of answers, and dialogues for the bases; two prompts stand in several."""
    write(
        place / "d1.json",
        json.dumps(
            [{"prompt": f"ask {i}", "response": [f"good {i}", f"bad {i}"]} for i in range(9)]
        ),
    )
    write(
        place / "d2.jsonl",
        *(json.dumps({"prompt": f"tell {i}"}) for i in range(8)),
        json.dumps({"prompt": "ask 3"}),
    )
    alpaca = [{"instruction": f"do {i}", "input": "", "output": f"done {i}"} for i in range(7)]
    write(
        place / "test.json.gz",
        json.dumps([*alpaca, {"instruction": "ask 4", "input": "", "output": "x"}]),
    )
    write(place / "all.jsonl", *ROWS)
    own = [
        f"--data.{name}={place / file}"
        for name, file in (("d1", "d1.json"), ("d2", "d2.jsonl"), ("test", "test.json.gz"))
    ]
    return [
        f"--data.path={place / 'all.jsonl'}",
        *own,
        "--data.template=plain",
        "--data.shares=1,0,0,0",
        "--model.vocab=330",
    ]


def test_a_run_on_files_for_each_slice(place):
    """Prompts suffice for D2, answers for the test: no preference accuracy, the rest is there."""
    words = [
        write_stub(place / "p"),
        *files(place),
        "--macpo.rounds=1",
        "--macpo.controls=false",
        "--run.name=own",
    ]
    out = train(*words).out
    run = place / "runs/own"
    slices = {name: rows_of(run / f"data/slices/{name}.jsonl") for name in ("d1", "d2", "test")}
    assert {name: len(part) for name, part in slices.items()} == {"d1": 8, "d2": 8, "test": 8}
    ids = json.loads((run / "data/slices/split.json").read_text())
    assert {name: [r["id"] for r in part] for name, part in slices.items()} == ids
    counts = stages_of(run)["data/slices"]["counts"]
    assert counts["repeated prompts left out"] == {
        "d2": 0,
        "test": 0,
        "first turn of another slice": 2,
    }
    assert counts["read test test"].startswith("instruction: text, output: text; 8 rows, 8 kept")
    table = json.loads((run / "eval/table.json").read_text())
    assert (
        all("accuracy" not in r and r["perplexity"] > 1 for r in table["rows"])
        and "pref.acc" not in out
    )
    page = (run / "report.html").read_text()
    assert "student&#x27;s perplexity of true answers" in page


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--macpo.controls=true"], "no row of d2 has a chosen answer"),
        (["--run.method=dpo-truth"], "no row of d2 has a rejected answer"),
        (["--data.d1={}/test.json.gz"], "no row is left for d1"),
        (
            ["--data.test={}/d2.jsonl"],
            "no row is left for d2 (too few rows, or their prompts are in another slice)",
        ),
        (
            ["--data.test={}/d2.jsonl", "--data.d2={}/test.json.gz"],
            "no row is left for test (without chosen answer: 9)",
        ),
        (["--data.d1=nowhere"], "data.d1: nowhere does not exist"),
        (["--data.d2={}/p"], "data.d2: no .jsonl"),
        (["--data.path=none"], "data.path"),
        (["--data.test=none"], "data.shares"),
        (["--data.truncation_mode=raise", "--data.max_prompt_length=8"], "is too long"),
    ],
)
def test_what_the_slices_need(place, words, says):
    base = [write_stub(place / "p"), *files(place), "--macpo.controls=false"]
    assert says in refused(place, *base, *(word.format(place) for word in words))


def test_long_rows_may_be_an_error(place):
    words = [
        write_stub(place / "p"),
        *files(place),
        "--macpo.controls=false",
        "--data.max_prompt_length=10",
        "--dry_run",
    ]
    assert "over-long prompt" in invoke("train", *words).err
    assert "d1: the row that begins with 'ask 0'" in refused(
        place, *words, "--data.truncation_mode=raise"
    )


def test_what_a_run_reads_is_in_its_recipe(place):
    words = files(place)
    told = identify_source(parse(words[:1]).config)
    assert told.keys() == {
        "shares",
        "max_examples",
        "preference_label",
        "on_invalid_row",
        "seed",
        "files",
    }
    more = [
        told,
        *(
            identify_source(parse([words[0], word]).config)
            for word in (
                words[1],
                words[2],
                words[3],
                "--data.preference_label=safer",
                "--data.on_invalid_row=skip",
            )
        ),
    ]
    assert len({json.dumps(source) for source in more}) == 6


@pytest.mark.parametrize(
    "name", ["two forms", "a directory", "no form", "a cut array", "half a pair", "a role"]
)
def test_bad_files_end_a_program_with_one_sentence(place, name):
    preset, file = write_stub(place / "p"), place / "x.json"
    words = [preset, *HH, f"--data.path={file}"]
    if name == "a directory":
        file.mkdir()
        ended = refused(place, *words)
        assert "no .jsonl or .json file" in ended
        assert "no .jsonl or .json file" in refused(
            place, "nowhere", f"--prompts={file}", f"--out={place / 'o'}", program="sample"
        )
        return
    content, says = {
        "two forms": ("\n".join([*ROWS, json.dumps(GOOD)]), "line 61: another form"),
        "no form": ('{"a": 1}', "form not recognised"),
        "a cut array": (json.dumps(ARRAY)[:-9], "cut short"),
        "half a pair": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        "a role": ('{"messages": [{"role": "critic", "content": "x"}]}', "'critic'"),
    }[name]
    write(file, content)
    assert says in refused(place, *words) and says in refused(place, *words, "--dry_run")
    ended = invoke("train", *words, "--data.on_invalid_row=skip", "--dry_run")
    if name == "two forms":
        assert (
            ended.code == 0
            and "1 skipped (another form) (first in line 61)" in ended.out
            and not (place / "runs").exists()
        )
    else:
        check_sentence(ended.code, ended.err)


# ---- export ---------------------------------------------------------------------------------


def test_records_in_the_shape_of_the_released_files():
    pair = Pair("i", (Q, A, R), "yes", "no")
    assert released(pair) == {
        "instruction": "USER: q ASSISTANT: a USER: r",
        "input": "",
        "output": ["yes", "no"],
    }
    sample = Sample("i", (Q,), "yes", "stop", (1,), -1.0, 2.0, "teacher1", 0)
    assert released(sample) == {"instruction": "q", "input": "", "output": "yes"}
    tagged = Sample(
        "i",
        (Message("system", "s"), Message("user", "q"), Message("tag", "t")),
        "yes",
        "stop",
        (3,),
        -1.0,
        2.0,
        "x",
        0,
    )
    assert released(tagged)["instruction"] == "SYSTEM: s USER: q"
    assert parse_row(released(pair))[0] == Pair(
        example_id((m := Message("user", "USER: q ASSISTANT: a USER: r"),)), (m,), "yes", "no"
    )


def test_export_of_pairs_and_labels(stub, place):
    for stage, source in (
        ("round1/pairs_student", "pairs.jsonl"),
        ("round0/weak_labels", "samples.jsonl"),
    ):
        target = place / "deep.json"
        assert invoke("eval", "export", stub, stage, target).code == 0
        records, found = rows_of(stub / stage / source), json.loads(target.read_text())
        assert len(found) == len(records) > 5 and {tuple(r) for r in found} == {
            ("instruction", "input", "output")
        }
        for record, values in zip(records, found, strict=True):
            assert values["instruction"] == record["prompt"][0]["content"] and values["input"] == ""
            wanted = (
                [record["chosen"], record["rejected"]] if "chosen" in record else record["response"]
            )
            assert values["output"] == wanted
        usable = [r for r in records if "chosen" in r or r["response"]]
        pairs, _ = read_data(str(target))
        assert [p.chosen for p in pairs] == [
            r["chosen"] if "chosen" in r else r["response"] for r in usable
        ]
        before = tree(place)
        for words in (
            ("export", stub, stage, target),
            ("export", stub, "round9/x", place / "y"),
            ("export", stub, stage),
            ("export", stub, "round0/teacher1_pos", place / "y"),
            ("export", stub, stage, place / "no" / "y"),
        ):
            ended = invoke("eval", *words)
            check_sentence(ended.code, ended.err)
        assert tree(place) == before
        target.unlink()
