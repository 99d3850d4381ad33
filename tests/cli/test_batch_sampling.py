"""sample.py --prompts: every form of row, files that a kill leaves, and rows on their own."""

import gzip
import json
import os
import shutil
import signal
import time

import pytest
from runs import copy_run, fork, invoke, rows_of
from test_bad_input import check_sentence, tree

from minmacpo import UserError
from minmacpo.cli.batch_sampling import read_prompts
from minmacpo.cli.chat import CUT_MARK
from minmacpo.config.schema import Config, Data
from minmacpo.data.records import Message
from minmacpo.runtime.files import open_locked
from minmacpo.runtime.progress import escape_control_chars

QUESTION = "\n\nHuman: where is it ?\n\nAssistant:"
TURNS = [{"role": "user", "content": "where is it ?"}]
FORMS = {
    "strings.jsonl": {"prompt": "where is it ?", "chosen": "a", "rejected": "b"},
    "lists.jsonl": {"prompt": TURNS, "chosen": "a", "rejected": "b"},
    "hh.jsonl.gz": {"chosen": QUESTION + " a", "rejected": QUESTION + " b"},
    "pku.jsonl": {
        "prompt": "where is it ?",
        "response_0": "a",
        "response_1": "b",
        "better_response_id": 1,
    },
    "sharegpt.json": {
        "conversations": [
            {"from": "human", "value": "where is it ?"},
            {"from": "gpt", "value": "a"},
        ]
    },
    "alpaca.json.gz": {"instruction": "where is it ?", "input": "", "output": "a"},
    "prompts.json": {"prompt": "where is it ?"},
}


def batch(agent, file, *words, out="out.jsonl", code=0):
    """sample.py on a file of prompts; its rows, or its error where it must fail."""
    ended = invoke("sample", agent, f"--prompts={file}", f"--out={out}", *words)
    if code:
        check_sentence(ended.code, ended.err)
        return ended.err
    assert ended.code == 0, ended.err
    return ended.out


@pytest.fixture
def agent(stub):
    return stub / "round1/student_pos"


@pytest.fixture
def file(place):
    """Ten prompts of different lengths."""
    file = place / "p.txt"
    file.write_text("".join(f"{'where is ' * (i * 7 % 5)}it {i} ?\n" for i in range(10)))
    return file


def test_every_form_of_row(agent, place):
    one = invoke("sample", agent, "where is it ?").out.removesuffix("\n")
    for name, row in FORMS.items():
        text = json.dumps([row] if ".json" in name and ".jsonl" not in name else row)
        (place / name).write_bytes(
            gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        )
        told = batch(agent, place / name, out=f"{name}.out")
        assert "1 rows, 1 kept" in told and next(iter(row)) in told
        (found,) = rows_of(place / f"{name}.out")
        assert (
            found["prompt"] == TURNS
            and escape_control_chars(found["response"]) + CUT_MARK * (found["finish"] == "length")
            == one
        ), name


def test_several_turns_and_a_system_message(agent, place):
    turns = [
        *TURNS,
        {"role": "assistant", "content": "here"},
        {"role": "user", "content": "and now ?"},
    ]
    (place / "p.jsonl").write_text(json.dumps({"messages": turns}))
    batch(agent, "p.jsonl")
    assert rows_of(place / "out.jsonl")[0]["prompt"] == turns


def test_a_row_is_the_same_whatever_lies_beside_it(agent, place, file):
    batch(agent, file, "--generate.batch=4", "--n=2")
    rows = rows_of(place / "out.jsonl")
    keys = ("id", "prompt", "response", "tokens", "seed", "finish")
    found = {(r["prompt"][0]["content"], n % 2): [r[k] for k in keys] for n, r in enumerate(rows)}
    assert len(rows) == len(found) == 20 and len({r["seed"] for r in rows}) == 20
    lines = file.read_text().splitlines()
    (place / "back.txt").write_text("\n".join(reversed(lines)))
    batch(agent, "back.txt", "--generate.batch=3", out="back.jsonl")
    for row in rows_of(place / "back.jsonl"):
        assert [row[k] for k in keys] == found[row["prompt"][0]["content"], 0]
    alone = invoke("sample", agent, lines[4], "--n=2").out
    said = [found[lines[4], n] for n in (0, 1)]
    assert alone == "".join(
        f"[{n}] {escape_control_chars(row[2])}{CUT_MARK * (row[5] == 'length')}\n"
        for n, row in enumerate(said, 1)
    )
    assert rows_of(place / "out.jsonl")[0]["agent"] == str(agent)


def test_equal_prompts_get_answers_of_their_own(agent, place):
    (place / "p.txt").write_text("where is it ?\nwhere is it ?\n")
    batch(agent, "p.txt")
    one, two = rows_of(place / "out.jsonl")
    assert (
        one["prompt"] == two["prompt"] and one["id"] != two["id"] and one["tokens"] != two["tokens"]
    )


def test_a_torn_file_ends_as_if_nothing_had_happened(agent, place, file):
    """MicroBatcher at line ends, within lines, within a character, and before the first byte."""
    words = ("--generate.batch=4", "--run.seed=5")
    batch(agent, file, *words)
    whole = (place / "out.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in (
        0,
        1,
        9,
        40,
        ends[0] - 1,
        ends[0],
        ends[2] + 100,
        ends[3],
        ends[4] + 7,
        ends[8] + 30,
        ends[9] - 1,
        ends[9],
    ):
        (place / "out.jsonl").write_bytes(whole[:size])
        told = batch(agent, file, *words)
        assert (place / "out.jsonl").read_bytes() == whole, size
        assert ("there already" in told) == (size >= ends[0])
        if size >= ends[0]:
            assert f"{sum(end <= size for end in ends)} were there already" in told


def test_killed_again_and_again(agent, place, file):
    """A process of its own, killed at moments that nobody chose."""
    file.write_text("".join(f"where is it {i} ?\n" for i in range(60)))
    words = (agent, f"--prompts={file}", "--generate.batch=2", "--generate.max_new_tokens=40")
    assert invoke("sample", *words, "--out=whole.jsonl").code == 0
    out, sizes = place / "out.jsonl", [0]
    for _ in range(2):
        process = fork("sample", *words, "--out=out.jsonl")
        end = time.monotonic() + 60
        while (
            process.poll() is None
            and time.monotonic() < end
            and (out.stat().st_size if out.exists() else 0) <= sizes[-1]
        ):
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        sizes.append(out.stat().st_size)
    assert sizes == sorted(sizes) and 0 < sizes[1] < (place / "whole.jsonl").stat().st_size
    assert invoke("sample", *words, "--out=out.jsonl").code == 0
    assert out.read_bytes() == (place / "whole.jsonl").read_bytes()


def test_answers_of_something_else_are_not_mixed(stub, agent, place, file):
    batch(agent, file, "--generate.batch=4")
    raw = (place / "out.jsonl").read_bytes()
    (place / "out.jsonl").write_bytes(raw[: len(raw) // 2])
    (place / "other.txt").write_text("where was it ?\n" + file.read_text())
    (place / "fewer.txt").write_text("\n".join(file.read_text().splitlines()[:9]))
    shutil.copytree(agent.parent.parent / "bases", place / "bases")
    shutil.copytree(agent, place / "round1/student_pos")
    cases = [
        (agent, file, "--run.seed=1"),
        (agent, file, "--generate.top_k=3"),
        (agent, file, "--generate.batch=5"),
        (agent, file, "--n=2"),
        (agent, file, "--data.template=plain"),
        (agent, "other.txt"),
        (agent, "fewer.txt"),
        (stub / "round2/student_pos", file),
        (stub / "bases/strong", file),
        (place / "round1/student_pos", file),
    ]
    for folder, prompts, *words in cases:
        before, words = (
            tree(place),
            words if any("batch" in w for w in words) else [*words, "--generate.batch=4"],
        )
        said = batch(folder, prompts, *words, code=2)
        assert "out.jsonl, line 1" in said and "--out" in said and tree(place) == before
    batch(agent, file, "--generate.batch=4")
    assert (place / "out.jsonl").read_bytes() == raw


def test_another_adapter_under_the_same_path_is_noticed(stub, place, file):
    run = copy_run(stub, place / "runs", ("bases", "round1", "round2"))
    agent, words = run / "round1/student_pos", ("--generate.batch=4", "--generate.max_new_tokens=8")
    batch(agent, file, *words)
    shutil.copytree(run / "round2/student_pos", agent, dirs_exist_ok=True)
    assert "another PATH" in batch(agent, file, *words, code=2)


@pytest.mark.parametrize(
    "text",
    [
        "no answers\n",
        "no answers",
        "{}\n",
        "[]\n",
        '{"id": 3}\n',
        '{"id": "',
        "\n",
        '{"id": "0',
        "é",
    ],
)
def test_foreign_files_are_left_alone(agent, place, file, text):
    (place / "out.jsonl").write_text(text)
    if text == '{"id": "':  # as torn as a first line can be
        batch(agent, file)
        assert len(rows_of(place / "out.jsonl")) == 10
    elif text != '{"id": "0' or not batch_begins_with_zero(agent, place, file):
        batch(agent, file, code=2)
        assert (place / "out.jsonl").read_text() == text


def batch_begins_with_zero(agent, place, file) -> bool:
    batch(agent, file, out="first.jsonl")
    return rows_of(place / "first.jsonl")[0]["id"].startswith("0")


def test_more_answers_than_asked_for(agent, place, file):
    batch(agent, file)
    with (place / "out.jsonl").open("a") as stream:
        stream.write("{")
    assert "more than the 10 answers" in batch(agent, file, code=2)


def test_one_process_at_a_time(agent, place, file):
    with open_locked(place / "out.jsonl", "ab", "busy"), pytest.raises(UserError, match="busy"):
        open_locked(place / "out.jsonl", "a", "busy")
    with open_locked(place / "out.jsonl", "ab", "busy"):
        assert "another process" in batch(agent, file, code=2)
    batch(agent, file)


def test_over_long_prompts_are_dropped_cut_or_refused(agent, place):
    (place / "p.txt").write_text("short ?\n" + "word " * 300 + "end ?\n\n")
    told = batch(agent, "p.txt")
    assert (
        "1 over-long prompt: with generate.max_new_tokens = 12 there is room for 116 tokens" in told
        and "1 blank line" in told
    )
    assert len(rows_of(place / "out.jsonl")) == 1
    told = batch(agent, "p.txt", "--data.truncation_mode=cut_prompt", out="cut.jsonl")
    cut = rows_of(place / "cut.jsonl")[1]["prompt"][0]["content"]
    assert "1 prompt cut" in told and cut.endswith("end ?") and len(cut) < 1500
    before = tree(place)
    assert (
        "too long" in batch(agent, "p.txt", "--data.truncation_mode=raise", out="r.jsonl", code=2)
        and tree(place) == before
    )


def test_bad_rows_are_an_error_or_counted(agent, place):
    (place / "p.jsonl").write_text('{"prompt": "a ?"}\n{"prompt": ""}\n{"prompt": "b ?"}\n')
    before = tree(place)
    assert "p.jsonl, line 2" in batch(agent, "p.jsonl", code=2) and tree(place) == before
    assert "1 skipped (empty turn) (first in line 2)" in batch(
        agent, "p.jsonl", "--data.on_invalid_row=skip"
    )
    assert len(rows_of(place / "out.jsonl")) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(agent, place, file):
    (place / "closed").mkdir(mode=0o500)
    assert "closed" in batch(agent, file, out="closed/out.jsonl", code=2)


def test_what_cannot_be_written_is_one_sentence(agent, place, file):
    for out, says in (
        ("no/out.jsonl", "No such file"),
        (file.parent, "no ordinary file"),
        (f"{file}/out", "Not a directory"),
        ("/proc/out", ""),
    ):
        before = tree(place)
        assert says in batch(agent, file, out=out, code=2) and tree(place) == before


def test_rows_get_the_system_message_that_is_given(tmp_path):
    config = Config(data=Data(system="be kind"))
    rows = [{"prompt": TURNS}, {"prompt": [{"role": "system", "content": "s"}, *TURNS]}]
    file = tmp_path / "p.json"
    file.write_text(json.dumps(rows))
    systems = [pair.prompt[0] for pair in read_prompts(file, config)]
    assert systems == [Message("system", "be kind"), Message("system", "s")]
