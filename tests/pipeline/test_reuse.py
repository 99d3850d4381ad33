"""What is run is what is written: edits of the code, new settings, runs of older versions."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY, copy_run, differences, invoke, stages_of, train, write_stub

import minmacpo
from minmacpo.pipeline import (
    base_models,
    code_digest,
    preference_stage,
    prepare_data,
    sample_stage,
    score_stage,
    train_stage,
)
from minmacpo.pipeline.run_dir import SET_ASIDE_DIR
from minmacpo.pipeline.stage_maker import write_notes

CACHED = [
    value for value in vars(code_digest).values() if isinstance(value, functools._lru_cache_wrapper)
]


class Package:
    """A copy of the package's sources that digests are taken of in place of the real ones."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(
            Path(minmacpo.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__")
        )

    def plant(self, module: str) -> None:
        """Add a statement to the module."""
        file = self.folder / module
        file.write_text(file.read_text() + "SIGN = -1\n")
        forget()

    def edit(self, module: str, old: str, new: str) -> None:
        """Replace a text that stands in the module once or more."""
        file = self.folder / module
        text = file.read_text()
        assert old in text, f"{module} has no {old!r} to plant an edit at"
        file.write_text(text.replace(old, new, 1))
        forget()


def forget() -> None:
    """Let sources be read again."""
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def package(tmp_path, monkeypatch):
    copy = Package(tmp_path / "minmacpo")
    monkeypatch.setattr(code_digest, "PACKAGE", copy.folder)
    forget()
    yield copy
    forget()


@pytest.fixture
def finished(stub, tmp_path):
    """A copy of the finished run, with the words that go on with it."""
    run = copy_run(stub, tmp_path / "runs")
    return run, [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]


def plan_of(*words: str) -> tuple[set[str], str]:
    """The stages that a dry run would compute, and what it says after their list."""
    lines = train(*words, "--dry_run").out.partition(" stages in ")[2].splitlines()[1:]
    rows = [line for line in lines if line[:4].strip().isdecimal()]
    rest = [line for line in lines if line not in rows]
    unfinished = {row.split()[1] for row in rows if not row.endswith("finished")}
    return unfinished, "\n".join(rest)


# --- The digest of a stage's code


def digest(package: Package, text: str) -> str:
    """The digest of a module with this text."""
    (package.folder / "core/new.py").write_text(text)
    forget()
    return code_digest.module_digest("core/new.py")


def test_comments_docstrings_and_formatting_do_not_count(package):
    plain = digest(package, "def add(a, b):\n    return a + b\n")

    assert (
        digest(
            package,
            '"""What."""\n\ndef add(a,  b):\n    """Sum."""\n    # so\n    return (a + b)\n',
        )
        == plain
    )
    assert digest(package, "def add(a, b):\n    return a - b\n") != plain
    assert digest(package, "def add(a, b=1):\n    return a + b\n") != plain


def test_a_text_that_is_no_docstring_counts(package):
    assert digest(package, "x = 'a'\n") != digest(package, "x = 'b'\n")


def test_imports_count_wherever_they_stand_but_those_for_type_checkers(package):
    text = (
        "from typing import TYPE_CHECKING\n"
        "from minmacpo.core import losses\n"
        "from minmacpo.config.schema import Config\n"
        "if TYPE_CHECKING:\n    from minmacpo.core.trainer import train\n"
        "def later():\n    from minmacpo.data.text_metrics import distinct2\n"
    )
    digest(package, text)

    reached = code_digest.reached_modules("core/new.py")

    assert {"core/new.py", "core/losses.py", "data/text_metrics.py"} <= reached
    assert "core/trainer.py" not in reached and "config/schema.py" not in reached


@pytest.mark.parametrize(
    ("compute", "reaches", "not_reached"),
    [
        (preference_stage.train_dpo, ["core/losses.py", "core/trainer.py", "core/model.py"], []),
        (train_stage.train_sft, ["core/sft_loss.py", "core/trainer.py"], ["core/losses.py"]),
        (base_models.pretrain, ["core/sft_loss.py", "core/trainer.py"], ["core/losses.py"]),
        (sample_stage.sample, ["core/sampling.py"], ["core/losses.py", "core/trainer.py"]),
        (score_stage.score_texts, ["core/scoring.py"], ["core/losses.py", "core/sampling.py"]),
        (prepare_data.prepare, ["data/synthetic.py", "data/formats.py"], ["core/model.py"]),
    ],
)  # fmt: skip
def test_a_stage_depends_on_the_code_that_can_change_it(compute, reaches, not_reached):
    modules = code_digest.code_digests(compute)

    assert set(reaches) <= modules.keys()
    assert not set(not_reached) & modules.keys()
    assert not [name for name in modules if name.startswith(("evaluation/", "cli/", "config/"))]
    assert "pipeline/run.py" not in modules and "runtime/progress.py" not in modules


def test_a_function_that_a_stage_was_given_counts(package):
    def given():
        """Stands for a question that another module asks."""

    given.__module__ = "minmacpo.evaluation.report"

    def compute(context):
        return given()

    assert "evaluation/report.py" in code_digest.code_digests(compute)


# --- Planted edits, before a finished run


def test_an_edited_loss_redoes_the_trainings_on_pairs_and_what_follows(package, finished):
    run, words = finished
    package.plant("core/losses.py")

    unfinished, said = plan_of(*words)

    kinds = {name: notes["kind"].partition("/")[0] for name, notes in stages_of(run).items()}
    assert {name for name, kind in kinds.items() if kind == "prefer"} <= unfinished
    assert "round2/positives_student" in unfinished, "it follows from such a training"
    assert not {name for name, kind in kinds.items() if kind == "pretrain"} & unfinished
    assert not {name for name in unfinished if name.startswith("round0/")}
    numbers = f"{len(unfinished)} of {len(stages_of(run))} stages"
    changed = "core/losses.py has changed since they were made"
    assert f"{numbers} are computed anew: {changed}" in said


def test_an_edited_sampler_leaves_the_first_trainings(package, finished):
    _, words = finished
    package.plant("core/sampling.py")

    unfinished, said = plan_of(*words)

    assert "round0/teacher1_neg" not in unfinished and "round0/negatives_teacher1" in unfinished
    assert "round0/student_pos" in unfinished, "it learns from sampled answers"
    assert "core/sampling.py has changed" in said


@pytest.mark.parametrize(
    "module", ["evaluation/report.py", "evaluation/table.py", "cli/dry_run.py", "pipeline/run.py"]
)
def test_an_edit_of_what_cannot_change_a_stage_redoes_nothing(package, finished, module):
    _, words = finished
    package.plant(module)

    unfinished, said = plan_of(*words)

    assert not unfinished and "anew" not in said


@pytest.mark.parametrize(
    ("old", "new"), [("\ndef ", "\n# a comment\ndef "), ('"""', '"""Another word. ')]
)
def test_an_edited_comment_redoes_nothing(package, finished, old, new):
    _, words = finished
    package.edit("core/losses.py", old, new)

    unfinished, said = plan_of(*words)

    assert not unfinished and "anew" not in said


def test_stages_of_other_code_are_not_linked_from_other_runs(package, finished):
    _, words = finished
    words += ["--run.name=other", "--stage=data/slices"]
    package.plant("data/synthetic.py")

    out = train(*words).out

    assert "taken from" not in out and "data/synthetic.py has changed since they were made" in out


def test_what_no_longer_fits_is_set_aside_and_taken_back(package, finished, stub):
    """A run that is stopped after a change has lost nothing when the change is undone."""
    run, words = finished
    package.plant("pipeline/train_stage.py")
    train(*words, "--stage=round0/teacher1_pos")
    assert len(list((run / SET_ASIDE_DIR).iterdir())) == 1
    package.edit("pipeline/train_stage.py", "SIGN = -1\n", "")

    out = train(*words).out

    assert f"taken from stub/{SET_ASIDE_DIR}" in out and not (run / SET_ASIDE_DIR).exists()
    assert differences(run, stub, ("linked_from",)) == []


# --- run.reuse


def test_reuse_all_takes_everything_and_says_so(package, finished):
    run, words = finished
    package.plant("core/losses.py")
    before = {name: notes["fingerprint"] for name, notes in stages_of(run).items()}

    out = train(*words, "--run.reuse=all").out

    assert "are taken although core/losses.py has changed since they were made" in out
    assert "the results are those of the earlier code" in out
    after = stages_of(run)
    assert {name: notes["fingerprint"] for name, notes in after.items()} == before
    assert after["round1/student_pos"]["reused_despite"] == "core/losses.py has changed"
    assert "reused_despite" not in after["data/slices"]


def test_what_was_built_on_stale_stages_is_not_taken_later(package, finished):
    run, words = finished
    package.plant("core/losses.py")
    shutil.rmtree(run / "round2/student_pos")
    train(*words, "--run.reuse=all", "--stage=round2/student_pos")

    unfinished, _ = plan_of(*words)

    assert {"round1/student_pos", "round2/student_pos"} <= unfinished
    unfinished, _ = plan_of(*words, "--run.reuse=all")
    assert not {"round1/student_pos", "round2/student_pos"} & unfinished


def test_reuse_all_goes_beside_another_run(package, finished):
    run, words = finished
    package.plant("core/losses.py")

    out = train(*words, "--run.reuse=all", "--macpo.rounds=1").out

    other = stages_of(run.parent / "stub-rounds=1")
    assert "WARNING" in out and "core/losses.py" in other["round1/student_pos"]["reused_despite"]
    assert other["round1/student_pos"]["code"] == stages_of(run)["round1/student_pos"]["code"]


def test_reuse_with_a_wrong_value_is_one_sentence():
    ended = invoke("train", "@tiny", "--run.reuse=none")

    assert ended.code == 2 and len(ended.err.splitlines()) == 1
    assert "run.reuse" in ended.err and "code | all" in ended.err


# --- New settings, other files, older versions


def rewrite_notes(run: Path, change) -> None:
    """Change what all stage.json of a run say."""
    for file in run.glob("*/*/stage.json"):
        notes = json.loads(file.read_text())
        change(notes)
        file.unlink()  # it may be a link to another run's
        write_notes(file.parent, notes)


def test_a_setting_that_is_new_is_told_once_and_the_run_goes_on(finished, stub):
    run, words = finished

    def before_the_setting(notes):
        if notes["kind"].startswith("prefer"):
            del notes["settings"]["label_smoothing"]
            notes["fingerprint"] = notes["fingerprint"][::-1]

    rewrite_notes(run, before_the_setting)

    unfinished, said = plan_of(*words)
    assert "round1/student_pos" in unfinished and "round0/student_pos" not in unfinished
    assert said.count("stages are computed anew") == 1
    assert "the setting label_smoothing has been added (0.0) since they were made" in said

    assert "round1/student_pos" not in plan_of(*words, "--run.reuse=all")[0]
    train(*words)
    assert differences(run, stub, ("linked_from",)) == []


def test_a_run_of_an_older_version_is_told_as_such(finished):
    run, words = finished
    config = run / "config.toml"
    config.write_text(config.read_text().replace("max_new_tokens", "max_new"))

    ended = invoke("train", *words)

    assert ended.code == 2 and len(ended.err.splitlines()) == 1
    assert f"{run}: holds a run of another version of minmacpo" in ended.err
    assert "choose another --run.name, or delete that folder" in ended.err


def test_stages_that_do_not_say_what_code_made_them_are_computed_anew(finished, stub):
    run, words = finished

    def before_the_digests(notes):
        del notes["code"]
        notes["fingerprint"] = notes["fingerprint"][::-1]

    rewrite_notes(run, before_the_digests)

    unfinished, said = plan_of(*words)
    assert unfinished == stages_of(run).keys()
    assert "did not record the code that made them" in said
    assert plan_of(*words, "--run.reuse=all")[0] == unfinished, "they cannot be trusted either"


# --- The real thing


@pytest.mark.slow
def test_a_flipped_sign_of_the_margin_is_run(tmp_path):
    """The package is copied, edited and run by programs of their own."""
    for name in ("minmacpo", "train.py"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    write_stub(tmp_path)
    command = [sys.executable, "train.py", "@stub.toml", "--run.root=runs", "--run.name=r"]

    def run() -> tuple[str, bytes]:
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        adapter = tmp_path / "runs/r/round1/student_pos/adapter_model.safetensors"
        return ended.stdout, adapter.read_bytes()

    _, good = run()
    losses = tmp_path / "minmacpo/core/losses.py"
    text = losses.read_text()
    right = "margin = logps.chosen_log_ratio - logps.rejected_log_ratio"
    wrong = "margin = logps.rejected_log_ratio - logps.chosen_log_ratio"
    assert right in text
    losses.write_text(text.replace(right, wrong))
    said, flipped = run()
    assert "stages are computed anew: core/losses.py has changed since they were made" in said
    assert flipped != good
    losses.write_text(text)
    said, again = run()
    assert "core/losses.py has changed" in said and again == good
