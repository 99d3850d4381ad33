"""The files that MACPO's authors released: written, read, and rendered as their runs rendered them."""

import json

import pytest
from conftest import REPO
from runs import invoke

from minmacpo.data import Message, Pair
from minmacpo.forms import read_data, released
from minmacpo.templates import frames

PROMPT = (Message("user", "hi"), Message("assistant", "yo"), Message("user", "q"))


def told(prompt) -> str:
    """The text before an answer under vicuna-macpo, without the system sentence."""
    parts = [frame.replace("{}", content) for frame, content, _ in frames("vicuna-macpo", prompt) if frame]
    return parts[-1] if parts[-1].startswith("USER") else "".join(parts)


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]])
def test_a_dialogue_and_its_released_row_are_rendered_alike(tmp_path, prompt):
    row = released(Pair("x", prompt, "good", "bad"), named=True)
    assert row["instruction"].startswith("USER: hi") and "USER: USER:" not in row["instruction"]
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (pair,), _ = read_data(str(tmp_path / "a.json"))
    assert (pair.chosen, pair.rejected) == ("good", "bad")
    assert told(pair.prompt) == told(prompt) and told(prompt).count("USER: USER: hi") == 1


def test_a_bare_question_stays_bare_without_its_name():
    assert released(Pair("x", PROMPT[:1], "good", "bad"))["instruction"] == "hi"


def test_a_d1_of_single_answers_says_how_to_join_them(tmp_path):
    rows = [{"instruction": f"question {i}", "input": "", "output": "fine"} for i in range(40)]
    (tmp_path / "d1.json").write_text(json.dumps(rows))
    ended = invoke("train", "@hh", f"--data.path={tmp_path / 'd1.json'}", "--dry_run", f"--run.root={tmp_path}")
    assert ended.code == 2 and "are joined as" in ended.err and (REPO / "README.md").is_file()
