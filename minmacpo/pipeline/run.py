"""The run folder: stages that are whole or absent, their fingerprints, seeds, log and metrics.

A stage is a function from finished stages to a folder. Its fingerprint says what its content depends on (but
for torch's version and threads, which env.json has); it is computed only if no finished one
with that fingerprint exists, here or in another run of the root, whose files are then linked. So a variant pays
only for what differs.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minmacpo import UserError
from minmacpo.config.parse import to_toml
from minmacpo.config.schema import Config
from minmacpo.pipeline.disk_space import disk_need
from minmacpo.pipeline.run_dir import (
    PARTIAL,
    check_folder,
    check_whole,
    finished_under,
    read_metrics,
    take,
    turn,
)
from minmacpo.runtime.device import environment, peaks, reset_peaks, resolve_device, resolve_dtype
from minmacpo.runtime.distributed import Distributed
from minmacpo.runtime.files import (
    describe,
    fingerprint,
    read_json,
    read_rows,
    replace_fsync,
    with_path,
    write_atomic,
    write_json,
    write_rows,
)
from minmacpo.runtime.progress import Progress, escape_control_chars

FINISHED = "eval/table.json"  # written last: it says that the run is finished


SEEN = 120.0  # seconds after which every rank has seen what rank 0 wrote


TOGETHER = {
    "sft",
    "prefer",
    "sample",
    "score",
    "pairs",
    "ask",
}  # kinds of stages that all ranks compute; they load a base


@dataclass(frozen=True, slots=True)
class Stage:
    """A folder of a run, finished or to be computed; `fingerprint` stands for its content."""

    name: str
    path: Path
    fingerprint: str
    external: bool = False  # a folder of the user's (a base model), outside the run
    kind: str = ""  # its function, with the version: "sft/1"
    size: str = ""  # what it will do, in words

    @property
    def finished(self) -> bool:
        return self.external or (self.path / "stage.json").is_file()

    def notes(self) -> dict:
        """stage.json of a finished stage: counts, seconds, settings, inputs."""
        return read_json(self.path / "stage.json")


@dataclass(slots=True)
class StageContext:
    """What a stage's function gets: its (temporary) folder, its seed, and ways to speak. Of several `ranks` that compute it
    the main one alone writes; a stage that is not `together` has no other."""

    run: "Run"
    name: str
    folder: Path
    seed: int
    together: bool = False

    @property
    def dist(self) -> Distributed:
        return self.run.dist if self.together else Distributed(self.run.signals)

    def progress(self, total: int, unit: str, done: int = 0) -> Progress:
        """A bar for `total` units of this stage."""
        return Progress(
            self.run.label(self.name), total, unit, done, self.run.on_step, self.dist.is_main
        )

    def log(self, text: str) -> None:
        """One line under this stage's name."""
        self.run.log(f"{self.run.label(self.name)}  {text}")

    def log_detail(self, text: str) -> None:
        """One line under this stage's name in log.txt alone."""
        self.run.log_detail(f"{self.run.label(self.name)}  {text}")

    def log_metrics(self, row: dict, **timing) -> None:
        """One line of the run's metrics.jsonl."""
        line = json.dumps({"stage": self.name} | row | timing | {"time": round(time.time(), 3)})
        file = self.run.path / "metrics.jsonl"
        if self.dist.is_main:
            with self.run.turn(), with_path(file), file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")

    def raise_if_stopped(self) -> None:
        """Raise Interrupted if the user asked to stop."""
        self.dist.raise_if_stopped()

    @property
    def should_stop(self) -> bool:
        return self.dist.all_reduce_max(self.run.signals.number or 0) > 0


def derive_seed(seed: int, *key) -> int:
    """63 bits that depend on the run's seed and a key such as ("round1", "student", "sft")."""
    return int.from_bytes(hashlib.sha256(repr((seed, *key)).encode()).digest()[:8]) >> 1


class Run:
    """One run folder. Made in planning mode: `stage` only lists; `begin` writes and computes."""

    def __init__(
        self,
        config: Config,
        only: str | None = None,
        profile: bool = False,
        dry: bool = False,
        dist: Distributed | None = None,
    ):
        self.config, self.only, self.profile = config, only, profile
        self.dry = dry  # never begun: given weights are told apart by size and time, not read
        self.root = Path(config.run.root)
        self.path = self.root / config.run.name
        self.plan: dict[str, Stage] = {}
        self.recipes: dict[
            str, tuple[dict, Sequence[Stage]]
        ] = {}  # of the plan's stages, with their inputs
        self.planning = True
        self.provided: set[str] = set()  # stages seen to in this process
        self.named: dict[tuple[bool, str], str] = {}  # (planning, stage) -> its fingerprint
        self.dist, self.signals = (dist := dist or Distributed()), dist.signals
        self.on_step: Callable[[], None] | None = None
        self.after_stage: Callable[[Path], None] = lambda path: None  # called with the run's folder
        check_folder(self.path, config)

    def begin(self) -> None:
        """Leave planning: take the folder, and write the run's own files."""
        self.dist.all_reduce_max(0)  # all have seen the folder as it was
        self.dist.run_on_main(self.open)
        self.signals.install()
        self.planning = False

    def open(self) -> None:
        """Take the folder for this process, for one stage together with those that compute other ones."""
        self.check_room()
        self.log_file, *self.locks = take(
            self.path, self.only, self.only and self.plan[self.only].fingerprint
        )
        with self.turn():
            check_folder(self.path, self.config)  # another process may have made it since
            if not (self.path / "config.toml").exists():
                write_atomic(self.path / "config.toml", to_toml(self.config))
            device = resolve_device(self.config.run.device)
            self.environment = environment(device, resolve_dtype(self.config.run.dtype, device))
            write_json(self.path / "env.json", self.environment)
            write_rows(self.path / "metrics.jsonl", read_metrics(self.path, self.plan, self.only))
            if not all(stage.finished for stage in self.plan.values()):
                (self.path / FINISHED).unlink(missing_ok=True)

    def turn(self) -> contextlib.AbstractContextManager:
        """Held while a file of the whole run is written, as other processes may be at other stages of it."""
        return turn(self.path) if self.only else contextlib.nullcontext()

    def check_room(self) -> None:
        """Raise UserError if the disk has no room for what is still to be computed."""
        left = [s for s in self.plan.values() if self.only in (None, s.name) and not s.finished]
        kinds = {s.fingerprint: s.kind for s in left if s.fingerprint not in self.siblings}
        home = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        need, free = disk_need(self.config, kinds.values()), shutil.disk_usage(home).free
        if free < need:
            problem = f"{free / 1e6:.0f} MB free, this run needs about {need / 1e6:.0f} MB"
            raise UserError(f"{home}: {problem}; make room or choose another --run.root")

    def log(self, text: str) -> None:
        """One line to the terminal and to log.txt."""
        if not self.dist.is_main:
            return
        print(escape_control_chars(text), flush=True)
        self.log_detail(text)

    def log_detail(self, text: str) -> None:
        """One line to log.txt alone."""
        if not self.dist.is_main:
            return
        text = escape_control_chars(text)
        with with_path(self.path / "log.txt"):
            print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=self.log_file, flush=True)

    def label(self, name: str) -> str:
        """ "[12/57] round1/student_pos": a stage and its place in the plan."""
        return f"[{[*self.plan, name].index(name) + 1}/{len(self.plan)}] {name}"

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
        """The finished stage `name`; if need be, `compute` fills its folder and returns counts.

        `kind` is the stage function with its version ("sft/1": raise it when a change alters what it makes);
        `settings` are all settings it uses; a random one has a `seed_key`; `summary` is for the plan.
        """
        seed = derive_seed(self.config.run.seed, *seed_key) if seed_key else 0
        recipe = {
            "kind": kind,
            "settings": settings,
            "seed": seed,
            "inputs": [s.fingerprint for s in inputs],
        }
        stage = Stage(name, self.path / name, fingerprint(recipe), kind=kind, size=summary)
        sources = [source for source in inputs if name == self.only and not source.external]
        if missing := [source.name for source in sources if not source.finished]:
            many = len(missing) > 1
            raise UserError(
                f"--stage={name} needs {', '.join(missing)}, which {'are' if many else 'is'} not finished; run {'those' if many else 'that'} first"
            )
        for source in sources:
            verify(source)
        self.check_name(stage)
        if self.planning:
            self.plan[name], self.recipes[name] = stage, (recipe, inputs)
        elif self.only in (None, name) and name not in self.provided:
            self.provided.add(name)
            inputs = {source.name: source.fingerprint for source in inputs}
            named = {
                "name": name,
                "method": self.config.run.method,
                "fingerprint": stage.fingerprint,
                "inputs": inputs,
            }
            self.provide(stage, recipe | named, compute)
        return stage

    def check_name(self, stage: Stage) -> None:
        """Raise RuntimeError if another stage has this one's name: a defect of the method, not of its user."""
        if (
            self.named.setdefault((self.planning, stage.name), stage.fingerprint)
            != stage.fingerprint
        ):
            raise RuntimeError(f"{stage.name}: one name for two different stages")

    def provide(self, stage: Stage, notes: dict, compute: Callable[[StageContext], dict]) -> None:
        """Accept the stage if it is finished here, link it from another run, or compute it; rank 0 says which."""
        together = stage.kind.partition("/")[0] in TOGETHER
        work = StageContext(
            self, stage.name, self.path / PARTIAL / stage.fingerprint, notes["seed"], together
        )

        def alone() -> bool:
            """What rank 0 does before, or instead of, what all do; returns whether that is all."""
            self.signals.check()
            if stage.finished:
                verify(stage)
                return True
            if stage.path.exists():
                problem = "has no stage.json, so it is no finished stage; delete that folder and start again"
                raise UserError(f"{stage.path}: {problem}")
            found = self.link(work, stage)
            if not found:
                work.folder.mkdir(parents=True, exist_ok=True)
                for torn in work.folder.glob("*.tmp"):
                    torn.unlink()  # a kill left it
                if together:
                    return False
            self.seal(work, stage, notes | (found or self.compute(work, stage.kind, compute)))
            return True

        try:
            if not self.dist.run_on_main(alone):
                found = self.compute(work, stage.kind, compute)
                self.dist.run_on_main(lambda: self.seal(work, stage, notes | found))
        except OSError as error:
            if self.dist.is_main and error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.clear(work) if self.only else self.end()  # a full disk: give its space back
            raise
        if not self.dist.is_main:
            await_stage(stage)

    def seal(self, work: StageContext, stage: Stage, notes: dict) -> None:
        """Put a stage that is computed, or linked, in its place, and say so."""
        write_json(work.folder / "stage.json", notes | {"checksum": fingerprint(notes)})
        stage.path.parent.mkdir(exist_ok=True)
        replace_fsync(work.folder, stage.path)
        self.clear(work)
        self.siblings[stage.fingerprint] = stage.path
        if "linked_from" in notes:
            did = f"taken from {notes['linked_from']}"
        else:
            counts = notes["counts"].items()
            words = ", ".join(
                f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in counts
            )
            did = f"{notes['seconds']:.1f} s  {words}"
        self.log(f"{self.label(stage.name)}  {did}")
        with self.turn():
            self.after_stage(self.path)

    def link(self, work: StageContext, stage: Stage) -> dict | None:
        """Take the files and the metrics of an equal stage, of any run of the root; returns what
        stage.json says of them, None where there is no such stage, or only a damaged one."""
        try:
            source = self.siblings[stage.fingerprint]
            notes = verify(replace(stage, path=source))
        except (KeyError, UserError):
            return None
        shutil.rmtree(work.folder, ignore_errors=True)
        work.folder.mkdir(parents=True)
        for name in notes["files"]:
            try:
                os.link(source / name, work.folder / name)
            except OSError:  # there are no links between file systems
                write_atomic(work.folder / name, (source / name).read_bytes())
        for row in (
            read_rows(work.folder / "metrics.jsonl") if "metrics.jsonl" in notes["files"] else ()
        ):
            work.log_metrics(row)
        own = {
            "name": work.name,
            "method": self.config.run.method,
            "linked_from": str(source.relative_to(self.root)),
        }
        return {key: value for key, value in notes.items() if key != "inputs"} | own

    def compute(
        self, work: StageContext, kind: str, compute: Callable[[StageContext], dict]
    ) -> dict:
        """Fill the work folder by `compute`; returns what stage.json says of it, {} where another rank will write that."""
        device, started = resolve_device(self.config.run.device), time.time()
        clock, cpu = time.monotonic(), time.process_time()  # the time of day may be set back
        reset_peaks(device)
        with self.profiler(kind) as profiler:
            self.on_step = profiler and profiler.step
            counts = compute(work)
        if not self.dist.is_main:
            return {}
        files = sorted(file for file in work.folder.iterdir() if file.name != "stage.json")
        return {
            "counts": counts,
            "started": started,
            "seconds": round(time.monotonic() - clock, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
            **peaks(device),
            **({"ranks": self.dist.world_size} if work.dist.world_size > 1 else {}),
            "commit": self.environment["commit"],
            "files": {file.name: describe(file) for file in files},
        }

    def profiler(self, kind: str):
        """Traces three steps of the first stage of each kind into profile/, if the user asked to."""
        target = self.path / "profile" / f"{kind.partition('/')[0]}.json"
        if not (self.profile and self.dist.is_main) or target.exists():
            return contextlib.nullcontext()
        target.parent.mkdir(exist_ok=True)
        schedule = torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1)
        return torch.profiler.profile(
            schedule=schedule,
            on_trace_ready=lambda p: p.export_chrome_trace(str(target)),
            record_shapes=True,
        )

    @functools.cached_property
    def siblings(self) -> dict[str, Path]:
        return finished_under(self.root)

    def clear(self, work: StageContext) -> None:
        """Remove what is there of a stage beside its own folder: a started one, its training state (fit.Watch), its lock."""
        name = work.folder.name
        for folder in (work.folder, work.folder.with_name(f"state-{name}")):
            shutil.rmtree(folder, ignore_errors=True)
        work.folder.with_name(f"{name}.lock").unlink(
            missing_ok=True
        )  # still held, and by nobody who waits

    def end(self) -> None:
        """Remove what is not part of a finished stage; the metrics stand as the plan has the stages, whatever was made anew."""
        shutil.rmtree(self.path / PARTIAL, ignore_errors=True)
        write_rows(self.path / "metrics.jsonl", read_metrics(self.path, self.plan))


def await_stage(stage: Stage) -> None:
    """Wait until a stage that another rank has finished is seen here too: a network's file system may take its time."""
    end = time.monotonic() + SEEN
    while not stage.finished:
        if time.monotonic() > end:
            raise UserError(
                f"{stage.path}: is finished, but not seen here; all ranks need the same run folder"
            )
        time.sleep(0.1)


def verify(stage: Stage) -> dict:
    """stage.json of a finished stage; UserError unless it is the one wanted and its files are undamaged."""
    notes = check_whole(stage.path)
    if notes["fingerprint"] != stage.fingerprint:
        problem = "was made by another version of the code or from other files"
        raise UserError(
            f"{stage.path}: {problem}; delete that folder, or choose another --run.name"
        )
    return notes
