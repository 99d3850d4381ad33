"""The run folder: stages that are whole or absent, their fingerprints, seeds, log and metrics.

A stage is a function from finished stages to a folder. Its fingerprint says everything that its
content depends on; it is computed only if no finished one with that fingerprint exists, here or in
another run of the root, whose files are then linked. So a variant pays only for what differs.
"""

import contextlib
import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minmacpo import UserError
from minmacpo.commandline import overlay, read_toml, to_toml
from minmacpo.config import Config, flatten
from minmacpo.files import (
    fingerprint,
    link_or_copy,
    move_folder,
    read_json,
    read_rows,
    sha256_file,
    write_atomic,
    write_json,
    write_rows,
)
from minmacpo.machine import code_commit, environment, peak_mb
from minmacpo.progress import Progress, Signals

PARTIAL = ".partial"  # unfinished stages live here, under their fingerprint


@dataclass(frozen=True, slots=True)
class Stage:
    """A folder of a run, finished or to be computed; `fingerprint` stands for its content.

    An external one is a folder of the user's (a base model), outside the run.
    """

    name: str
    path: Path
    fingerprint: str
    external: bool = False

    @property
    def finished(self) -> bool:
        return self.external or (self.path / "stage.json").is_file()

    def notes(self) -> dict:
        """stage.json of a finished stage: counts, seconds, settings, inputs."""
        return read_json(self.path / "stage.json")


@dataclass(frozen=True, slots=True)
class Planned:
    stage: Stage
    kind: str
    size: str  # what it will do, in words


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
        self.run.log(f"    {text}")

    def metrics(self, row: dict, **timing) -> None:
        """One line of the run's metrics.jsonl."""
        self.run.write_metrics(self.name, row | timing)

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

    def __init__(self, config: Config, only: str | None = None, profile: bool = False):
        self.config, self.only, self.profile = config, only, profile
        self.root = Path(config.run.root)
        self.path = self.root / config.run.name
        self.plan: dict[str, Planned] = {}
        self.planning, self.siblings = True, None
        self.signals = Signals()
        self.after_stage: Callable[[], None] = lambda: None
        self.on_step: Callable[[], None] | None = None
        self.profiled: set[str] = set()
        self.provided: set[str] = set()  # stages seen to in this process
        self.commit = code_commit()
        check_folder(self.path, config)

    # ---- the folder

    def begin(self, need_bytes: int = 100_000_000) -> None:
        """Leave planning: check that the folder can be written and has room, then write its files."""
        home = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        free = shutil.disk_usage(home).free
        if free < need_bytes:
            raise UserError(
                f"{home}: {free / 1e6:.0f} MB free, this run needs about {need_bytes / 1e6:.0f} MB;"
                " make room or choose another --run.root"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.toml").exists():
            write_atomic(self.path / "config.toml", to_toml(self.config))
        write_json(self.path / "env.json", environment(self.config))
        self.planning = False
        self.repair_metrics()
        self.signals.install()

    def log(self, text: str) -> None:
        """One line to the terminal and to log.txt."""
        print(text, flush=True)
        with (self.path / "log.txt").open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def label(self, name: str) -> str:
        """"[12/57] round1/student_pos": a stage and its place in the plan."""
        names = list(self.plan)
        place = names.index(name) + 1 if name in names else len(names)
        return f"[{place}/{len(names)}] {name}"

    def write_metrics(self, stage: str, row: dict) -> None:
        """Append one line to metrics.jsonl."""
        line = json.dumps({"stage": stage} | row | {"time": round(time.time(), 3)})
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def repair_metrics(self) -> None:
        """Keep the lines of finished stages; an unfinished one writes its own again on resuming."""
        file = self.path / "metrics.jsonl"
        rows = []
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
            try:
                row = json.loads(line)
                finished = (self.path / row["stage"] / "stage.json").exists()
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill; its stage is unfinished
            rows += [row] if finished else []
        write_rows(file, rows)

    # ---- stages

    def stage(
        self,
        name: str,
        kind: str,
        settings: dict,
        inputs: Sequence[Stage],
        compute: Callable[[Work], dict],
        key: tuple = (),
        size: str = "",
    ) -> Stage:
        """The finished stage `name`; `compute` fills its folder and returns counts, if need be.

        `kind` is the stage function with its version ("sft/1": raise it when a change alters what it
        makes); `settings` are all settings it uses; a random one has a `key` for its seed. `size`
        says in the plan what it will do. In planning mode nothing is computed.
        """
        seed = derive_seed(self.config.run.seed, *key) if key else 0
        recipe = {"kind": kind, "settings": settings, "seed": seed, "inputs": [s.fingerprint for s in inputs]}
        stage = Stage(name, self.path / name, fingerprint(recipe))
        missing = [source.name for source in inputs if not source.finished] if name == self.only else []
        if missing:
            raise UserError(f"--stage={name} needs {missing[0]}, which is not finished; run that first")
        if self.planning:
            self.plan[name] = Planned(stage, kind, size)
        elif self.only in (None, name) and name not in self.provided:
            self.provided.add(name)
            self.provide(stage, recipe, {s.name: s.fingerprint for s in inputs}, compute)
        return stage

    def provide(self, stage: Stage, recipe: dict, inputs: dict, compute: Callable[[Work], dict]) -> None:
        """Accept the stage if it is finished here, link it from another run, or compute it."""
        self.signals.check()
        if stage.finished:
            verify(stage)
            return
        if stage.path.exists():
            raise UserError(f"{stage.path}: has no stage.json, so it is no finished stage; delete that folder and start again")
        source = self.find_sibling(stage.fingerprint)
        try:
            if source and sound(Stage(stage.name, source, stage.fingerprint)):
                self.link(stage, source, inputs)
            else:
                self.compute(stage, recipe, inputs, compute)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a full disk: give its space back
                for torn in (self.path / PARTIAL).glob(f"*{stage.fingerprint}"):
                    shutil.rmtree(torn, ignore_errors=True)
            raise
        self.after_stage()

    def compute(self, stage: Stage, recipe: dict, inputs: dict, compute: Callable[[Work], dict]) -> None:
        """Fill a temporary folder, then rename it to the stage's."""
        folder = self.path / PARTIAL / stage.fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        for torn in folder.glob("*.tmp"):
            torn.unlink()  # a kill left it
        started, cpu = time.time(), time.process_time()
        work = Work(self, stage.name, folder, recipe["seed"])
        with profiled(self, recipe["kind"]):
            counts = compute(work)
        notes = recipe | {
            "name": stage.name,
            "fingerprint": stage.fingerprint,
            "inputs": inputs,
            "counts": counts,
            "started": started,
            "seconds": round(time.time() - started, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
            "peak_mb": round(peak_mb()),
            "commit": self.commit,
        }
        seal(folder, stage, notes)
        words = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in counts.items())
        self.log(f"{self.label(stage.name)}  {notes['seconds']:.1f} s  {words}")

    def find_sibling(self, wanted: str) -> Path | None:
        """Folder of a finished stage with this fingerprint, here or in another run of the root."""
        if self.siblings is None:
            self.siblings = {}
            for file in sorted(self.root.glob("*/[!.]*/*/stage.json")):  # not those in PARTIAL
                try:
                    self.siblings[json.loads(file.read_bytes())["fingerprint"]] = file.parent
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # a damaged stage of another run is no source; that run will say so
        for planned in self.plan.values():
            if planned.stage.fingerprint == wanted and planned.stage.finished:
                return planned.stage.path
        return self.siblings.get(wanted)

    def link(self, stage: Stage, source: Path, inputs: dict) -> None:
        """Make the stage from the files of an equal one; its own stage.json says where they came from."""
        notes = read_json(source / "stage.json")
        folder = self.path / PARTIAL / f"link-{stage.fingerprint}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in notes["files"]:
            link_or_copy(source / name, folder / name)
        origin = str(source.relative_to(self.root))
        for row in read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else ():
            self.write_metrics(stage.name, row)  # before the stage counts as finished: a kill must not lose them
        seal(folder, stage, notes | {"name": stage.name, "inputs": inputs, "linked_from": origin})
        self.log(f"{self.label(stage.name)}  taken from {origin}")

    def end(self) -> None:
        """Remove what finished stages left behind."""
        shutil.rmtree(self.path / PARTIAL, ignore_errors=True)


def check_folder(path: Path, config: Config) -> None:
    """Raise UserError if `path` holds something else than a run of this configuration."""
    if not path.exists():
        return
    begun = path.is_dir() and {p.name for p in path.iterdir()} <= {"config.toml.tmp"}  # killed before its first file
    if not begun and not (path / "config.toml").is_file():
        raise UserError(f"{path}: exists and is no run folder; choose another --run.name")
    if not (path / "config.toml").is_file():
        return
    mine = flatten(config)
    theirs = flatten(overlay(Config(), read_toml(path / "config.toml"), str(path / "config.toml")))
    for key in mine:
        if key not in ("run.root", "run.name") and mine[key] != theirs[key]:
            raise UserError(
                f"{path}: holds a run with {key} = {theirs[key]}, this one has {mine[key]};"
                " choose another --run.name, or delete that folder"
            )


def seal(folder: Path, stage: Stage, notes: dict) -> None:
    """List the folder's files with size and hash in its stage.json, and move it to its place."""
    files = sorted(p for p in folder.iterdir() if p.name != "stage.json")
    listed = {p.name: {"size": p.stat().st_size, "sha256": sha256_file(p)} for p in files}
    notes = {k: v for k, v in notes.items() if k != "checksum"} | {"files": listed}
    write_json(folder / "stage.json", notes | {"checksum": fingerprint(notes)})
    move_folder(folder, stage.path)


def verify(stage: Stage) -> None:
    """Raise UserError unless the finished stage is the one wanted and its files are undamaged."""
    notes = stage.notes()
    known = isinstance(notes, dict) and notes.keys() >= {"fingerprint", "files", "counts", "started"}
    if not known or notes.pop("checksum", None) not in (None, fingerprint(notes)):
        raise UserError(f"{stage.path / 'stage.json'}: is damaged; delete the folder {stage.path} and start again")
    if notes["fingerprint"] != stage.fingerprint:
        raise UserError(
            f"{stage.path}: was made by another version of the code or from other files;"
            " delete that folder, or choose another --run.name"
        )
    for name, wanted in notes["files"].items():
        file = stage.path / name
        if not file.is_file() or file.stat().st_size != wanted["size"] or sha256_file(file) != wanted["sha256"]:
            raise UserError(f"{file}: is missing or damaged; delete the folder {stage.path} and start again")


def sound(stage: Stage) -> bool:
    """Whether a finished stage passes `verify`."""
    try:
        verify(stage)
    except UserError:
        return False
    return True


@contextlib.contextmanager
def profiled(run: Run, kind: str):
    """Trace three steps of the first stage of each kind into profile/, if the user asked to."""
    if not run.profile or kind in run.profiled:
        yield
        return
    run.profiled.add(kind)
    folder = run.path / "profile"
    folder.mkdir(exist_ok=True)
    target = folder / f"{kind.partition('/')[0]}.json"
    schedule = torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1)
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(str(target)), record_shapes=True
    ) as profiler:
        run.on_step = profiler.step
        yield
    run.on_step = None
