"""A run read back from its folder, at any time: what has been finished by then."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from minmacpo import UserError
from minmacpo.config.parse import read_settings
from minmacpo.config.schema import Config
from minmacpo.data.formats import released
from minmacpo.data.records import Pair, Sample
from minmacpo.pipeline.run import verify
from minmacpo.pipeline.stage import Stage
from minmacpo.runtime.files import check_links, fingerprint, read_json, read_rows, write_json

# What stage.json says of every stage, whatever its kind
STAGE_FIELDS = {
    "name",
    "kind",
    "fingerprint",
    "counts",
    "started",
    "seconds",
    "cpu_seconds",
    "peak_mb",
}

NUMBERED_AGENT = re.compile(r"(teacher|weak)(\d+)")  # agents and bases of which there are several

verify_once = functools.cache(verify)  # files are hashed once in a process


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What a run folder held when it was read.

    `metadata` is stage.json of every finished stage, by the stage's name.
    """

    folder: Path
    config: Config
    metadata: dict[str, dict]

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.resolve().name

    @property
    def teachers(self) -> list[str]:
        """The names of the teachers."""
        return [f"teacher{k + 1}" for k in range(self.config.macpo.teachers)]

    @property
    def has_gold(self) -> bool:
        """Whether its answers have a gold reward: those of the built-in world have one."""
        return self.config.data.path is None

    def __contains__(self, name: str) -> bool:
        """Whether the stage of this name is finished."""
        return name in self.metadata

    def stage(self, name: str) -> Stage:
        """The finished stage of this name.

        Raises:
            UserError: there is no such stage, or one of its files is damaged.
        """
        if name not in self:
            raise UserError(f"{self.folder / name}: is no finished stage")
        stage = Stage(name, self.folder / name, self.metadata[name]["fingerprint"])
        verify_once(stage)
        return stage

    def measured_rounds(self, agent: str) -> list[int]:
        """The rounds after which an agent's test answers were sampled, in order."""
        rounds = range(self.config.macpo.rounds + 1)
        return [t for t in rounds if answers_stage(agent, t) in self]

    def last_student(self) -> tuple[str, int]:
        """(agent, round) of the student that the run ends with.

        That is the one that macpo.stop = rollback went back to, or else that of the last round.

        Raises:
            UserError: no student has been measured.
        """
        for agent in ("kept", "student"):
            rounds = self.measured_rounds(agent)
            if rounds:
                return agent, rounds[-1]
        raise UserError(f"{self.folder}: no answers of its student are finished yet")


def read_run(path: str | Path) -> FinishedRun:
    """The run in a folder, with the stages that are finished now.

    Raises:
        UserError: the folder is no run's, or a stage.json in it is damaged.
    """
    folder = Path(path)
    settings = folder / "config.toml"
    if not settings.is_file():
        raise UserError(f"{folder}: is no run folder (it has no config.toml)")
    check_links(folder)
    metadata = {}
    for file in folder.glob("[!.]*/*/stage.json"):  # unfinished stages lie in a hidden folder
        name = file.parent.relative_to(folder).as_posix()
        metadata[name] = read_stage_json(file)
    return FinishedRun(folder, read_settings(settings), metadata)


def read_stage_json(file: Path) -> dict:
    """What a stage.json says, without its checksum; UserError if it is damaged."""
    fields = read_json(file)
    checksum = fields.pop("checksum", None)
    if checksum != fingerprint(fields) or not fields.keys() >= STAGE_FIELDS:
        raise UserError(f"{file}: is damaged, or no stage's; delete {file.parent} and start again")
    return fields


def answers_stage(agent: str, t: int) -> str:
    """The name of the stage that holds an agent's test answers after round t."""
    return f"eval/round{t}_{agent}_samples"


def agent_label(agent: str) -> str:
    """ "teacher 1" for "teacher1"; any other name as it is."""
    numbered = NUMBERED_AGENT.fullmatch(agent)
    if numbered:
        return f"{numbered[1]} {numbered[2]}"
    return agent


def by_number(name: str) -> tuple[int, str]:
    """A key to sort names by: teacher2 comes before teacher10, and round9 before round10."""
    return len(name), name


def read_samples(stage: Stage) -> list[Sample]:
    """The sampled answers that a stage holds."""
    return read_rows(stage.path / "samples.jsonl", Sample)


def read_records(stage: Stage) -> list[Pair] | list[Sample]:
    """All pairs, or all sampled answers, that a stage holds; UserError for any other stage."""
    if (stage.path / "pairs.jsonl").is_file():
        return read_rows(stage.path / "pairs.jsonl", Pair)
    if (stage.path / "samples.jsonl").is_file():
        return read_samples(stage)
    raise UserError(f"{stage.path}: holds neither pairs nor answers")


def export(run_path: str, stage_name: str, target_path: str) -> str:
    """Write a stage's pairs or answers as MACPO's authors released theirs; says what it wrote."""
    run = read_run(run_path)
    target = Path(target_path)
    records = read_records(run.stage(stage_name))
    if target.exists():
        raise UserError(f"{target}: exists already; it is not overwritten")
    # Their HH runs have the speaker's name before a single question too
    with_speaker = "vicuna-macpo" in run.config.data.template
    write_json(target, [released(record, with_speaker=with_speaker) for record in records])
    return f"{len(records)} rows: {target}"
