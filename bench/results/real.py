"""MACPO on real dialogues, kept as a benchmark.

    python -m bench.results.real --helpful=FILE --harmless=FILE [--pku=FILE] [--alpaca=FILE]

FILEs (or folders) are HH-RLHF's, PKU-SafeRLHF's and Alpaca's as published. Each is dealt once into
five splits, disjoint by first human turn: text to pre-train on, D1, D2, test, and pairs for
the reward models, which nothing else sees. Bases are made of the first, then every run of
bench/results/real.toml is an ordinary run of train.py. A call ends before 9 minutes and the same
command goes on where it was, until it says that nothing is left; files need be named once only.

--seeds=0,1   --root=runs/real   --minutes=8: when a call ends   --dry_run: what is left
--full: the larger sizes, for a GPU
--collect: write what is finished into assets/results/real.json, for `python -m bench.results`
"""

import functools
import random
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.results.real_plan import HERE, PARTS, SOURCES, Plan, read_plan
from bench.results.real_scores import collect, rate
from minmacpo import UserError
from minmacpo.config.parse import ArgParser
from minmacpo.data.formats import read_data
from minmacpo.data.readers import find_files
from minmacpo.data.records import Example, Pair
from minmacpo.data.splits import assign_splits, first_turn
from minmacpo.evaluation.experiments import check_ended, parse_seeds, run_process
from minmacpo.pipeline.base_models import setup_stages
from minmacpo.pipeline.prepare_data import base_names, prepare_splits
from minmacpo.pipeline.run import FINISHED, Run
from minmacpo.runtime.device import configure_torch
from minmacpo.runtime.files import sha256_file, write_json, write_rows
from minmacpo.runtime.progress import run_main

STOPPED = (143, -15)  # exit codes of a process that was asked to end


# ---- the split ------------------------------------------------------------------------------


def split(plan: Plan, files: dict[str, str]) -> None:
    """Write data/SOURCE/SPLIT.jsonl and split.json.

    Raises:
        UserError: an earlier call split other files.
    """
    checksums = {}
    for source, path in files.items():
        checksums[source] = []
        for file in find_files(path, source):
            checksums[source].append([file.name, sha256_file(file)])

    note = plan.root / "data/split.json"
    if note.is_file():
        if files and plan.counts()["files"] != checksums:
            remedy = "give the same ones, or choose another --root"
            raise UserError(f"{note}: was made of other files; {remedy}")
        return
    if not {"helpful", "harmless"} <= files.keys():
        needed = "--helpful=FILE and --harmless=FILE, HH-RLHF's files as published"
        raise UserError(f"the first call needs {needed}")

    pairs = {}
    reports = {}
    for source, path in files.items():
        pairs[source], reports[source] = read_data(path, setting=source)
    most = {} if plan.full else plan.settings["most"]
    parts = divide(pairs, plan.settings["shares"], most)
    for (source, part), rows in parts.items():
        file = plan.split_path(source, part)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(file, map(row_of, rows))

    read = {}
    counts = {}
    for source in files:
        read[source] = {}
        for file, report in reports[source].items():
            read[source][file] = str(report)
        counts[source] = {}
        for part in PARTS:
            counts[source][part] = len(parts[source, part])
    write_json(note, {"files": checksums, "read": read, "rows": counts})


def divide(
    pairs_of: dict[str, list[Pair]], shares: dict[str, Sequence[float]], most: dict[str, int]
) -> dict[tuple[str, str], list[Pair]]:
    """{(source, split): pairs}.

    A first human turn that occurs in several sources goes to one split in all; D2 and test have a
    prompt once.

    Args:
        pairs_of: the pairs of every source.
        shares: of the first human turns of a source, in the order of PARTS.
        most: rows of a split at most.
    """
    split_of_turn: dict[str, str] = {}
    for source, pairs in pairs_of.items():
        turns = {first_turn(pair) for pair in pairs} - split_of_turn.keys()
        share_of_part = dict(zip(PARTS, shares[source], strict=True))
        split_of_turn |= assign_splits(turns, share_of_part, f"real/{source}")

    parts: dict[tuple[str, str], list[Pair]] = {}
    prompts = set()
    for source, pairs in pairs_of.items():
        for part in PARTS:
            parts[source, part] = []
        for pair in pairs:
            part = split_of_turn.get(first_turn(pair))
            is_repeated = part in ("d2", "test") and pair.prompt in prompts
            if part and not is_repeated:
                parts[source, part].append(pair)
                prompts.add(pair.prompt)

    for (source, part), pairs in parts.items():
        random.Random(f"real/{source}/{part}").shuffle(pairs)
        if part in most:
            del pairs[most[part] :]
    check_disjoint(parts)
    return parts


def check_disjoint(parts: dict[tuple[str, str], list[Pair]]) -> None:
    """No first human turn stands in two splits, of whatever sources."""
    split_of_turn: dict[str, str] = {}
    for (_, part), pairs in parts.items():
        for pair in pairs:
            owner = split_of_turn.setdefault(first_turn(pair), part)
            assert owner == part, "two splits have a first human turn in common"


def row_of(pair: Pair) -> dict:
    """A pair as a row that train.py reads."""
    prompt = [{"role": message.role, "content": message.content} for message in pair.prompt]
    if pair.rejected:
        return {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return {"prompt": prompt, "response": pair.chosen}


# ---- bases ----------------------------------------------------------------------------------


def texts_of(plan: Plan, seed: int, base: str) -> list[Example]:
    """What a base reads: both answers of a random share of each source's pre-training pairs."""
    texts = []
    for source in plan.counts()["files"]:
        share = plan.settings["texts"][base][source]
        rng = random.Random(f"{seed}/{base}/{source}")
        pairs, _ = read_data(str(plan.split_path(source, "pretrain")))
        for pair in pairs:
            if rng.random() >= share:
                continue
            for answer in (pair.chosen, pair.rejected):
                if answer:
                    texts.append(Example(pair.id, pair.prompt, answer, {"file": source}))

    # A tokenizer made of the first ones is to know all sources
    random.Random(f"{seed}/{base}").shuffle(texts)
    return texts


def make_bases(plan: Plan, seed: int) -> None:
    """A run that ends after its bases: the strong one and three weak ones.

    Each has a size and texts of its own.
    """
    config = plan.config(seed, f"bases-seed={seed}", [f"--data.path={plan.root / 'data'}"])
    configure_torch(config.run.threads)
    bases = base_names(config)
    source = {
        "files": plan.counts()["files"],
        "shares": plan.settings["shares"],
        "texts": {base: plan.settings["texts"][base] for base in bases},
        "seed": seed,
    }

    @functools.cache
    def prepared():
        texts = {base: texts_of(plan, seed, base) for base in bases}
        return prepare_splits(config, {}, texts, [], {})

    run = Run(config)
    setup_stages(run, source, prepared)  # only lists the stages
    run.begin()
    models = setup_stages(run, source, prepared).base_models
    run.end()

    summary = {}
    for base, model in models.items():
        notes = model.stage.notes()
        summary[base] = {}
        for name in ("counts", "cpu_seconds", "commit"):
            summary[base][name] = notes[name]
    write_json(run.path / "bases.json", summary)


# ---- what is to be done ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """A process to run, finished when `results` are there."""

    label: str
    command: list[str]
    results: tuple[Path, ...]

    @property
    def finished(self) -> bool:
        return all(file.is_file() for file in self.results)


def jobs(plan: Plan, seeds: Sequence[int]) -> Iterator[Job]:
    """Everything, seed by seed: bases, runs, ratings."""
    this_program = [sys.executable, "-m", "bench.results.real", f"--root={plan.root}"]
    if plan.full:
        this_program.append("--full")
    train = str(HERE.parent.parent / "train.py")

    for seed in seeds:
        bases = plan.bases_path(seed) / "bases.json"
        yield Job(f"bases, seed {seed}", [*this_program, f"--bases={seed}"], (bases,))

        runs = plan.runs(seed)
        for name, case in runs.items():
            command = [sys.executable, train, *plan.words_of(case, seed)]
            yield Job(name, command, (plan.run_path(name) / FINISHED,))

        ratings = tuple(map(plan.rating_path, runs))
        yield Job(f"ratings, seed {seed}", [*this_program, f"--rate={seed}"], ratings)


def work(
    left: Sequence[Job],
    seconds: float,
    run: Callable = run_process,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Do one job after the other for at most so many seconds; returns how many were finished.

    A job that time cuts short is asked to save and end, and goes on at the next call.

    Args:
        run: command, end by the clock -> exit code, what it printed on stderr.

    Raises:
        UserError: a job failed.
    """
    started = clock()
    end = started + seconds
    for number, job in enumerate(left):
        if clock() >= end:
            return number
        minutes = (clock() - started) / 60
        print(f"[{number + 1}/{len(left)}, {minutes:.1f} min] {job.label}", flush=True)
        code, errors = run(job.command, end)
        if code in STOPPED and clock() >= end:
            return number
        check_ended(job.label, code, errors, job.finished)
    return len(left)


def read_options(argv: Sequence[str]) -> Namespace:
    """The command line."""
    parser = ArgParser(
        "python -m bench.results.real",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    for source in SOURCES:
        parser.add_argument(f"--{source}")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--seeds", type=parse_seeds)
    parser.add_argument("--minutes", type=float, default=8.0)
    for flag in ("--full", "--dry_run", "--collect"):
        parser.add_argument(flag, action="store_true")
    for part in ("--bases", "--rate"):
        explanation = "one part, for a seed: what a call starts as processes of their own"
        parser.add_argument(part, type=int, help=explanation)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int | None:
    """One call; returns the exit code."""
    options = read_options(argv)
    usual_root = Path("runs/real-full" if options.full else "runs/real")
    plan = read_plan(options.root or usual_root, options.full)
    if options.bases is not None:
        return make_bases(plan, options.bases)
    if options.rate is not None:
        return rate(plan, options.rate)

    files = {}
    for source in SOURCES:
        if getattr(options, source):
            files[source] = getattr(options, source)
    split(plan, files)

    seeds = options.seeds or plan.settings["seeds"]
    if options.collect:
        return collect(plan, seeds)

    every_job = list(jobs(plan, seeds))
    left = [job for job in every_job if not job.finished]
    if not options.dry_run:
        done = work(left, 60 * options.minutes)
        left = left[done:]
    for job in left:
        print(job.label)
    hint = "; the same command goes on" if left else ""
    print(f"{len(left)} of {len(every_job)} left{hint}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
