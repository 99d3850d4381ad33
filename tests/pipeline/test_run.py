"""The run folder: stages whole or absent, reuse, resume after any kill, links between runs."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from runs import (
    FREE,
    RATES,
    Fork,
    begin_run,
    contents,
    copy_run,
    differences,
    fork,
    inodes,
    invoke,
    rows_of,
    spawn,
    stages_of,
    train,
    without,
    write_stub,
)

from minmacpo import UserError
from minmacpo.config.parse import parse
from minmacpo.core import trainer
from minmacpo.evaluation import report
from minmacpo.pipeline import stage_maker
from minmacpo.pipeline.disk_space import disk_need
from minmacpo.pipeline.run import FINISHED, Run
from minmacpo.pipeline.run_dir import IN_PROGRESS_DIR
from minmacpo.runtime import device, files
from minmacpo.runtime.progress import Signals
from minmacpo.runtime.seeds import derive_seed


@pytest.fixture
def mine(stub, tmp_path):
    """A copy of the good run that may be changed, with the words that go on with it."""
    run = copy_run(stub, tmp_path / "runs")
    return run, [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]


@pytest.fixture(scope="module")
def ours(stub, tmp_path_factory):
    """The same for tests that leave the run as they found it."""
    root = tmp_path_factory.mktemp("ours")
    return copy_run(stub, root / "runs"), [write_stub(root), f"--run.root={root / 'runs'}"]


@pytest.fixture(scope="module")
def beside(stub, tmp_path_factory):
    """The same for tests that put variants beside the run."""
    root = tmp_path_factory.mktemp("beside")
    return copy_run(stub, root / "runs"), [write_stub(root), f"--run.root={root / 'runs'}"]


# ---- what a finished run looks like ---------------------------------------------------------


def test_a_finished_run_has_its_files_and_nothing_left_over(stub):
    assert {path.name for path in stub.iterdir()} == {
        "config.toml",
        "env.json",
        "log.txt",
        "metrics.jsonl",
        "report.html",
        "data",
        "bases",
        "round0",
        "round1",
        "round2",
        "controls",
        "eval",
    }
    assert [path.name for path in stub.parent.iterdir()] == ["stub"]  # nothing outside the run
    for pattern in ("*.tmp", "*.partial", "state.*"):
        assert list(stub.rglob(pattern)) == []
    for folder in stub.glob("*/*/"):
        assert (folder / "stage.json").is_file()
    assert [path.name for path in (stub / "eval").iterdir() if path.is_file()] == ["table.json"]


def test_stage_json_says_what_the_stage_depends_on_and_what_it_made(stub):
    stages = stages_of(stub)
    for name, notes in stages.items():
        assert notes["name"] == name
        assert len(notes["fingerprint"]) == 32
        assert notes.keys() >= {
            "kind",
            "settings",
            "seed",
            "inputs",
            "counts",
            "started",
            "seconds",
            "cpu_seconds",
            "peak_mb",
            "commit",
            "files",
        }
        for source, fingerprint in notes["inputs"].items():
            assert stages[source]["fingerprint"] == fingerprint, (name, source)
        on_disk = {path.name for path in (stub / name).iterdir()} - {"stage.json"}
        assert on_disk
        assert on_disk == notes["files"].keys()
        for file, listed in notes["files"].items():
            content = (stub / name / file).read_bytes()
            assert listed["size"] == len(content)
            assert listed["sha256"] == hashlib.sha256(content).hexdigest()
        assert notes["seconds"] >= 0
        assert notes["peak_mb"] > 10


def test_random_stages_have_seeds_of_their_own(stub):
    training_kinds = {"sft", "prefer", "pretrain"}
    kinds_seen = set()
    training_seeds = []
    users = Counter()  # how many stages were computed with a seed
    for notes in stages_of(stub).values():
        kind = notes["kind"].partition("/")[0]
        kinds_seen.add(kind)
        if kind in training_kinds:
            training_seeds.append(notes["seed"])
        if kind in training_kinds or kind == "sample":
            assert notes["seed"]
        if notes["seed"] and "linked_from" not in notes:
            users[notes["seed"]] += 1
    assert kinds_seen >= training_kinds | {"sample"}
    assert len(set(training_seeds)) == len(training_seeds)
    assert max(users.values()) <= 10


def test_config_and_environment_repeat_the_run(stub, tmp_path):
    words = [f"@{stub / 'config.toml'}", f"--run.root={tmp_path}"]
    assert parse(words).config.run.name == "stub"
    env = json.loads((stub / "env.json").read_text())
    assert env.keys() >= {
        "torch",
        "python",
        "threads",
        "device",
        "dtype",
        "command",
        "commit",
        "processor",
        "numpy",
        "instructions",
    }
    assert env["threads"] == 1
    assert env["device"] == "cpu"
    assert "stub.toml" in env["command"]


def test_metrics_have_the_names_of_the_field(stub):
    of_pairs = {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "sft_loss",
    }
    of_steps = {
        "stage",
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "tokens_per_s",
        "peak_mem_gb",
        "time",
    }
    stages = stages_of(stub)
    for row in rows_of(stub / "metrics.jsonl"):
        has_pairs = stages[row["stage"]]["kind"].startswith("prefer/")
        if row["step"] == 0:
            assert has_pairs
        else:
            assert row.keys() >= of_steps
            assert 0 < row["time"] < time.time()
            assert row["tokens_per_s"] > 0
        if has_pairs:
            assert row.keys() >= of_pairs
            check_metrics_of_pairs(row)


def check_metrics_of_pairs(row: dict) -> None:
    margin = row["rewards/chosen"] - row["rewards/rejected"]
    assert row["rewards/margins"] == pytest.approx(margin, abs=1e-5)
    assert 0 <= row["rewards/accuracies"] <= 1
    if row["step"] > 0:
        loss = row["dpo_loss"] + 0.2 * row["sft_loss"]  # dpo.sft_weight of the stub preset
        assert row["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_run_s_metrics_are_those_of_its_stages(stub):
    stages = stages_of(stub)
    trained = {name for name, notes in stages.items() if "steps" in notes["counts"]}
    rows = rows_of(stub / "metrics.jsonl")
    assert {row["stage"] for row in rows} == trained
    for name in trained:
        notes = stages[name]
        steps = [row["step"] for row in rows if row["stage"] == name]
        assert steps == sorted(set(steps))
        assert steps[-1] == notes["counts"]["steps"]
        has_pairs = notes["kind"].startswith("prefer/")
        assert (steps[0] == 0) == has_pairs, "a row from before the first step"
        own_rows = rows_of(stub / name / "metrics.jsonl")
        assert [row["step"] for row in own_rows] == steps
        assert own_rows[-1]["tokens"] == notes["counts"]["tokens"]
        for row in own_rows:
            assert "time" not in row


# ---- again ----------------------------------------------------------------------------------


def computed(out: str) -> list[str]:
    """The numbers of the stages that a run says it has computed, in its order: "3/87"."""
    numbers = re.findall(r"^\[(.+?)\]", out, re.MULTILINE)
    return list(dict.fromkeys(numbers))


def test_nothing_is_redone_and_the_table_is_printed(ours):
    run, words = ours
    before = inodes(run)
    contents_before = contents(run)
    out = train(*words).out
    assert computed(out) == []
    assert inodes(run) == before
    assert contents(run) == contents_before
    assert "student, round 2" in out
    assert "ceiling" in out
    assert "report.html" in out
    table = out[out.index("stub") :]
    assert train(*words).out.endswith(table)


def test_the_first_run_prints_its_stages_in_the_order_of_the_plan(tmp_path, stub):
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    numbers = computed(train(*words, "--macpo.rounds=1", "--macpo.controls=false").out)
    total = len(numbers)
    assert total > 40
    assert numbers == [f"{number}/{total}" for number in range(1, total + 1)]


FIRST_ROWS = {
    "pretrain": ["row"],
    "sft": ["row"],
    "prefer": ["chosen", "rejected"],
    "sample": ["prompt"],
    "score": ["row"],
    "pairs": ["chosen"],
}


def test_every_stage_shows_its_first_row_with_its_mask(stub):
    """In the log, before the line that ends the stage; one that is linked renders nothing."""
    stages = stages_of(stub)
    shown = []
    kinds_seen = set()
    for line in (stub / "log.txt").read_text().splitlines():
        # 2026-11-30 20:51:41 [4/95] bases/strong  first row: ...
        stage, _, message = line[20:].partition("  ")
        if message.startswith("first "):
            assert stage.startswith("["), "it names its stage"
            what, _, text = message.removeprefix("first ").partition(": ")
            assert len(text) > 10
            has_mask = "⟦" in text
            assert has_mask == (what != "prompt")
            shown.append(what)
        elif stage.startswith("[") and re.match(r"\d+\.\d s ", message):
            kind = stages[stage.split()[1]]["kind"].partition("/")[0]
            assert shown == FIRST_ROWS.get(kind, []), stage
            kinds_seen.add(kind)
            shown = []
    assert kinds_seen >= FIRST_ROWS.keys()


@pytest.mark.parametrize(
    "name",
    [
        "data/slices",
        "data/corpus_weak1",
        "bases/tokenizer",
        "bases/weak2",
        "round0/teacher1_pos",
        "round0/student_neg",
        "round0/weak_labels",
        "round1/scores_student",
        "round1/pairs_student",
        "round1/student_pos",
        "round2/positives_student",
        "round2/teacher2_pos",
        "controls/ceiling",
        "eval/round1_student_samples",
    ],
)
def test_a_deleted_stage_alone_is_redone_to_the_same_bits(ours, stub, name):
    run, words = ours
    before = inodes(run)
    shutil.rmtree(run / name)
    train(*words)
    after = inodes(run)
    assert after.keys() == before.keys()
    for path in after:
        is_redone = after[path] != before[path]
        assert is_redone == path.startswith(name + "/"), path
    assert differences(run, stub, ("linked_from",)) == []


def test_a_deleted_round_is_redone_to_the_same_bits(ours, stub):
    run, words = ours
    for part in ("round2", "controls"):
        shutil.rmtree(run / part)
    train(*words)
    assert differences(run, stub, ("linked_from",)) == []


def test_a_deleted_table_and_report_are_made_again(mine, stub):
    run, words = mine
    for file in ("eval/table.json", "report.html", "env.json"):
        (run / file).unlink()
    train(*words)
    assert differences(run, stub) == []


def cut(file: Path) -> None:
    os.truncate(file, 500)


def change_number(file: Path) -> None:
    """A number in the middle is another one."""
    file.write_text(file.read_text().replace('"step": 2', '"step": 3'))


def change_name(file: Path) -> None:
    """A bit of the name of a rate is another one."""
    file.write_text(file.read_text().replace("tokens_per_s", "uokens_per_s", 1))


@pytest.mark.parametrize("damage", [Path.unlink, cut, change_number, change_name])
def test_metrics_are_put_back_from_the_stages_in_the_order_of_the_plan(mine, stub, damage):
    run, words = mine
    damage(run / "metrics.jsonl")
    train(*words)
    assert differences(run, stub) == []


def test_a_link_in_a_run_folder_is_refused_before_anything_is_written(mine):
    """What is written through it would lie elsewhere."""
    run, words = mine
    outside = run.parent.parent / "outside"
    outside.write_text("mine\n")
    for name in ("log.txt", "round1/student_pos/adapter_config.json"):
        content = (run / name).read_bytes()
        for target in (outside, "nowhere", "metrics.jsonl"):
            (run / name).unlink()
            (run / name).symlink_to(target)
            before = sorted(run.rglob("*"))
            ended = invoke("train", *words)
            assert ended.code == 2
            assert f"{run / name}: is a link" in ended.err
            assert sorted(run.rglob("*")) == before
        (run / name).unlink()
        (run / name).write_bytes(content)
    assert outside.read_text() == "mine\n"


@pytest.mark.parametrize(
    "name", ["config.toml", "log.txt", "metrics.jsonl", "round1/student_pos/stage.json"]
)
def test_a_pipe_in_a_run_folder_is_not_waited_for(mine, name):
    run, words = mine
    (run / name).unlink()
    os.mkfifo(run / name)
    ended = invoke("train", *words)
    assert ended.code == 2
    assert f"{run / name}: is neither a file nor a folder" in ended.err


def test_a_stage_has_no_file_of_another_folder(mine):
    """Nor is one taken from a run that says so."""
    run, words = mine
    other = run / "round0/other.txt"
    other.write_text("x")
    file = run / "round0/student_pos/stage.json"
    notes = json.loads(file.read_text())
    del notes["checksum"]
    notes["files"]["../other.txt"] = files.describe(other)
    files.write_json(file, notes | {"checksum": files.fingerprint(notes)})
    ended = invoke("train", *words)
    assert ended.code == 2
    assert "other.txt" in ended.err
    train(*words, "--macpo.rounds=1")
    assert list(run.parent.glob("stub-rounds=1/**/other.txt")) == []


# ---- one stage at a time --------------------------------------------------------------------


def test_one_stage_alone(mine, stub):
    run, words = mine
    shutil.rmtree(run / "round1/student_pos")
    shutil.rmtree(run / "round2/student_pos")
    before = inodes(run)
    train(*words, "--stage=round1/student_pos")
    added = inodes(run).keys() - before.keys()
    assert added == {
        f"round1/student_pos/{file}" for file in os.listdir(stub / "round1/student_pos")
    }
    adapter = "round1/student_pos/adapter_model.safetensors"
    assert (run / adapter).read_bytes() == (stub / adapter).read_bytes()


def test_one_stage_needs_its_inputs(mine):
    run, words = mine
    for name in ("round1/student_pos", "round1/pairs_student"):
        shutil.rmtree(run / name)
    ended = invoke("train", *words, "--stage=round1/student_pos")
    assert ended.code == 2
    assert "round1/pairs_student" in ended.err
    assert "not finished" in ended.err
    assert not (run / "round1/student_pos").exists()
    assert not (run / IN_PROGRESS_DIR).exists()


def test_one_stage_takes_no_damaged_input(mine):
    run, words = mine
    shutil.rmtree(run / "round1/student_pos")
    pairs = run / "round1/pairs_student/pairs.jsonl"
    text = pairs.read_text()
    pairs.unlink()  # it is a link to the good run's
    pairs.write_text(text[:-20])
    ended = invoke("train", *words, "--stage=round1/student_pos")
    assert ended.code == 2
    assert "pairs.jsonl" in ended.err
    assert not (run / "round1/student_pos").exists()


def test_a_run_that_goes_on_is_not_finished(mine):
    run, words = mine
    shutil.rmtree(run / "round1/student_pos")
    assert (run / FINISHED).exists()
    train(*words, "--stage=round1/student_pos")
    assert not (run / FINISHED).exists()
    train(*words)
    assert (run / FINISHED).exists()


def planned_lines(*words) -> list[str]:
    """The lines of a dry run, one for each stage."""
    _, _, plan = train(*words, "--dry_run").out.partition(" stages in ")
    return plan.splitlines()[1:]


@pytest.mark.slow
def test_all_stages_one_by_one_make_the_same_run(tmp_path):
    """The same files, each made by a program run of its own, as on a machine with little memory."""
    smaller = ["--macpo.rounds=1", "--macpo.teachers=1", "--macpo.controls=false"]
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", *smaller]
    names = [line.split()[1] for line in planned_lines(*words)]
    assert len(names) > 25
    for name in names:
        train(*words, f"--stage={name}")
    train(*words)  # nothing is left to compute; it closes the run
    train(words[0], f"--run.root={tmp_path / 'good'}", *smaller)
    (one_by_one,) = (tmp_path / "runs").iterdir()
    (good,) = (tmp_path / "good").iterdir()
    assert set(differences(one_by_one, good, ("linked_from",))) <= {"eval/table.json"}


# ---- dry run, profile -----------------------------------------------------------------------


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [write_stub(tmp_path / "presets"), f"--run.root={tmp_path / 'runs'}"]
    out = train(*words, "--dry_run").out
    assert [path.name for path in tmp_path.iterdir()] == ["presets"]
    settings, _, plan = out.partition("\nsplits:")
    settings = settings[settings.index("[run]") :]
    assert tomllib.loads(settings)["dpo"]["batch"] == 4
    assert "'rows': 12" in plan
    assert "round2/teacher2_pos" in plan
    assert "stages in" in plan
    assert "student" in plan


def test_a_dry_run_on_a_finished_run_changes_nothing_and_says_so(mine):
    run, words = mine
    shutil.rmtree(run / "round2/student_pos")
    before = times_of(run)
    lines = planned_lines(*words)
    assert times_of(run) == before
    unfinished = [line.split()[1] for line in lines if not line.endswith("finished")]
    assert unfinished == ["round2/student_pos"]


def times_of(run: Path) -> dict[Path, int]:
    """{path: time of last change} of everything in a run."""
    return {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.slow
def test_profile_writes_traces_and_changes_nothing(stub, tmp_path):
    copy_run(stub, tmp_path / "runs", ("data", "bases"))
    shutil.rmtree(tmp_path / "runs/stub/bases/strong")
    words = [write_stub(tmp_path, "x"), f"--run.root={tmp_path / 'runs'}"]
    train(*words, "--macpo.rounds=1", "--macpo.controls=false", "--profile")
    (run,) = (tmp_path / "runs").glob("x*")
    trace = json.loads((run / "profile/pretrain.json").read_text())
    assert trace["traceEvents"]
    name = "bases/strong/model.safetensors"
    assert (run / name).read_bytes() == (stub / name).read_bytes()


# ---- variants beside it ---------------------------------------------------------------------

GROUND = {
    "data/slices",
    "data/corpus_strong",
    "data/corpus_weak1",
    "bases/tokenizer",
    "bases/strong",
    "bases/weak1",
}
FIRST = {
    "round0/teacher1_pos",
    "round0/teacher1_neg",
    "round0/teacher2_pos",
    "round0/teacher2_neg",
    "round0/student_pos",
    "round0/student_neg",
    "round0/weak_labels",
    "round0/weak_negatives",
    "round1/positives_teacher1",
    "round1/positives_teacher2",
    "round0/negatives_student",
    "round0/negatives_teacher1",
    "round0/negatives_teacher2",
}


@pytest.mark.parametrize(
    ("word", "equal", "own"),
    [
        (
            "--macpo.teachers=1",
            GROUND | {name for name in FIRST if "teacher2" not in name},
            {"round1/pairs_student", "round1/student_pos"},
        ),
        (
            "--macpo.mutual_positives=false",
            GROUND | FIRST,
            {"round1/positives_student", "round1/pairs_student", "round1/teacher1_pos"},
        ),
        (
            "--macpo.hard_negatives=false",
            GROUND | FIRST | {"round1/scores_student", "round1/pairs_student"},
            {"round1/student_pos", "round1/positives_student", "round2/teacher2_pos"},
        ),
        (
            "--macpo.update_teachers=false",
            GROUND | FIRST | {"round1/student_pos", "round1/pairs_student"},
            {"round2/positives_teacher1", "round2/pairs_student", "round2/student_pos"},
        ),
        (
            "--macpo.select=random",
            GROUND | FIRST,
            {"round1/pairs_student", "round1/student_pos", "round1/teacher2_pos"},
        ),
        (
            "--macpo.rounds=1",
            GROUND | FIRST | {"round1/teacher2_pos", "eval/round1_student_samples"},
            {"controls/continued"},
        ),
        (
            "--macpo.refresh_negatives=true",
            GROUND | FIRST | {"round1/student_pos", "round1/teacher2_pos"},
            {"round1/student_neg", "round1/negatives_teacher2", "round2/pairs_teacher1"},
        ),
    ],
)
def test_a_variant_pays_only_for_what_differs(beside, word, equal, own):
    run, words = beside
    before = inodes(run)
    train(*words, word)
    assert inodes(run) == before
    setting = word.removeprefix("--macpo.")
    name = f"stub-macpo.{setting}" if setting == "teachers=1" else f"stub-{setting}"
    variant = run.parent / name
    base = {notes["fingerprint"]: notes for notes in stages_of(run).values()}
    base_files = {file.stat().st_ino for file in run.rglob("*")}

    linked = set()
    computed = set()
    for stage, notes in stages_of(variant).items():
        stage_files = [file for file in (variant / stage).iterdir() if file.name != "stage.json"]
        if notes["fingerprint"] in base:
            linked.add(stage)
            source = run.parent / notes["linked_from"]
            for file in stage_files:
                assert file.stat().st_ino == (source / file.name).stat().st_ino
            assert notes["files"] == base[notes["fingerprint"]]["files"]
        else:
            computed.add(stage)
            for file in stage_files:
                assert file.stat().st_ino not in base_files, stage
    assert equal <= linked
    assert own <= computed
    check_metrics_of_all_trainings(variant)


def check_metrics_of_all_trainings(run: Path) -> None:
    """The run's metrics.jsonl has rows of every stage that took a step."""
    trained = {name for name, notes in stages_of(run).items() if notes["counts"].get("steps")}
    assert {row["stage"] for row in rows_of(run / "metrics.jsonl")} == trained


def test_splits_say_the_same_whatever_the_number_of_teachers(tmp_path):
    """Their fingerprint does not depend on it, so a sibling links them: no count in them may."""
    splits = "splits (d1 (rows 10), d2 (rows 12), test (rows 8))"
    found = []
    for teachers in (1, 3):
        root = tmp_path / str(teachers)
        words = [write_stub(tmp_path), f"--run.root={root}", f"--macpo.teachers={teachers}"]
        assert splits in train(*words, "--stage=data/slices").out
        (run,) = root.iterdir()
        notes = stages_of(run)["data/slices"]
        found.append({key: notes[key] for key in ("fingerprint", "counts", "files")})
    with_one, with_three = found
    assert with_one == with_three
    plan = train(*words, "--dry_run").out
    assert "\nd0: {'strong': 240, 'weak1': 200, 'weak2': 200, 'weak3': 200}\n" in plan


@pytest.mark.slow
def test_the_order_of_runs_does_not_matter(stub, tmp_path):
    """A variant linked from the main run equals the same variant made alone."""
    preset = write_stub(tmp_path)
    copy_run(stub, tmp_path / "beside")
    for root in ("alone", "beside"):
        train(preset, f"--run.root={tmp_path / root}", "--macpo.mutual_positives=false")
    alone = tmp_path / "alone/stub-mutual_positives=false"
    beside = tmp_path / "beside/stub-mutual_positives=false"
    assert differences(alone, beside, ("linked_from",)) == []
    assert 0 in [row["step"] for row in rows_of(beside / "metrics.jsonl")]


def test_copies_where_links_fail(beside, monkeypatch):
    run, words = beside

    def refused(source, target):
        raise OSError(errno.EXDEV, "no links here")

    monkeypatch.setattr(os, "link", refused)
    train(*words, "--macpo.rounds=1", "--run.name=copied")
    file = "bases/strong/model.safetensors"
    variant = run.parent / "copied"
    assert (variant / file).read_bytes() == (run / file).read_bytes()
    assert (variant / file).stat().st_ino != (run / file).stat().st_ino


def test_a_damaged_sibling_is_no_source(mine, stub):
    """Another run's damaged file must not stop this one, nor get into it."""
    run, words = mine
    (run / "bases/strong/model.safetensors").write_bytes(b"damaged")
    (run / "round0/teacher1_pos/stage.json").write_text("{")
    (run / "round0/weak_labels/stage.json").write_text("[1]")
    train(*words, "--macpo.rounds=1")
    variant = run.parent / "stub-rounds=1"
    for name in ("bases/strong", "round0/teacher1_pos", "round1/student_pos"):
        for file in stages_of(stub)[name]["files"]:
            assert (variant / name / file).read_bytes() == (stub / name / file).read_bytes()


@pytest.mark.slow
def test_another_seed_shares_nothing(beside):
    run, words = beside
    train(*words, "--run.seed=1", "--macpo.rounds=1")
    other = run.parent / "stub-rounds=1-seed=1"
    assert not fingerprints_of(other) & fingerprints_of(run)


def fingerprints_of(run: Path) -> set[str]:
    return {notes["fingerprint"] for notes in stages_of(run).values()}


# ---- names ----------------------------------------------------------------------------------


def test_a_name_that_holds_another_configuration(ours):
    run, words = ours
    before = times_of(run)
    ended = invoke("train", *words, "--run.name=stub", "--macpo.rounds=5", "--dpo.beta=0.3")
    assert ended.code == 2
    assert len(ended.err.splitlines()) <= 5
    assert "dpo.beta" in ended.err
    assert "0.3" in ended.err
    assert "0.1" in ended.err
    assert "--run.name" in ended.err
    assert times_of(run) == before


def test_a_name_that_is_no_run_folder(tmp_path):
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", "--run.name=x"]
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/thesis.txt").write_text("precious")
    ended = invoke("train", *words)
    assert ended.code == 2
    assert "no run folder" in ended.err
    assert [p.name for p in (tmp_path / "runs/x").iterdir()] == ["thesis.txt"]
    (tmp_path / "runs/y").write_text("a file")
    assert invoke("train", *words[:2], "--run.name=y").code == 2


def test_an_explicit_name_goes_on_with_its_own_configuration(ours):
    run, words = ours
    before = inodes(run)
    train(*words, "--run.name=stub")
    assert inodes(run) == before


# ---- kills ----------------------------------------------------------------------------------


class PowerCut(BaseException):
    """Stands for a kill: nothing in the library may catch it."""


def cut_power(patch, after: int) -> None:
    """At the `after`-th flush, rename or removal from now, half of it happens, then no more."""
    operations = 0
    real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}

    def cutting(name):
        def wrapped(*args, **options):
            nonlocal operations
            operations += 1
            if operations < after:
                return None if name == "fsync" else real[name](*args, **options)
            if operations == after and name == "fsync":
                write_half(args[0])
            raise PowerCut

        return wrapped

    for name in real:
        patch.setattr(os, name, cutting(name))


def write_half(handle: int) -> None:
    """Of what is not flushed yet, half has come to the disk."""
    if not os.path.isdir(f"/proc/self/fd/{handle}"):
        os.truncate(handle, os.fstat(handle).st_size // 2)


def test_a_cut_at_any_file_operation_is_resumed_to_the_same_bits(stub, tmp_path, seed):
    """A run that is cut again and again, at a random operation, ends as if it had not been."""
    rng = random.Random(seed)
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    cuts = 0
    code = None
    while code is None:
        assert cuts < 200
        with pytest.MonkeyPatch.context() as patch:
            cut_power(patch, rng.randint(5, 99))
            if cuts > 0:  # to save time
                patch.setattr(report, "write_report", write_no_report)
            with contextlib.suppress(PowerCut):
                code = invoke("train", *words, whole=True).code
            if code is None:
                cuts += 1
    assert code == 0
    assert cuts > 10
    assert differences(tmp_path / "runs/stub", stub) == []


def write_no_report(path: Path) -> None:
    files.write_atomic(path / "report.html", "x")


def wait_for(path: Path, process: subprocess.Popen | Fork) -> None:
    """Until `path` exists, or the process has ended."""
    limit = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)


def test_kills_and_signals_at_random_moments(stub, tmp_path, seed):
    """kill -9, Ctrl-C and SIGTERM; then the run goes on to the same bits.

    The fault suite has many more.
    """
    rng = random.Random(seed)
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    run = tmp_path / "runs/stub"
    notes = stages_of(stub)
    order = sorted(notes, key=lambda name: notes[name]["started"])
    order = order[: order.index("round2/student_pos")]
    for number in rng.sample([signal.SIGKILL, signal.SIGINT, signal.SIGTERM], 3):
        left = [name for name in order if not (run / name).exists()]
        soon = left[: max(1, len(left) // 4)]
        process = fork("train", *words)
        wait_for(run / rng.choice(soon), process)
        time.sleep(rng.random() * 0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        assert "Traceback" not in err
        assert len(err.splitlines()) <= 5, err
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 128 + number, err
            assert "same command line goes on" in err
            assert not (run / "eval/table.json").exists()
    ended = invoke("train", *words)
    assert ended.code == 0, ended.err
    assert differences(run, stub) == []


@pytest.mark.slow
def test_thirty_kills_over_a_tiny_run(tmp_path, seed, capsys):
    """kill -9 at 30 moments drawn evenly over a whole run of @tiny, each in a run of its own."""
    rng = random.Random(seed)
    good = spawn("train", "@tiny", "--run.workers=1", f"--run.root={tmp_path / 'good'}")
    wait_for(tmp_path / "good/tiny/env.json", good)
    begun = time.monotonic()
    good.communicate()
    assert good.returncode == 0
    duration = time.monotonic() - begun

    root = tmp_path / "killed"
    moments = []
    while len(moments) < 30:
        moment = rng.random() * duration
        process = spawn("train", "@tiny", "--run.workers=1", f"--run.root={root}")
        wait_for(root / "tiny/env.json", process)
        time.sleep(moment)
        process.kill()
        process.communicate()
        # Otherwise it was faster than the first one, and has ended
        if process.returncode == -signal.SIGKILL:
            finished = len(stages_of(root / "tiny"))
            ended = invoke("train", "@tiny", "--run.workers=1", f"--run.root={root}")
            assert ended.code == 0, ended.err
            differing = differences(root / "tiny", tmp_path / "good/tiny")
            assert differing == [], (moment, finished)
            moments.append((round(moment, 1), finished))
        shutil.rmtree(root)
    with capsys.disabled():
        print("\n30 kills at random moments over a @tiny run (second, stages then finished):")
        print(*sorted(moments))
        print("every one resumed to identical files")


def stop_training(patch, step: int, how: str) -> None:
    """A signal comes in this step of the next training, or a kill before it."""
    train_step = trainer.train_step
    steps = 0

    def stopping(*args, **options):
        nonlocal steps
        steps += 1
        if steps == step:
            if how == "kill":
                raise PowerCut
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args, **options)

    patch.setattr(trainer, "train_step", stopping)


def train_until_stopped(words: list[str], step: int, how: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_training(patch, step, how)
        if how == "kill":
            with pytest.raises(PowerCut):
                invoke("train", *words)
        else:
            assert invoke("train", *words).code == 128 + signal.SIGTERM


def lasting_metrics(run: Path, stages: Iterable[str]) -> list[dict]:
    """The rows of these stages in a run's metrics.jsonl, without times."""
    return [without(row, RATES) for row in rows_of(run / "metrics.jsonl") if row["stage"] in stages]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("how", ["signal", "kill"])
def test_a_training_that_is_stopped_at_any_step_goes_on_to_the_same_bits(stub, tmp_path, step, how):
    """Signals save at the step they come at; a kill goes back to the last state."""
    run = copy_run(stub, tmp_path / "runs", ("data", "bases"))
    shutil.rmtree(run / "bases/strong")
    shutil.copy(stub / "config.toml", run)
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", "--stage=bases/strong"]
    train_until_stopped(words, step, how)
    out = train(*words).out
    if how == "signal":
        assert f"resumed at step {step}" in out
    for file in ("model.safetensors", "metrics.jsonl", "config.json", "tokenizer.model"):
        name = f"bases/strong/{file}"
        assert (run / name).read_bytes() == (stub / name).read_bytes(), file
    assert lasting_metrics(run, ["bases/strong"]) == lasting_metrics(stub, ["bases/strong"])


@pytest.mark.parametrize("how", ["signal", "kill"])
def test_the_metrics_before_the_first_step_survive_a_stop(stub, tmp_path, how):
    """They are the first row of the stage's own metrics.jsonl, and once in the run's."""
    run = copy_run(stub, tmp_path / "runs", ("data", "bases", "round0", "round1"))
    name = "round1/student_pos"
    shutil.rmtree(run / name)
    shutil.copy(stub / "config.toml", run)
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", f"--stage={name}"]
    train_until_stopped(words, 3, how)
    assert "resumed at step" in train(*words).out
    metrics = f"{name}/metrics.jsonl"
    assert (run / metrics).read_bytes() == (stub / metrics).read_bytes()
    steps = [row["step"] for row in lasting_metrics(run, [name])]
    assert steps.count(0) == 1
    assert steps == [row["step"] for row in rows_of(stub / metrics)]


def test_signals_are_remembered_until_looked_at_and_a_second_one_acts_at_once():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signals = Signals()
        signals.install()
        signals.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM
        with pytest.raises(Exception, match="SIGTERM"):
            signals.check()
        with pytest.raises(Exception, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- what a kill can leave behind, one by one -----------------------------------------------


@pytest.mark.parametrize(
    "leftover", ["log.txt", "config.toml.tmp", "env.json.tmp", "metrics.jsonl.tmp"]
)
def test_a_torn_file_of_a_run_that_had_hardly_begun(tmp_path, leftover):
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", "--stage=data/slices"]
    run = tmp_path / "runs/stub"
    run.mkdir(parents=True)
    (run / leftover).write_text("[ru")
    if leftover not in ("log.txt", "config.toml.tmp"):
        copy = tmp_path / "other"
        train(words[0], f"--run.root={copy}", "--stage=data/slices")
        shutil.copy(copy / "stub/config.toml", run)
    train(*words)
    assert (run / "data/slices/stage.json").is_file()


@pytest.mark.parametrize(
    "leftover",
    [
        "stage.json.tmp",
        "samples.jsonl.tmp",
        "block0.jsonl.tmp",
        "block1.jsonl.tmp",
        "stage.json",
        f"block0-{'0' * 64}.jsonl",
    ],
)
def test_a_torn_file_inside_an_unfinished_stage(ours, stub, leftover):
    run, words = ours
    name = "round1/positives_student"
    unfinished = run / IN_PROGRESS_DIR / stages_of(stub)[name]["fingerprint"]
    shutil.rmtree(run / name)
    unfinished.mkdir(parents=True)
    (unfinished / leftover).write_text('{"id": "torn')
    train(*words)
    train(*words)  # the stage must also pass its examination
    assert differences(run, stub, ("linked_from",)) in ([], ["metrics.jsonl"])


def test_a_block_of_another_stage_is_sampled_anew(ours, stub):
    """It is whole, and would fit."""
    run, words = ours
    name = "round1/positives_student"
    other = run / IN_PROGRESS_DIR / "other"
    unfinished = run / IN_PROGRESS_DIR / stages_of(stub)[name]["fingerprint"]
    shutil.rmtree(run / name)
    for folder in (other, unfinished):
        folder.mkdir(parents=True)
    block = files.write_shard(other, 0, rows_of(stub / "round1/positives_teacher1/samples.jsonl"))
    block.rename(unfinished / block.name)
    train(*words)
    assert differences(run, stub, ("linked_from",)) in ([], ["metrics.jsonl"])


def test_a_torn_last_line_of_metrics(mine, stub):
    run, words = mine
    metrics = run / "metrics.jsonl"
    shutil.rmtree(run / "controls")
    before, first, rest = metrics.read_text().partition('{"stage": "controls/continued"')
    whole_line, newline, torn_line = rest.partition("\n")
    metrics.write_text(before + first + whole_line + newline + torn_line[:20])
    train(*words)
    assert differences(run, stub) == []
    with metrics.open("ab") as stream:
        for junk in (b"\xff\xfe", b"7", b'{"step": 1}', b'{"stage": 3}', b"[]", b""):
            stream.write(junk + b"\n")
    train(*words)
    assert differences(run, stub) == []


def test_metrics_of_a_linked_stage_survive_a_kill(mine, monkeypatch):
    """The lines of a linked training are in metrics.jsonl whenever its stage is finished."""
    run, words = mine
    good = stage_maker.replace_fsync

    def replace_fsync(folder, target):
        good(folder, target)
        if target.match("round0/student_pos"):
            raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(stage_maker, "replace_fsync", replace_fsync)
        with pytest.raises(PowerCut):
            invoke("train", *words, "--macpo.rounds=1")
    train(*words, "--macpo.rounds=1")
    linked = lasting_metrics(run.parent / "stub-rounds=1", ["round0/student_pos"])
    assert linked == lasting_metrics(run, ["round0/student_pos"])


def test_a_linked_stage_has_every_line_of_metrics(mine):
    """Also the one before the first step."""
    run, words = mine
    train(*words, "--macpo.rounds=1")
    linked = run.parent / "stub-rounds=1"
    assert "linked_from" in stages_of(linked)["round1/student_pos"]
    same_stages = stages_of(linked).keys() - {"controls/continued"}
    linked_rows = lasting_metrics(linked, same_stages)
    rows = lasting_metrics(run, same_stages)
    assert sorted(map(str, linked_rows)) == sorted(map(str, rows))
    steps = [row["step"] for row in linked_rows if row["stage"] == "round1/student_pos"]
    assert 0 in steps


# ---- two processes --------------------------------------------------------------------------


def test_a_second_process_is_shut_out_and_a_kill_lets_it_in(tmp_path, stub):
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    run = begin_run(stub, tmp_path / "runs")
    first = fork("train", *words)
    try:
        wait_for(run / "round0/teacher1_pos", first)
        first.send_signal(signal.SIGSTOP)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        for more in ([], ["--stage=data/slices"]):
            second = invoke("train", *words, *more)
            assert second.code == 2
            assert "another process" in second.err
            assert len(second.err.splitlines()) == 1
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        assert train(*words, "--dry_run").out  # looking is free
    finally:
        first.kill()
        first.communicate()
    train(*words)
    assert differences(run, stub) == []


def test_a_run_that_another_process_began_meanwhile_is_looked_at_again(tmp_path):
    """Between the first look at the folder and the lock, another configuration may come there."""
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", "--run.name=x"]
    run = Run(parse([*words, "--dpo.beta=0.3"]).config)
    train(*words, "--stage=data/slices")
    with pytest.raises(UserError, match=r"dpo\.beta"):
        run.begin()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def refused(stream, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refused)
    ended = train(write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", "--stage=data/slices")
    assert "no lock" in ended.err


# ---- memory and disk ------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_peak_memory_is_the_stage_s_own(tmp_path):
    run = Run(parse(["@tiny", f"--run.root={tmp_path}"]).config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *args: None)
        run.begin()

    def peak_of(name: str, megabytes: int) -> float:
        def work(context):
            return {"bytes": len(b"x" * (megabytes << 20))}

        return run.stage(name, "k/1", {"name": name}, [], work).notes()["peak_mb"]

    small = peak_of("x/small", 1)
    big = peak_of("x/big", 400)
    later = peak_of("x/later", 1)
    assert big - small > 350
    assert big - later > 350


def test_peaks_of_a_gpu_are_recorded(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 << 20)
    device.reset_peaks("cuda")
    assert resets == ["reset"]
    assert device.peaks("cuda")["peak_gpu_mb"] == 5

    monkeypatch.setattr(device, "read_proc", lambda *args: None)  # where there is no /proc
    device.reset_peaks("cpu")
    assert resets == ["reset"]
    assert device.peaks("cpu").keys() == {"peak_mb"}
    assert device.peak_mb() > 10


def test_the_estimate_of_the_disk_is_near_what_a_run_writes(stub):
    """Not less than all stages hold, not many times more; the fixed part when all exist."""
    config = parse([f"@{stub / 'config.toml'}"]).config
    kinds = []
    written = 0
    for notes in stages_of(stub).values():
        if "linked_from" not in notes:
            kinds.append(notes["kind"])
            written += sum(file["size"] for file in notes["files"].values())
    fixed = disk_need(config, [])
    needed = disk_need(config, kinds) - fixed
    assert written < needed < 10 * written
    assert fixed < 50e6


def test_the_estimate_of_the_disk_follows_shapes_and_files(tmp_path, stub):
    def need(kind: str, *words: str) -> int:
        config = parse([f"@{stub / 'config.toml'}", *words]).config
        return disk_need(config, [kind]) - disk_need(config, [])

    # A new base: the embeddings, the head and two layers; and twice its training state
    numbers = 64 * 400 + 64 * 400 + 2 * 64 * (4 * 64 + 3 * 128)
    assert need("pretrain/1", "--model.strong=64x2x4x128") == 7 * 4 * numbers

    # Adapters of a given model
    folder = tmp_path / "given"
    folder.mkdir()
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}
    (folder / "config.json").write_text(json.dumps(sizes))
    given = [f"--model.student={folder}", "--lora.targets=q_proj,v_proj"]
    adapter = 4 * 8 * 2 * 32 * (4096 + 11008)
    assert need("sft/1", *given) == 7 * adapter
    assert need("prefer/1", *given) == 7 * adapter
    assert need("score/1", *given) == 0

    # Texts of given files
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "x.jsonl").write_bytes(b"x" * 1000)
    given = [f"--data.path={texts}", "--data.shares=0.4,0.1,0.3,0.2"]
    assert need("sample/1", *given) == 300
    assert need("corpus/1", *given) == 400


# ---- files ----------------------------------------------------------------------------------


def test_write_atomic_is_all_or_nothing(tmp_path, monkeypatch):
    file = tmp_path / "x"
    files.write_atomic(file, "old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space"):
                files.write_atomic(file, "new")
        assert file.read_text() == "old"
        assert list(tmp_path.iterdir()) == [file]

    def cut(handle):
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", cut)
        with pytest.raises(PowerCut):
            files.write_atomic(file, "new")
    assert file.read_text() == "old"
    files.write_atomic(file, b"new")
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    operations = []
    fsync = os.fsync
    replace = os.replace

    def recorded_fsync(handle):
        is_folder = os.path.isdir(f"/proc/self/fd/{handle}")
        operations.append("flush the folder" if is_folder else "flush the file")
        fsync(handle)

    def recorded_replace(source, target):
        operations.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    files.write_atomic(tmp_path / "x", "text")
    assert operations == ["flush the file", "rename", "flush the folder"]


def test_seeds_depend_on_every_part_of_their_key():
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, ("a", 1)), (0, "a0"), (0,)]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert seeds == [derive_seed(*key) for key in keys]


def test_fingerprints_follow_settings_seeds_inputs_and_kind(tmp_path):
    run = Run(parse(["@tiny", f"--run.root={tmp_path}"]).config)
    other_run = Run(parse(["@tiny", f"--run.root={tmp_path}", "--run.seed=1"]).config)
    names = (f"x/y{number}" for number in itertools.count())

    def fingerprint(run, kind="sft/1", lr=1, inputs=(), seed_key=("a",)):
        stage = run.stage(next(names), kind, {"lr": lr}, inputs, lambda context: {}, seed_key)
        return stage.fingerprint

    source = run.stage("x/z", "k/1", {}, [], lambda context: {})
    first = fingerprint(run)
    others = [
        fingerprint(run, kind="sft/2"),
        fingerprint(run, lr=2),
        fingerprint(run, inputs=[source]),
        fingerprint(run, seed_key=("b",)),
        fingerprint(other_run),
    ]
    assert len({first, *others}) == 6
    assert fingerprint(run) == first
    assert list(tmp_path.iterdir()) == []  # planning writes nothing


def test_compared_files_are_all_but_times(stub):
    """What `differences` leaves out of the comparison is no more than what has times in it."""
    assert set(FREE) == {"log.txt", "env.json", "report.html"}
    ignored = [path for path, content in contents(stub).items() if content is None]
    assert len(ignored) == 3
