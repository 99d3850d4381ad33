"""Many runs under one question: python train.py @experiment-NAME [--seeds=0,1] [--section.key=value]...

A file in presets/experiments names variants by their flags, and may name groups, which are crossed with them. Every
variant is an ordinary run for each seed; finished ones are not redone, so an experiment that was stopped goes on where
it was. At the end it writes results.json and report.html into `<run.root>/experiment-NAME`. The first variant of a
group is what the others of that group are compared with.
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

import numpy as np

from minmacpo import UserError
from minmacpo.config.parse import PRESETS, parse
from minmacpo.config.schema import Config
from minmacpo.evaluation.bootstrap import paired_interval
from minmacpo.evaluation.html import document, forest, grid, tag
from minmacpo.evaluation.table import FinishedRun, gold_by_prompt, make_table, measured, read_run
from minmacpo.evaluation.text_tables import bracketed
from minmacpo.pipeline.run import FINISHED
from minmacpo.pipeline.run_dir import check_folder
from minmacpo.runtime.distributed import launched
from minmacpo.runtime.files import read_json, write_atomic, write_json
from minmacpo.runtime.progress import Signals, aligned

MARK = "@experiment-"


TOLD = (
    "--run.name",
    "--run.seed",
    "--run.method",
    "--method",
    "--stage",
    "--profile",
)  # what an experiment says itself


HEAD = (
    "variant",
    "seeds",
    "student, last round",
    "first variant − it [95 %]",
    "win rate over naive SFT",
    "PGR",
    "teachers",
    "chosen right",
    "any right",
    "collapsed",
    "alarm in",
    "CPU s",
    "tokens",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One variant in one group ("" where there are no groups), and the flags of train.py that make it."""

    group: str
    name: str
    words: list[str]

    @property
    def label(self) -> str:
        return f"{self.group}: {self.name}" if self.group else self.name


@dataclass(frozen=True, slots=True)
class Experiment:
    """A preset of presets/experiments: what is asked, and all cases."""

    name: str
    question: str
    seeds: list[int]
    cases: list[Case]


def read_experiment(name: str) -> Experiment:
    """The experiment of this name; UserError with the nearest one if there is none."""
    names = sorted(file.stem for file in (PRESETS / "experiments").glob("*.toml"))
    if name not in names:
        near = get_close_matches(name, names, 1) or names[:1]
        raise UserError(
            f"{MARK}{name}: no such experiment ({', '.join(names)}); did you mean {near[0]}?"
        )
    file = PRESETS / "experiments" / f"{name}.toml"
    try:
        found = tomllib.loads(file.read_text("utf-8"))
        experiment = Experiment(name, found["question"], found["seeds"], cases_of(found))
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: no experiment: {error}; expected question, seeds, [variants] of flags, perhaps [groups]"
        ) from None
    if not experiment.cases or not experiment.seeds:
        raise UserError(f"{file}: has no variant or no seed; an experiment needs one of each")
    return experiment


def cases_of(found: dict) -> list[Case]:
    """Every variant in every group of an experiment's table."""
    return [
        Case(group, label, shlex.split(f"{shared} {flags}"))
        for group, shared in found.get("groups", {"": ""}).items()
        for label, flags in found["variants"].items()
    ]


def run_experiment(argv: Sequence[str], program: str) -> int:
    """Run what is not finished of the experiment that argv names, with its other words as flags of every run;
    then write and print what was found. `program` is train.py's path."""
    if launched() > 1:
        raise UserError(
            "an experiment is many runs, each in a process of its own; start it without torchrun"
        )
    names = [word.removeprefix(MARK) for word in argv if word.startswith(MARK)]
    given = [word.removeprefix("--seeds=") for word in argv if word.startswith("--seeds=")]
    shared = [
        word for word in argv if not word.startswith((MARK, "--seeds=")) and word != "--dry_run"
    ]
    if len(given) > 1:
        raise UserError(
            f"--seeds={given[-1][:40]}: --seeds is there {len(given)} times; write it once, such as --seeds=0,1"
        )
    if "--seeds" in shared:
        raise UserError("--seeds: write it as one word, such as --seeds=0,1")
    if len(names) != 1:
        raise UserError(f"{' '.join(map(MARK.__add__, names))}: one experiment at a time")
    experiment = read_experiment(names[0])
    check_shared(shared, experiment)
    seeds = seeds_of(given[0]) if given else experiment.seeds
    plan = [
        (seed, case, [*shared, *case.words, f"--run.seed={seed}"])
        for seed in seeds
        for case in experiment.cases
    ]
    configs = [
        parse(words).config for *_, words in plan
    ]  # a wrong flag is an error before anything runs
    check_apart(plan, configs)
    if configs[0].data.path:
        raise UserError(
            "an experiment needs the gold reward of the built-in world; leave out --data.path"
        )
    if "--dry_run" in argv:
        print(
            *(
                f"seed {seed}  {case.label}: {folder(config)}"
                for (seed, case, _), config in zip(plan, configs, strict=True)
            ),
            sep="\n",
        )
        return 0
    compute(plan, configs, program)
    found = gather(experiment, seeds, plan, configs) | {
        "shared": [w for w in shared if not w.startswith("--run.root")]
    }
    place = Path(configs[0].run.root) / f"experiment-{experiment.name}"
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "results.json", found)
    write_atomic(place / "report.html", experiment_page(found))
    print(as_text(found), f"\n\nreport: {place / 'report.html'}", sep="")
    return 0


def check_shared(shared: Sequence[str], experiment: Experiment) -> None:
    """UserError for a flag that an experiment or a case of it sets itself, so that it would not count."""
    mine = {word.partition("=")[0] for case in experiment.cases for word in case.words}
    if odd := [word for word in shared if word.startswith(TOLD) or word.partition("=")[0] in mine]:
        raise UserError(
            f"{odd[0]}: an experiment says this itself; run train.py without it for a single run"
        )


def check_apart(plan: Sequence[tuple[int, Case, list[str]]], configs: Sequence[Config]) -> None:
    """UserError where a file that is laid over makes two cases the same run, or says for all what the cases say."""
    runs: dict[Path, str] = {}
    for (_, case, words), config in zip(plan, configs, strict=True):
        asked = next(
            (w.partition("=")[2] for w in case.words if w.startswith("--method=")), "macpo"
        )
        if config.run.method != asked:
            raise UserError(
                f"run.method = {config.run.method}: an experiment says this itself; leave it out of {shlex.join(words[:1])}"
            )
        if (other := runs.setdefault(folder(config), case.label)) != case.label:
            raise UserError(
                f"{other} and {case.label} would be the same run, {folder(config)}; see the files that are laid over"
            )


def seeds_of(text: str) -> list[int]:
    """The seeds of "0,1"; UserError if it is no such list."""
    if not re.fullmatch(r"\d{1,18}(,\d{1,18})*", text, re.ASCII):
        raise UserError(f"--seeds={text[:40]}: expected whole numbers with commas between them")
    return sorted({int(seed) for seed in text.split(",")})


def folder(config: Config) -> Path:
    """Where a run lies."""
    return Path(config.run.root) / config.run.name


def whole(run: Path) -> bool:
    """Whether a run is finished, and all stages that its table tells of are there still."""
    told = (run / FINISHED).is_file() and read_json(run / FINISHED).get("cost")
    try:
        names = {row["name"] for row in told or ()}
    except (TypeError, KeyError):
        raise UserError(f"{run / FINISHED}: is damaged; delete it, and it is made anew") from None
    return bool(told) and names <= read_run(run).notes.keys()


def compute(
    plan: Sequence[tuple[int, Case, list[str]]], configs: Sequence[Config], program: str
) -> None:
    """Every run that is not finished, one after the other, each a process of its own; UserError if one fails."""
    for config in configs:
        check_folder(
            folder(config), config
        )  # a folder of that name may hold a run of other settings
    left = [i for i, config in enumerate(configs) if not whole(folder(config))]
    started = time.monotonic()
    for number, i in enumerate(left):
        seed, case, words = plan[i]
        spent = time.monotonic() - started
        eta = f", {spent / number * (len(left) - number) / 60:.0f} min left" if number else ""
        print(f"[{number + 1}/{len(left)}{eta}] seed {seed}  {case.label}", flush=True)
        code, said = run_alone([sys.executable, program, *words])
        check_ended(f"seed {seed}, {case.label}", code, said)


def check_ended(label: str, code: int, said: str, made: bool = True) -> None:
    """UserError with the last line that a process said where it failed, or has not `made` what it should."""
    if code or not made:
        last = said.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"{label}: exit {code}: {last[0]}")


def run_alone(command: list[str], end: float = math.inf) -> tuple[int, str]:
    """(exit code, what it said on stderr) of a process; a signal to this one is handed on once, so that the other can
    save, and acts when that has ended. At `end` (time.monotonic) it is asked to stop in the same way."""
    signals, told, said = Signals(), False, None
    before = {number: signal.getsignal(number) for number in Signals.numbers}
    signals.install()
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        while said is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                said = process.communicate(timeout=0.2)[1]
            if not told and (signals.number is not None or time.monotonic() > end):
                process.send_signal(signals.number or signal.SIGTERM)
                told = True
    for number, handler in before.items():
        signal.signal(number, handler)
    signals.check()
    return process.returncode, said


# ---- what was found ----------------------------------------------------------------------------
Golds = dict[int, np.ndarray]  # by seed, the gold reward of every test prompt


def golds(runs: dict[int, FinishedRun], agent: str, t: int | None = None) -> Golds:
    """Gold reward by prompt, per seed; "teachers" is their mean; at round t, or the last one measured before."""
    out = {}
    for seed, run in runs.items():
        names = run.teachers if agent == "teachers" else [agent]
        when = [max(r for r in measured(run, name) if t is None or r <= t) for name in names]
        out[seed] = np.mean(
            [gold_by_prompt(run, *known)["gold"] for known in zip(names, when, strict=True)], 0
        )
    return out


def with_interval(arrays: list[np.ndarray]) -> list[float]:
    """[mean, low, high] of paired values over seeds and prompts; [] of nothing."""
    return (
        [float(np.mean([a.mean() for a in arrays])), *paired_interval(arrays)]
        if arrays and all(map(len, arrays))
        else []
    )


def wins(mine: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Per prompt 1 where the gold reward is higher, 0.5 where it is equal, 0 where it is lower."""
    return (mine > other + 1e-9) + 0.5 * (abs(mine - other) <= 1e-9)


def first_alarm(table: dict) -> int | None:
    """The first round in which the monitor warned of the student."""
    return next(
        (row["round"] for row in table["monitor"] if row["agent"] == "student" and row["alarms"]),
        None,
    )


def collapsed(curve: Sequence[float]) -> bool:
    """Whether the last of an agent's gold rewards by round is below 97 % of the best."""
    return bool(curve[-1] < 0.97 * max(curve))


def variant_row(case: Case, runs: dict[int, FinishedRun], first: Golds) -> dict:
    """What the runs of one variant gave, by seed; `first` is the student of its group's first variant."""
    last, naive, tables = (
        golds(runs, "student"),
        golds(runs, "student", 0),
        [make_table(r) for r in runs.values()],
    )
    rounds = max(run.config.macpo.rounds for run in runs.values())
    chosen = [table["filter"][-1] for table in tables if table["filter"]]
    students = [[row for row in table["rows"] if row["agent"] == "student"] for table in tables]
    pgr = [rows[-1]["pgr"] for rows in students if "pgr" in rows[-1]]
    alarms = [first_alarm(table) for table in tables]
    kept = [
        golds({s: r}, "student", alarm and alarm - 1)[s].mean()
        for (s, r), alarm in zip(runs.items(), alarms, strict=True)
    ]
    cost = [
        (s["cpu_seconds"], s["tokens"] or 0, not s["linked_from"])
        for table in tables
        for s in table["cost"]
    ]
    return {
        "group": case.group,
        "name": case.name,
        "flags": shlex.join(case.words),
        "seeds": [*runs],
        "by_round": [
            float(np.mean([g.mean() for g in golds(runs, "student", t).values()]))
            for t in range(rounds + 1)
        ],
        "by_seed": [float(g.mean()) for g in last.values()],
        "student": float(np.mean([g.mean() for g in last.values()])),
        "difference": with_interval([first[s] - last[s] for s in last if s in first]),
        "wins": with_interval([wins(last[s], naive[s]) for s in last]),
        "gain": with_interval([last[s] - naive[s] for s in last]),
        "alarms": alarms,
        "kept": float(np.mean(kept)),  # kept: what macpo.stop = rollback ends with
        "collapsed": [
            collapsed(
                [g.mean() for t in range(rounds + 1) for g in [golds({s: r}, "student", t)[s]]]
            )
            for s, r in runs.items()
        ],
        "teachers": float(np.mean([g.mean() for g in golds(runs, "teachers").values()])),
        "lengths": [float(np.mean([rows[i]["length"] for rows in students])) for i in (0, -1)],
        "pgr": float(np.mean(pgr)) if pgr and None not in pgr else None,
        **{
            key: float(np.mean([row[key] for row in chosen]))
            if chosen and None not in [row.get(key) for row in chosen]
            else None
            for key in ("right", "offered", "different")
        },
        "cpu_seconds": sum(seconds for seconds, *_ in cost) / len(runs),
        "tokens": sum(n for _, n, _ in cost) / len(runs),
        "spent": sum(seconds for seconds, _, own in cost if own)
        / len(runs),  # beside what other runs had computed
    }


def gather(experiment: Experiment, seeds: Sequence[int], plan, configs: Sequence[Config]) -> dict:
    """The whole result as JSON: one row per variant, from the finished runs on the disk."""
    runs: dict[str, dict[int, FinishedRun]] = {}
    for (seed, case, _), config in zip(plan, configs, strict=True):
        runs.setdefault(case.label, {})[seed] = read_run(folder(config))
    rows, first = [], {}
    for case in experiment.cases:
        mine = first.setdefault(case.group, golds(runs[case.label], "student"))
        rows.append(variant_row(case, runs[case.label], mine))
    return {
        "name": experiment.name,
        "question": experiment.question,
        "seeds": list(seeds),
        "variants": rows,
    }


def label_of(row: dict) -> str:
    """A row's group and name."""
    return Case(row.get("group", ""), row["name"], []).label


def cells(row: dict) -> list[str]:
    """One row of the table as text."""

    def number(value: float | None, form: str = ".3f") -> str:
        return "–" if value is None else format(value, form)

    mean, *bounds = row["difference"] or [0.0]
    apart = bracketed([mean, *bounds], "+.3f") if any(bounds) else ""
    return [
        label_of(row),
        str(len(row["seeds"])),
        number(row["student"]),
        apart,
        bracketed(row["wins"]),
        number(row["pgr"], ".2f"),
        number(row["teachers"]),
        number(row["right"], ".0%"),
        number(row["offered"], ".0%"),
        f"{sum(row['collapsed'])} of {len(row['seeds'])}",
        ", ".join(str(t or "–") for t in row["alarms"]),
        number(row["cpu_seconds"], ",.0f"),
        number(row["tokens"], ",.0f"),
    ]


def as_text(found: dict) -> str:
    """The table for a terminal."""
    return aligned(HEAD, [*map(cells, found["variants"])])


def experiment_page(found: dict) -> str:
    """The report: the question, a picture of all variants, the table, the student by round."""
    rows = found["variants"]
    gains = {label_of(row): row["gain"] for row in rows}
    rounds = range(max(len(row["by_round"]) for row in rows))
    curve = [[label_of(row), *(f"{v:.3f}" for v in row["by_round"])] for row in rows]
    seeds = [[label_of(row), *(f"{v:.3f}" for v in row["by_seed"])] for row in rows]
    return document(
        "experiment.html",
        name=[f"experiment: {found['name']}"],
        question=[found["question"]],
        picture=[forest("Gain of the student's gold reward over naive SFT", gains)],
        table=[grid(HEAD, map(cells, rows))],
        rounds=[grid(["student", *(f"round {t}" for t in rounds)], curve)],
        seeds=[grid(["student, last round", *(f"seed {s}" for s in found["seeds"])], seeds)],
        flags=[
            grid(
                ["variant", "flags of train.py"],
                [[label_of(r), tag("code", r["flags"] or "none")] for r in rows],
            )
        ],
    )
