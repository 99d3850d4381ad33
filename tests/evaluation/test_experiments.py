"""Experiments: many runs of train.py under one question, resumable, with a table and a page."""

import fcntl
import json
import math
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from runs import METHODS, copy_run, inodes, invoke, spawn, stages_of, write_stub

from bench.results import page
from minmacpo import UserError
from minmacpo.config.parse import PRESETS, parse
from minmacpo.evaluation import experiment_results, experiments
from minmacpo.evaluation.finished_run import read_run
from minmacpo.evaluation.gold import gold_by_prompt

NAMES = sorted(file.stem for file in (PRESETS / "experiments").glob("*.toml"))


SMALL = """
question = "How much should an agent learn from itself?"
seeds = [0, 1]
[variants]
"0" = ""
"1" = "--macpo.mutual_positives=false"
"""
GROUPED = """
question = "The same, with fewer teachers?"
seeds = [0, 1]
[groups]
"two" = ""
"one" = "--macpo.teachers=1"
[variants]
"0" = ""
"1" = "--macpo.mutual_positives=false"
"""


def run_inside(command: list[str], end: float = math.inf) -> tuple[int, str]:
    """A run in this process, which saves the start of another."""
    ended = invoke("train", *command[2:])
    return ended.code, ended.err


def run_experiment(words: list[str]) -> None:
    assert experiments.run_experiment(words, str(REPO / "train.py")) == 0


def results_of(root: Path, name: str) -> dict:
    """The results of an experiment under this root of runs."""
    return json.loads((root / f"runs/experiment-{name}/results.json").read_text())


@pytest.fixture(scope="module")
def finished(stub, tmp_path_factory):
    """An experiment of two variants and two seeds of the stub, of which the first run is there."""
    root = tmp_path_factory.mktemp("experiment")
    copy_run(stub, root / "runs")
    (root / "experiments").mkdir()
    (root / "experiments/small.toml").write_text(SMALL)
    words = ["@experiment-small", write_stub(root), f"--run.root={root / 'runs'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "PRESETS", root)
        patch.setattr(experiments, "run_process", run_inside)
        run_experiment(words)
        yield root, words


def test_the_experiments_are_there():
    assert set(NAMES) >= {
        "main",
        "ablations",
        "teachers",
        "rounds",
        "noise",
        "selection",
        "self",
        "negatives",
        "loss",
        "domains",
        "sizes",
        "conditions",
        "lengths",
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_can_be_planned_and_names_no_run_twice(name):
    experiment = experiments.read_experiment(name)
    assert experiment.question
    assert len(experiment.seeds) > 1
    runs = [parse([*case.flags, "--run.seed=7"]).config.run.name for case in experiment.cases]
    assert len(runs) > 1
    assert len(set(runs)) == len(runs)


def test_groups_are_crossed_with_variants():
    cases = experiments.read_experiment("noise").cases
    assert len(cases) == 9 * 10
    assert len({case.label for case in cases}) == len(cases)
    assert cases[11].label == "10 % swapped: MACPO, keep 0.75"
    assert cases[11].flags == ["--data.noise=0.1", "--macpo.keep_fraction=0.75"]


def test_the_main_experiment_has_every_method():
    methods = set()
    for case in experiments.read_experiment("main").cases:
        for flag in case.flags:
            methods.add(flag.removeprefix("--method="))
    assert methods == set(METHODS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["@experiment-mian"], "main"),
        (["@experiment-self", "@experiment-main"], "one experiment"),
        (["@experiment-self", "--seeds=a"], "whole numbers"),
        (["@experiment-self", "--macpo.muual=false"], "macpo.mutual_positives"),
        (["@experiment-self", "--data.path=x"], "world"),
        (["@experiment-self", "--run.name=x"], "run.name"),
        (["@experiment-self", "--method=spin"], "method"),
        (["@experiment-self", "--run.method=spin"], "run.method"),
        (["@experiment-self", "--run.method", "spin"], "run.method"),
        (["@experiment-self", "--macpo.self_fraction=0.5"], "self_fraction"),
        (["@experiment-domains", "--world.domain", "town"], "world.domain"),
        (["@experiment-self", "--seeds", "0,1"], "--seeds=0,1"),
        (["@experiment-self", "--seeds=" + "9" * 5000], "99: expected whole numbers"),
        (["@experiment-self", "--seeds=0", "--seeds=1"], "--seeds is there 2 times"),
    ],
)
def test_a_wrong_experiment_is_refused_before_anything_runs(place, words, says):
    ended = invoke("train", *words)
    assert ended.code == 2
    assert says in ended.err
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[run]\nmethod = "spin"\n', "run.method = spin"),
        ('[run]\nname = "x"\n', "would be the same run"),
        ("[dpo]\nbeta = 0.1\nsft_weight = 0.2\n", "would be the same run"),
    ],
)
def test_a_file_that_would_mix_up_the_cases_is_refused(place, text, says):
    (place / "me.toml").write_text(text)
    ended = invoke("train", "@experiment-loss", "@tiny", "@me.toml", "--dry_run")
    assert ended.code == 2
    assert says in ended.err


@pytest.mark.slow
def test_a_failing_run_ends_the_experiment_with_its_sentence(stub, place):
    copy_run(stub, place / "runs", ("data", "bases"))
    words = ["@experiment-self", "--seeds=0", write_stub(place), "--sft.student_lr=1e30"]
    ended = invoke("train", *words)
    assert ended.code == 2
    assert "seed 0, 0: exit" in ended.err
    assert "learning rate" in ended.err


def test_dry_run_lists_every_run(place):
    ended = invoke("train", "@experiment-loss", "--seeds=0,5", "--dry_run")
    assert ended.code == 0
    assert len(ended.out.splitlines()) == 12
    assert "runs/world-seed=5" in ended.out
    assert not list(place.iterdir())


@dataclass(frozen=True)
class Made:
    """A finished run of a variant, and what it says of its students."""

    gold: list[np.ndarray]  # of every round, (prompts,)
    table: dict

    def last_student(self) -> dict:
        """The last row of a student in the table."""
        return [row for row in self.table["rows"] if row["agent"] == "student"][-1]

    def first_alarm(self) -> int | None:
        return experiment_results.first_alarm(self.table)

    def gold_before_the_alarm(self) -> float:
        alarm = self.first_alarm()
        return self.gold[-1 if alarm is None else alarm - 1].mean()


def read_made(path: Path) -> Made:
    run = read_run(path)
    gold = [gold_by_prompt(run, "student", t) for t in (0, 1, 2)]
    return Made(gold, json.loads((path / "eval/table.json").read_text()))


def test_results_are_what_the_runs_say(finished):
    root, _ = finished
    results = results_of(root, "small")
    assert results["seeds"] == [0, 1]
    first, second = results["variants"]
    assert first["name"] == "0"
    assert second["name"] == "1"
    runs = root / "runs"
    made_first = [read_made(runs / "stub"), read_made(runs / "stub-seed=1")]
    name = "stub-mutual_positives=false"
    made_second = [read_made(runs / name), read_made(runs / f"{name}-seed=1")]
    check_row(first, made_first, made_first)
    check_row(second, made_second, made_first)


def check_row(row: dict, made: list[Made], made_first: list[Made]) -> None:
    """A variant's row is what its runs say, of one seed each, beside those of the first variant."""
    # Gold reward, by round and by seed
    by_round = []
    for t in (0, 1, 2):
        by_round.append(np.mean([run.gold[t].mean() for run in made]))
    assert row["by_round"] == pytest.approx(by_round)
    assert row["student"] == pytest.approx(by_round[-1])
    assert row["student"] == pytest.approx(np.mean(row["by_seed"]))

    # Its last student and the first variant's, prompt by prompt
    differences = []
    wins = []
    for run, first in zip(made, made_first, strict=True):
        last_gold = run.gold[-1]
        differences.append((first.gold[-1] - last_gold).mean())
        better = last_gold > run.gold[0]
        equal = last_gold == run.gold[0]
        wins.append(np.mean(better + equal / 2))
    assert row["difference"][0] == pytest.approx(np.mean(differences))
    won, low, high = row["wins"]
    assert won == pytest.approx(np.mean(wins))
    assert low <= won <= high

    # Alarms, and the gold of the student that they would keep
    assert row["alarms"] == [run.first_alarm() for run in made]
    assert row["kept"] == pytest.approx(np.mean([run.gold_before_the_alarm() for run in made]))

    # The table of every run
    last_students = [run.last_student() for run in made]
    pgrs = [student["pgr"] for student in last_students]
    if None in pgrs:
        assert row["pgr"] is None
    else:
        assert row["pgr"] == pytest.approx(np.mean(pgrs))
    lengths = [student["length"] for student in last_students]
    assert row["lengths"][1] == pytest.approx(np.mean(lengths))
    assert 0 < row["spent"] <= row["cpu_seconds"]
    assert row["tokens"] > 1000


def test_the_page_of_an_experiment(finished):
    root, _ = finished
    text = (root / "runs/experiment-small/report.html").read_text()
    assert text.count("<tr>") >= 8
    assert "<svg" in text
    assert "<script" not in text
    assert "$" not in text


def test_a_finished_table_that_is_none_is_made_again(tmp_path, finished):
    root, _ = finished
    shutil.copytree(root / "runs/stub", tmp_path / "stub")
    assert experiments.is_complete(tmp_path / "stub")
    (tmp_path / "stub/eval/table.json").write_text("{}")
    assert not experiments.is_complete(tmp_path / "stub")


def test_finished_runs_are_not_redone_and_a_missing_one_is(finished, capsys):
    root, words = finished
    missing = root / "runs/stub-mutual_positives=false-seed=1"
    others = [run for run in root.glob("runs/stub*") if run != missing]
    before = [inodes(run) for run in others]
    shutil.rmtree(missing)
    run_experiment(words)
    out = capsys.readouterr().out
    assert "[1/1] seed 1  1" in out
    assert "[2/" not in out
    assert "variant" in out
    assert [inodes(run) for run in others] == before
    assert stages_of(missing)


def test_the_first_variant_of_a_group_is_what_its_others_are_compared_with(finished, capsys):
    root, words = finished
    (root / "experiments/grouped.toml").write_text(GROUPED)
    run_experiment(["@experiment-grouped", "--seeds=0", *words[1:]])
    out = capsys.readouterr().out
    results = results_of(root, "grouped")
    rows = results["variants"]
    cases = [(row["group"], row["name"]) for row in rows]
    assert cases == [("two", "0"), ("two", "1"), ("one", "0"), ("one", "1")]
    for first, second in (rows[:2], rows[2:]):
        assert first["difference"] == [0, 0, 0]
        assert second["difference"][0] == pytest.approx(first["student"] - second["student"])

    assert "one: 1" in out
    assert "one: 1" in (root / "runs/experiment-grouped/report.html").read_text()
    section = page.experiment_section(results, "So it is.")
    assert "So it is." in section
    assert f"| 1 | {rows[1]['student']:.3f} | {rows[3]['student']:.3f} |" in section


@pytest.mark.parametrize("measured", [1, 2, 3])
def test_pgr_is_that_of_the_last_student_of_every_seed(measured):
    """Also where a method has no rounds between the first and the last."""
    tables = []
    for last_pgr in (0.2, 0.6):
        rows = [{"agent": "student", "pgr": -9.0} for _ in range(measured - 1)]
        tables.append({"rows": [*rows, {"agent": "student", "pgr": last_pgr}]})

    assert experiment_results.last_pgr(tables) == pytest.approx(0.4)


def test_a_seed_whose_pgr_is_unknown_makes_the_mean_unknown():
    tables = [{"rows": [{"agent": "student", "pgr": pgr}]} for pgr in (0.2, None)]

    assert experiment_results.last_pgr(tables) is None


def test_a_run_that_lost_a_stage_is_made_whole(finished):
    root, words = finished
    stage = root / "runs/stub/eval/round2_student_samples"
    before = results_of(root, "small")["variants"]
    shutil.rmtree(stage)
    assert not experiments.is_complete(root / "runs/stub")
    assert experiments.is_complete(root / "runs/stub-seed=1")
    run_experiment(words)
    assert (stage / "samples.jsonl").is_file()
    after = results_of(root, "small")["variants"]
    assert [row["by_seed"] for row in after] == [row["by_seed"] for row in before]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_a_signal_reaches_the_run_once_and_the_experiment_goes_on_afterwards(
    stub, tmp_path, place, number
):
    copy_run(stub, place / "runs", ("data", "bases"))
    words = ["@experiment-self", "--seeds=0", write_stub(tmp_path), "--sft.teacher_epochs=9999"]

    def listen():
        signal.signal(number, signal.SIG_DFL)  # nohup would have it ignored

    process = spawn("train", *words, cwd=place, start_new_session=True, preexec_fn=listen)
    run = place / "runs/stub-teacher_epochs=9999"
    while not is_training(run):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "goes on from here" in err
    assert "Traceback" not in err
    states = list(run.glob(".partial/state-*/state.safetensors"))
    assert states, "the run saved before it ended"
    with (run / "log.txt").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody works on it any more


def is_training(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and "teacher1_pos" in metrics.read_text()


def test_only_what_was_made_without_further_flags_is_collected(finished, tmp_path, capsys):
    root, words = finished
    results = results_of(root, "small")
    preset = str(words[1])
    assert results["shared"] == [preset], "the preset, but not where the runs lie"
    for name, shared in (("one", ["@tiny"]), ("two", [])):
        folder = tmp_path / f"runs/experiment-{name}"
        folder.mkdir(parents=True)
        changed = results | {"name": name, "shared": shared}
        (folder / "results.json").write_text(json.dumps(changed))
    page.collect_experiments(tmp_path / "runs", tmp_path)
    assert (tmp_path / "two.json").is_file()
    assert not (tmp_path / "one.json").exists()
    assert "left out, it was made with @tiny" in capsys.readouterr().out


def test_a_folder_of_another_configuration_is_no_run_of_the_experiment(finished):
    root, words = finished
    other = root / "other"
    preset = write_stub(other)
    file = other / "stub.toml"
    file.write_text(file.read_text().replace("beta = 0.1", "beta = 0.7"))
    with pytest.raises(UserError, match=r"dpo\.beta = 0\.1"):
        run_experiment([words[0], preset, *words[2:]])


def test_help_and_a_dry_run_with_a_value_start_nothing(place, monkeypatch):
    monkeypatch.setattr(experiments, "PRESETS", PRESETS)  # in place of those of `finished`
    assert "--seeds=0,1" in invoke("train", "@experiment-self", "--help").out
    ended = invoke("train", "@experiment-self", "--dry_run=false")
    assert ended.code == 2
    assert "dry_run" in ended.err
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "question = 'x'\nseeds = [0]\n[variants]\n",
        "question = 'x'\nseeds = []\n[variants]\na = ''\n",
        "seeds = [0",
        "question = 'x'\nseeds = [0]\n[variants]\na = \"'\"\n",
        "question = 'x'\nseeds = [0]\n",
    ],
)
def test_a_broken_experiment_file_is_one_sentence(tmp_path, monkeypatch, text):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/odd.toml").write_text(text)
    monkeypatch.setattr(experiments, "PRESETS", tmp_path)
    with pytest.raises(UserError, match=r"odd\.toml"):
        experiments.read_experiment("odd")


def test_a_win_is_more_than_the_noise_of_a_float():
    gold = np.array([0.1 + 0.2, 0.5, 0.2, 0.4])
    other = np.array([0.3, 0.4, 0.4, 0.4])
    assert experiment_results.win_by_prompt(gold, other).tolist() == [0.5, 1, 0, 0.5]
