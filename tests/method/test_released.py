"""Files that MACPO's authors released: written, read, and rendered as their runs did it."""

import json

import pytest
from runs import invoke

from minmacpo import UserError
from minmacpo.data.chat_template import template_segments
from minmacpo.data.formats import read_data, released
from minmacpo.data.records import Message, Pair
from minmacpo.data.splits import join_sides

PROMPT = (Message("user", "hi"), Message("assistant", "yo"), Message("user", "q"))


def human_turn(prompt) -> str:
    """The text before an answer under vicuna-macpo, without the system sentence."""
    *_, turn, header = template_segments("vicuna-macpo", prompt)
    assert header.frame == ""  # the turn ends with "ASSISTANT:" itself
    return turn.fill(turn.frame)


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]])
def test_a_dialogue_and_its_released_row_are_rendered_alike(tmp_path, prompt):
    row = released(Pair("x", prompt, "good", "bad"), with_speaker=True)
    assert row["instruction"].startswith("USER: hi") and "USER: USER:" not in row["instruction"]
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (pair,), _ = read_data(str(tmp_path / "a.json"))
    assert (pair.chosen, pair.rejected) == ("good", "bad")
    assert human_turn(pair.prompt) == human_turn(prompt)
    assert human_turn(prompt).count("USER: USER: hi") == 1


def test_a_bare_question_stays_bare_without_its_name():
    assert released(Pair("x", PROMPT[:1], "good", "bad"))["instruction"] == "hi"


def test_a_d1_of_single_answers_says_how_to_join_them(tmp_path):
    rows = [{"instruction": f"question {i}", "input": "", "output": "fine"} for i in range(40)]
    (tmp_path / "d1.json").write_text(json.dumps(rows))
    ended = invoke(
        "train", "@hh", f"--data.path={tmp_path / 'd1.json'}", "--dry_run", f"--run.root={tmp_path}"
    )
    assert ended.code == 2 and "--data.d1=GOOD,BAD" in ended.err


def test_the_two_files_of_a_released_d1_are_joined(tmp_path):
    good, bad = (
        [
            {"instruction": f"USER: question {i % 30}", "input": "", "output": f"{side} {i}"}
            for i in numbers
        ]
        for side, numbers in (("good", range(33)), ("bad", [*range(32, 1, -1)]))
    )
    for name, rows in (("train", good), ("neg", bad)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    path = f"{tmp_path / 'train.json'},{tmp_path / 'neg.json'}"
    pairs, alone = join_sides(read_data(path)[0], path)
    assert len(pairs) == 31 and alone == 2 and len({pair.id for pair in pairs}) == 31
    for pair in pairs:
        number = int(pair.chosen.split()[1])
        assert (
            pair.chosen.startswith("good")
            and pair.rejected.startswith("bad")
            and int(pair.rejected.split()[1]) % 30 == number % 30
        )
    for name in ("train", "neg"):  # of one name in two folders
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.json").rename(tmp_path / name / "d1.json")
    path = f"{tmp_path / 'train/d1.json'},{tmp_path / 'neg/d1.json'}"
    assert [(pair.chosen, pair.rejected) for pair in join_sides(read_data(path)[0], path)[0]] == [
        (p.chosen, p.rejected) for p in pairs
    ]
    with pytest.raises(UserError, match="two files"):
        join_sides(read_data(str(tmp_path / "neg/d1.json"))[0], "x,y")
    (tmp_path / "d2.json").write_text(
        json.dumps([{"instruction": f"other {i}", "input": "", "output": "a"} for i in range(40)])
    )
    (tmp_path / "t.json").write_text(
        json.dumps([{"instruction": f"third {i}", "input": "", "output": "a"} for i in range(40)])
    )
    (tmp_path / "p.json").write_text(
        json.dumps(
            [{"instruction": f"fourth {i}", "input": "", "output": "a b c"} for i in range(90)]
        )
    )
    words = [
        f"--data.{key}={tmp_path / name}"
        for key, name in (("path", "p.json"), ("d2", "d2.json"), ("test", "t.json"))
    ]
    ended = invoke(
        "train",
        "@hh",
        *words,
        f"--data.d1={path}",
        "--dry_run",
        f"--run.root={tmp_path}",
        "--model.vocab=300",
        "--macpo.controls=false",
    )
    assert ended.code == 0, ended.err
    assert "d1 answers without their other side: 2" in ended.out
