"""What the runs of an experiment come to: one row per variant, as JSON, text and a page."""

from collections.abc import Sequence

import numpy as np

from minmacpo.evaluation.bootstrap import mean_of_means, paired_interval
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
    missing_headings,
    percent,
    three_decimals,
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
    measures = {"seeds": list(runs)}
    measures |= student_gold(runs, first)
    measures |= monitor_result(runs, tables)
    measures["teachers"] = mean_gold(gold_of_seed(runs, "teachers"))
    measures["lengths"] = student_lengths(tables)
    measures["pgr"] = last_pgr(tables)
    measures |= last_filter(tables)
    measures |= mean_cost(tables)
    return measures


def student_rows(table: dict) -> list[dict]:
    """The rows of the student in a run's table, in the order of its rounds."""
    return [row for row in table["rows"] if row["agent"] == "student"]


def student_lengths(tables: Sequence[dict]) -> list[float]:
    """[first, last]: how long the student's answers were in characters, means over runs."""
    first_lengths = []
    last_lengths = []
    for table in tables:
        rows = student_rows(table)
        first_lengths.append(rows[0]["length"])
        last_lengths.append(rows[-1]["length"])
    return [float(np.mean(first_lengths)), float(np.mean(last_lengths))]


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
    # By round; a run that ended before the last round counts there with the last one it has
    rounds = max(run.config.macpo.rounds for run in runs.values())
    gold_by_round = []
    for t in range(rounds + 1):
        gold_by_round.append(gold_of_seed(runs, "student", t))
    naive = gold_by_round[0]  # the student of round 0 is trained by naive SFT alone
    last = gold_of_seed(runs, "student")

    # By seed, the same prompts under this student and another one
    differences = []
    wins = []
    gains = []
    is_collapsed = []
    for seed, gold in last.items():
        if seed in first:
            differences.append(first[seed] - gold)
        wins.append(win_by_prompt(gold, naive[seed]))
        gains.append(gold - naive[seed])
        is_collapsed.append(has_collapsed([of_round[seed].mean() for of_round in gold_by_round]))

    return {
        "by_round": [mean_gold(gold) for gold in gold_by_round],
        "by_seed": [float(gold.mean()) for gold in last.values()],
        "student": mean_gold(last),
        "difference": mean_with_interval(differences),
        "wins": mean_with_interval(wins),
        "gain": mean_with_interval(gains),
        "collapsed": is_collapsed,
    }


def monitor_result(runs: RunOfSeed, tables: Sequence[dict]) -> dict:
    """When the monitor warned, by seed, and the gold reward of the round before: what it keeps."""
    alarms = []
    kept = []
    for (seed, run), table in zip(runs.items(), tables, strict=True):
        alarm = first_alarm(table)
        last_good = None  # without an alarm, that is the last round
        if alarm is not None:
            last_good = alarm - 1
        gold = gold_of_seed({seed: run}, "student", last_good)
        alarms.append(alarm)
        kept.append(gold[seed].mean())
    return {"alarms": alarms, "kept": float(np.mean(kept))}


def last_filter(tables: Sequence[dict]) -> dict:
    """What the filter did in the last round; None where a run does not know it."""
    rows = [table["filter"][-1] for table in tables if table["filter"]]
    means = {}
    for key in ("right", "offered", "different"):
        values = [row.get(key) for row in rows]
        means[key] = mean_or_none(values)
    return means


def mean_cost(tables: Sequence[dict]) -> dict:
    """What a run cost; "spent" is what it had to compute beside the stages of other runs."""
    cpu_seconds = 0.0
    tokens = 0
    spent = 0.0
    for table in tables:
        for stage in table["cost"]:
            cpu_seconds += stage["cpu_seconds"]
            tokens += stage["tokens"] or 0  # None for a stage without a model
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
        agents = [agent]
        if agent == "teachers":
            agents = run.teachers
        values = []  # of each agent, (prompts,)
        for name in agents:
            rounds = [r for r in run.measured_rounds(name) if t is None or r <= t]
            values.append(gold_by_prompt(run, name, max(rounds)))
        gold[seed] = np.mean(values, axis=0)
    return gold


def mean_gold(gold: GoldOfSeed) -> float:
    """The mean over seeds of the mean over prompts."""
    return mean_of_means(list(gold.values()))


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean; None of nothing, and where a value is None."""
    if not values or None in values:
        return None
    return float(np.mean(values))


def mean_with_interval(values_of_seeds: Sequence[np.ndarray]) -> list[float]:
    """[mean, low, high] of paired values over seeds and prompts; [] of nothing."""
    if not values_of_seeds or not all(map(len, values_of_seeds)):
        return []
    return [mean_of_means(values_of_seeds), *paired_interval(values_of_seeds)]


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
    if row.get("group"):
        return f"{row['group']}: {row['name']}"
    return row["name"]


def result_cells(row: dict) -> list[str]:
    """One row of the table as text."""
    # Exact zeros on both sides are those of the first variant, which is compared with itself
    difference = ""
    if row["difference"] and any(row["difference"][1:]):
        difference = bracketed(row["difference"], "+.3f")

    pgr = NOTHING
    if row["pgr"] is not None:
        pgr = f"{row['pgr']:.2f}"

    alarms = []  # the round of each seed's first one
    for alarm in row["alarms"]:
        alarms.append(NOTHING if alarm is None else str(alarm))

    seeds = len(row["seeds"])
    return [
        label_of(row),
        str(seeds),
        f"{row['student']:.3f}",
        difference,
        bracketed(row["wins"]),
        pgr,
        f"{row['teachers']:.3f}",
        percent(row["right"]),
        percent(row["offered"]),
        f"{sum(row['collapsed'])} of {seeds}",
        ", ".join(alarms),
        f"{row['cpu_seconds']:,.0f}",
        f"{row['tokens']:,.0f}",
    ]


def format_results(results: dict) -> str:
    """The table for a terminal; a line says what it leaves out."""
    table = TextTable(list(HEAD), [result_cells(row) for row in results["variants"]])
    narrow = fit_width(table, HEAD[1:])
    text = aligned(narrow.head, narrow.rows)
    left_out = missing_headings(table, narrow)
    if left_out:
        text += f"\n\n{left_out_note(left_out)}"
    return text


def experiment_page(results: dict) -> str:
    """The report: the question, a picture of all variants, the table, the student by round."""
    # --- The variants, one row in each table
    gains = {}
    cells = []
    by_round = []
    by_seed = []
    flags = []
    for row in results["variants"]:
        label = label_of(row)
        gains[label] = row["gain"]
        cells.append(result_cells(row))
        by_round.append([label, *three_decimals(row["by_round"])])
        by_seed.append([label, *three_decimals(row["by_seed"])])
        flags.append([label, tag("code", row["flags"] or "none")])

    # --- Headings; a variant may have fewer rounds than others
    columns = max(map(len, by_round))
    round_head = ["student"]
    for t in range(columns - 1):
        round_head.append(f"round {t}")
    seed_head = ["student, last round"]
    for seed in results["seeds"]:
        seed_head.append(f"seed {seed}")

    # --- The page
    return document(
        "experiment.html",
        name=[f"experiment: {results['name']}"],
        question=[results["question"]],
        picture=[forest("Gain of the student's gold reward over naive SFT", gains)],
        table=[grid(HEAD, cells)],
        rounds=[grid(round_head, by_round)],
        seeds=[grid(seed_head, by_seed)],
        flags=[grid(["variant", "flags of train.py"], flags)],
    )
