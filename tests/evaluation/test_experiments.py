"""Experiments: many runs of train.py under one question, resumable, with a table and a page."""

import fcntl
import json
import math
import os
import shutil
import signal
import time

import numpy as np
import pytest
from conftest import REPO
from runs import METHODS, copy_run, invoke, spawn, stages_of, write_stub

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


def inside(command: list[str], end: float = math.inf) -> tuple[int, str]:
    """A run in this process, which saves the start of another."""
    ended = invoke("train", *command[2:])
    return ended.code, ended.err


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
        patch.setattr(experiments, "run_process", inside)
        assert experiments.run_experiment(words, str(REPO / "train.py")) == 0
        yield root, words


def test_every_experiment_can_be_planned_and_names_no_run_twice():
    assert {
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
    } <= {*NAMES}
    for name in NAMES:
        found = experiments.read_experiment(name)
        flags = [parse([*case.flags, "--run.seed=7"]).config.run.name for case in found.cases]
        assert len(set(flags)) == len(flags) > 1 and found.question and len(found.seeds) > 1


def test_groups_are_crossed_with_variants():
    found = experiments.read_experiment("noise")
    assert len(found.cases) == 9 * 10 == len({case.label for case in found.cases})
    assert found.cases[11].label == "10 % swapped: MACPO, keep 0.75"
    assert found.cases[11].flags == ["--data.noise=0.1", "--macpo.keep_fraction=0.75"]


def test_the_main_experiment_has_every_method():
    flags = [flag for case in experiments.read_experiment("main").cases for flag in case.flags]
    assert {flag.removeprefix("--method=") for flag in flags} == {*METHODS}


@pytest.mark.parametrize(
    "words,wanted",
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
def test_a_wrong_experiment_is_refused_before_anything_runs(place, words, wanted):
    ended = invoke("train", *words)
    assert ended.code == 2 and wanted in ended.err and not list(place.iterdir())


@pytest.mark.parametrize(
    "text,wanted",
    [
        ('[run]\nmethod = "spin"\n', "run.method = spin"),
        ('[run]\nname = "x"\n', "would be the same run"),
        ("[dpo]\nbeta = 0.1\nsft_weight = 0.2\n", "would be the same run"),
    ],
)
def test_a_file_that_would_mix_up_the_cases_is_refused(place, text, wanted):
    (place / "me.toml").write_text(text)
    ended = invoke("train", "@experiment-loss", "@tiny", "@me.toml", "--dry_run")
    assert ended.code == 2 and wanted in ended.err


def test_a_failing_run_ends_the_experiment_with_its_sentence(stub, place):
    copy_run(stub, place / "runs", ("data", "bases"))
    ended = invoke(
        "train", "@experiment-self", "--seeds=0", write_stub(place), "--sft.student_lr=1e30"
    )
    assert ended.code == 2 and "seed 0, 0: exit" in ended.err and "learning rate" in ended.err


def test_dry_run_lists_every_run(place):
    ended = invoke("train", "@experiment-loss", "--seeds=0,5", "--dry_run")
    assert (
        ended.code == 0 and len(ended.out.splitlines()) == 12 and "runs/world-seed=5" in ended.out
    )
    assert not list(place.iterdir())


def test_results_are_what_the_runs_say(finished):
    root, _ = finished
    found = json.loads((root / "runs/experiment-small/results.json").read_text())
    names = {"0": "stub", "1": "stub-mutual_positives=false"}
    assert [row["name"] for row in found["variants"]] == [*names] and found["seeds"] == [0, 1]
    gold = {}
    for label, name in names.items():
        runs = [read_run(root / "runs" / name), read_run(root / "runs" / f"{name}-seed=1")]
        gold[label] = [[gold_by_prompt(run, "student", t) for run in runs] for t in (0, 1, 2)]
    for row in found["variants"]:
        mine, first = gold[row["name"]], gold["0"]
        assert row["by_round"] == pytest.approx([np.mean([g.mean() for g in at]) for at in mine])
        assert (
            row["student"]
            == pytest.approx(row["by_round"][-1])
            == pytest.approx(np.mean(row["by_seed"]))
        )
        assert row["difference"][0] == pytest.approx(
            np.mean([(a - b).mean() for a, b in zip(first[-1], mine[-1], strict=True)])
        )
        won = [np.mean((a > b) + (a == b) / 2) for a, b in zip(mine[-1], mine[0], strict=True)]
        assert (
            row["wins"][0] == pytest.approx(np.mean(won))
            and row["wins"][1] <= row["wins"][0] <= row["wins"][2]
        )
        alarms = [
            experiment_results.first_alarm(
                json.loads((root / "runs" / name / "eval/table.json").read_text())
            )
            for name in (names[row["name"]], f"{names[row['name']]}-seed=1")
        ]
        assert row["alarms"] == alarms
        kept = [
            mine[-1 if alarm is None else alarm - 1][i].mean() for i, alarm in enumerate(alarms)
        ]
        assert row["kept"] == pytest.approx(np.mean(kept))
        tables = [
            json.loads((root / "runs" / name / "eval/table.json").read_text())
            for name in (names[row["name"]], f"{names[row['name']]}-seed=1")
        ]
        last = [[r for r in table["rows"] if r["agent"] == "student"][-1] for table in tables]
        if None in [r["pgr"] for r in last]:
            assert row["pgr"] is None
        else:
            assert row["pgr"] == pytest.approx(np.mean([r["pgr"] for r in last]))
        assert row["lengths"][1] == pytest.approx(np.mean([r["length"] for r in last]))
        assert 0 < row["spent"] <= row["cpu_seconds"] and row["tokens"] > 1000
    page = (root / "runs/experiment-small/report.html").read_text()
    assert page.count("<tr>") >= 8 and "<svg" in page and "<script" not in page and "$" not in page


def test_a_finished_table_that_is_none_is_made_again(tmp_path, finished):
    root, _ = finished
    shutil.copytree(root / "runs/stub", tmp_path / "stub")
    assert experiments.is_complete(tmp_path / "stub")
    (tmp_path / "stub/eval/table.json").write_text("{}")
    assert not experiments.is_complete(tmp_path / "stub")


def test_finished_runs_are_not_redone_and_a_missing_one_is(finished, capsys):
    root, words = finished
    before = {p: p.stat().st_mtime_ns for p in root.glob("runs/stub*/*/*/*")}
    shutil.rmtree(root / "runs/stub-mutual_positives=false-seed=1")
    assert experiments.run_experiment(words, str(REPO / "train.py")) == 0
    shown = capsys.readouterr().out
    assert "[1/1] seed 1  1" in shown and "[2/" not in shown and "variant" in shown
    after = {p: p.stat().st_mtime_ns for p in root.glob("runs/stub*/*/*/*")}
    assert {p for p in before if before[p] != after.get(p)} <= {
        p for p in before if "stub-mutual_positives=false-seed=1" in str(p)
    }
    assert stages_of(root / "runs/stub-mutual_positives=false-seed=1")


def test_the_first_variant_of_a_group_is_what_its_others_are_compared_with(finished, capsys):
    root, words = finished
    (root / "experiments/grouped.toml").write_text(GROUPED)
    assert (
        experiments.run_experiment(
            ["@experiment-grouped", "--seeds=0", *words[1:]], str(REPO / "train.py")
        )
        == 0
    )
    shown = capsys.readouterr().out
    found = json.loads((root / "runs/experiment-grouped/results.json").read_text())["variants"]
    assert [(row["group"], row["name"]) for row in found] == [
        ("two", "0"),
        ("two", "1"),
        ("one", "0"),
        ("one", "1"),
    ]
    for first, second in (found[:2], found[2:]):
        assert first["difference"] == [0, 0, 0]
        assert second["difference"][0] == pytest.approx(first["student"] - second["student"])
    assert (
        "one: 1" in shown and "one: 1" in (root / "runs/experiment-grouped/report.html").read_text()
    )
    sections = page.experiment_section(
        json.loads((root / "runs/experiment-grouped/results.json").read_text()), "So it is."
    )
    assert (
        f"| 1 | {found[1]['student']:.3f} | {found[3]['student']:.3f} |" in sections
        and "So it is." in sections
    )


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
    gone, before = (
        root / "runs/stub/eval/round2_student_samples",
        (root / "runs/experiment-small/results.json").read_bytes(),
    )
    shutil.rmtree(gone)
    assert not experiments.is_complete(root / "runs/stub") and experiments.is_complete(
        root / "runs/stub-seed=1"
    )
    assert (
        experiments.run_experiment(words, str(REPO / "train.py")) == 0
        and (gone / "samples.jsonl").is_file()
    )
    after = (root / "runs/experiment-small/results.json").read_bytes()
    (old, new) = (json.loads(text)["variants"] for text in (before, after))
    assert [row["by_seed"] for row in old] == [row["by_seed"] for row in new]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_a_signal_reaches_the_run_once_and_the_experiment_goes_on_afterwards(
    stub, tmp_path, place, number
):
    copy_run(stub, place / "runs", ("data", "bases"))
    words = ["@experiment-self", "--seeds=0", write_stub(tmp_path), "--sft.teacher_epochs=9999"]
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731 (nohup would have it ignored)
    process = spawn("train", *words, cwd=place, start_new_session=True, preexec_fn=heard)
    state = place / "runs/stub-teacher_epochs=9999"
    while not (
        (metrics := state / "metrics.jsonl").exists() and "teacher1_pos" in metrics.read_text()
    ):  # it trains
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert (
        process.returncode == 128 + number and "goes on from here" in err and "Traceback" not in err
    )
    assert [*state.glob(".partial/state-*/state.safetensors")], "the run saved before it ended"
    log = (state / "log.txt").open("a")
    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody works on it any more


def test_only_what_was_made_without_further_flags_is_collected(
    finished, tmp_path, monkeypatch, capsys
):
    root, _ = finished
    found = json.loads((root / "runs/experiment-small/results.json").read_text())
    assert found["shared"] == [str(word) for word in finished[1][1:2]], (
        "the preset, but not where the runs lie"
    )
    for name, shared in (("one", ["@tiny"]), ("two", [])):
        (tmp_path / f"runs/experiment-{name}").mkdir(parents=True)
        (tmp_path / f"runs/experiment-{name}/results.json").write_text(
            json.dumps(found | {"name": name, "shared": shared})
        )
    page.collect_experiments(tmp_path / "runs", tmp_path)
    assert (tmp_path / "two.json").is_file() and not (tmp_path / "one.json").exists()
    assert "left out, it was made with @tiny" in capsys.readouterr().out


def test_a_folder_of_another_configuration_is_no_run_of_the_experiment(finished):
    root, words = finished
    (root / "other").mkdir(exist_ok=True)
    changed = write_stub(root / "other", extra="").removeprefix("@")
    text = (root / "other/stub.toml").read_text().replace("beta = 0.1", "beta = 0.7")
    (root / "other/stub.toml").write_text(text)
    with pytest.raises(UserError, match=r"dpo\.beta = 0\.1"):
        experiments.run_experiment([words[0], f"@{changed}", *words[2:]], str(REPO / "train.py"))


def test_help_and_a_dry_run_with_a_value_start_nothing(place, monkeypatch):
    monkeypatch.setattr(experiments, "PRESETS", PRESETS)  # in place of those of `finished`
    assert "--seeds=0,1" in invoke("train", "@experiment-self", "--help").out
    ended = invoke("train", "@experiment-self", "--dry_run=false")
    assert ended.code == 2 and "dry_run" in ended.err and not list(place.iterdir())


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
    mine, other = np.array([0.1 + 0.2, 0.5, 0.2, 0.4]), np.array([0.3, 0.4, 0.4, 0.4])
    assert experiment_results.win_by_prompt(mine, other).tolist() == [0.5, 1, 0, 0.5]
