"""MACPO on real dialogues, kept as a benchmark: python -m bench.real --helpful=FILE --harmless=FILE [--pku=FILE] [--alpaca=FILE]

FILEs (or folders) are HH-RLHF's, PKU-SafeRLHF's and Alpaca's as published. They are split once into five slices each, disjoint
by first human turn: text to pre-train on, D1, D2, test, and pairs for the reward models, which nothing else sees. Bases
are made of the first, then every run of bench/real.toml is an ordinary run of train.py. A call ends before 9 minutes and
the same command goes on where it was, until it says that nothing is left; files need be named once only.

--seeds=0,1   --root=runs/real   --minutes=8: when a call ends   --full: the larger sizes, for a GPU   --dry_run: what is left
--collect: write what is finished into assets/results/real.json, for `python -m bench.results`
"""

import functools
import random
import re
import sys
import time
import tomllib
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minmacpo import UserError
from minmacpo.config.parse import ArgParser, parse
from minmacpo.config.schema import Config
from minmacpo.data.formats import read_data
from minmacpo.data.readers import find_files
from minmacpo.data.records import Example, Pair
from minmacpo.data.splits import assign_splits, first_turn
from minmacpo.evaluation.experiments import Case, cases_of, check_ended, parse_seeds, run_process
from minmacpo.pipeline.base_models import setup_stages
from minmacpo.pipeline.prepare_data import base_names, prepare_splits
from minmacpo.pipeline.run import FINISHED, Run
from minmacpo.runtime.device import configure_torch
from minmacpo.runtime.files import read_json, sha256_file, write_json, write_rows
from minmacpo.runtime.progress import run_main

HERE = Path(__file__).parent
PARTS = ("pretrain", "d1", "d2", "test", "reward")
SOURCES = ("helpful", "harmless", "pku", "alpaca")
STOPPED = (143, -15)  # exit codes of a process that was asked to end


@dataclass(frozen=True, slots=True)
class Plan:
    """bench/real.toml, and where all files of the benchmark lie."""

    root: Path
    full: bool
    settings: dict

    @property
    def experiments(self) -> dict[str, dict]:
        """What is asked, by name."""
        return {
            name: found
            for name, found in self.settings.items()
            if isinstance(found, dict) and "question" in found
        }

    def cases(self, name: str) -> list[Case]:
        """All runs of an experiment, for any seed."""
        return cases_of(self.experiments[name])

    def missing(self, case: Case) -> set[str]:
        """The sources that a case needs and that were not given."""
        return {source for source, _ in slices_of(case.flags).values()} - {*self.counts()["files"]}

    def rating(self, run: str) -> Path:
        """Where the ratings of a run's answers are."""
        return self.root / "reward" / f"{run}.json"

    def counts(self) -> dict:
        """What the split says of itself."""
        return read_json(self.root / "data/split.json")

    def config(self, seed: int, name: str, words: Sequence[str]) -> Config:
        """The settings of a run: the preset's, the larger sizes if wanted, its own."""
        return parse(self.words(seed, name, words)).config

    def words(self, seed: int, name: str, words: Sequence[str]) -> list[str]:
        """The flags of train.py that make a run."""
        size = self.settings["full"].split() if self.full else []
        shared = [*self.settings["flags"].split(), *size, f"--run.root={self.root / 'runs'}"]
        return [*shared, *words, f"--run.seed={seed}", f"--run.name={name}"]


def read_plan(root: Path, full: bool) -> Plan:
    """The plan as bench/real.toml has it."""
    return Plan(root, full, tomllib.loads((HERE / "real.toml").read_text("utf-8")))


# ---- the split -----------------------------------------------------------------------------------


def split(plan: Plan, files: dict[str, str]) -> None:
    """Write data/SOURCE/SLICE.jsonl and split.json. A first human turn that occurs in several sources goes to one slice
    in all; D2 and test have a prompt once. UserError if an earlier call split other files."""
    marks = {
        name: [[f.name, sha256_file(f)] for f in find_files(path, name)]
        for name, path in files.items()
    }
    note = plan.root / "data/split.json"
    if note.is_file():
        if files and plan.counts()["files"] != marks:
            raise UserError(
                f"{note}: was made of other files; give the same ones, or choose another --root"
            )
        return
    if not {"helpful", "harmless"} <= files.keys():
        raise UserError(
            "the first call needs --helpful=FILE and --harmless=FILE, HH-RLHF's files as published"
        )
    found = {name: read_data(path, setting=name) for name, path in files.items()}
    most = {} if plan.full else plan.settings["most"]
    parts = divide(
        {name: pairs for name, (pairs, _) in found.items()}, plan.settings["shares"], most
    )
    for (name, part), pairs in parts.items():
        (plan.root / "data" / name).mkdir(parents=True, exist_ok=True)
        write_rows(plan.root / "data" / name / f"{part}.jsonl", map(row_of, pairs))
    rows = {name: {part: len(parts[name, part]) for part in PARTS} for name in found}
    read = {
        name: {file: str(report) for file, report in reports.items()}
        for name, (_, reports) in found.items()
    }
    write_json(note, {"files": marks, "read": read, "rows": rows})


def divide(
    found: dict[str, list[Pair]], shares: dict[str, Sequence[float]], most: dict[str, int]
) -> dict[tuple[str, str], list[Pair]]:
    """{(source, slice): pairs}, shares being of the first human turns of a source; `most`: rows of a slice at most."""
    where: dict[str, str] = {}
    for name, pairs in found.items():
        mine = dict(zip(PARTS, shares[name], strict=True))
        where |= assign_splits(
            {first_turn(pair) for pair in pairs} - where.keys(), mine, f"real/{name}"
        )
    parts: dict[tuple[str, str], list[Pair]] = {
        (name, part): [] for name in found for part in PARTS
    }
    prompts = set()
    for name, pairs in found.items():
        for pair in pairs:
            part = where.get(first_turn(pair))
            if part and not (part in ("d2", "test") and pair.prompt in prompts):
                parts[name, part].append(pair)
                prompts.add(pair.prompt)
    for key, pairs in parts.items():
        random.Random(f"real/{'/'.join(key)}").shuffle(pairs)
        del pairs[most.get(key[1], len(pairs)) :]
    check_disjoint(parts)
    return parts


def check_disjoint(parts: dict[tuple[str, str], list[Pair]]) -> None:
    """No first human turn stands in two slices, of whatever sources."""
    turns = [
        {first_turn(pair) for (_, part), pairs in parts.items() if part == wanted for pair in pairs}
        for wanted in PARTS
    ]
    assert sum(map(len, turns)) == len(set().union(*turns)), (
        "two slices have a first human turn in common"
    )


def row_of(pair: Pair) -> dict:
    """A pair as a row that train.py reads."""
    prompt = [{"role": message.role, "content": message.content} for message in pair.prompt]
    answers = (
        {"chosen": pair.chosen, "rejected": pair.rejected}
        if pair.rejected
        else {"response": pair.chosen}
    )
    return {"prompt": prompt} | answers


# ---- bases ---------------------------------------------------------------------------------------


def texts_of(plan: Plan, seed: int, base: str) -> list[Example]:
    """What a base reads: both answers of a random share of each source's pre-training pairs."""
    found = []
    for source in plan.counts()["files"]:
        share, rng = plan.settings["texts"][base][source], random.Random(f"{seed}/{base}/{source}")
        pairs, _ = read_data(str(plan.root / "data" / source / "pretrain.jsonl"))
        for pair in (pair for pair in pairs if rng.random() < share):
            found += [
                Example(pair.id, pair.prompt, text, {"file": source})
                for text in (pair.chosen, pair.rejected)
                if text
            ]
    random.Random(f"{seed}/{base}").shuffle(
        found
    )  # a tokenizer made of the first ones knows all sources
    return found


def make_bases(plan: Plan, seed: int) -> None:
    """A run that ends after its bases: the strong one, and three weak ones with sizes and texts of their own."""
    config = plan.config(seed, f"bases-seed={seed}", [f"--data.path={plan.root / 'data'}"])
    configure_torch(config.run.threads)
    texts = {base: plan.settings["texts"][base] for base in base_names(config)}
    source = {
        "files": plan.counts()["files"],
        "shares": plan.settings["shares"],
        "texts": texts,
        "seed": seed,
    }
    prepared = functools.cache(
        lambda: prepare_splits(
            config, {}, {base: texts_of(plan, seed, base) for base in texts}, [], {}
        )
    )
    run = Run(config)
    setup_stages(run, source, prepared)  # only lists the stages
    run.begin()
    bases = setup_stages(run, source, prepared).base_models
    run.end()
    keys = ("counts", "cpu_seconds", "commit")
    write_json(
        run.path / "bases.json",
        {base: {k: made.stage.notes()[k] for k in keys} for base, made in bases.items()},
    )


# ---- what is to be done --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """A process to run, finished when `made` is there."""

    label: str
    command: list[str]
    made: tuple[Path, ...]

    @property
    def finished(self) -> bool:
        return all(file.is_file() for file in self.made)


def slices_of(words: Sequence[str]) -> dict[str, tuple[str, str]]:
    """{setting: (source, slice)} of the data that the words of a case name."""
    named = (
        word.split("=", 1)
        for word in words
        if word.startswith(("--data.path=", "--data.d2=", "--data.test="))
    )
    return {key: tuple(value.split("/")) for key, value in named}


def name_of(case: Case, seed: int) -> str:
    """The folder of a run: its sources, then what it sets."""
    sources = dict.fromkeys(source for source, _ in slices_of(case.flags).values())
    rest = [
        re.sub(r"^--(\w+\.)?", "", word)
        for word in case.flags
        if not word.startswith("--data.") or "noise" in word
    ]
    return "-".join([*sources, *rest, f"seed={seed}"])


def words_of(plan: Plan, case: Case, seed: int) -> list[str]:
    """The flags of a case, with the folders of its data and bases."""
    named, home = slices_of(case.flags), plan.root / "runs" / f"bases-seed={seed}" / "bases"
    data = [
        f"{key}={plan.root / 'data' / source / part}.jsonl" for key, (source, part) in named.items()
    ]
    other = [word for word in case.flags if word.partition("=")[0] not in named]
    count = next(
        (int(word.partition("=")[2]) for word in other if word.startswith("--macpo.teachers=")), 3
    )
    weak = ",".join(str(home / f"weak{k + 1}") for k in range(count))
    given = [
        "--data.shares=0,1,0,0",
        f"--model.student={home / 'strong'}",
        f"--model.teachers={weak}",
    ]
    return plan.words(seed, name_of(case, seed), [*data, *given, *other])


def runs_of(plan: Plan, seed: int) -> dict[str, Case]:
    """{run: case} of all experiments whose files are there, each run once."""
    cases = [
        case for name in plan.experiments for case in plan.cases(name) if not plan.missing(case)
    ]
    return {name_of(case, seed): case for case in cases}


def jobs(plan: Plan, seeds: Sequence[int]) -> Iterator[Job]:
    """Everything, seed by seed: bases, runs, ratings."""
    again = [
        sys.executable,
        "-m",
        "bench.real",
        f"--root={plan.root}",
        *(["--full"] if plan.full else []),
    ]
    for seed in seeds:
        bases = plan.root / "runs" / f"bases-seed={seed}" / "bases.json"
        yield Job(f"bases, seed {seed}", [*again, f"--bases={seed}"], (bases,))
        runs = runs_of(plan, seed)
        for name, case in runs.items():
            command = [sys.executable, str(HERE.parent / "train.py"), *words_of(plan, case, seed)]
            yield Job(name, command, (plan.root / "runs" / name / FINISHED,))
        rated = tuple(plan.rating(name) for name in runs)
        yield Job(f"ratings, seed {seed}", [*again, f"--rate={seed}"], rated)


def work(
    left: Sequence[Job],
    seconds: float,
    run: Callable = run_process,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Do one job after the other for at most so many seconds; returns how many were finished. A job that
    time cuts short is asked to save and end, and goes on at the next call. UserError if one fails."""
    end, started = clock() + seconds, clock()
    for number, job in enumerate(left):
        if clock() >= end:
            return number
        print(
            f"[{number + 1}/{len(left)}, {(clock() - started) / 60:.1f} min] {job.label}",
            flush=True,
        )
        code, said = run(job.command, end)
        if code in STOPPED and clock() >= end:
            return number
        check_ended(job.label, code, said, job.finished)
    return len(left)


def options(argv: Sequence[str]):
    """The command line."""
    parser = ArgParser(
        "python -m bench.real", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    for source in SOURCES:
        parser.add_argument(f"--{source}")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--seeds", type=parse_seeds)
    parser.add_argument("--minutes", type=float, default=8.0)
    for flag in ("--full", "--dry_run", "--collect"):
        parser.add_argument(flag, action="store_true")
    for part in ("--bases", "--rate"):
        parser.add_argument(
            part,
            type=int,
            help="one part, for a seed: what a call starts as processes of their own",
        )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int | None:
    """One call; returns the exit code."""
    words = options(argv)
    plan = read_plan(
        words.root or Path("runs/real-full" if words.full else "runs/real"), words.full
    )
    if words.bases is not None:
        return make_bases(plan, words.bases)
    if words.rate is not None:
        from bench.real_scores import rate

        return rate(plan, words.rate)
    split(plan, {name: path for name in SOURCES if (path := getattr(words, name))})
    every = list(jobs(plan, words.seeds or plan.settings["seeds"]))
    if words.collect:
        from bench.real_scores import collect

        return collect(plan, words.seeds or plan.settings["seeds"])
    left = [job for job in every if not job.finished]
    if not words.dry_run:
        left = left[work(left, 60 * words.minutes) :]
    print(*(job.label for job in left), sep="\n")
    print(f"{len(left)} of {len(every)} left" + ("; the same command goes on" if left else ""))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
