"""What the runs of an experiment come to: one row per variant, as JSON, text and a page."""

from collections.abc import Sequence

import numpy as np

from minmacpo.evaluation.bootstrap import paired_interval
from minmacpo.evaluation.charts import forest
from minmacpo.evaluation.finished_run import FinishedRun
from minmacpo.evaluation.gold import gold_by_prompt
from minmacpo.evaluation.html import document, grid, tag
from minmacpo.evaluation.table import make_table
from minmacpo.evaluation.text_tables import (
    NOTHING,
    TextTable,
    bracketed,
    fit_width,
    left_out_note,
    percent,
)
from minmacpo.runtime.progress import aligned

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

COLLAPSED_BELOW = 0.97  # of the best round's gold reward

GoldOfSeed = dict[int, np.ndarray]  # by seed, the gold reward of every test prompt
RunOfSeed = dict[int, FinishedRun]


# ---- one variant ------------------------------------------------------------------------------


def variant_measures(runs: RunOfSeed, first: GoldOfSeed) -> dict:
    """What the runs of one variant gave.

    Args:
        first: the student of the first variant of the same group.
    """
    tables = [make_table(run) for run in runs.values()]
    students = [student_rows(table) for table in tables]
    return (
        {"seeds": list(runs)}
        | student_gold(runs, first)
        | monitor_result(runs, [first_alarm(table) for table in tables])
        | {
            "teachers": mean_gold(gold_of_seed(runs, "teachers")),
            "lengths": [
                float(np.mean([rows[0]["length"] for rows in students])),
                float(np.mean([rows[-1]["length"] for rows in students])),
            ],
            "pgr": last_pgr(tables),
        }
        | last_filter(tables)
        | mean_cost(tables)
    )


def student_rows(table: dict) -> list[dict]:
    """The rows of the student in a run's table, in the order of its rounds."""
    return [row for row in table["rows"] if row["agent"] == "student"]


def last_pgr(tables: Sequence[dict]) -> float | None:
    """The mean PGR of the last students; None where one is not known, or there is none."""
    values = []
    for table in tables:
        last = student_rows(table)[-1]
        if "pgr" in last:  # a run without a ceiling has none
            values.append(last["pgr"])
    return mean_or_none(values)


def student_gold(runs: RunOfSeed, first: GoldOfSeed) -> dict:
    """The student's gold reward by round and seed, beside the first variant and naive SFT."""
    rounds = max(run.config.macpo.rounds for run in runs.values())
    by_round = [gold_of_seed(runs, "student", t) for t in range(rounds + 1)]
    naive = by_round[0]
    last = gold_of_seed(runs, "student")
    is_collapsed = []
    for seed in runs:
        is_collapsed.append(has_collapsed([gold[seed].mean() for gold in by_round]))
    return {
        "by_round": [mean_gold(gold) for gold in by_round],
        "by_seed": [float(gold.mean()) for gold in last.values()],
        "student": mean_gold(last),
        "difference": mean_with_interval(
            [first[seed] - last[seed] for seed in last if seed in first]
        ),
        "wins": mean_with_interval([win_by_prompt(last[seed], naive[seed]) for seed in last]),
        "gain": mean_with_interval([last[seed] - naive[seed] for seed in last]),
        "collapsed": is_collapsed,
    }


def monitor_result(runs: RunOfSeed, alarms: Sequence[int | None]) -> dict:
    """When the monitor warned, by seed, and the gold reward of the round before: what it keeps."""
    kept = []
    for (seed, run), alarm in zip(runs.items(), alarms, strict=True):
        last_good = None if alarm is None else alarm - 1
        kept.append(gold_of_seed({seed: run}, "student", last_good)[seed].mean())
    return {"alarms": list(alarms), "kept": float(np.mean(kept))}


def last_filter(tables: Sequence[dict]) -> dict:
    """What the filter did in the last round; None where a run does not know it."""
    rows = [table["filter"][-1] for table in tables if table["filter"]]
    return {
        key: mean_or_none([row.get(key) for row in rows])
        for key in ("right", "offered", "different")
    }


def mean_cost(tables: Sequence[dict]) -> dict:
    """What a run cost; "spent" is what it had to compute beside the stages of other runs."""
    cpu_seconds = 0.0
    tokens = 0
    spent = 0.0
    for table in tables:
        for stage in table["cost"]:
            cpu_seconds += stage["cpu_seconds"]
            tokens += stage["tokens"] or 0
            if not stage["linked_from"]:
                spent += stage["cpu_seconds"]
    count = len(tables)
    return {"cpu_seconds": cpu_seconds / count, "tokens": tokens / count, "spent": spent / count}


def gold_of_seed(runs: RunOfSeed, agent: str, t: int | None = None) -> GoldOfSeed:
    """Gold reward by prompt of an agent, or of the mean of the "teachers", per seed.

    Args:
        t: the round, or the last one measured before it; None for the last one of all.
    """
    gold = {}
    for seed, run in runs.items():
        agents = run.teachers if agent == "teachers" else [agent]
        values = []
        for name in agents:
            rounds = [r for r in run.measured_rounds(name) if t is None or r <= t]
            values.append(gold_by_prompt(run, name, max(rounds)))
        gold[seed] = np.mean(values, axis=0)
    return gold


def mean_gold(gold: GoldOfSeed) -> float:
    """The mean over seeds of the mean over prompts."""
    return float(np.mean([values.mean() for values in gold.values()]))


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean; None of nothing, and where a value is None."""
    if not values or None in values:
        return None
    return float(np.mean(values))


def mean_with_interval(values_of_seeds: Sequence[np.ndarray]) -> list[float]:
    """[mean, low, high] of paired values over seeds and prompts; [] of nothing."""
    if not values_of_seeds or not all(len(values) for values in values_of_seeds):
        return []
    mean = float(np.mean([values.mean() for values in values_of_seeds]))
    return [mean, *paired_interval(values_of_seeds)]


def win_by_prompt(values: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 where a reward is higher than the other, 0.5 where they are equal, 0 elsewhere, (N,)."""
    is_equal = abs(values - other) <= 1e-9  # means of the same rewards differ in their last bits
    is_higher = values > other + 1e-9
    return is_higher + 0.5 * is_equal


def first_alarm(table: dict) -> int | None:
    """The first round in which the monitor warned of the student."""
    for row in table["monitor"]:
        if row["agent"] == "student" and row["alarms"]:
            return row["round"]
    return None


def has_collapsed(gold_by_round: Sequence[float]) -> bool:
    """Whether the last round's gold reward is far below the best one's."""
    return bool(gold_by_round[-1] < COLLAPSED_BELOW * max(gold_by_round))


# ---- as text and as a page --------------------------------------------------------------------


def label_of(row: dict) -> str:
    """A row's group and name."""
    return f"{row['group']}: {row['name']}" if row.get("group") else row["name"]


def result_cells(row: dict) -> list[str]:
    """One row of the table as text."""
    difference = ""  # the first variant has none to itself
    if row["difference"] and any(row["difference"][1:]):
        difference = bracketed(row["difference"], "+.3f")
    pgr = NOTHING if row["pgr"] is None else f"{row['pgr']:.2f}"
    alarms = [NOTHING if alarm is None else str(alarm) for alarm in row["alarms"]]
    return [
        label_of(row),
        str(len(row["seeds"])),
        f"{row['student']:.3f}",
        difference,
        bracketed(row["wins"]),
        pgr,
        f"{row['teachers']:.3f}",
        percent(row["right"]),
        percent(row["offered"]),
        f"{sum(row['collapsed'])} of {len(row['seeds'])}",
        ", ".join(alarms),
        f"{row['cpu_seconds']:,.0f}",
        f"{row['tokens']:,.0f}",
    ]


def format_results(results: dict) -> str:
    """The table for a terminal; a line says what it leaves out."""
    table = TextTable(list(HEAD), [result_cells(row) for row in results["variants"]])
    narrow = fit_width(table, HEAD[1:])
    left_out = [heading for heading in HEAD if heading not in narrow.head]
    text = aligned(narrow.head, narrow.rows)
    return f"{text}\n\n{left_out_note(left_out)}" if left_out else text


def experiment_page(results: dict) -> str:
    """The report: the question, a picture of all variants, the table, the student by round."""
    rows = results["variants"]
    gains = {label_of(row): row["gain"] for row in rows}
    longest = max(len(row["by_round"]) for row in rows)
    by_round = []
    by_seed = []
    flags = []
    for row in rows:
        label = label_of(row)
        by_round.append([label, *(f"{value:.3f}" for value in row["by_round"])])
        by_seed.append([label, *(f"{value:.3f}" for value in row["by_seed"])])
        flags.append([label, tag("code", row["flags"] or "none")])
    round_head = ["student", *(f"round {t}" for t in range(longest))]
    seed_head = ["student, last round", *(f"seed {seed}" for seed in results["seeds"])]
    return document(
        "experiment.html",
        name=[f"experiment: {results['name']}"],
        question=[results["question"]],
        picture=[forest("Gain of the student's gold reward over naive SFT", gains)],
        table=[grid(HEAD, [result_cells(row) for row in rows])],
        rounds=[grid(round_head, by_round)],
        seeds=[grid(seed_head, by_seed)],
        flags=[grid(["variant", "flags of train.py"], flags)],
    )
