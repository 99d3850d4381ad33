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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minmacpo import UserError
from minmacpo.commandline import overlay, read_toml, to_toml
from minmacpo.config import Config, flatten
from minmacpo.files import (
    check_links,
    describe,
    fingerprint,
    move,
    naming,
    open_alone,
    read_json,
    read_rows,
    write_atomic,
    write_json,
    write_rows,
)
from minmacpo.machine import device_of, disk_need, environment, peaks, reset_peaks
from minmacpo.progress import Progress, Signals, inert

FINISHED = "eval/table.json"  # written last: it says that the run is finished
PARTIAL = ".partial"  # unfinished stages live here, under their fingerprint


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
class Work:
    """What a stage's function gets: its (temporary) folder, its seed, and ways to speak."""

    run: "Run"
    name: str
    folder: Path
    seed: int

    def progress(self, total: int, unit: str, done: int = 0) -> Progress:
        """A bar for `total` units of this stage."""
        return Progress(self.run.label(self.name), total, unit, done, self.run.on_step)

    def log(self, text: str) -> None:
        """One line under this stage's name."""
        self.run.log(f"{self.run.label(self.name)}  {text}")

    def metrics(self, row: dict, **timing) -> None:
        """One line of the run's metrics.jsonl."""
        line = json.dumps({"stage": self.name} | row | timing | {"time": round(time.time(), 3)})
        file = self.run.path / "metrics.jsonl"
        with naming(file), file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def check(self) -> None:
        """Raise Interrupted if the user asked to stop."""
        self.run.signals.check()

    @property
    def stopping(self) -> bool:
        return self.run.signals.number is not None


def derive_seed(seed: int, *key) -> int:
    """63 bits that depend on the run's seed and a key such as ("round1", "student", "sft")."""
    return int.from_bytes(hashlib.sha256(repr((seed, *key)).encode()).digest()[:8]) >> 1


class Run:
    """One run folder. Made in planning mode: `stage` only lists; `begin` writes and computes."""

    def __init__(self, config: Config, only: str | None = None, profile: bool = False, dry: bool = False):
        self.config, self.only, self.profile = config, only, profile
        self.dry = dry  # never begun: given weights are told apart by size and time, not read
        self.root = Path(config.run.root)
        self.path = self.root / config.run.name
        self.plan: dict[str, Stage] = {}
        self.recipes: dict[str, tuple[dict, Sequence[Stage]]] = {}  # of the plan's stages, with their inputs
        self.planning = True
        self.provided: set[str] = set()  # stages seen to in this process
        self.named: dict[tuple[bool, str], str] = {}  # (planning, stage) -> its fingerprint
        self.signals = Signals()
        self.on_step: Callable[[], None] | None = None
        self.after_stage: Callable[[Path], None] = lambda path: None  # called with the run's folder
        check_folder(self.path, config)

    def begin(self) -> None:
        """Leave planning: take the folder for this process, and write the run's own files."""
        self.check_room()
        self.path.mkdir(parents=True, exist_ok=True)
        busy = f"{self.path}: another process works on this run; wait for it, or choose another --run.name"
        self.log_file = open_alone(self.path / "log.txt", "a", busy)
        check_folder(self.path, self.config)  # another process may have made it since
        if not (self.path / "config.toml").exists():
            write_atomic(self.path / "config.toml", to_toml(self.config))
        self.environment = environment(self.config)
        write_json(self.path / "env.json", self.environment)
        write_rows(self.path / "metrics.jsonl", read_metrics(self.path, self.plan))
        if not all(stage.finished for stage in self.plan.values()):
            (self.path / FINISHED).unlink(missing_ok=True)
        self.signals.install()
        self.planning = False

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
        text = inert(text)
        print(text, flush=True)
        with naming(self.path / "log.txt"):
            print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=self.log_file, flush=True)

    def label(self, name: str) -> str:
        """"[12/57] round1/student_pos": a stage and its place in the plan."""
        return f"[{[*self.plan, name].index(name) + 1}/{len(self.plan)}] {name}"

    def stage(self, name: str, kind: str, settings: dict, inputs: Sequence[Stage],
              compute: Callable[[Work], dict], key: tuple = (), size: str = "") -> Stage:  # fmt: skip
        """The finished stage `name`; if need be, `compute` fills its folder and returns counts.

        `kind` is the stage function with its version ("sft/1": raise it when a change alters what it makes);
        `settings` are all settings it uses; a random one has a `key` for its seed; `size` is for the plan.
        """
        seed = derive_seed(self.config.run.seed, *key) if key else 0
        recipe = {"kind": kind, "settings": settings, "seed": seed, "inputs": [s.fingerprint for s in inputs]}
        stage = Stage(name, self.path / name, fingerprint(recipe), kind=kind, size=size)
        for source in (source for source in inputs if name == self.only and not source.external):
            if not source.finished:
                raise UserError(f"--stage={name} needs {source.name}, which is not finished; run that first")
            verify(source)
        self.check_name(stage)
        if self.planning:
            self.plan[name], self.recipes[name] = stage, (recipe, inputs)
        elif self.only in (None, name) and name not in self.provided:
            self.provided.add(name)
            inputs = {source.name: source.fingerprint for source in inputs}
            named = {"name": name, "method": self.config.run.method, "fingerprint": stage.fingerprint, "inputs": inputs}
            self.provide(stage, recipe | named, compute)
        return stage

    def check_name(self, stage: Stage) -> None:
        """Raise RuntimeError if another stage has this one's name: a defect of the method, not of its user."""
        if self.named.setdefault((self.planning, stage.name), stage.fingerprint) != stage.fingerprint:
            raise RuntimeError(f"{stage.name}: one name for two different stages")

    def provide(self, stage: Stage, notes: dict, compute: Callable[[Work], dict]) -> None:
        """Accept the stage if it is finished here, link it from another run, or compute it."""
        self.signals.check()
        if stage.finished:
            verify(stage)
            return
        if stage.path.exists():
            problem = "has no stage.json, so it is no finished stage; delete that folder and start again"
            raise UserError(f"{stage.path}: {problem}")
        work = Work(self, stage.name, self.path / PARTIAL / stage.fingerprint, notes["seed"])
        try:
            notes |= self.link(work, stage) or self.compute(work, stage.kind, compute)
            write_json(work.folder / "stage.json", notes | {"checksum": fingerprint(notes)})
            stage.path.parent.mkdir(exist_ok=True)
            move(work.folder, stage.path)
            shutil.rmtree(work.folder.with_name(f"state-{work.folder.name}"), ignore_errors=True)  # see fit.Watch
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.end()  # a full disk: give its space back
            raise
        self.siblings[stage.fingerprint] = stage.path
        if "linked_from" in notes:
            did = f"taken from {notes['linked_from']}"
        else:
            counts = notes["counts"].items()
            words = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in counts)
            did = f"{notes['seconds']:.1f} s  {words}"
        self.log(f"{self.label(stage.name)}  {did}")
        self.after_stage(self.path)

    def link(self, work: Work, stage: Stage) -> dict | None:
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
        for row in read_rows(work.folder / "metrics.jsonl") if "metrics.jsonl" in notes["files"] else ():
            work.metrics(row)
        own = {"name": work.name, "method": self.config.run.method, "linked_from": str(source.relative_to(self.root))}
        return {key: value for key, value in notes.items() if key != "inputs"} | own

    def compute(self, work: Work, kind: str, compute: Callable[[Work], dict]) -> dict:
        """Fill the work folder by `compute`; returns what stage.json says of it."""
        work.folder.mkdir(parents=True, exist_ok=True)
        for torn in work.folder.glob("*.tmp"):
            torn.unlink()  # a kill left it
        device, started = device_of(self.config), time.time()
        clock, cpu = time.monotonic(), time.process_time()  # the time of day may be set back
        reset_peaks(device)
        with self.profiler(kind) as profiler:
            self.on_step = profiler and profiler.step
            counts = compute(work)
        files = sorted(file for file in work.folder.iterdir() if file.name != "stage.json")
        return {
            "counts": counts,
            "started": started,
            "seconds": round(time.monotonic() - clock, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
            **peaks(device),
            "commit": self.environment["commit"],
            "files": {file.name: describe(file) for file in files},
        }

    def profiler(self, kind: str):
        """Traces three steps of the first stage of each kind into profile/, if the user asked to."""
        target = self.path / "profile" / f"{kind.partition('/')[0]}.json"
        if not self.profile or target.exists():
            return contextlib.nullcontext()
        target.parent.mkdir(exist_ok=True)
        schedule = torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1)
        return torch.profiler.profile(
            schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(str(target)), record_shapes=True
        )

    @functools.cached_property
    def siblings(self) -> dict[str, Path]:
        """{fingerprint: folder} of the finished stages of all runs of the root, this one's included."""
        found = {}
        for file in sorted(self.root.glob("*/[!.]*/*/stage.json")):  # not those in PARTIAL
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # its own run will say so
                found[json.loads(file.read_bytes())["fingerprint"]] = file.parent
        return found

    def end(self) -> None:
        """Remove what is not part of a finished stage."""
        shutil.rmtree(self.path / PARTIAL, ignore_errors=True)


def read_metrics(run: Path, names: Iterable[str]) -> list[dict]:
    """The lines of the finished ones of these stages in a run's metrics.jsonl, or, where they are not as the stage's own
    file has them, those, without times; an unfinished stage writes its own anew."""
    file, found, rows = run / "metrics.jsonl", {}, []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # torn by a kill
            row = json.loads(line)
            found.setdefault(row["stage"], []).append(row)
    for name in names:
        own = run / name / "metrics.jsonl"
        if own.is_file() and (own.parent / "stage.json").is_file():
            with contextlib.suppress(UserError):  # `verify` will say so
                told = [{"stage": name} | row for row in read_rows(own)]
                mine = found.get(name, [])
                same = len(mine) == len(told) and all(row.items() >= want.items() for row, want in zip(mine, told, strict=True))
                rows += mine if same else told
    return rows


def check_folder(path: Path, config: Config) -> None:
    """Raise UserError if `path` holds something else than a run of this configuration, or a link, which could lead out of it."""
    check_links(path)
    file, names = path / "config.toml", {p.name for p in path.iterdir()} if path.is_dir() else set()
    if file.name not in names:
        begun = {"log.txt", "config.toml.tmp"}  # what is there before it, at a kill
        if names - begun or (path.exists() and not path.is_dir()):
            raise UserError(f"{path}: exists and is no run folder; choose another --run.name")
        return
    mine, theirs = flatten(config), flatten(overlay(Config(), read_toml(file), str(file)))
    for key in mine:
        if key not in ("run.root", "run.name") and mine[key] != theirs[key]:
            problem = f"holds a run with {key} = {theirs[key]}, this one has {mine[key]}"
            raise UserError(f"{path}: {problem}; choose another --run.name, or delete that folder")


def verify(stage: Stage) -> dict:
    """stage.json of a finished stage; UserError unless it is the one wanted and its files are undamaged."""
    notes, remedy = stage.notes(), f"damaged; delete the folder {stage.path} and start again"
    if notes.pop("checksum", None) != fingerprint(notes):
        raise UserError(f"{stage.path / 'stage.json'}: is {remedy}")
    if notes["fingerprint"] != stage.fingerprint:
        problem = "was made by another version of the code or from other files"
        raise UserError(f"{stage.path}: {problem}; delete that folder, or choose another --run.name")
    for name, wanted in notes["files"].items():
        file = stage.path / name
        if name != file.name or file.is_symlink() or not file.is_file() or wanted != describe(file):
            raise UserError(f"{file}: is missing or {remedy}")
    return notes
