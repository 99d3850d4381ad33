"""What a stage is, and what the function that computes one is given."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minmacpo.pipeline.run_dir import METRICS, recorded_fingerprint
from minmacpo.runtime.distributed import Distributed
from minmacpo.runtime.files import read_json, with_path
from minmacpo.runtime.progress import Progress

if TYPE_CHECKING:
    from minmacpo.pipeline.run import Run


@dataclass(frozen=True, slots=True)
class Stage:
    """A folder of a run, finished or still to be computed.

    `fingerprint` stands for its content; `kind` is the function that computes it with a version
    ("sft/1"); `summary` says in words what it will do. An `external` stage is a folder of the
    user's, such as a base model, outside the run.
    """

    name: str
    path: Path
    fingerprint: str
    external: bool = False
    kind: str = ""
    summary: str = ""

    @property
    def finished(self) -> bool:
        """Whether the folder is there, whole, and was made by this recipe."""
        return self.external or recorded_fingerprint(self.path) == self.fingerprint

    def notes(self) -> dict:
        """stage.json of a finished stage: counts, seconds, settings, inputs, code."""
        return read_json(self.path / "stage.json")


@dataclass(slots=True)
class StageContext:
    """What a stage's function gets: its unfinished folder, its seed, and ways to speak.

    Where several processes compute the stage (`distributed`), the main one alone writes.
    """

    run: "Run"
    name: str
    folder: Path
    seed: int
    distributed: bool = False

    @property
    def dist(self) -> Distributed:
        """The processes that compute this stage together; this one alone unless `distributed`."""
        if self.distributed:
            return self.run.dist
        return Distributed(self.run.signals)

    def progress(self, total: int, unit: str, done: int = 0) -> Progress:
        """A bar for `total` units of this stage, of which `done` are finished."""
        label = self.run.label(self.name)
        return Progress(label, total, unit, done, self.run.on_step, self.dist.is_main)

    def log(self, text: str) -> None:
        """One line under this stage's name, on the terminal and in log.txt."""
        self.run.log(f"{self.run.label(self.name)}  {text}")

    def log_detail(self, text: str) -> None:
        """One line under this stage's name, in log.txt alone."""
        self.run.log_detail(f"{self.run.label(self.name)}  {text}")

    def log_metrics(self, row: dict, **timing) -> None:
        """One line of the run's metrics.jsonl."""
        if not self.dist.is_main:
            return
        file = self.run.path / METRICS
        line = json.dumps({"stage": self.name, **row, **timing, "time": round(time.time(), 3)})
        with self.run.lock(), with_path(file), file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def raise_if_stopped(self) -> None:
        """Raise Interrupted if the user asked to stop."""
        self.dist.raise_if_stopped()

    @property
    def should_stop(self) -> bool:
        """Whether the user asked to stop. Collective."""
        return self.dist.all_reduce_max(self.run.signals.number or 0) > 0
