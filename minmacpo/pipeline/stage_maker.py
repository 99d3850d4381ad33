"""How a stage becomes a folder that is whole or absent: taken if it is finished, else computed.

Of several processes the main one alone looks, links and writes; the others wait for it, and take
part in the stages that use a model.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minmacpo import UserError
from minmacpo.pipeline.reuse import Changes, FinishedStage
from minmacpo.pipeline.run_dir import (
    IN_PROGRESS_DIR,
    METRICS,
    check_notes,
    check_whole,
    recorded_fingerprint,
    set_aside,
)
from minmacpo.pipeline.stage import Stage, StageContext
from minmacpo.runtime.device import peaks, reset_peaks, resolve_device
from minmacpo.runtime.files import (
    DISK_FULL,
    describe,
    fingerprint,
    read_rows,
    replace_fsync,
    write_atomic,
    write_json,
)

if TYPE_CHECKING:
    from minmacpo.pipeline.run import Run

VISIBILITY_TIMEOUT_S = 120.0  # until every process has seen what the main one wrote

# The kinds of stages that all processes compute together: they load a base model
DISTRIBUTED_KINDS = {"sft", "prefer", "sample", "score", "pairs", "ask"}


@dataclass(frozen=True, slots=True)
class Declared:
    """A stage with what it takes to compute it."""

    stage: Stage
    recipe: dict  # kind, settings, seed, inputs and code: what the fingerprint covers
    inputs: Sequence[Stage]
    compute: Callable[[StageContext], dict]
    changes: Changes | None  # since an earlier stage of its name or settings was made, if any

    @property
    def is_of_other_code(self) -> bool:
        """Whether run.reuse=all takes a stage that today's code has not made."""
        return self.stage.fingerprint != fingerprint(self.recipe)

    @property
    def distributed(self) -> bool:
        return self.stage.kind.partition("/")[0] in DISTRIBUTED_KINDS

    def notes(self, method: str) -> dict:
        """What stage.json says of the stage before anything is computed."""
        return self.recipe | {
            "name": self.stage.name,
            "method": method,
            "fingerprint": self.stage.fingerprint,
            "inputs": {source.name: source.fingerprint for source in self.inputs},
        }


class StageMaker:
    """Sees to it that the stages of a run are finished, one after the other."""

    def __init__(self, run: "Run"):
        self.run = run
        self.dist = run.dist

    def ensure(self, declared: Declared) -> None:
        """Return once the stage is finished: accepted, linked from another run, or computed."""
        with self.space_given_back(declared):
            if self.dist.run_on_main(lambda: self.is_there(declared)):
                pass
            elif declared.distributed:
                self.make(declared)
            else:
                self.dist.run_on_main(lambda: self.make(declared))
        if not self.dist.is_main:
            wait_until_seen(declared.stage)

    def observe(self, read: Callable, while_listing):
        """What `read` says of the stages so far: they are computed."""
        return read()

    def complete(self) -> None:
        """Nothing is left to do."""

    def compute(self, declared: Declared) -> None:
        """Compute one stage of which the caller has seen that it is not there."""
        with self.space_given_back(declared):
            self.make(declared)

    # --- Taking what is finished

    def is_there(self, declared: Declared) -> bool:
        """Whether the stage need not be computed."""
        self.run.signals.check()
        return self.accept(declared) or self.link(declared)

    def accept(self, declared: Declared) -> bool:
        """Whether the run's folder has the stage already; UserError if it is damaged."""
        stage = declared.stage
        if not stage.path.exists():
            return False
        if not (stage.path / "stage.json").is_file():
            raise UserError(
                f"{stage.path}: has no stage.json, so it is no finished stage; delete that folder "
                "and start again"
            )
        notes = check_notes(stage.path)
        if notes["fingerprint"] != stage.fingerprint:
            return False  # it is set aside when its successor is whole
        check_whole(stage.path)
        if declared.is_of_other_code and "reused_despite" not in notes:
            write_notes(stage.path, notes | {"reused_despite": declared.changes.sentence()})
        return True

    def link(self, declared: Declared) -> bool:
        """Whether another run of the root has the stage, undamaged; its files are then linked."""
        stage = declared.stage
        source = self.run.finished.by_fingerprint.get(stage.fingerprint)
        if source is None or not is_usable(source, declared):
            return False

        context = self.context_of(declared)
        shutil.rmtree(context.folder, ignore_errors=True)
        context.folder.mkdir(parents=True)
        for name in source.notes["files"]:
            link_or_copy(source.folder / name, context.folder / name)
        if METRICS in source.notes["files"]:
            for row in read_rows(context.folder / METRICS):
                context.log_metrics(row)

        # What made it is said by its own notes; who uses it, and where, by this run's
        origin = source.folder.relative_to(self.run.root)
        notes = source.notes | {
            "name": stage.name,
            "method": self.run.config.run.method,
            "inputs": {source.name: source.fingerprint for source in declared.inputs},
            "linked_from": str(origin),
        }
        notes.pop("reused_despite", None)
        if declared.is_of_other_code:
            notes["reused_despite"] = declared.changes.sentence()
        self.commit(context, stage, notes)
        self.run.log(f"{self.run.label(stage.name)}  taken from {origin}")
        self.run.report_progress()
        return True

    # --- Computing what is not

    def make(self, declared: Declared) -> None:
        """Compute the stage and put its folder in place."""
        context = self.context_of(declared)
        context.dist.run_on_main(lambda: open_work_folder(context.folder))
        measured = self.measured(declared, context)
        context.dist.run_on_main(lambda: self.finish(declared, context, measured))

    def context_of(self, declared: Declared) -> StageContext:
        """What the stage's function gets."""
        stage = declared.stage
        return StageContext(
            run=self.run,
            name=stage.name,
            folder=self.run.path / IN_PROGRESS_DIR / stage.fingerprint,
            seed=declared.recipe["seed"],
            distributed=declared.distributed,
        )

    def measured(self, declared: Declared, context: StageContext) -> dict:
        """Let the stage's function fill the folder; returns its counts, times and peak memory."""
        device = resolve_device(self.run.config.run.device)
        started = time.time()
        clock = time.monotonic()  # the time of day may be set back
        cpu_clock = time.process_time()
        reset_peaks(device)
        with self.run.profiler(declared.stage.kind) as profiler:
            self.run.on_step = profiler.step if profiler else None
            counts = declared.compute(context)
        return {
            "counts": counts,
            "started": started,
            "seconds": round(time.monotonic() - clock, 3),
            "cpu_seconds": round(time.process_time() - cpu_clock, 3),
            **peaks(device),
        }

    def finish(self, declared: Declared, context: StageContext, measured: dict) -> None:
        """Write stage.json, put the folder in place and say so."""
        files = sorted(file for file in context.folder.iterdir() if file.name != "stage.json")
        notes = declared.notes(self.run.config.run.method) | measured
        if context.dist.world_size > 1:
            notes["ranks"] = context.dist.world_size
        notes["commit"] = self.run.environment["commit"]
        notes["files"] = {file.name: describe(file) for file in files}
        self.commit(context, declared.stage, notes)

        # what did not happen is in stage.json alone: a line is to fit the terminal
        counts = {name: count for name, count in measured["counts"].items() if count}
        words = ", ".join(show_count(name, count) for name, count in counts.items())
        label = self.run.label(declared.stage.name)
        self.run.log(f"{label}  {measured['seconds']:.1f} s  {words}")
        self.run.report_progress()

    def commit(self, context: StageContext, stage: Stage, notes: dict) -> None:
        """Rename the finished folder into place, so that it is whole or absent."""
        write_notes(context.folder, notes)
        stage.path.parent.mkdir(exist_ok=True)
        if stage.path.exists():  # it no longer fits (see `accept`)
            earlier = check_notes(stage.path)
            set_aside(self.run.path, stage.path, earlier["fingerprint"])
        replace_fsync(context.folder, stage.path)
        self.clear(context.folder)
        self.run.finished.add(stage.path, notes)

    # --- Giving space back

    @contextlib.contextmanager
    def space_given_back(self, declared: Declared) -> Iterator[None]:
        """Remove what is unfinished if the disk is full: a user needs room to make room."""
        try:
            yield
        except OSError as error:
            if self.dist.is_main and error.errno in DISK_FULL:
                if self.run.is_shared:  # others may compute other stages
                    self.clear(self.context_of(declared).folder)
                else:
                    self.run.end()
            raise

    def clear(self, work_folder: Path) -> None:
        """Remove an unfinished stage with its training state and its lock."""
        shutil.rmtree(work_folder, ignore_errors=True)
        shutil.rmtree(work_folder.with_name(f"state-{work_folder.name}"), ignore_errors=True)
        # The lock is still held; nobody waits for it
        work_folder.with_name(f"{work_folder.name}.lock").unlink(missing_ok=True)


def profiler_of(target: Path) -> torch.profiler.profile:
    """Writes a trace of three steps, after two that are not looked at and one to warm up."""
    target.parent.mkdir(exist_ok=True)
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(target)),
        record_shapes=True,
    )


def is_usable(source: FinishedStage, declared: Declared) -> bool:
    """Whether a stage of another run is undamaged.

    Raises:
        UserError: if it is damaged, but has been taken in the plan whatever its code.
    """
    try:
        check_whole(source.folder)
    except UserError:
        if declared.is_of_other_code:
            raise
        return False  # the run that it belongs to will say so
    return recorded_fingerprint(source.folder) == declared.stage.fingerprint


def open_work_folder(folder: Path) -> None:
    """Make the folder of an unfinished stage, or go on with it without what a kill has torn."""
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob("*.tmp"):
        torn.unlink()


def link_or_copy(source: Path, target: Path) -> None:
    """The same file at another place."""
    try:
        os.link(source, target)
    except OSError:  # there are no links between file systems
        write_atomic(target, source.read_bytes())


def write_notes(folder: Path, notes: dict) -> None:
    """Write stage.json with a checksum of what it says."""
    notes = {key: value for key, value in notes.items() if key != "checksum"}
    write_json(folder / "stage.json", notes | {"checksum": fingerprint(notes)})


def show_count(name: str, count) -> str:
    """ "steps 12", "loss 0.693", "d1 (rows 32)"."""
    if isinstance(count, dict):
        return f"{name} ({', '.join(show_count(*item) for item in count.items())})"
    return f"{name} {count:g}" if isinstance(count, float) else f"{name} {count}"


def wait_until_seen(stage: Stage) -> None:
    """Wait until this process sees what the main one wrote: a network's file system takes time."""
    end = time.monotonic() + VISIBILITY_TIMEOUT_S
    while not stage.finished:
        if time.monotonic() > end:
            raise UserError(
                f"{stage.path}: is finished, but not seen here; all ranks need the same run folder"
            )
        time.sleep(0.1)
