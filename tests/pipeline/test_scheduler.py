"""Stages side by side: the order, the same bytes, and workers that fail or die."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import REPOSITORY, Ended, differences, fork, invoke, stages_of, train, write_stub

from minmacpo import UserError
from minmacpo.cli import side_by_side
from minmacpo.config.parse import parse
from minmacpo.pipeline import sample_stage, scheduler, score_stage
from minmacpo.pipeline.run_dir import IN_PROGRESS_DIR
from minmacpo.pipeline.scheduler import longest_chains, sources_within
from minmacpo.pipeline.stage import Stage
from minmacpo.pipeline.stage_maker import Declared
from minmacpo.runtime.device import physical_cores
from minmacpo.runtime.progress import RESUMES

ORIGIN = ("linked_from",)  # which of several equal stages a stage was taken from
TWO = "--run.workers=2"


# One teacher, one round, a few prompts: for tests that go on with a run that was stopped
SMALL = [
    "--macpo.teachers=1", "--macpo.rounds=1", "--macpo.controls=false", "--run.name=small",
    "--pretrain.batch=4", "--world.d1=2", "--world.d2=4", "--world.test=2", "--generate.batch=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A small run of one worker."""
    place = tmp_path_factory.mktemp("one")
    train(write_stub(place), f"--run.root={place}", *SMALL)
    return place / "small"


def declared(name: str, *inputs: str, fingerprint: str = "") -> Declared:
    """A stage that reads others, by their names."""
    sources = [Stage(source, Path(source), source) for source in inputs]
    return Declared(Stage(name, Path(name), fingerprint or name), {}, sources, None, None)


# --- The graph


def test_a_stage_waits_for_its_inputs_and_for_its_twin():
    stages = {
        "base": declared("base", "given"),  # a base of the user's is no stage of the run
        "a": declared("a", "base"),
        "b": declared("b", "base", "a"),
        "a_again": declared("a_again", "base", fingerprint="a"),
    }
    assert sources_within(stages) == {
        "base": set(),
        "a": {"base"},
        "b": {"base", "a"},
        "a_again": {"base", "a"},
    }


def test_the_longest_chain_is_that_of_all_stages_behind():
    sources = {"base": set(), "long": {"base"}, "short": {"base"}, "last": {"long", "short"}}
    costs = {"base": 1.0, "long": 10.0, "short": 2.0, "last": 5.0}
    assert longest_chains(sources, costs) == {"base": 16.0, "long": 15.0, "short": 7.0, "last": 5.0}
    assert longest_chains(sources, {}) == dict.fromkeys(sources, 0.0)


# --- The same bytes


def log_lines(run: Path) -> list[str]:
    """What log.txt says, without times, in an order of its own."""
    lines = []
    for line in (run / "log.txt").read_text().splitlines():
        words = line.split()[2:]  # without the date and the time
        is_taken = "taken" in words
        if "s" in words and not is_taken:
            seconds = words.index("s") - 1
            del words[seconds]
        lines.append(" ".join(words))
    return sorted(lines)


def test_two_workers_make_the_bytes_of_one(stub, tmp_path, monkeypatch):
    """And no stage was begun before its inputs were finished."""
    train(write_stub(tmp_path), TWO, f"--run.root={tmp_path}")
    run = tmp_path / "stub"
    assert differences(stub, run, ORIGIN) == []
    assert not (run / IN_PROGRESS_DIR).exists()
    assert log_lines(run) == log_lines(stub)

    stages = stages_of(run)
    for stage in stages.values():
        for name in stage["inputs"]:
            source = stages[name]
            assert source["started"] + source["seconds"] <= stage["started"] + 0.01

    # --- Again: nothing is computed, and nobody is forked
    monkeypatch.setattr(scheduler, "FORK", None)
    train(write_stub(tmp_path), TWO, f"--run.root={tmp_path}")
    assert differences(stub, run, ORIGIN) == []


NEW_PROCESSES = """
import sys
sys.path.insert(0, {repository!r})
import train
from minmacpo.pipeline import run
from minmacpo.runtime.progress import run_main

class Run(run.Run):
    def __init__(self, *args):
        super().__init__(*args)
        self.forks_workers = False

run.Run = Run
sys.exit(run_main(train.main))
"""


@pytest.mark.slow
def test_workers_that_are_new_processes_make_the_same_bytes(small, tmp_path):
    """As on GPUs, which a forked process cannot use."""
    program = tmp_path / "program.py"
    program.write_text(NEW_PROCESSES.format(repository=str(REPOSITORY)))
    words = [write_stub(tmp_path), TWO, f"--run.root={tmp_path}", *SMALL]
    subprocess.run([sys.executable, program, *words], check=True, capture_output=True)
    assert differences(small, tmp_path / "small", ORIGIN) == []
    assert not workers_of(os.getpid())


@pytest.mark.slow
def test_rounds_that_the_monitor_may_end_are_the_same(tmp_path):
    """The rounds after it are not computed ahead."""
    for workers in (1, 2):
        words = [f"--run.workers={workers}", f"--run.name={workers}", "--macpo.stop=rollback"]
        train(write_stub(tmp_path), *words, f"--run.root={tmp_path / str(workers)}")
    assert differences(tmp_path / "1/1", tmp_path / "2/2", ORIGIN) == []


# --- Errors


def test_the_sentence_of_a_failing_stage(small, tmp_path, monkeypatch):
    """It is that of one process; what was finished stays, and nothing else is begun."""

    def fail(*args, **settings):
        raise UserError("the tenth row is no row")

    words = [write_stub(tmp_path), f"--run.root={tmp_path}", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(sample_stage, "generate", fail)
        ended = invoke("train", *words, TWO)
    assert (ended.code, ended.err) == (2, "error: the tenth row is no row\n")
    assert "round0/teacher1_pos" in stages_of(tmp_path / "small")

    train(*words, TWO)
    assert differences(small, tmp_path / "small", ORIGIN) == []


def test_a_defect_shows_the_traceback_of_the_worker(tmp_path, monkeypatch):
    def fail(*args, **settings):
        raise KeyError("round9")

    monkeypatch.setattr(sample_stage, "generate", fail)
    says = r"(?s)round0/\w+ failed in a worker process.*KeyError: 'round9'"
    with pytest.raises(RuntimeError, match=says):
        invoke("train", write_stub(tmp_path), f"--run.root={tmp_path}", TWO)


def test_lack_of_memory_in_a_worker(tmp_path, monkeypatch):
    def fail(*args, **settings):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(score_stage, "score", fail)
    ended = invoke("train", write_stub(tmp_path), f"--run.root={tmp_path}", TWO)
    assert ended.code == 2
    assert f": out of memory; lower run.workers = 2; {RESUMES}" in ended.err


def workers_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_a_worker(words: list[str], seconds: float, rng: random.Random) -> Ended:
    """train.py, a worker of which is killed so long after it was there."""
    process = fork("train", *words)
    while not workers_of(process.pid) and process.poll() is None:
        time.sleep(0.002)
    time.sleep(seconds)
    if process.poll() is None and workers_of(process.pid):
        os.kill(rng.choice(workers_of(process.pid)), signal.SIGKILL)
    out, err = process.communicate()
    return Ended(process.returncode, out, err)


def test_a_worker_that_is_killed(small, tmp_path, seed):
    """One sentence with its stage; the next start goes on to the same bytes."""
    rng = random.Random(seed)
    words = [write_stub(tmp_path), TWO, f"--run.root={tmp_path}", *SMALL]
    ended = kill_a_worker(words, 0.5 * rng.random(), rng)
    if ended.code != 0:  # it did not come too late
        assert ended.code == 2
        assert ended.err.count("\n") == 1
        assert ended.err.startswith("error: ")
        assert f": the process that computed it was killed by SIGKILL; {RESUMES}" in ended.err
        assert ended.err.removeprefix("error: ").partition(": ")[0] in planned_names(words)
    train(*words)
    assert differences(small, tmp_path / "small", ORIGIN) == []


def planned_names(words: list[str]) -> set[str]:
    """The names of the stages that a dry run lists."""
    lines = invoke("train", *words, "--dry_run").out.splitlines()
    return {line.split()[1] for line in lines if line[:4].strip().isdecimal()}


def test_a_worker_that_the_system_kills_for_memory(tmp_path, monkeypatch):
    """The system counts such kills."""
    counts = iter(range(100))
    monkeypatch.setattr(scheduler, "memory_kills", lambda: next(counts))
    monkeypatch.setattr(
        sample_stage, "generate", lambda *args, **kw: os.kill(os.getpid(), signal.SIGKILL)
    )
    ended = invoke("train", write_stub(tmp_path), f"--run.root={tmp_path}", TWO)
    assert ended.code == 2
    assert "was killed by the system, which is short of memory; lower run.workers = 2" in ended.err


def test_a_signal_stops_all_workers(small, tmp_path):
    words = [write_stub(tmp_path), TWO, f"--run.root={tmp_path}", *SMALL]
    process = fork("train", *words)
    while not (tmp_path / "small/bases/weak1").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (128 + signal.SIGINT, f"\nstopped; {RESUMES}\n")
    train(*words)
    assert differences(small, tmp_path / "small", ORIGIN) == []


# --- How many


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--run.workers=0", "run.workers = 0 must be at least 1"),
        ("--run.workers=-1", "run.workers = -1 must be at least 1"),
        ("--run.workers=many", "expected auto | whole number"),
        ("--run.workers=1.5", "expected auto | whole number"),
    ],
)
def test_numbers_of_workers_that_make_no_sense(place, word, says):
    ended = invoke("train", word)
    assert ended.code == 2
    assert says in ended.err
    assert list(place.iterdir()) == []


def test_more_workers_than_memory_allows_are_lowered(tmp_path, monkeypatch):
    """And it is said so, on the terminal and in the log."""
    monkeypatch.setattr(side_by_side, "largest_need", lambda plan: 2 << 30)
    monkeypatch.setattr(side_by_side, "free_memory", lambda plan: 5 << 30)
    words = [write_stub(tmp_path), f"--run.root={tmp_path}", "--run.workers=7"]
    ended = train(*words, "--method=sft", "--macpo.controls=false", "--macpo.teachers=1")
    warning = (
        "WARNING: run.workers = 7 is lowered to 2: 5.00 GB of memory are free, and one of them may "
        "need 2.00 GB"
    )
    assert warning in ended.out.splitlines()


def test_auto_is_a_worker_for_each_core():
    assert parse(["@tiny"]).config.run.workers == "auto"
    assert 1 <= physical_cores() <= os.cpu_count()
