"""Several ranks against one: gradients, training, scores, samples, whole runs, and how they end."""

import contextlib
import gc
import os
import random
import re
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
    while not (line := re.match(r"ranks(.*)\n", process.printed(0))):
        assert process.poll() is None, process.printed(1)
        time.sleep(0.01)
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
        assert process.poll() is None and time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)


def toys(folder: Path, seed: int, cases: list[str]) -> dict:
    """{case: what each rank has found} of small models, see ranks.all_toys."""
    code, _, err = finish(Fork(lambda: ranks.all_toys(str(folder), seed, cases)))
    assert code == 0, err
    assert (
        err.count("error:")
        == sum("complaint" in case for case in cases)
        == err.count("error: row 7 is too long")
    ), err
    found: dict = {}
    for file in sorted(folder.glob("*.pt")):
        case, _, _ = file.stem.rpartition("-")
        found.setdefault(case, []).append(torch.load(file))
    return found


def check_toys(found: dict) -> None:
    """Every case equals one rank."""
    for case, results in found.items():
        world, kind, mode = case.split("-") if case[0].isdecimal() else (None, None, None)
        if case.startswith("stopped"):
            assert len({*results}) == 1 and results[0] in (ranks.LAST_STEP, ranks.LAST_STEP + 1), (
                "all ranks stop after the same step"
            )
        if case.startswith("train_adapter"):
            assert all(
                (each - found["1-pairs-replicate"][0]["adapter"]).abs().max() <= 1e-5
                for each in results
            )
        if world in (None, "1"):
            continue
        one = found[f"1-{kind}-replicate"][0]
        assert len(results) == int(world)
        for each in results:
            assert (each["grads"] - one["grads"]).norm() <= 1e-6 * one["grads"].norm() and one[
                "grads"
            ].norm() > 0
            assert (
                torch.equal(each["adapter"], results[0]["adapter"])
                and (each["adapter"] - one["adapter"]).abs().max() <= 1e-5
            )
            assert each["values"] == pytest.approx(one["values"], rel=1e-5, abs=1e-6)
            assert each["logps"] == pytest.approx(one["logps"], rel=1e-5)
            assert each["samples"] == one["samples"] and len({*map(len, one["samples"])}) > 2
            assert (
                each["held"] == one["held"]
                if mode == "replicate"
                else each["held"] < 0.8 * one["held"]
            )


def test_ranks_equal_one(tmp_path, seed):
    """Gradients of a step, a training, scores and samples; stopped together, and gone on with by
    another number; one complaint.
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
    ranks = [as_rank(rank, world_size, is_sharded) for rank in range(world_size)]

    local = [dist.split_batches(batches) for dist in ranks]

    trained = sorted(number for of_rank in local for batch in of_rank for number in batch)
    assert trained == sorted(number for batch in batches for number in batch)
    for of_rank in local:
        assert all(batch in batches for batch in of_rank[: len(batches) // world_size])
    passes = [len(of_rank) for of_rank in local]
    if is_sharded:
        assert len(set(passes)) == 1, "all ranks make equally many passes"
    else:
        assert max(passes) == passes[0] and all(batch for of_rank in local for batch in of_rank)
    if world_size == 1:
        assert local[0] == batches


def test_without_torchrun_nothing_is_distributed():
    """One process does all by itself, and an ordinary start does not even look for others."""
    code = """
import sys, torch
before = {name for name in sys.modules if "distributed" in name}
import train, minmacpo.evaluation.report
from minmacpo.runtime.distributed import meet
dist = meet()
assert dist.world_size == 1
assert dist.run_on_main(dict) == {} and dist.all_reduce_max(7) == 7
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
            assert all(reference() is None for reference in loaded), "the last one is still there"
            self.itself = self
            self.model = None
            loaded.append(weakref.ref(self))

    replacements = {
        "LoadedModel": SelfReferring,
        "free_bytes": lambda device: 0,
        "weight_bytes": lambda *args: 1,
        "read_config": lambda folder: None,
        "disable_adapter": lambda model: None,
    }
    for name, value in replacements.items():
        monkeypatch.setattr(model_pool, name, value)
    pool = model_pool.ModelPool(parse(["@tiny"]).config)
    gc.disable()
    try:
        for name in ("a", "b", "c"):
            stage = Stage(name, Path(name), fingerprint=name, external=True)
            pool.get(BaseModel(name, stage), adapter=None)
    finally:
        gc.enable()
    assert len(loaded) == 3 and len(pool.models) == 1


def test_a_rank_of_a_sharded_base_is_planned_for_its_part(tmp_path):
    totals, weights = [], []
    for dist in (Distributed(), as_rank(0, 4, True)):
        words = ["@tiny", f"--run.root={tmp_path}", "--model.strong=64x12x4x128"]
        run = Run(parse(words).config, dist=dist)
        __import__("train").run_all(run, {}, None)
        plan = Plan(run, prepared=None)
        totals.append(plan.memory("bases/strong").total)
        weights.append(plan.memory("round0/student_pos").weights)
    assert totals[0] == totals[1], "bases are made by one rank"
    assert weights[0] // 4 == weights[1]


# ---- whole runs -----------------------------------------------------------------------------


def check_same(run: Path, one: Path) -> None:
    """The run has the stages of the other, with the same texts, and adapters that differ by
    rounding at most.
    """
    mine, theirs = stages_of(run), stages_of(one)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert (
            mine[name]["fingerprint"] == theirs[name]["fingerprint"]
            and mine[name]["files"].keys() == theirs[name]["files"].keys()
        )
        for file in mine[name]["files"]:
            a, b = run / name / file, one / name / file
            if file == "adapter_model.safetensors":
                a, b = load_file(a), load_file(b)
                assert all((a[key] - b[key]).abs().max() <= 1e-4 for key in b), name
            elif file == "samples.jsonl":
                assert [row["tokens"] for row in rows_of(a)] == [
                    row["tokens"] for row in rows_of(b)
                ], name
            elif mine[name]["kind"].startswith("score/"):
                assert [row["logp"] for row in rows_of(a)] == pytest.approx(
                    [row["logp"] for row in rows_of(b)], rel=1e-3
                )
            elif file != "metrics.jsonl" and file != "pairs.jsonl":
                assert a.read_bytes() == b.read_bytes(), f"{name}/{file}"


def lines_of_ours(err: str) -> list[str]:
    """What stderr has that is not torchrun's or gloo's: no rank shows a traceback."""
    assert "Traceback" not in err, err
    return [line for line in err.splitlines() if line.startswith(("error:", "stopped;"))]


def test_a_run_is_stopped_by_a_signal_then_by_a_kill_and_goes_on_with_any_number(tmp_path, stub):
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    run = begin_run(stub, tmp_path / "runs")
    process = launch(2, *words)
    wait_for(run / "round0/teacher1_pos", process)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code and len(lines_of_ours(err)) == 1 and "stopped; all finished work is saved" in err
    before = {name: notes["ranks"] for name, notes in stages_of(run).items() if "ranks" in notes}
    assert before and {*before.values()} == {2}
    process = launch(2, *words)
    last_rank = ranks_of(process)[-1]
    wait_for(run / "round0/student_pos", process)
    os.kill(last_rank, signal.SIGKILL)
    code, _, err = finish(process)
    assert code and len(lines_of_ours(err)) == 1, err
    train(*words)
    check_same(run, stub)
    assert not (run / ".partial").exists() and len(rows_of(run / "metrics.jsonl")) == len(
        rows_of(stub / "metrics.jsonl")
    )


# ---- several processes, each at a stage of its own ----------------------------------------------


def test_two_processes_compute_two_stages_of_one_run_at_once_and_never_the_same(tmp_path, stub):
    """A run of all stages keeps out of their way, and they out of its."""
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"]
    run = begin_run(stub, tmp_path / "runs")
    names = ["round0/teacher1_pos", "round0/teacher2_pos"]
    first = fork("train", *words, f"--stage={names[0]}")
    try:
        wait_for(run / ".partial" / stages_of(stub)[names[0]]["fingerprint"], first)
        first.send_signal(signal.SIGSTOP)
        assert train(*words, f"--stage={names[1]}") and names[0] not in stages_of(run)
        for more, says in (
            ([f"--stage={names[0]}"], "another process computes this stage"),
            ([], "another process works on this run"),
        ):
            second = invoke("train", *words, *more)
            assert second.code == 2 and says in second.err and len(second.err.splitlines()) == 1
        first.send_signal(signal.SIGCONT)
        assert finish(first)[0] == 0
    finally:
        first.kill()
    assert set(names) <= set(stages_of(run)) and set(names) <= {
        row["stage"] for row in rows_of(run / "metrics.jsonl")
    }
    train(*words)
    assert set(differences(run, stub)) <= {"metrics.jsonl"} and not (run / ".partial").exists()
    key = lambda row: (row["stage"], row["step"])  # noqa: E731
    mine, theirs = (
        [
            {k: row[k] for k in ("stage", "step", "loss")}
            for row in rows_of(folder / "metrics.jsonl")
        ]
        for folder in (run, stub)
    )
    assert sorted(mine, key=key) == sorted(theirs, key=key), (
        "in the order in which they came, each once"
    )


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
    for names in (
        ["round0/teacher1_pos", "round0/teacher2_pos", "controls/ceiling"],
        [
            "round0/teacher1_neg",
            "round0/teacher2_neg",
            "round1/positives_teacher1",
            "round1/positives_teacher2",
        ],
    ):
        processes = [spawn("train", *words, f"--stage={name}") for name in names]
        assert [finish(process)[0] for process in processes] == [0] * len(names)
        assert set(names) <= set(stages_of(run))
    train(*words)
    assert set(differences(run, stub)) <= {"metrics.jsonl"}


# ---- torchrun itself, and all methods (slow) ----------------------------------------------------


def torchrun(world: int, *words) -> subprocess.Popen:
    """train.py as a user starts it on several processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={world}",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, str(REPOSITORY / "train.py"), *map(str, words)], **pipes)


@pytest.mark.slow
def test_torchrun_of_tiny_equals_one_process(tmp_path, tiny):
    code, _, err = finish(torchrun(2, "@tiny", f"--run.root={tmp_path}"))
    assert code == 0, err
    check_same(tmp_path / "tiny", tiny)


@pytest.mark.slow
def test_torchrun_says_an_error_once_and_can_be_stopped(tmp_path, stub):
    words, run = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"], tmp_path / "runs/stub"
    code, _, err = finish(torchrun(2, *words, "--data.path=nowhere.jsonl"))
    assert code == 1 and err.count("nowhere.jsonl does not exist") == 1
    code, _, err = finish(torchrun(2, "@experiment-main"))
    assert code == 1 and "without torchrun" in err
    process = torchrun(2, *words)
    wait_for(run / "round0/teacher1_pos", process)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 1 and err.count("stopped; all finished work is saved") == 1
    train(*words)
    check_same(run, stub)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("shard", ["true", "false"])
def test_stub_runs_on_ranks_equal_one(tmp_path, stub, world, shard):
    code, _, err = finish(
        launch(
            world,
            write_stub(tmp_path),
            f"--run.root={tmp_path / 'runs'}",
            f"--parallel.shard={shard}",
        )
    )
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
    words, run, rng = (
        [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}"],
        tmp_path / "runs/stub",
        random.Random(seed),
    )
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
    assert len(lines_of_ours(err)) == (code != 0), err
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    code, _, err = finish(launch(rng.choice([1, 2, 4]), *words))
    assert code == 0, err
    check_same(run, stub)
