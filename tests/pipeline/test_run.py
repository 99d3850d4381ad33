"""The run folder: stages whole or absent, reuse, resume after any kill, links between runs."""

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
from pathlib import Path

import pytest
import torch
from runs import (
    FREE,
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
    write_stub,
)

from minmacpo import UserError
from minmacpo.config.parse import parse
from minmacpo.core import trainer as fit
from minmacpo.pipeline import stage_maker
from minmacpo.pipeline.disk_space import disk_need
from minmacpo.pipeline.run import FINISHED, Run
from minmacpo.pipeline.run_dir import IN_PROGRESS_DIR
from minmacpo.runtime import device as machine
from minmacpo.runtime import files
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
    assert {p.name for p in stub.iterdir()} == {
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
    assert [p.name for p in stub.parent.iterdir()] == ["stub"]  # nothing is written outside the run
    assert (
        not list(stub.rglob("*.tmp"))
        and not list(stub.rglob("*.partial"))
        and not list(stub.rglob("state.*"))
    )
    for folder in stub.glob("*/*/"):
        assert (folder / "stage.json").is_file()
    assert {p.name for p in (stub / "eval").iterdir() if p.is_file()} == {"table.json"}


def test_stage_json_says_what_the_stage_depends_on_and_what_it_made(stub):
    notes = stages_of(stub)
    by_fingerprint = {n["fingerprint"] for n in notes.values()}
    for name, note in notes.items():
        assert note["name"] == name and len(note["fingerprint"]) == 32
        assert note.keys() >= {
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
        assert (
            set(note["inputs"].values()) <= by_fingerprint and note["inputs"].keys() <= notes.keys()
        )
        on_disk = {p.name for p in (stub / name).iterdir()} - {"stage.json"}
        assert on_disk == note["files"].keys() and on_disk
        for file, listed in note["files"].items():
            raw = (stub / name / file).read_bytes()
            assert listed == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        assert note["seconds"] >= 0 and note["peak_mb"] > 10
    # random stages have seeds of their own; those that are not random have none
    seeds = Counter(n["seed"] for n in notes.values() if n["seed"] and "linked_from" not in n)
    drawn = {n["kind"].partition("/")[0] for n in notes.values() if n["seed"]}
    assert drawn >= {"sft", "prefer", "sample", "pretrain"} and max(seeds.values()) <= 10
    assert all(
        n["seed"]
        for n in notes.values()
        if n["kind"].startswith(("sft", "prefer", "sample", "pretrain"))
    )
    trained = [
        n["seed"] for n in notes.values() if n["kind"].startswith(("sft", "prefer", "pretrain"))
    ]
    assert len(set(trained)) == len(trained)


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
    assert env["threads"] == 1 and env["device"] == "cpu" and "stub.toml" in env["command"]


def test_metrics_have_the_names_of_the_field(stub):
    pair = {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "sft_loss",
    }
    always = {
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
    rows, notes = rows_of(stub / "metrics.jsonl"), stages_of(stub)
    trained = {name for name, note in notes.items() if "steps" in note["counts"]}
    assert {row["stage"] for row in rows} == trained
    for row in rows:
        kind = notes[row["stage"]]["kind"].partition("/")[0]
        if row["step"] == 0:
            assert kind == "prefer" and row.keys() >= pair
            continue
        assert row.keys() >= always | (pair if kind == "prefer" else set())
        if kind == "prefer":
            assert row["rewards/margins"] == pytest.approx(
                row["rewards/chosen"] - row["rewards/rejected"], abs=1e-5
            )
            assert 0 <= row["rewards/accuracies"] <= 1
            wanted = row["dpo_loss"] + 0.2 * row["sft_loss"]  # gamma of the stub preset
            assert row["loss"] == pytest.approx(wanted, rel=1e-5)
        assert 0 < row["time"] < time.time() and row["tokens_per_s"] > 0
    for name in trained:
        steps = [row["step"] for row in rows if row["stage"] == name]
        assert steps == sorted(set(steps)) and steps[-1] == notes[name]["counts"]["steps"]
        assert (steps[0] == 0) == notes[name]["kind"].startswith("prefer/"), (
            "a row from before the first step"
        )
        kept = rows_of(stub / name / "metrics.jsonl")
        assert [row["step"] for row in kept] == steps and not any("time" in row for row in kept)
        assert kept[-1]["tokens"] == notes[name]["counts"]["tokens"]


# ---- again ----------------------------------------------------------------------------------


def test_nothing_is_redone_and_the_table_is_printed(ours):
    run, words = ours
    before, listed = inodes(run), contents(run)
    first = train(*words)
    assert inodes(run) | {"eval/table.json": 0} == before | {"eval/table.json": 0}
    assert "student, round 2" in first.out and "ceiling" in first.out and "report.html" in first.out
    assert not [
        line for line in first.out.splitlines() if line.startswith("[")
    ]  # no stage had to be done
    assert contents(run) == listed
    table = first.out[first.out.index("stub") :]
    assert train(*words).out.endswith(table)


def test_the_first_run_prints_its_stages_in_the_order_of_the_plan(tmp_path, stub):
    words = [
        write_stub(tmp_path),
        f"--run.root={tmp_path / 'runs'}",
        "--macpo.rounds=1",
        "--macpo.controls=false",
    ]
    out = train(*words).out
    places = [
        *dict.fromkeys(
            line[1 : line.index("]")] for line in out.splitlines() if line.startswith("[")
        )
    ]
    total = len(places)
    assert places == [f"{i}/{total}" for i in range(1, total + 1)] and total > 40


def test_every_stage_shows_its_first_row_with_its_mask(stub):
    """In the log, before the line that ends the stage; one that was taken from elsewhere renders
    nothing.
    """
    wanted = {
        "pretrain": ["row"],
        "sft": ["row"],
        "prefer": ["chosen", "rejected"],
        "sample": ["prompt"],
        "score": ["row"],
        "pairs": ["chosen"],
    }
    shown, seen = [], Counter()
    for line in (stub / "log.txt").read_text().splitlines():
        text, _, said = line[20:].partition("  ")
        if said.startswith("first "):
            assert text.startswith("["), "it names its stage"
            shown.append(said)
        elif text.startswith("[") and re.match(r"\d+\.\d s ", said):
            kind = stages_of(stub)[text.split()[1]]["kind"].partition("/")[0]
            assert [first.split()[1] for first in shown] == [
                f"{what}:" for what in wanted.get(kind, [])
            ], text
            assert all(
                ("⟦" in first) == ("prompt:" not in first) and len(first) > 20 for first in shown
            )
            seen[kind] += 1
            shown = []
    assert seen.keys() >= wanted.keys()


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
    changed = {
        path for path in after if after[path] != before.get(path) and path != "eval/table.json"
    }
    assert (
        changed == {path for path in before if path.startswith(name + "/")}
        and after.keys() == before.keys()
    )
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


def changed(file: Path) -> None:
    """A number in the middle is another one."""
    file.write_text(file.read_text().replace('"step": 2', '"step": 3'))


def renamed(file: Path) -> None:
    """A bit of the name of a rate is another one."""
    file.write_text(file.read_text().replace("tokens_per_s", "uokens_per_s", 1))


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda file: os.truncate(file, 500), changed, renamed]
)
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
    for name, target in itertools.product(
        ("log.txt", "round1/student_pos/adapter_config.json"), (outside, "nowhere", "metrics.jsonl")
    ):
        good = (run / name).read_bytes()
        (run / name).unlink()
        (run / name).symlink_to(target)
        before = sorted(run.rglob("*"))
        ended = invoke("train", *words)
        assert (
            ended.code == 2
            and f"{run / name}: is a link" in ended.err
            and sorted(run.rglob("*")) == before
        )
        (run / name).unlink()
        (run / name).write_bytes(good)
    assert outside.read_text() == "mine\n"


@pytest.mark.parametrize(
    "name", ["config.toml", "log.txt", "metrics.jsonl", "round1/student_pos/stage.json"]
)
def test_a_pipe_in_a_run_folder_is_not_waited_for(mine, name):
    run, words = mine
    (run / name).unlink()
    os.mkfifo(run / name)
    ended = invoke("train", *words)
    assert ended.code == 2 and f"{run / name}: is neither a file nor a folder" in ended.err


def test_a_stage_has_no_file_of_another_folder(mine):
    """Nor is one taken from a run that says so."""
    run, words = mine
    note = run / "round0/student_pos/stage.json"
    notes = json.loads(note.read_text())
    (run / "round0/other.txt").write_text("x")
    notes["files"]["../other.txt"] = files.describe(run / "round0/other.txt")
    notes["checksum"] = files.fingerprint(
        {key: value for key, value in notes.items() if key != "checksum"}
    )
    files.write_json(note, notes)
    ended = invoke("train", *words)
    assert ended.code == 2 and "other.txt" in ended.err
    train(*words, "--macpo.rounds=1")
    assert not [*run.parent.glob("stub-rounds=1/**/other.txt")]


# ---- one stage at a time --------------------------------------------------------------------


def test_one_stage_alone(mine, stub):
    run, words = mine
    shutil.rmtree(run / "round1/student_pos")
    shutil.rmtree(run / "round2/student_pos")
    before = inodes(run)
    train(*words, "--stage=round1/student_pos")
    made = {path for path in inodes(run) if path not in before}
    assert made == {f"round1/student_pos/{f}" for f in os.listdir(stub / "round1/student_pos")}
    kept = "round1/student_pos/adapter_model.safetensors"
    assert (run / kept).read_bytes() == (stub / kept).read_bytes()


def test_one_stage_needs_its_inputs(mine):
    run, words = mine
    for name in ("round1/student_pos", "round1/pairs_student"):
        shutil.rmtree(run / name)
    ended = invoke("train", *words, "--stage=round1/student_pos")
    assert ended.code == 2 and "round1/pairs_student" in ended.err and "not finished" in ended.err
    assert not (run / "round1/student_pos").exists() and not (run / IN_PROGRESS_DIR).exists()


def test_one_stage_takes_no_damaged_input(mine):
    run, words = mine
    shutil.rmtree(run / "round1/student_pos")
    pairs = run / "round1/pairs_student/pairs.jsonl"
    text = pairs.read_text()
    pairs.unlink()  # it is a link to the good run's
    pairs.write_text(text[:-20])
    ended = invoke("train", *words, "--stage=round1/student_pos")
    assert (
        ended.code == 2 and "pairs.jsonl" in ended.err and not (run / "round1/student_pos").exists()
    )


def test_a_run_that_goes_on_is_not_finished(mine):
    run, words = mine
    shutil.rmtree(run / "round1/student_pos")
    assert (run / FINISHED).exists()
    train(*words, "--stage=round1/student_pos")
    assert not (run / FINISHED).exists()
    train(*words)
    assert (run / FINISHED).exists()


def test_all_stages_one_by_one_make_the_same_run(tmp_path):
    """The same files, each made by a program run of its own, as on a machine with little memory."""
    smaller = ["--macpo.rounds=1", "--macpo.teachers=1", "--macpo.controls=false"]
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", *smaller]
    plan = train(*words, "--dry_run").out.partition(" stages in ")[2].splitlines()[1:]
    names = [line.split()[1] for line in plan]
    assert len(names) > 25
    for name in names:
        train(*words, f"--stage={name}")
    train(*words)  # nothing is left to compute; it closes the run
    train(words[0], f"--run.root={tmp_path / 'good'}", *smaller)
    one, other = (next((tmp_path / root).iterdir()) for root in ("runs", "good"))
    assert [d for d in differences(one, other, ("linked_from",)) if d != "eval/table.json"] == []


# ---- dry run, profile -----------------------------------------------------------------------


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [write_stub(tmp_path / "presets"), f"--run.root={tmp_path / 'runs'}"]
    out = train(*words, "--dry_run").out
    assert [p.name for p in tmp_path.iterdir()] == ["presets"]
    settings, _, rest = out.partition("\nsplits:")
    assert (
        tomllib.loads(settings.partition("[run]")[1] + settings.partition("[run]")[2])["dpo"][
            "batch"
        ]
        == 4
    )
    assert "'rows': 12" in rest and "round2/teacher2_pos" in rest
    assert "stages in" in rest and "student" in rest


def test_a_dry_run_on_a_finished_run_changes_nothing_and_says_so(mine):
    run, words = mine
    shutil.rmtree(run / "round2/student_pos")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    plan = train(*words, "--dry_run").out.partition(" stages in ")[2].splitlines()[1:]
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    unfinished = [line.split()[1] for line in plan if not line.endswith("finished")]
    assert unfinished == ["round2/student_pos"]


def test_profile_writes_traces_and_changes_nothing(stub, tmp_path):
    copy_run(stub, tmp_path / "runs", ("data", "bases"))
    shutil.rmtree(tmp_path / "runs/stub/bases/strong")
    words = [
        write_stub(tmp_path, "x"),
        f"--run.root={tmp_path / 'runs'}",
        "--macpo.rounds=1",
        "--macpo.controls=false",
    ]
    train(*words, "--profile")
    (run,) = (p for p in (tmp_path / "runs").iterdir() if p.name.startswith("x"))
    traces = {p.stem: json.loads(p.read_text()) for p in (run / "profile").iterdir()}
    assert "pretrain" in traces and traces["pretrain"]["traceEvents"]
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
FIRST = {f"round0/{a}_{p}" for a in ("teacher1", "teacher2", "student") for p in ("pos", "neg")} | {
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
            GROUND | {n for n in FIRST if "teacher2" not in n},
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
    name = word[2:].partition(".")[2]
    variant = run.parent / f"stub-{'macpo.' if 'teachers=1' in name else ''}{name}"
    notes, base = stages_of(variant), stages_of(run)
    known = {note["fingerprint"]: stage for stage, note in base.items()}
    assert inodes(run) == before
    for stage, note in notes.items():
        files = [f for f in (variant / stage).iterdir() if f.name != "stage.json"]
        linked = note["fingerprint"] in known
        assert ("linked_from" in note) >= linked, stage
        if linked:
            source = run.parent / note["linked_from"]
            assert all(f.stat().st_ino == (source / f.name).stat().st_ino for f in files)
            assert note["files"] == base[known[note["fingerprint"]]]["files"]
        else:
            outside = {f.stat().st_ino for r in (run,) for f in r.rglob("*")}
            assert not any(f.stat().st_ino in outside for f in files), stage
    assert equal <= {stage for stage, note in notes.items() if note["fingerprint"] in known}
    assert own <= {stage for stage, note in notes.items() if note["fingerprint"] not in known}
    trained = {name for name, note in notes.items() if "steps" in note["counts"]}
    steps = {name for name in trained if notes[name]["counts"]["steps"]}
    assert {row["stage"] for row in rows_of(variant / "metrics.jsonl")} == steps


def test_splits_say_the_same_whatever_the_number_of_teachers(tmp_path):
    """Their fingerprint does not depend on it, so a sibling links them: no count in them may."""
    notes = []
    for teachers in (1, 3):
        words = [
            f"--run.root={tmp_path / str(teachers)}",
            f"--macpo.teachers={teachers}",
            "--stage=data/slices",
        ]
        assert (
            str({"d1": {"rows": 10}, "d2": {"rows": 12}, "test": {"rows": 8}})
            in train(write_stub(tmp_path), *words).out
        )
        (note,) = (
            stage
            for run in (tmp_path / str(teachers)).iterdir()
            for stage in stages_of(run).values()
        )
        notes.append({key: note[key] for key in ("fingerprint", "counts", "files")})
    assert notes[0] == notes[1]
    plan = train(write_stub(tmp_path), *words[:2], "--dry_run").out
    assert re.search(r"\nd0: \{'strong': 240, 'weak1': 200, 'weak2': 200, 'weak3': 200\}\n", plan)


def test_the_order_of_runs_does_not_matter(stub, tmp_path):
    """A variant linked from the main run equals the same variant made alone."""
    for root in ("alone", "beside"):
        if root == "beside":
            copy_run(stub, tmp_path / root)
        train(
            write_stub(tmp_path), f"--run.root={tmp_path / root}", "--macpo.mutual_positives=false"
        )
    ways = [tmp_path / root / "stub-mutual_positives=false" for root in ("alone", "beside")]
    assert differences(*ways, ("linked_from",)) == []
    assert any(row["step"] == 0 for row in rows_of(ways[1] / "metrics.jsonl"))


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
    for name in ("bases/strong", "round0/teacher1_pos", "round1/student_pos"):
        for file in stages_of(stub)[name]["files"]:
            assert (run.parent / "stub-rounds=1" / name / file).read_bytes() == (
                stub / name / file
            ).read_bytes()


def test_another_seed_shares_nothing(beside):
    run, words = beside
    train(*words, "--run.seed=1", "--macpo.rounds=1")
    notes = stages_of(run.parent / "stub-rounds=1-seed=1")
    known = {note["fingerprint"] for note in stages_of(run).values()}
    assert not {n["fingerprint"] for n in notes.values()} & known


# ---- names ----------------------------------------------------------------------------------


def test_a_name_that_holds_another_configuration(ours):
    run, words = ours
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    ended = invoke("train", *words, "--run.name=stub", "--macpo.rounds=5", "--dpo.beta=0.3")
    assert ended.code == 2 and len(ended.err.splitlines()) <= 5
    assert (
        "dpo.beta" in ended.err
        and "0.3" in ended.err
        and "0.1" in ended.err
        and "--run.name" in ended.err
    )
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_a_name_that_is_no_run_folder(tmp_path):
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", "--run.name=x"]
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/thesis.txt").write_text("precious")
    ended = invoke("train", *words)
    assert ended.code == 2 and "no run folder" in ended.err
    assert [p.name for p in (tmp_path / "runs/x").iterdir()] == ["thesis.txt"]
    (tmp_path / "runs/y").write_text("a file")
    assert invoke("train", *words[:2], "--run.name=y").code == 2


def test_an_explicit_name_goes_on_with_its_own_configuration(ours):
    run, words = ours
    before = inodes(run)
    train(*words, "--run.name=stub")
    assert {k: v for k, v in inodes(run).items() if k != "eval/table.json"} == {
        k: v for k, v in before.items() if k != "eval/table.json"
    }


# ---- kills ----------------------------------------------------------------------------------


class PowerCut(BaseException):
    """Stands for a kill: nothing in the library may catch it."""


def cut_power(patch, after: int) -> None:
    """At the `after`-th flush, rename or removal from now, half of it happens and then nothing
    more.
    """
    left = [after]
    names = ("fsync", "replace", "unlink")
    good = {name: getattr(os, name) for name in names}

    def cutting(name):
        def wrapped(*args, **options):
            left[0] -= 1
            if left[0] > 0:
                return None if name == "fsync" else good[name](*args, **options)
            if left[0] == 0 and name == "fsync":
                size = os.fstat(args[0]).st_size
                with pytest.MonkeyPatch.context() as inner:
                    inner.setattr(os, "fsync", good["fsync"])
                    if not os.path.isdir(f"/proc/self/fd/{args[0]}"):
                        os.truncate(args[0], size // 2)
            raise PowerCut

        return wrapped

    for name in names:
        patch.setattr(os, name, cutting(name))


def test_a_cut_at_any_file_operation_is_resumed_to_the_same_bits(stub, tmp_path, seed):
    """A run that is cut again and again, at a random one of its next file operations, ends as if it
    had not been.
    """
    rng = random.Random(seed)
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    cuts, code = 0, None
    while code is None:
        assert cuts < 200
        with pytest.MonkeyPatch.context() as patch:
            cut_power(patch, rng.randint(5, 99))
            try:
                code = invoke("train", *words, whole=True).code if cuts == 0 else quick(words)
            except PowerCut:
                cuts += 1
    assert code == 0 and cuts > 10
    assert differences(tmp_path / "runs/stub", stub) == []


def quick(words) -> int:
    """The program without its reports, its files under the eyes of `cut_power`."""
    with pytest.MonkeyPatch.context() as patch:
        from minmacpo.evaluation import report

        patch.setattr(
            report, "write_report", lambda path: files.write_atomic(path / "report.html", "x")
        )
        return invoke("train", *words, whole=True).code


def wait_for(path: Path, process: subprocess.Popen | Fork) -> None:
    """Until `path` exists, or the process has ended."""
    limit = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)


def test_kills_and_signals_at_random_moments(stub, tmp_path, seed):
    """kill -9, Ctrl-C and SIGTERM; then the run goes on to the same bits. The fault suite has many
    more.
    """
    rng = random.Random(seed)
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    notes, run = stages_of(stub), tmp_path / "runs/stub"
    order = sorted(notes, key=lambda name: notes[name]["started"])
    order = order[: order.index("round2/student_pos")]
    kinds = rng.sample([signal.SIGKILL, signal.SIGINT, signal.SIGTERM], 3)
    for number in kinds:
        left = [name for name in order if not (run / name).exists()]
        process = fork("train", *words)
        wait_for(run / rng.choice(left[: max(1, len(left) // 4)]), process)
        time.sleep(rng.random() * 0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        assert "Traceback" not in err and len(err.splitlines()) <= 5, err
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 128 + number, err
            assert "same command line goes on" in err and not (run / "eval/table.json").exists()
    ended = invoke("train", *words)
    assert ended.code == 0, ended.err
    assert differences(run, stub) == []


@pytest.mark.slow
def test_thirty_kills_over_a_tiny_run(tmp_path, seed, capsys):
    """kill -9 at 30 moments drawn evenly over a whole run of @tiny, each in a run of its own."""
    rng, kills, moments = random.Random(seed), 30, []
    good = spawn("train", "@tiny", f"--run.root={tmp_path / 'good'}")
    wait_for(tmp_path / "good/tiny/env.json", good)
    begun = time.monotonic()
    assert good.communicate() and good.returncode == 0
    lasted = time.monotonic() - begun
    while len(moments) < kills:
        root, moment = tmp_path / "killed", rng.random() * lasted
        process = spawn("train", "@tiny", f"--run.root={root}")
        wait_for(root / "tiny/env.json", process)
        time.sleep(moment)
        process.kill()
        process.communicate()
        if (
            process.returncode == -signal.SIGKILL
        ):  # else it was faster than the first one, and has ended
            done = len(stages_of(root / "tiny"))
            ended = invoke("train", "@tiny", f"--run.root={root}")
            assert ended.code == 0, ended.err
            assert differences(root / "tiny", tmp_path / "good/tiny") == [], (moment, done)
            moments.append((round(moment, 1), done))
        shutil.rmtree(root)
    with capsys.disabled():
        print(
            f"\n{kills} kills at random moments over a @tiny run (second, stages then finished):",
            *sorted(moments),
        )
        print("every one resumed to identical files")


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("how", ["signal", "kill"])
def test_a_training_that_is_stopped_at_any_step_goes_on_to_the_same_bits(
    stub, tmp_path, monkeypatch, step, how
):
    """Signals save at the step they come at; a kill goes back to the last state."""
    copy_run(stub, tmp_path / "runs", ("data", "bases"))
    run = tmp_path / "runs/stub"
    shutil.rmtree(run / "bases/strong")
    shutil.copy(stub / "config.toml", run)
    good, seen = fit.train_step, []

    def train_step(*args, **more):
        seen.append(1)
        if len(seen) == step:
            if how == "kill":
                raise PowerCut
            os.kill(os.getpid(), signal.SIGTERM)
        return good(*args, **more)

    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", "--stage=bases/strong"]
    with monkeypatch.context() as patch:
        patch.setattr(fit, "train_step", train_step)
        try:
            ended = invoke("train", *words)
            assert how == "signal" and ended.code == 143
        except PowerCut:
            assert how == "kill"
    seen.clear()
    resumed = train(*words)
    if how == "signal":
        assert f"resumed at step {step}" in resumed.out
    for file in ("model.safetensors", "metrics.jsonl", "config.json", "tokenizer.model"):
        assert (run / "bases/strong" / file).read_bytes() == (
            stub / "bases/strong" / file
        ).read_bytes(), file
    rows = [
        [
            {k: v for k, v in row.items() if k not in ("time", "tokens_per_s", "peak_mem_gb")}
            for row in rows_of(r / "metrics.jsonl")
            if row["stage"] == "bases/strong"
        ]
        for r in (run, stub)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("how", ["signal", "kill"])
def test_the_metrics_before_the_first_step_survive_a_stop(stub, tmp_path, monkeypatch, how):
    """They are the first row of the stage's own metrics.jsonl, and once in the run's."""
    copy_run(stub, tmp_path / "runs", ("data", "bases", "round0", "round1"))
    run, name = tmp_path / "runs/stub", "round1/student_pos"
    shutil.rmtree(run / name)
    shutil.copy(stub / "config.toml", run)
    good, seen = fit.train_step, []

    def train_step(*args, **more):
        seen.append(1)
        if len(seen) == 3:
            if how == "kill":
                raise PowerCut
            os.kill(os.getpid(), signal.SIGTERM)
        return good(*args, **more)

    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", f"--stage={name}"]
    with monkeypatch.context() as patch:
        patch.setattr(fit, "train_step", train_step)
        try:
            assert invoke("train", *words).code == 143
        except PowerCut:
            assert how == "kill"
    assert "resumed at step" in train(*words).out
    assert (run / name / "metrics.jsonl").read_bytes() == (
        stub / name / "metrics.jsonl"
    ).read_bytes()
    steps = [row["step"] for row in rows_of(run / "metrics.jsonl") if row["stage"] == name]
    assert (
        steps == [row["step"] for row in rows_of(stub / name / "metrics.jsonl")]
        and steps.count(0) == 1
    )


def test_signals_are_remembered_until_looked_at_and_a_second_one_acts_at_once():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
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
    other, unfinished = (
        run / IN_PROGRESS_DIR / "other",
        run / IN_PROGRESS_DIR / stages_of(stub)[name]["fingerprint"],
    )
    shutil.rmtree(run / name)
    for folder in (other, unfinished):
        folder.mkdir(parents=True)
    block = files.write_shard(other, 0, rows_of(stub / "round1/positives_teacher1/samples.jsonl"))
    block.rename(unfinished / block.name)
    train(*words)
    assert differences(run, stub, ("linked_from",)) in ([], ["metrics.jsonl"])


def test_a_torn_last_line_of_metrics(mine, stub):
    run, words = mine
    shutil.rmtree(run / "controls")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if '"controls/continued"' in line)
    (run / "metrics.jsonl").write_text("".join(lines[: cut + 1]) + lines[cut + 1][:20])
    train(*words)
    assert differences(run, stub) == []
    for junk in (b"\xff\xfe\n", b"7\n", b'{"step": 1}\n', b'{"stage": 3}\n', b"[]\n", b"\n"):
        with (run / "metrics.jsonl").open("ab") as stream:
            stream.write(junk)
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
    rows = rows_of(run.parent / "stub-rounds=1/metrics.jsonl")
    assert [row["step"] for row in rows if row["stage"] == "round0/student_pos"] == [
        row["step"] for row in rows_of(run / "round0/student_pos/metrics.jsonl")
    ]


def test_a_linked_stage_has_every_line_of_metrics(mine):
    """Also the one before the first step."""
    run, words = mine
    train(*words, "--macpo.rounds=1")
    linked = run.parent / "stub-rounds=1"
    assert "linked_from" in stages_of(linked)["round1/student_pos"]
    times = ("time", "tokens_per_s", "peak_mem_gb")
    rows = [
        [
            {k: v for k, v in row.items() if k not in times}
            for row in rows_of(r / "metrics.jsonl")
            if row["stage"] in stages_of(linked).keys() - {"controls/continued"}
        ]
        for r in (linked, run)
    ]
    assert sorted(map(str, rows[0])) == sorted(map(str, rows[1]))
    assert any(row["stage"] == "round1/student_pos" and row["step"] == 0 for row in rows[0])


# ---- two processes --------------------------------------------------------------------------


def test_a_second_process_is_shut_out_and_a_kill_lets_it_in(tmp_path, stub):
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    run = begin_run(stub, tmp_path / "runs")
    first = fork("train", *words)
    try:
        wait_for(run / "round0/teacher1_pos", first)
        first.send_signal(signal.SIGSTOP)
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        for more in ([], ["--stage=data/slices"]):
            second = invoke("train", *words, *more)
            assert (
                second.code == 2
                and "another process" in second.err
                and len(second.err.splitlines()) == 1
            )
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
        assert train(*words, "--dry_run").out  # looking is free
    finally:
        first.kill()
        first.communicate()
    train(*words)
    assert differences(run, stub) == []


def test_a_run_that_another_process_began_meanwhile_is_looked_at_again(tmp_path):
    """Between the first look at the folder and the lock, somebody may have put another
    configuration there.
    """
    words = [
        write_stub(tmp_path),
        f"--run.root={tmp_path / 'runs'}",
        "--run.name=x",
        "--stage=data/slices",
    ]
    run = Run(parse([*words[:3], "--dpo.beta=0.3"]).config)
    train(*words)
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
    sizes = {"x/small": 1, "x/big": 400, "x/later": 1}
    stages = [
        run.stage(
            name,
            "k/1",
            {"name": name},
            [],
            lambda work, size=size: {"bytes": len(b"x" * (size << 20))},
        )
        for name, size in sizes.items()
    ]
    small, big, later = (stage.notes()["peak_mb"] for stage in stages)
    assert big - small > 350 and big - later > 350


def test_peaks_of_a_gpu_are_recorded(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 << 20)
    machine.reset_peaks("cuda")
    assert done == ["reset"] and machine.peaks("cuda")["peak_gpu_mb"] == 5
    monkeypatch.setattr(machine, "read_proc", lambda *args: None)  # where there is no /proc
    machine.reset_peaks("cpu")
    assert (
        done == ["reset"] and machine.peaks("cpu").keys() == {"peak_mb"} and machine.peak_mb() > 10
    )


def test_the_estimate_of_the_disk_is_near_what_a_run_writes(stub):
    """Not less than all stages hold, and not many times more; nothing but the fixed part when all
    are there.
    """
    config = parse([f"@{stub / 'config.toml'}"]).config
    made = [note for note in stages_of(stub).values() if "linked_from" not in note]
    written = sum(file["size"] for note in made for file in note["files"].values())
    fixed = disk_need(config, [])
    needed = disk_need(config, [note["kind"] for note in made]) - fixed
    assert written < needed < 10 * written and fixed < 50e6


def test_the_estimate_of_the_disk_follows_shapes_and_files(tmp_path, stub):
    def need(kind: str, *words: str) -> int:
        config = parse([f"@{stub / 'config.toml'}", *words]).config
        return disk_need(config, [kind]) - disk_need(config, [])

    weights = (
        4 * 64 * (2 * 400 + 2 * (4 * 64 + 3 * 128))
    )  # of the embeddings, the head and two layers
    assert (
        need("pretrain/1", "--model.strong=64x2x4x128") == 7 * weights
    )  # the base; twice its training state
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}'
    )
    given = [f"--model.student={folder}", "--lora.targets=q_proj,v_proj"]
    adapter = 4 * 8 * 2 * 32 * (4096 + 11008)
    assert (
        need("sft/1", *given) == need("prefer/1", *given) == 7 * adapter
        and need("score/1", *given) == 0
    )
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/x.jsonl").write_bytes(b"x" * 1000)
    files = [f"--data.path={tmp_path / 'texts'}", "--data.shares=0.4,0.1,0.3,0.2"]
    assert need("sample/1", *files) == 300 and need("corpus/1", *files) == 400


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
        assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(PowerCut()))
        with pytest.raises(PowerCut):
            files.write_atomic(file, "new")
    assert file.read_text() == "old"
    files.write_atomic(file, b"new")
    assert file.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (
            done.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"),
            fsync(fd),
        ),
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    files.write_atomic(tmp_path / "x", "text")
    assert done == ["file", "rename", "folder"]


def test_seeds_depend_on_every_part_of_their_key():
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, ("a", 1)), (0, "a0"), (0,)]
    found = [derive_seed(*key) for key in keys]
    assert len(set(found)) == len(found) and all(0 <= s < 2**63 for s in found)
    assert found == [derive_seed(*key) for key in keys]


def test_fingerprints_follow_settings_seeds_inputs_and_kind(tmp_path):
    run = Run(parse(["@tiny", f"--run.root={tmp_path}"]).config)
    other = Run(parse(["@tiny", f"--run.root={tmp_path}", "--run.seed=1"]).config)

    names = map("x/y{}".format, itertools.count())

    def made(run, kind="sft/1", settings=None, inputs=(), key=("a",)):
        return run.stage(
            next(names), kind, settings or {"lr": 1}, inputs, lambda work: {}, key
        ).fingerprint

    first = made(run)
    stage = run.stage("x/z", "k/1", {}, [], lambda work: {})
    found = [
        first,
        made(run, "sft/2"),
        made(run, settings={"lr": 2}),
        made(run, inputs=[stage]),
        made(run, key=("b",)),
        made(other),
    ]
    assert len(set(found)) == len(found) and made(run) == first
    assert list(tmp_path.iterdir()) == []  # planning writes nothing


def test_compared_files_are_all_but_times(stub):
    """What `differences` leaves out of the comparison is no more than what has times in it."""
    assert set(FREE) == {"log.txt", "env.json", "report.html"}
    named = contents(stub)
    assert sum(value is None for value in named.values()) == 3
