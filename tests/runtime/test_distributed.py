"""Several ranks against one: gradients, training, scores, samples, whole runs, and how they end."""

import contextlib
import gc
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import ranks
import torch
from runs import (
    METHODS,
    REPOSITORY,
    Fork,
    begin_run,
    copy_run,
    differences,
    fork,
    invoke,
    program,
    rows_of,
    spawn,
    stages_of,
    train,
    write_stub,
)
from safetensors.torch import load_file

from minmacpo.cli.plan import Plan
from minmacpo.config.parse import parse
from minmacpo.pipeline import model_pool
from minmacpo.pipeline.artifacts import BaseModel
from minmacpo.pipeline.run import Run
from minmacpo.pipeline.stage import Stage
from minmacpo.runtime.distributed import Distributed
from minmacpo.runtime.progress import run_main
from train import run_all

CASES = ["1-pairs-replicate", "2-pairs-replicate", "2-pairs-shard", "a-2-1", "complaint-2"]
MORE = [
    "1-sft-replicate",
    "1-pairs-replicate",
    "2-sft-replicate",
    "2-sft-shard",
    "4-sft-replicate",
    "4-pairs-shard",
    "a-4-1",
    "b-4-2",
    "c-2-4",
    "complaint-4",
]


def launch(world_size: int, *words) -> Fork:
    """train.py on so many ranks."""

    def work() -> int:
        sys.argv = ["train.py", *map(str, words)]
        return ranks.launch(world_size, lambda: run_main(program("train")))

    return Fork(work)


def ranks_of(process: Fork) -> list[int]:
    """The process ids of the ranks, which their launcher prints first."""
    line = None
    while line is None:
        assert process.poll() is None, process.printed(1)
        time.sleep(0.01)
        line = re.match(r"ranks(.*)\n", process.printed(0))
    return [int(number) for number in line[1].split()]


def finish(process: subprocess.Popen | Fork) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a process that must end within two minutes."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for(path: Path, process: subprocess.Popen | Fork, seconds: float = 60) -> None:
    """Until a path is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"{path} never came"
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)


def toys(folder: Path, seed: int, cases: list[str]) -> dict[str, list]:
    """{case: what each rank has found} of small models, see ranks.all_toys."""
    code, _, err = finish(Fork(lambda: ranks.all_toys(str(folder), seed, cases)))
    assert code == 0, err
    complaints = sum("complaint" in case for case in cases)
    assert err.count("error:") == complaints, err
    assert err.count("error: row 7 is too long") == complaints, err
    results: dict[str, list] = {}
    for file in sorted(folder.glob("*.pt")):
        case, _, _ = file.stem.rpartition("-")
        results.setdefault(case, []).append(torch.load(file))
    return results


def check_toys(results: dict[str, list]) -> None:
    """Every case equals one rank."""
    for case, of_ranks in results.items():
        if case.startswith("stopped"):
            assert len(set(of_ranks)) == 1, "all ranks stop after the same step"
            assert of_ranks[0] in (ranks.LAST_STEP, ranks.LAST_STEP + 1)
        elif case.startswith("train_adapter"):
            one = results["1-pairs-replicate"][0]["adapter"]
            for adapter in of_ranks:
                assert (adapter - one).abs().max() <= 1e-5
        elif case[0].isdecimal():
            world_size, kind, mode = case.split("-")
            assert len(of_ranks) == int(world_size)
            (one,) = results[f"1-{kind}-replicate"]
            if world_size != "1":
                for result in of_ranks:
                    check_equals_one(result, one, is_sharded=mode == "shard")
                    assert torch.equal(result["adapter"], of_ranks[0]["adapter"])


def check_equals_one(result: dict, one: dict, is_sharded: bool) -> None:
    """What a rank has found is what one rank alone finds."""
    assert one["grads"].norm() > 0
    assert (result["grads"] - one["grads"]).norm() <= 1e-6 * one["grads"].norm()
    assert (result["adapter"] - one["adapter"]).abs().max() <= 1e-5
    assert result["values"] == pytest.approx(one["values"], rel=1e-5, abs=1e-6)
    assert result["logps"] == pytest.approx(one["logps"], rel=1e-5)
    assert result["samples"] == one["samples"]
    assert len({len(sample) for sample in one["samples"]}) > 2
    if is_sharded:
        assert result["held"] < 0.8 * one["held"]
    else:
        assert result["held"] == one["held"]


def test_ranks_equal_one(tmp_path, seed):
    """Gradients of a step, a training, scores and samples, and one complaint.

    The training is stopped together, and gone on with by another number of ranks.
    """
    check_toys(toys(tmp_path, seed, CASES))


@pytest.mark.slow
def test_two_and_four_ranks_replicated_and_sharded_equal_one(tmp_path, seed):
    check_toys(toys(tmp_path, seed, MORE))


def as_rank(rank: int, world_size: int, is_sharded: bool) -> Distributed:
    """A rank that is asked what it would do, with nobody beside it."""
    dist = Distributed(rank=rank, world_size=world_size)
    dist.is_sharded = is_sharded
    return dist


def random_batches(seed: int) -> list[list[int]]:
    """Up to 11 micro-batches of up to 11 examples, numbered through."""
    rng = random.Random(seed)
    batches = []
    first = 0
    for _ in range(rng.randrange(1, 12)):
        size = rng.randrange(1, 12)
        batches.append(list(range(first, first + size)))
        first += size
    return batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_step_is_divided_evenly(world_size, is_sharded, seed):
    """Every example once; ranks differ by the parts of what cannot be dealt out whole."""
    batches = random_batches(seed)
    of_ranks = []
    for rank in range(world_size):
        of_ranks.append(as_rank(rank, world_size, is_sharded).split_batches(batches))

    trained = []
    for local_batches in of_ranks:
        for batch in local_batches:
            trained += batch
        for batch in local_batches[: len(batches) // world_size]:
            assert batch in batches
    assert sorted(trained) == list(range(sum(map(len, batches))))

    passes = [len(local_batches) for local_batches in of_ranks]
    if is_sharded:
        assert len(set(passes)) == 1, "all ranks make equally many passes"
    else:
        assert max(passes) == passes[0]
        for local_batches in of_ranks:
            assert [] not in local_batches
    if world_size == 1:
        assert of_ranks == [batches]


def test_without_torchrun_nothing_is_distributed():
    """One process does all by itself, and an ordinary start does not even look for others."""
    code = """
import sys, torch
before = {name for name in sys.modules if "distributed" in name}
import train, minmacpo.evaluation.report
from minmacpo.runtime.distributed import meet
dist = meet()
assert dist.world_size == 1
assert dist.run_on_main(dict) == {}
assert dist.all_reduce_max(7) == 7
assert list(dist.parallel_map([1, 2], str)) == ["1", "2"]
new = {name for name in sys.modules if "distributed" in name} - before
assert new <= {"minmacpo.runtime.distributed"}, new
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


def test_a_base_that_leaves_the_pool_is_gone_before_the_next_one_comes(monkeypatch):
    """Also one that refers to itself, as a sharded model does."""
    loaded = []

    class SelfReferring:
        def __init__(self, *args, **kwargs):
            for reference in loaded:
                assert reference() is None, "the last one is still there"
            self.itself = self
            self.model = None
            loaded.append(weakref.ref(self))

    monkeypatch.setattr(model_pool, "LoadedModel", SelfReferring)
    monkeypatch.setattr(model_pool, "free_bytes", lambda device: 0)
    monkeypatch.setattr(model_pool, "weight_bytes", lambda *args: 1)
    monkeypatch.setattr(model_pool, "read_config", lambda folder: None)
    monkeypatch.setattr(model_pool, "disable_adapter", lambda model: None)
    pool = model_pool.ModelPool(parse(["@tiny"]).config)
    gc.disable()
    try:
        for name in ("strong", "weak1", "weak2"):
            stage = Stage(name, Path(name), fingerprint=name, external=True)
            pool.get(BaseModel(name, stage), adapter=None)
    finally:
        gc.enable()
    assert len(loaded) == 3
    assert len(pool.models) == 1


def test_a_rank_of_a_sharded_base_is_planned_for_its_part(tmp_path):
    words = ["@tiny", f"--run.root={tmp_path}", "--model.strong=64x12x4x128"]

    def plan_of(dist: Distributed) -> Plan:
        run = Run(parse(words).config, dist=dist)
        run_all(run, {}, None)
        return Plan(run, prepared=None)

    alone = plan_of(Distributed())
    sharded = plan_of(as_rank(0, 4, is_sharded=True))
    base = "bases/strong"
    assert sharded.memory(base).total == alone.memory(base).total, "bases are made by one rank"
    student = "round0/student_pos"
    assert sharded.memory(student).weights == alone.memory(student).weights // 4


# ---- whole runs -----------------------------------------------------------------------------


def check_same(run: Path, one: Path) -> None:
    """The run has the stages of the other, with the same texts.

    Adapters differ by rounding at most.
    """
    stages = stages_of(run)
    stages_of_one = stages_of(one)
    assert stages.keys() == stages_of_one.keys()
    for name, notes in stages.items():
        assert notes["fingerprint"] == stages_of_one[name]["fingerprint"]
        assert notes["files"].keys() == stages_of_one[name]["files"].keys()
        for file in notes["files"]:
            check_same_file(run / name / file, one / name / file, notes["kind"])


def check_same_file(file: Path, of_one: Path, kind: str) -> None:
    """The file of a stage of this kind is as one process makes it, but for rounding."""
    if file.name == "adapter_model.safetensors":
        adapter = load_file(file)
        for name, tensor in load_file(of_one).items():
            assert (adapter[name] - tensor).abs().max() <= 1e-4, f"{file}, {name}"
    elif file.name == "samples.jsonl":
        assert column_of(file, "tokens") == column_of(of_one, "tokens"), file
    elif kind.startswith("score/"):
        assert column_of(file, "logp") == pytest.approx(column_of(of_one, "logp"), rel=1e-3)
    elif file.name not in ("metrics.jsonl", "pairs.jsonl"):
        assert file.read_bytes() == of_one.read_bytes(), file


def column_of(file: Path, name: str) -> list:
    """One column of a .jsonl file."""
    return [row[name] for row in rows_of(file)]


def lines_of_ours(err: str) -> list[str]:
    """What stderr has that is not torchrun's or gloo's: no rank shows a traceback."""
    assert "Traceback" not in err, err
    return [line for line in err.splitlines() if line.startswith(("error:", "stopped;"))]


def test_a_run_is_stopped_by_a_signal_then_by_a_kill_and_goes_on_with_any_number(tmp_path, stub):
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    run = begin_run(stub, tmp_path / "runs")

    # A signal to the launcher of two ranks
    process = launch(2, *words)
    wait_for(run / "round0/teacher1_pos", process)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code != 0
    assert len(lines_of_ours(err)) == 1, err
    assert "stopped; all finished work is saved" in err
    numbers = {notes["ranks"] for notes in stages_of(run).values() if "ranks" in notes}
    assert numbers == {2}

    # kill -9 to one of two ranks
    process = launch(2, *words)
    last_rank = ranks_of(process)[-1]
    wait_for(run / "round0/student_pos", process)
    os.kill(last_rank, signal.SIGKILL)
    code, _, err = finish(process)
    assert code != 0
    assert len(lines_of_ours(err)) == 1, err

    # One process goes on
    train(*words)
    check_same(run, stub)
    assert not (run / ".partial").exists()
    assert len(rows_of(run / "metrics.jsonl")) == len(rows_of(stub / "metrics.jsonl"))


# ---- several processes, each at a stage of its own ----------------------------------------------


def test_two_processes_compute_two_stages_of_one_run_at_once_and_never_the_same(tmp_path, stub):
    """A run of all stages keeps out of their way, and they out of its."""
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    run = begin_run(stub, tmp_path / "runs")
    one_stage = "round0/teacher1_pos"
    other_stage = "round0/teacher2_pos"
    first = fork("train", *words, f"--stage={one_stage}")
    try:
        wait_for(run / ".partial" / stages_of(stub)[one_stage]["fingerprint"], first)
        first.send_signal(signal.SIGSTOP)
        train(*words, f"--stage={other_stage}")
        assert one_stage not in stages_of(run)

        same_stage = invoke("train", *words, f"--stage={one_stage}")
        assert same_stage.code == 2
        assert "another process computes this stage" in same_stage.err
        assert same_stage.err.count("\n") == 1
        all_stages = invoke("train", *words)
        assert all_stages.code == 2
        assert "another process works on this run" in all_stages.err
        assert all_stages.err.count("\n") == 1

        first.send_signal(signal.SIGCONT)
        code, _, err = finish(first)
        assert code == 0, err
    finally:
        first.kill()
    both = {one_stage, other_stage}
    assert stages_of(run).keys() >= both
    assert set(column_of(run / "metrics.jsonl", "stage")) >= both

    train(*words)
    assert set(differences(run, stub)) <= {"metrics.jsonl"}
    assert not (run / ".partial").exists()
    # Rows of metrics are in the order in which they came, each once
    assert sorted(losses_of(run)) == sorted(losses_of(stub))


def losses_of(run: Path) -> list[tuple]:
    """(stage, step, loss) of every row of the run's metrics."""
    return [(row["stage"], row["step"], row["loss"]) for row in rows_of(run / "metrics.jsonl")]


@pytest.mark.slow
def test_a_stage_that_was_killed_leaves_no_lock(tmp_path, stub):
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", "--stage=round0/teacher1_pos"]
    run = begin_run(stub, tmp_path / "runs")
    first = spawn("train", *words)
    wait_for(run / ".partial" / stages_of(stub)["round0/teacher1_pos"]["fingerprint"], first)
    first.kill()
    first.communicate()
    train(*words)
    assert "round0/teacher1_pos" in stages_of(run)


@pytest.mark.slow
def test_many_processes_at_once(tmp_path, stub):
    """Each at its own stage, all writing log, metrics and report of one run."""
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    run = begin_run(stub, tmp_path / "runs")
    trainings = ["round0/teacher1_pos", "round0/teacher2_pos", "controls/ceiling"]
    after_them = [
        "round0/teacher1_neg",
        "round0/teacher2_neg",
        "round1/positives_teacher1",
        "round1/positives_teacher2",
    ]
    for names in (trainings, after_them):
        processes = [spawn("train", *words, f"--stage={name}") for name in names]
        for process in processes:
            code, _, err = finish(process)
            assert code == 0, err
        assert stages_of(run).keys() >= set(names)
    train(*words)
    # Of two equal stages another one may have been computed first
    assert set(differences(run, stub, ("linked_from",))) <= {"metrics.jsonl"}


# ---- torchrun itself, and all methods (slow) ----------------------------------------------------


def torchrun(world_size: int, *words) -> subprocess.Popen:
    """train.py as a user starts it on several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world_size}", str(REPOSITORY / "train.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, words)], **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("sft/", "prefer/"), ("sample/", "score/", "pairs/")])
def test_torchrun_computes_stages_of_tiny_as_one_process_does(tmp_path, tiny, kinds):
    """From what one process has made: adapters but for rounding, all else to the last bit.

    A whole run is not compared. Rounding of an adapter moves the probabilities of tokens by about
    1e-6, and among the 20,000 tokens of this run a draw can fall between the two borders.
    """
    run = copy_run(tiny, tmp_path)
    removed = []
    for name, notes in stages_of(run).items():
        if notes["kind"].startswith(kinds):
            shutil.rmtree(run / name)
            removed.append(name)

    code, _, err = finish(torchrun(2, "@tiny", f"--run.root={tmp_path}"))

    assert code == 0, err
    assert stages_of(run).keys() == stages_of(tiny).keys()
    for name in removed:
        for file in sorted((tiny / name).iterdir()):
            if file.name == "adapter_model.safetensors":
                check_same_file(run / name / file.name, file, kinds[0])
            elif file.suffix == ".jsonl" and file.name != "metrics.jsonl":
                assert (run / name / file.name).read_bytes() == file.read_bytes(), file


@pytest.mark.slow
def test_torchrun_says_an_error_once_and_can_be_stopped(tmp_path, stub):
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    run = tmp_path / "runs/stub"
    code, _, err = finish(torchrun(2, *words, "--data.path=nowhere.jsonl"))
    assert code == 1
    assert err.count("nowhere.jsonl does not exist") == 1

    code, _, err = finish(torchrun(2, "@experiment-main"))
    assert code == 1
    assert "without torchrun" in err

    process = torchrun(2, *words)
    wait_for(run / "round0/teacher1_pos", process)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 1
    assert err.count("stopped; all finished work is saved") == 1
    train(*words)
    check_same(run, stub)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("shard", ["true", "false"])
def test_stub_runs_on_ranks_equal_one(tmp_path, stub, world, shard):
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", f"--parallel.shard={shard}"]
    code, _, err = finish(launch(world, *words))
    assert code == 0, err
    check_same(tmp_path / "runs/stub", stub)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_two_ranks(tmp_path, methods, method):
    shard = "true" if method in ("rlaif", "self-rewarding") else "false"
    words = [
        write_stub(tmp_path),
        f"--run.root={tmp_path / 'runs'}",
        f"--method={method}",
        f"--parallel.shard={shard}",
    ]
    code, _, err = finish(launch(2, *words))
    assert code == 0, err
    check_same(tmp_path / f"runs/stub-method={method}", methods[method])


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(8))
def test_killed_and_stopped_at_any_moment(tmp_path, stub, seed, draw):
    """One message, no traceback, no rank left; the next start ends with what one process makes."""
    rng = random.Random(seed)
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    run = tmp_path / "runs/stub"
    process = launch(2, *words)
    pids = ranks_of(process)
    wait_for(run / "config.toml", process)
    time.sleep(rng.uniform(0, 1.5))
    with contextlib.suppress(ProcessLookupError):
        if rng.random() < 0.5:
            os.kill(rng.choice(pids), signal.SIGKILL)
        else:
            process.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT]))
    code, _, err = finish(process)
    messages = lines_of_ours(err)
    if code == 0:
        assert messages == []
    else:
        assert len(messages) == 1, err
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()
    code, _, err = finish(launch(rng.choice([1, 2, 4]), *words))
    assert code == 0, err
    check_same(run, stub)
