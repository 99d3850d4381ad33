"""Many runs under one question: python train.py @experiment-NAME [--seeds=0,1] [--KEY=VALUE]...

A file in presets/experiments names variants by their flags, and may name groups, which are crossed
with them. Every variant is an ordinary run for each seed; finished ones are not redone, so that an
experiment that was stopped goes on where it was. At the end it writes results.json and report.html
into `<run.root>/experiment-NAME`. The first variant of a group is what the others of that group are
compared with.
"""

import contextlib
import math
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from minmacpo import UserError
from minmacpo.config.parse import PRESETS, parse
from minmacpo.config.schema import Config
from minmacpo.evaluation.experiment_results import (
    RunOfSeed,
    experiment_page,
    format_results,
    gold_of_seed,
    variant_measures,
)
from minmacpo.evaluation.finished_run import read_run
from minmacpo.pipeline.run import FINISHED
from minmacpo.pipeline.run_dir import check_folder
from minmacpo.runtime.distributed import launched_world_size
from minmacpo.runtime.files import read_json, write_atomic, write_json
from minmacpo.runtime.progress import Signals

PREFIX = "@experiment-"

# What an experiment sets itself, or what is no setting of its runs
OWN_FLAGS = ("--run.name", "--run.seed", "--run.method", "--method", "--stage", "--profile")

POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Case:
    """A variant in a group, and the flags of train.py that make it."""

    group: str  # "" where there are no groups
    name: str
    flags: list[str]

    @property
    def label(self) -> str:
        """What the case is called in the table."""
        if self.group:
            return f"{self.group}: {self.name}"
        return self.name


@dataclass(frozen=True, slots=True)
class Experiment:
    """A preset of presets/experiments: what is asked, and all cases."""

    name: str
    question: str
    seeds: list[int]
    cases: list[Case]


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of an experiment."""

    seed: int
    case: Case
    words: list[str]  # the command line of train.py
    config: Config

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return Path(self.config.run.root) / self.config.run.name


@dataclass(frozen=True, slots=True)
class ExperimentCommand:
    """The command line of an experiment."""

    experiment: Experiment
    seeds: list[int]
    shared: list[str]  # flags of every run
    dry_run: bool


def run_experiment(argv: Sequence[str], program: str) -> int:
    """Run what is not finished of an experiment, then write and print its results.

    Args:
        argv: names the experiment; its other words are flags of every run.
        program: the path of train.py.

    Returns:
        The exit code.
    """
    if launched_world_size() > 1:
        raise UserError(
            "an experiment is many runs, each in a process of its own; start it without torchrun"
        )
    command = parse_command(argv)
    plan = plan_runs(command)
    if command.dry_run:
        for run in plan:
            print(f"seed {run.seed}  {run.case.label}: {run.folder}")
        return 0

    # --- Run, and read back what the runs came to
    run_unfinished(plan, program)
    results = gather(command.experiment, command.seeds, plan)
    # Where runs lie says nothing about them, and the same results should be the same file anywhere
    results["shared"] = [flag for flag in command.shared if not flag.startswith("--run.root")]

    # --- Write it beside the runs
    folder = Path(plan[0].config.run.root) / f"experiment-{command.experiment.name}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    page = folder / "report.html"
    write_atomic(page, experiment_page(results))
    print(f"{format_results(results)}\n\nreport: {page}")
    return 0


# ---- what is asked ----------------------------------------------------------------------------


def parse_command(argv: Sequence[str]) -> ExperimentCommand:
    """The command line of an experiment; UserError if it makes no sense."""
    # --- What each word is
    names = []
    seed_lists = []
    shared = []
    for word in argv:
        if word.startswith(PREFIX):
            names.append(word.removeprefix(PREFIX))
        elif word.startswith("--seeds="):
            seed_lists.append(word.removeprefix("--seeds="))
        elif word != "--dry_run":
            shared.append(word)

    # --- What cannot be meant
    if len(seed_lists) > 1:
        raise UserError(
            f"--seeds={seed_lists[-1][:40]}: --seeds is there {len(seed_lists)} times; "
            "write it once, such as --seeds=0,1"
        )
    if "--seeds" in shared:
        raise UserError("--seeds: write it as one word, such as --seeds=0,1")
    if len(names) != 1:
        raise UserError(f"{' '.join(PREFIX + name for name in names)}: one experiment at a time")

    # --- What is asked for
    experiment = read_experiment(names[0])
    check_shared(shared, experiment)
    seeds = experiment.seeds
    if seed_lists:
        seeds = parse_seeds(seed_lists[0])
    return ExperimentCommand(experiment, seeds, shared, "--dry_run" in argv)


def parse_seeds(text: str) -> list[int]:
    """The seeds of "0,1"; UserError if it is no such list."""
    if not re.fullmatch(r"\d{1,18}(,\d{1,18})*", text, re.ASCII):
        raise UserError(f"--seeds={text[:40]}: expected whole numbers with commas between them")
    return sorted({int(seed) for seed in text.split(",")})


def read_experiment(name: str) -> Experiment:
    """The experiment of this name; UserError with the nearest one if there is none."""
    folder = PRESETS / "experiments"
    names = sorted(file.stem for file in folder.glob("*.toml"))
    if name not in names:
        near = get_close_matches(name, names, 1) or names[:1]
        raise UserError(
            f"{PREFIX}{name}: no such experiment ({', '.join(names)}); did you mean {near[0]}?"
        )
    file = folder / f"{name}.toml"
    try:
        values = tomllib.loads(file.read_text("utf-8"))
        experiment = Experiment(name, values["question"], values["seeds"], cases_of(values))
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: no experiment: {error}; expected question, seeds, [variants] of flags, "
            "perhaps [groups]"
        ) from None
    if not experiment.cases or not experiment.seeds:
        raise UserError(f"{file}: has no variant or no seed; an experiment needs one of each")
    return experiment


def cases_of(values: dict) -> list[Case]:
    """Every variant in every group of an experiment's file."""
    cases = []
    no_groups = {"": ""}
    for group, group_flags in values.get("groups", no_groups).items():
        for name, flags in values["variants"].items():
            cases.append(Case(group, name, shlex.split(f"{group_flags} {flags}")))
    return cases


def check_shared(shared: Sequence[str], experiment: Experiment) -> None:
    """UserError for a flag that an experiment or a case of it sets itself: it would not count."""
    case_settings = set()
    for case in experiment.cases:
        case_settings.update(flag.partition("=")[0] for flag in case.flags)
    for flag in shared:
        if flag.startswith(OWN_FLAGS) or flag.partition("=")[0] in case_settings:
            raise UserError(
                f"{flag}: an experiment says this itself; run train.py without it for a single run"
            )


def plan_runs(command: ExperimentCommand) -> list[PlannedRun]:
    """Every case with every seed; a wrong flag is a UserError before anything runs."""
    plan = []
    for seed in command.seeds:
        for case in command.experiment.cases:
            words = [*command.shared, *case.flags, f"--run.seed={seed}"]
            config = parse(words).config
            plan.append(PlannedRun(seed, case, words, config))
    check_distinct(plan)
    if plan[0].config.data.path:
        raise UserError(
            "an experiment needs the gold reward of the built-in world; leave out --data.path"
        )
    return plan


def check_distinct(plan: Sequence[PlannedRun]) -> None:
    """UserError where a file that is laid over undoes what tells the cases apart."""
    label_of_folder: dict[Path, str] = {}
    for run in plan:
        # A case that names no method means MACPO, but a file may say another one
        method = "macpo"
        for flag in run.case.flags:
            if flag.startswith("--method="):
                method = flag.partition("=")[2]
        if run.config.run.method != method:
            raise UserError(
                f"run.method = {run.config.run.method}: an experiment says this itself; "
                f"leave it out of {shlex.join(run.words[:1])}"
            )

        # A run is named after what its flags change in the files, so that a case whose flags a file
        # says already is the same run as the case without them
        label = run.case.label
        other = label_of_folder.setdefault(run.folder, label)
        if other != label:
            raise UserError(
                f"{other} and {label} would be the same run, {run.folder}; "
                "see the files that are laid over"
            )


# ---- running ----------------------------------------------------------------------------------


def run_unfinished(plan: Sequence[PlannedRun], program: str) -> None:
    """Compute every run that is not finished, one after the other; UserError if one fails."""
    for run in plan:
        check_folder(run.folder, run.config)  # it may hold a run of other settings
    unfinished = [run for run in plan if not is_complete(run.folder)]
    started = time.monotonic()
    for number, run in enumerate(unfinished):
        eta = ""
        if number:  # the first run has nothing to go by
            seconds_per_run = (time.monotonic() - started) / number
            minutes_left = seconds_per_run * (len(unfinished) - number) / 60
            eta = f", {minutes_left:.0f} min left"
        count = f"[{number + 1}/{len(unfinished)}{eta}]"
        print(f"{count} seed {run.seed}  {run.case.label}", flush=True)
        code, stderr = run_process([sys.executable, program, *run.words])
        check_ended(f"seed {run.seed}, {run.case.label}", code, stderr)


def is_complete(folder: Path) -> bool:
    """Whether a run is finished, and all stages that its table tells of are there still."""
    if not (folder / FINISHED).is_file():
        return False
    cost = read_json(folder / FINISHED).get("cost")
    try:
        names = {row["name"] for row in cost or ()}
    except (TypeError, KeyError):
        raise UserError(
            f"{folder / FINISHED}: is damaged; delete it, and it is made anew"
        ) from None
    return bool(names) and names <= read_run(folder).metadata.keys()


def check_ended(label: str, code: int, stderr: str, made: bool = True) -> None:
    """UserError with the last line of stderr where a process failed, or `made` nothing."""
    if code or not made:
        last = stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"{label}: exit {code}: {last[0]}")


def run_process(command: list[str], end: float = math.inf) -> tuple[int, str]:
    """Run a process; returns its exit code and what it wrote to stderr.

    A signal to this process is handed on once, so that the other can save its work; it acts here
    when the other has ended.

    Args:
        end: the time of time.monotonic() at which the process is asked to stop.
    """
    # --- Take over the signals, remembering who had them
    signals = Signals()
    handlers = {number: signal.getsignal(number) for number in Signals.numbers}
    signals.install()

    # --- Wait for the process, looking now and then whether it is to stop
    is_told = False
    stderr = None
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C in a terminal reaches it through this process alone
    ) as process:
        while stderr is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                stderr = process.communicate(timeout=POLL_SECONDS)[1]
            is_over = signals.number is not None or time.monotonic() > end
            if is_over and not is_told:
                process.send_signal(signals.number or signal.SIGTERM)
                is_told = True

    # --- Give the signals back, and act on one that has come
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signals.check()
    return process.returncode, stderr


# ---- results ----------------------------------------------------------------------------------


def gather(experiment: Experiment, seeds: Sequence[int], plan: Sequence[PlannedRun]) -> dict:
    """The whole result as JSON: one row per variant, from the finished runs on the disk."""
    runs_of: dict[str, RunOfSeed] = {}  # by the label of a case
    for planned in plan:
        runs_of.setdefault(planned.case.label, {})[planned.seed] = read_run(planned.folder)
    first_of_group = {}
    rows = []
    for case in experiment.cases:
        runs = runs_of[case.label]
        first = first_of_group.setdefault(case.group, gold_of_seed(runs, "student"))
        row = {"group": case.group, "name": case.name, "flags": shlex.join(case.flags)}
        rows.append(row | variant_measures(runs, first))
    return {
        "name": experiment.name,
        "question": experiment.question,
        "seeds": list(seeds),
        "variants": rows,
    }
