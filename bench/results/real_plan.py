"""What the benchmark on real dialogues asks (real.toml), and where its files lie."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minmacpo.config.parse import parse
from minmacpo.config.schema import Config
from minmacpo.evaluation.experiments import Case, cases_of
from minmacpo.runtime.files import read_json

HERE = Path(__file__).parent
PARTS = ("pretrain", "d1", "d2", "test", "reward")  # the splits of a source
SOURCES = ("helpful", "harmless", "pku", "alpaca")


@dataclass(frozen=True, slots=True)
class Plan:
    """real.toml, and where all files of the benchmark lie.

    Attributes:
        full: the larger sizes, for a GPU.
        settings: the content of real.toml.
    """

    root: Path
    full: bool
    settings: dict

    @property
    def experiments(self) -> dict[str, dict]:
        """What is asked, by name."""
        experiments = {}
        for name, value in self.settings.items():
            if isinstance(value, dict) and "question" in value:
                experiments[name] = value
        return experiments

    def cases(self, name: str) -> list[Case]:
        """All runs of an experiment, for any seed."""
        return cases_of(self.experiments[name])

    def missing(self, case: Case) -> set[str]:
        """The sources that a case needs and that were not given."""
        return set(sources_of(case.flags)) - set(self.counts()["files"])

    def run_path(self, run: str) -> Path:
        """The folder of a run."""
        return self.root / "runs" / run

    def bases_path(self, seed: int) -> Path:
        """The folder of the run that makes the bases of a seed."""
        return self.run_path(f"bases-seed={seed}")

    def split_path(self, source: str, part: str) -> Path:
        """The file of a split of a source."""
        return self.root / "data" / source / f"{part}.jsonl"

    def rating_path(self, run: str) -> Path:
        """The file with the ratings of a run's answers."""
        return self.root / "reward" / f"{run}.json"

    def counts(self) -> dict:
        """What the split says of itself."""
        return read_json(self.root / "data/split.json")

    def config(self, seed: int, name: str, words: Sequence[str]) -> Config:
        """The settings of a run: the preset's, the larger sizes if wanted, its own."""
        return parse(self.words(seed, name, words)).config

    def words(self, seed: int, name: str, words: Sequence[str]) -> list[str]:
        """The flags of train.py that make a run."""
        shared = self.settings["flags"].split()
        if self.full:
            shared += self.settings["full"].split()
        place = [f"--run.root={self.root / 'runs'}"]
        return [*shared, *place, *words, f"--run.seed={seed}", f"--run.name={name}"]

    def words_of(self, case: Case, seed: int) -> list[str]:
        """The flags of a case, with the folders of its data and bases."""
        splits = splits_of(case.flags)
        data = []
        for name, (source, part) in splits.items():
            data.append(f"{name}={self.split_path(source, part)}")

        others = []
        teachers = 3
        for word in case.flags:
            setting, _, value = word.partition("=")
            if setting in splits:
                continue
            others.append(word)
            if setting == "--macpo.teachers":
                teachers = int(value)

        bases = self.bases_path(seed) / "bases"
        weak_bases = [f"{bases}/weak{k + 1}" for k in range(teachers)]
        student = f"--model.student={bases / 'strong'}"
        models = [student, f"--model.teachers={','.join(weak_bases)}"]
        words = [*data, "--data.shares=0,1,0,0", *models, *others]
        return self.words(seed, run_name(case, seed), words)

    def runs(self, seed: int) -> dict[str, Case]:
        """{run: case} of all experiments whose files are there, each run once."""
        runs = {}
        for experiment in self.experiments:
            for case in self.cases(experiment):
                if not self.missing(case):
                    runs[run_name(case, seed)] = case
        return runs


def read_plan(root: Path, full: bool) -> Plan:
    """The plan as real.toml has it."""
    return Plan(root, full, tomllib.loads((HERE / "real.toml").read_text("utf-8")))


def splits_of(words: Sequence[str]) -> dict[str, tuple[str, str]]:
    """{setting: (source, split)} of the data that the words of a case name."""
    splits = {}
    for word in words:
        if word.startswith(("--data.path=", "--data.d2=", "--data.test=")):
            name, value = word.split("=", 1)
            source, part = value.split("/")
            splits[name] = (source, part)
    return splits


def sources_of(words: Sequence[str]) -> list[str]:
    """The sources that the words of a case name, each once."""
    sources = []
    for source, _ in splits_of(words).values():
        if source not in sources:
            sources.append(source)
    return sources


def run_name(case: Case, seed: int) -> str:
    """The name of a run: its sources, then what it sets."""
    parts = sources_of(case.flags)
    for word in case.flags:
        if not word.startswith("--data.") or "noise" in word:
            parts.append(re.sub(r"^--(\w+\.)?", "", word))
    return "-".join([*parts, f"seed={seed}"])
