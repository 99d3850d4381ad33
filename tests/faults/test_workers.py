"""Workers side by side: kill -9 of any process, signals, and a disk that fills up."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from forks import Good, check_none_failed, check_sentence, ended, fork, spread, stages, start
from runs import Ended, write_stub
from shim import Disk
from test_signals import check_most_stopped, check_stopped

pytestmark = pytest.mark.faults
FULL = "No space left on device"


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory) -> tuple[list[str], Path, float]:
    """The words of a run with two workers, such a run of one worker, and the seconds it took.

    Two teachers and two rounds, so that there is something to do side by side.
    """
    place = tmp_path_factory.mktemp("side_by_side")
    words = [
        write_stub(place),
        "--run.name=x",
        "--generate.max_new_tokens=4",
        "--eval.bootstrap=2",
        "--pretrain.batch=4",
    ]
    begun = time.monotonic()
    whole, _ = fork("train", [*words, f"--run.root={place}"], reports=True)
    assert whole.code == 0, whole.err
    return [*words, "--run.workers=2"], place / "x", time.monotonic() - begun


def workers_of(pid: int) -> list[int]:
    """The processes that a process has started; none where it has ended."""
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(word) for word in words]


def wait_until_gone(pids: list[int]) -> None:
    """Wait until processes that are nobody's children any more have died with their parent."""
    end = time.monotonic() + 20
    for pid in pids:
        while is_alive(pid):
            assert time.monotonic() < end, "a worker outlives the main process"
            time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether a process is there, and is more than an entry that nobody has looked at."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def kill_one(words, output: Path, seconds: float, rng: random.Random) -> str:
    """What was killed of train.py so long after its beginning: "main", "worker", or nothing."""
    pid = start("train", words, output, reports=True)
    time.sleep(seconds)
    workers = workers_of(pid)
    victim = rng.choice([pid, *workers, *workers])
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        victim = None
    code = ended(pid)
    wait_until_gone(workers)

    err = output.with_suffix(".err").read_text()
    if victim == pid:
        assert code in (0, -signal.SIGKILL), err
        return "main" if code else ""
    assert code in (0, 2), err
    if code == 0:
        return ""
    check_sentence(Ended(code, "", err), "the process that computed it was killed by SIGKILL")
    return "worker"


def test_kills_of_any_process_at_random_moments(side_by_side, scratch, seed, capsys):
    """Several kills one after the other, each in a run that was killed before."""
    words, whole, duration = side_by_side
    good = Good(whole)

    def check(point: int) -> None:
        rng = random.Random(f"{seed}/{point}")
        root = scratch / str(point)
        point_words = [*words, f"--run.root={root}"]
        finished = {}
        for _ in range(4):
            seconds = rng.random() * duration / 2
            killed = kill_one(point_words, scratch / f"said{point}", seconds, rng)
            if killed:
                with (scratch / f"killed_{killed}{point}").open("a") as counter:
                    counter.write("x")
            now = stages(root / "x")
            assert finished.items() <= now.items()
            finished = now
        again, _ = fork("train", point_words, reports=True)
        assert again.code == 0, again.err
        good.check(root / "x", finished)
        shutil.rmtree(root)

    points = range(36)
    failures = spread(check, points)
    kills = {}
    for killed in ("main", "worker"):
        kills[killed] = sum(file.stat().st_size for file in scratch.glob(f"killed_{killed}*"))
    with capsys.disabled():
        print(f"\nkills at random moments with two workers: {kills}")
    check_none_failed(failures, points)
    assert sum(kills.values()) >= 100
    assert min(kills.values()) >= 20


def test_a_signal_to_any_of_them(side_by_side, scratch, seed):
    """To the main process alone, as `kill` sends it, or to all, as Ctrl-C and Slurm do."""
    words, whole, duration = side_by_side
    good = Good(whole)
    log = scratch / "told"

    def check(point: int) -> None:
        rng = random.Random(f"{seed}/{point}")
        root = scratch / str(point)
        output = scratch / f"said{point}"
        pid = start("train", [*words, f"--run.root={root}"], output)
        number = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        time.sleep(duration / 4 + rng.random() * duration / 2)
        told = [pid]
        if rng.random() < 0.5:
            told += workers_of(pid)
        for process in told:
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue
        code = ended(pid)
        err = output.with_suffix(".err").read_text()
        check_stopped(Ended(code, "", err), number, log)

        finished = stages(root / "x")
        again, _ = fork("train", [*words, f"--run.root={root}"])
        assert again.code == 0, again.err
        good.check(root / "x", finished)

    failures = spread(check, range(40))
    check_none_failed(failures, range(40))
    check_most_stopped(log)


def test_a_disk_that_fills_up(side_by_side, scratch, seed):
    """From some operation of the main process, or of a worker, on."""
    words, whole, _ = side_by_side
    good = Good(whole)
    _, operations = fork("train", [*words, f"--run.root={scratch / 'counted'}"], Disk())
    rng = random.Random(seed)

    # A worker counts on from where it was forked, so that both come later than the main process
    points = [len(operations) // 2 + rng.randrange(1200) for _ in range(40)]

    def check(point: int) -> None:
        root = scratch / str(point)
        full, _ = fork("train", [*words, f"--run.root={root}"], Disk("full", point))
        if full.code != 0:
            check_sentence(full, f"error: {root}", FULL)
            assert list(root.rglob("*.tmp")) == []
        finished = stages(root / "x")
        again, _ = fork("train", [*words, f"--run.root={root}"])
        assert again.code == 0, again.err
        good.check(root / "x", finished)
        shutil.rmtree(root, ignore_errors=True)

    failures = spread(check, points)
    check_none_failed(failures, points)
