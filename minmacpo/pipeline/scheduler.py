"""The stages of a run side by side: worker processes compute those whose inputs are finished.

The method's code declares stages one after the other, as ever; here they are only collected. When
somebody has to look at them (the run's end, or the monitor) this process becomes a dispatcher:

1. It takes what is finished already, or linked from another run, and starts the workers. On a CPU
   they are forked, and have the declared stages in their memory, with the functions that compute
   them. A GPU cannot be used by a forked process: there they are new ones with the same command
   line, each of which lists the stages itself and has a GPU of its own.
2. It hands a free worker the stage that the longest chain of others waits for, of those
   whose inputs are finished. The worker computes the stage with the code that a single process
   computes it with, in the same threads, and answers with None, or with the error.
3. After the first error, or a signal, no stage is handed out. The workers are told to stop, save
   what a single process would save, and end; then the error is raised here.

A worker listens to this process alone, and dies with it. Whole-or-absent folders do the rest.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

import torch

from minmacpo import UserError
from minmacpo.pipeline.run_dir import check_notes
from minmacpo.pipeline.stage_maker import Declared, StageMaker
from minmacpo.runtime.device import read_proc
from minmacpo.runtime.files import DISK_FULL
from minmacpo.runtime.progress import (
    RESUMES,
    Interrupted,
    Progress,
    Signals,
    short_of_memory,
)

if TYPE_CHECKING:
    from minmacpo.pipeline.run import Run

POLL_S = 0.2  # between two looks whether a signal has come
PARENT_POLL_S = 0.05  # between two looks whether the main process is there
STOP = signal.SIGUSR1  # how a worker is told to stop

# Set in the environment of a new process that is a worker: its number, the file descriptor of the
# way to the main process, and the id of that
WORKER = "MINMACPO_WORKER"

FORK = multiprocessing.get_context("fork")


class StageScheduler:
    """Collects the stages of a run, and has workers compute them when they are needed."""

    def __init__(self, run: "Run"):
        self.run = run

    def ensure(self, declared: Declared) -> None:
        """Put the stage on the list of those to be finished."""
        self.run.waiting[declared.stage.name] = declared

    def observe(self, read: Callable, while_listing):
        """What `read` says of the stages so far, which are computed for that."""
        self.complete()
        return read()

    def complete(self) -> None:
        """Return once all stages that were collected are finished."""
        stages = self.run.waiting
        self.run.waiting = {}
        Dispatcher(self.run, stages).compute_all()


# --- The graph


def sources_within(stages: Mapping[str, Declared]) -> dict[str, set[str]]:
    """For each stage the names of those among `stages` that have to be finished before it.

    These are its inputs, and the first stage with the same fingerprint, which is linked then.
    """
    sources = {}
    first_of_fingerprint: dict[str, str] = {}
    for name, declared in stages.items():
        before = {stage.name for stage in declared.inputs if stage.name in stages}
        twin = first_of_fingerprint.setdefault(declared.stage.fingerprint, name)
        if twin != name:
            before.add(twin)
        sources[name] = before
    return sources


def longest_chains(sources: Mapping[str, set[str]], costs: Mapping[str, float]) -> dict[str, float]:
    """For each stage the cost of the longest chain of stages that begins with it.

    Args:
        sources: of each stage, in an order in which a stage stands behind its sources.
        costs: of stages; one that is not in it costs nothing.
    """
    behind = dict.fromkeys(sources, 0.0)  # the longest chain behind each stage
    chains = {}
    for name in reversed(list(sources)):
        chains[name] = behind[name] + costs.get(name, 0.0)
        for source in sources[name]:
            behind[source] = max(behind[source], chains[name])
    return chains


# --- The main process


@dataclass(slots=True)
class Worker:
    """A worker process, the way to it, and the stage that it computes."""

    process: "BaseProcess | NewProcess"
    connection: Connection
    stage: str | None = None
    is_told_to_stop: bool = False


class Dispatcher:
    """Hands stages to workers until all are finished, or one has failed."""

    def __init__(self, run: "Run", stages: Mapping[str, Declared]):
        self.run = run
        self.stages = stages
        self.maker = StageMaker(run)
        self.missing = sources_within(stages)  # the unfinished sources of every unfinished stage
        self.chains = longest_chains(self.missing, run.costs)
        self.ready: list[str] = []
        self.workers: list[Worker] = []
        self.failure: BaseException | None = None
        self.memory_kills = memory_kills()

    def compute_all(self) -> None:
        """Return once all stages are finished; raise the first error of a worker."""
        self.settle([name for name, missing in self.missing.items() if not missing])
        if not self.missing:
            return
        with self.processes():
            while self.missing and not self.is_stopping:
                self.hand_out()
                self.listen()
            while self.busy:
                self.tell_to_stop()
                self.listen()
        self.run.signals.check()
        if self.failure is not None:
            self.raise_failure()

    @property
    def busy(self) -> list[Worker]:
        """The workers that compute a stage."""
        return [worker for worker in self.workers if worker.stage is not None]

    @property
    def is_stopping(self) -> bool:
        """Whether no further stage is to begin."""
        return self.failure is not None or self.run.signals.number is not None

    # --- Which stages are finished

    def settle(self, names: Sequence[str]) -> None:
        """Take the stages that are there already; the others can be computed now.

        Args:
            names: stages whose sources are finished.
        """
        names = list(names)
        while names:
            name = names.pop(0)
            if self.maker.is_there(self.stages[name]):
                names += self.set_finished(name)
            else:
                self.ready.append(name)

    def set_finished(self, name: str) -> list[str]:
        """Note that a stage is finished; returns those that had waited for it alone."""
        del self.missing[name]
        freed = []
        for other, missing in self.missing.items():
            if name in missing:
                missing.remove(name)
                if not missing:
                    freed.append(other)
        return freed

    # --- The workers

    @contextlib.contextmanager
    def processes(self) -> Iterator[None]:
        """The worker processes, which end with the block."""
        before = signal.signal(STOP, self.run.signals.remember)  # workers inherit the handler
        try:
            for number in range(min(self.run.workers, len(self.missing))):
                self.workers.append(self.start_worker(number))
            yield
        finally:
            # One that still computes is as if killed by the user: its stage is whole or absent
            for worker in self.workers:
                worker.process.kill()
                worker.process.join()
            signal.signal(STOP, before)

    def start_worker(self, number: int) -> Worker:
        """Start the worker of this number."""
        connection, end_of_worker = multiprocessing.Pipe()
        if self.run.forks_workers:
            arguments = (self.run, self.stages, number, end_of_worker, os.getpid())
            process = FORK.Process(target=serve, args=arguments)
            process.start()
        else:
            process = NewProcess(number, end_of_worker)
        end_of_worker.close()  # so that the connection breaks when the worker dies
        return Worker(process, connection)

    def hand_out(self) -> None:
        """Give each free worker the stage that most work waits for."""
        for worker in self.workers:
            if worker.stage is None and self.ready:
                name = max(self.ready, key=self.chains.__getitem__)
                self.ready.remove(name)
                worker.stage = name
                with contextlib.suppress(BrokenPipeError):  # it has died: `listen` will tell
                    worker.connection.send(self.stages[name].stage)

    def tell_to_stop(self) -> None:
        """Tell each worker once to save its work and to end."""
        for worker in self.busy:
            if not worker.is_told_to_stop:
                os.kill(worker.process.pid, STOP)
                worker.is_told_to_stop = True

    def listen(self) -> None:
        """Wait for an answer, or for a moment; a stage that was finished frees others."""
        answered = wait([worker.connection for worker in self.busy], POLL_S)
        freed = []
        for worker in self.busy:
            if worker.connection in answered:
                freed += self.hear(worker)
        if self.is_stopping:
            return
        self.settle(freed)
        if freed:
            self.run.report_progress()

    def hear(self, worker: Worker) -> list[str]:
        """Note what has come of a worker's stage; returns the stages that can begin now."""
        name = worker.stage
        try:
            error = worker.connection.recv()
        except (EOFError, OSError):
            error = self.death(worker)
        worker.stage = None
        if error is None:
            stage = self.stages[name].stage
            self.run.finished.add(stage.path, check_notes(stage.path))
            return self.set_finished(name)
        if self.failure is None and not isinstance(error, Interrupted):
            self.failure = error
        return []

    def death(self, worker: Worker) -> UserError:
        """What to say of a worker that has died without a word."""
        worker.process.join()
        code = worker.process.exitcode
        if code == -signal.SIGKILL and memory_kills() > self.memory_kills:
            reason = (
                "was killed by the system, which is short of memory; lower "
                f"run.workers = {self.run.workers}"
            )
        elif code < 0:
            reason = f"was killed by {signal.Signals(-code).name}"
        else:
            reason = f"ended with exit code {code}"
        return UserError(f"{worker.stage}: the process that computed it {reason}; {RESUMES}")

    # --- The end

    def raise_failure(self) -> None:
        """Raise the first error; on a full disk, remove what is unfinished before."""
        error = self.failure
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            self.run.end()
        try:
            raise error
        finally:
            # An error that is kept holds this object, and with it the run's locks
            self.failure = None
            del error


def memory_kills() -> int:
    """How many processes the system has killed since it began because memory was short."""
    return int(read_proc("vmstat", r"(?m)^oom_kill (\d+)") or 0)


# --- A worker process


class NewProcess:
    """A process with the command line of this one, to be handled like one that was forked."""

    def __init__(self, number: int, connection: Connection):
        place = f"{number} {connection.fileno()} {os.getpid()}"
        environment = os.environ | {WORKER: place}
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = visible_gpus()[number]
        self.process = subprocess.Popen(
            [sys.executable, *sys.argv], env=environment, pass_fds=[connection.fileno()]
        )
        self.pid = self.process.pid

    @property
    def exitcode(self) -> int | None:
        """Minus the number of the signal that killed it; None while it is there."""
        return self.process.returncode

    def kill(self) -> None:
        self.process.kill()

    def join(self) -> None:
        self.process.wait()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return named.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]


def serve(
    run: "Run", stages: Mapping[str, Declared], number: int, connection: Connection, main_pid: int
) -> None:
    """Compute the stages that the main process sends, one after the other.

    Args:
        stages: what can be computed, by name.
        number: of this worker, from 0.
        connection: where stages come from; None or an error is the answer.
    """
    threading.Thread(target=die_with_main, args=(main_pid,), daemon=True).start()
    signal.signal(STOP, run.signals.remember)
    for number_of_signal in Signals.numbers:  # the main process hands them on
        signal.signal(number_of_signal, signal.SIG_IGN)
    Progress.set_lock(threading.RLock())  # tqdm's own is shared: who dies with it stops all
    Progress.position = number
    run.worker = number

    while True:
        stage = connection.recv()
        try:
            if stages[stage.name].stage != stage:
                raise UserError(f"{stage.name}: has changed since the run was begun; start again")
            StageMaker(run).compute(stages[stage.name])
        except BaseException as error:
            connection.send(portable(run, stage.name, error))
            return
        connection.send(None)


def is_new_worker() -> bool:
    """Whether this process was started as a worker of another one."""
    return WORKER in os.environ


def serve_as_new_process(run: "Run") -> None:
    """`serve` in a process that was started for it, and has listed the run."""
    number, descriptor, main_pid = map(int, os.environ[WORKER].split())
    run.join(number)
    serve(run, run.listed, number, Connection(descriptor), main_pid)


def die_with_main(main_pid: int) -> None:
    """End this process when the main one has ended, however that came."""
    while os.getppid() == main_pid:
        time.sleep(PARENT_POLL_S)
    os._exit(1)


def portable(run: "Run", name: str, error: BaseException) -> BaseException:
    """An error of a stage as the main process can raise it, to say what one process would say."""
    if isinstance(error, Interrupted):
        return error
    if short_of_memory(error):
        return UserError(f"{name}: out of memory; lower run.workers = {run.workers}; {RESUMES}")
    if isinstance(error, UserError | OSError):
        return error
    lines = "".join(traceback.format_exception(error))
    return RuntimeError(f"{name} failed in a worker process:\n{lines}")
