"""A run: the stages it is made of, their fingerprints and seeds, its log and its metrics.

A stage is a function from finished stages to a folder. Its fingerprint covers its kind, all its
settings, its seed, its inputs and the code that it reaches (not torch's version and threads, which
env.json has). It is computed only if no run of the root has finished one with that fingerprint; so
a variant of a run costs only what differs, and a killed run goes on where it stopped.

A run is declared twice by the same calls of `Run.stage`: before `begin` the stages are listed, for
the dry run and for the "[12/57]" of the log; after it they are computed.
"""

import contextlib
import functools
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from minmacpo import UserError
from minmacpo.config.parse import to_toml
from minmacpo.config.schema import Config
from minmacpo.pipeline.code_digest import code_digests
from minmacpo.pipeline.disk_space import disk_need
from minmacpo.pipeline.reuse import (
    Changes,
    FinishedStages,
    Reuse,
    changes_since,
    merged,
    stale_stages,
)
from minmacpo.pipeline.run_dir import (
    CONFIG,
    IN_PROGRESS_DIR,
    LOG,
    METRICS,
    SET_ASIDE_DIR,
    acquire_run_lock,
    check_folder,
    check_whole,
    read_metrics,
    set_aside,
    shared_files_lock,
)
from minmacpo.pipeline.scheduler import StageScheduler
from minmacpo.pipeline.stage import Stage, StageContext
from minmacpo.pipeline.stage_maker import Declared, StageMaker, profiler_of
from minmacpo.runtime.device import environment, resolve_device, resolve_dtype
from minmacpo.runtime.distributed import Distributed
from minmacpo.runtime.files import fingerprint, with_path, write_atomic, write_json, write_rows
from minmacpo.runtime.progress import CLEAR_LINE, escape_control_chars
from minmacpo.runtime.seeds import derive_seed

FINISHED = "eval/table.json"  # written last: it says that the run is finished
REPORT_EVERY = 10  # seconds from one report to the next while the run goes on


class StageLister:
    """Lists the stages of a run and computes nothing."""

    def __init__(self, run: "Run"):
        self.run = run

    def ensure(self, declared: Declared) -> None:
        """Put the stage on the list."""
        name = declared.stage.name
        self.run.plan[name] = declared.stage
        self.run.recipes[name] = (declared.recipe, declared.inputs)
        self.run.changes[name] = declared.changes
        self.run.listed[name] = declared

    def observe(self, read: Callable, while_listing):
        """Nothing has been computed that `read` could look at."""
        return while_listing

    def complete(self) -> None:
        """Nothing is computed."""


class Run:
    """One run folder. Its stages are listed first; from `begin` on they are computed."""

    def __init__(
        self,
        config: Config,
        only: str | None = None,
        profile: bool = False,
        dry: bool = False,
        dist: Distributed | None = None,
    ):
        """Args:
        only: the one stage that this process computes; None: all.
        profile: whether to trace three steps of the first stage of each kind.
        dry: whether the run will never begin. Given weights are then told apart by size and time.
        dist: the processes that do the run together.
        """
        self.config = config
        self.only = only
        self.profile = profile
        self.dry = dry
        self.dist = dist or Distributed()
        self.signals = self.dist.signals
        self.root = Path(config.run.root)
        self.path = self.root / config.run.name

        self.plan: dict[str, Stage] = {}
        self.recipes: dict[str, tuple[dict, Sequence[Stage]]] = {}  # of the plan, with the inputs
        self.changes: dict[str, Changes | None] = {}  # of the plan, since earlier stages
        self.listed: dict[str, Declared] = {}  # the plan with the functions that compute it
        self.fingerprints: dict[str, str] = {}  # by name, of the stages declared so far
        self.provided: set[str] = set()  # stages seen to in this process
        # Made for every stage: an object that is kept would hold this one, and its locks, too long
        self.strategy: type[StageLister | StageMaker | StageScheduler] = StageLister

        self.forks_workers = resolve_device(config.run.device) == "cpu"  # a GPU forbids it
        self.workers = 1  # processes that compute stages side by side
        self.worker: int | None = None  # the number of this one among them; None: the main process
        self.costs: Mapping[str, float] = {}  # of stages by name, in any unit
        self.waiting: dict[str, Declared] = {}  # stages that workers will be given

        self.on_step: Callable[[], None] | None = None
        self.after_stage: Callable[[Path], None] = lambda path: None  # called with the run's folder
        self.reported_at = -math.inf  # when that was; seconds of a clock that only goes forward
        check_folder(self.path, config)

    # --- Declaring stages

    def stage(
        self,
        name: str,
        kind: str,
        settings: dict,
        inputs: Sequence[Stage],
        compute: Callable[[StageContext], dict],
        seed_key: tuple = (),
        summary: str = "",
    ) -> Stage:
        """Declare a stage and return it: finished, or, before `begin`, listed.

        Args:
            name: its folder within the run: "round1/student_pos".
            kind: what computes it, with a version: "sft/1".
            settings: all settings that it depends on.
            inputs: the stages that it reads.
            compute: fills the context's folder and returns counts for the log and stage.json.
            seed_key: what its seed is derived from, beside the run's; empty if nothing is random.
            summary: what it will do, in words, for the plan.
        """
        seed = 0
        if seed_key:
            seed = derive_seed(self.config.run.seed, *seed_key)
        recipe = {
            "kind": kind,
            "settings": settings,
            "seed": seed,
            "inputs": [source.fingerprint for source in inputs],
            "code": code_digests(compute),
        }
        stage = Stage(
            name=name,
            path=self.path / name,
            fingerprint=self.resolved_fingerprint(name, recipe),
            kind=kind,
            summary=summary,
        )
        self.check_name(stage)
        if name == self.only:
            check_inputs(stage, inputs)
        if self.strategy is StageLister or self.only in (None, name):
            self.ensure(stage, recipe, inputs, compute)
        return stage

    def ensure(self, stage: Stage, recipe: dict, inputs: Sequence[Stage], compute) -> None:
        """List the stage, or see to it that it is finished; once is enough."""
        if stage.name in self.provided:
            return
        self.provided.add(stage.name)
        earlier = self.reuse.earlier.get(stage.fingerprint)
        changes = None
        if earlier is not None:
            changes = changes_since(earlier, recipe, inputs)
        self.strategy(self).ensure(Declared(stage, recipe, inputs, compute, changes))

    def observe(self, read: Callable, while_listing):
        """What `read` says of the stages so far, or `while_listing` where none is computed.

        For an algorithm whose next step depends on what came of the last ones.
        """
        return self.strategy(self).observe(read, while_listing)

    def resolved_fingerprint(self, name: str, recipe: dict) -> str:
        """The recipe's fingerprint or, with run.reuse=all, that of a stage of other code."""
        of_today = fingerprint(recipe)
        if self.config.run.reuse == "all":
            return self.dist.run_on_main(lambda: self.reuse.fingerprint(name, recipe, of_today))
        if self.dist.is_main:
            self.reuse.fingerprint(name, recipe, of_today)  # it remembers the earlier stage
        return of_today

    @functools.cached_property
    def finished(self) -> FinishedStages:
        """The finished stages of all runs of the root."""
        return FinishedStages(self.root, self.path)

    @functools.cached_property
    def reuse(self) -> Reuse:
        """What may be taken of them."""
        return Reuse(self.finished, whatever_the_code=self.config.run.reuse == "all")

    def check_name(self, stage: Stage) -> None:
        """Raise RuntimeError if another stage has this name: a defect of the method."""
        declared = self.fingerprints.setdefault(stage.name, stage.fingerprint)
        if declared != stage.fingerprint:
            raise RuntimeError(f"{stage.name}: one name for two different stages")

    # --- Beginning and ending

    def begin(self, workers: int = 1, costs: Mapping[str, float] | None = None) -> None:
        """Take the folder and write the run's own files; from here on stages are computed.

        Args:
            workers: how many processes compute stages side by side.
            costs: of the stages by name, estimated: the longest chain of them is begun first.
        """
        self.dist.all_reduce_max(0)  # all processes have seen the folder as it was
        self.dist.run_on_main(self.open)
        self.signals.install()
        self.strategy = StageMaker
        if workers > 1:
            self.strategy = StageScheduler
            self.workers = workers
            self.costs = costs or {}
        self.provided.clear()
        self.fingerprints.clear()
        self.listed = {}  # their functions hold this object, and with it the run's locks

    def open(self) -> None:
        """Take the folder for this process, or for one stage of it."""
        self.check_room()
        stage_fingerprint = self.plan[self.only].fingerprint if self.only else None
        files = acquire_run_lock(self.path, self.only, stage_fingerprint)
        self.log_file, *self.locks = files
        with self.lock():
            check_folder(self.path, self.config)  # another process may have made it since
            if not (self.path / CONFIG).exists():
                write_atomic(self.path / CONFIG, to_toml(of_all_commands(self.config)))
            device = resolve_device(self.config.run.device)
            self.environment = environment(device, resolve_dtype(self.config.run.dtype, device))
            write_json(self.path / "env.json", self.environment)
            if not self.only:
                self.set_aside_stale()
            write_rows(self.path / METRICS, read_metrics(self.path, self.plan, self.only))
            if not all(stage.finished for stage in self.plan.values()):
                (self.path / FINISHED).unlink(missing_ok=True)
        for line in self.reuse_lines():
            self.log(line)

    def join(self, number: int) -> None:
        """Take part in a run that another process has begun, as its worker of this number."""
        self.worker = number
        self.log_file = (self.path / LOG).open("a", encoding="utf-8")
        device = resolve_device(self.config.run.device)
        self.environment = environment(device, resolve_dtype(self.config.run.dtype, device))

    def lock(self) -> contextlib.AbstractContextManager:
        """Held while a file of the whole run is written, as others may compute other stages."""
        if self.is_shared:
            return shared_files_lock(self.path)
        return contextlib.nullcontext()

    @property
    def is_shared(self) -> bool:
        """Whether other processes may compute other stages of the run."""
        return self.only is not None or self.worker is not None

    def check_room(self) -> None:
        """Raise UserError if the disk has no room for what is still to be computed."""
        kinds = {}  # equal stages are computed once
        for name, stage in self.plan.items():
            known = stage.finished or stage.fingerprint in self.finished.by_fingerprint
            if self.only in (None, name) and not known:
                kinds[stage.fingerprint] = stage.kind
        need = disk_need(self.config, kinds.values())
        folder = self.path.absolute()
        while not folder.exists():  # the disk is that of the nearest folder that is there
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if free < need:
            raise UserError(
                f"{folder}: {free / 1e6:.0f} MB free, this run needs about {need / 1e6:.0f} MB; "
                "make room or choose another --run.root"
            )

    def set_aside_stale(self) -> None:
        """Move the run's stages that no longer fit out of the way, so that all that is left fits.

        They can be taken from there, should the code be changed back, until the run ends.
        """
        changed = {name for name, changes in self.changes.items() if changes}
        for name in stale_stages(self.finished, self.plan, changed):
            stage = self.finished.own.pop(name)
            set_aside(self.path, stage.folder, stage.fingerprint)
            self.finished.add(self.path / SET_ASIDE_DIR / stage.fingerprint, stage.notes)

    def reuse_lines(self) -> list[str]:
        """What to say of finished stages that no longer fit, or that are taken all the same."""
        anew = []
        despite = []
        for name, changes in self.changes.items():
            if changes is None or self.only not in (None, name):
                continue
            recipe, _ = self.recipes[name]
            if self.plan[name].fingerprint == fingerprint(recipe):
                anew.append(changes)
            else:
                despite.append(changes)

        total = len(self.plan)
        lines = []
        if merged(anew):
            lines.append(
                f"{len(anew)} of {total} stages are computed anew: {merged(anew).sentence()} since "
                "they were made (--run.reuse=all takes what only the code would change)"
            )
        if despite:
            lines.append(
                f"WARNING: {len(despite)} of {total} stages are taken although "
                f"{merged(despite).sentence()} since they were made (run.reuse = all): the results "
                "are those of the earlier code, and a run without it computes these stages anew"
            )
        return lines

    def complete(self) -> None:
        """Return once all stages that have been declared are finished."""
        self.strategy(self).complete()

    def end(self) -> None:
        """Remove what is not part of a finished stage; put the metrics into the plan's order."""
        shutil.rmtree(self.path / IN_PROGRESS_DIR, ignore_errors=True)
        shutil.rmtree(self.path / SET_ASIDE_DIR, ignore_errors=True)
        write_rows(self.path / METRICS, read_metrics(self.path, self.plan))

    # --- Speaking

    def log(self, text: str) -> None:
        """One line to the terminal and to log.txt."""
        if self.dist.is_main:
            line = escape_control_chars(text)
            if self.worker is not None and sys.stdout.isatty():
                line = CLEAR_LINE + line  # the bar of another worker may stand there
            print(line, flush=True)
        self.log_detail(text)

    def log_detail(self, text: str) -> None:
        """One line to log.txt alone."""
        if not self.dist.is_main:
            return
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with with_path(self.path / "log.txt"):
            print(now, escape_control_chars(text), file=self.log_file, flush=True)

    def label(self, name: str) -> str:
        """ "[12/57] round1/student_pos": a stage and its place in the plan."""
        number = [*self.plan, name].index(name) + 1
        return f"[{number}/{len(self.plan)}] {name}"

    def report_progress(self) -> None:
        """Let the caller look at the run after a stage, if it has not done so a moment ago.

        Of several processes the main one does so.
        """
        now = time.monotonic()
        if self.worker is not None or now - self.reported_at < REPORT_EVERY:
            return
        with self.lock():
            self.after_stage(self.path)
        self.reported_at = time.monotonic()

    def profiler(self, kind: str) -> contextlib.AbstractContextManager:
        """Traces the first stage of each kind into profile/, if the user asked for it."""
        target = self.path / "profile" / f"{kind.partition('/')[0]}.json"
        if not self.profile or not self.dist.is_main or target.exists():
            return contextlib.nullcontext()
        return profiler_of(target)


def check_inputs(stage: Stage, inputs: Sequence[Stage]) -> None:
    """Raise UserError unless the inputs of a stage that is computed alone are all finished."""
    sources = [source for source in inputs if not source.external]
    missing = [source.name for source in sources if not source.finished]
    if len(missing) == 1:
        raise UserError(
            f"--stage={stage.name} needs {missing[0]}, which is not finished; run that first"
        )
    if missing:
        raise UserError(
            f"--stage={stage.name} needs {', '.join(missing)}, which are not finished; "
            "run those first"
        )
    for source in sources:
        check_whole(source.path)


def of_all_commands(config: Config) -> Config:
    """The settings of a run; run.reuse and run.workers are a matter of one command."""
    return replace(config, run=replace(config.run, reuse="code", workers="auto"))


def verify(stage: Stage) -> dict:
    """stage.json of a finished stage; UserError unless its files are undamaged and its own."""
    notes = check_whole(stage.path)
    if notes["fingerprint"] != stage.fingerprint:
        raise UserError(f"{stage.path}: has been computed anew since it was looked at; start again")
    return notes
