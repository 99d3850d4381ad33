"""The last rounds of several finished runs side by side, with intervals of the paired differences.

python eval.py compare RUN RUN...                    runs that differ in their seed alone are averaged
python eval.py compare RUN RUN... --page=FILE.html   the same as a page, with the student's curves
"""

import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minmacpo import UserError
from minmacpo.config.parse import ArgParser
from minmacpo.evaluation.bootstrap import paired_interval
from minmacpo.evaluation.html import document, figure, grid
from minmacpo.evaluation.table import (
    FinishedRun,
    gold_by_prompt,
    last_student,
    measured,
    read_run,
    row_at,
)
from minmacpo.evaluation.text_tables import COLUMNS, bracketed
from minmacpo.pipeline.run import FINISHED
from minmacpo.runtime.files import read_json, write_atomic
from minmacpo.runtime.progress import aligned

SIDES = ("student", "teachers")


HEAD = (
    "last round",
    "seeds",
    "student",
    "difference to the first",
    "teachers",
    "difference (seeds in common)",
)


BESIDE = (
    "perplexity",
    "length",
    "hit_length",
    "refusals",
    "distinct2",
    "self_bleu",
)  # of evaluate's table


def last_gold(run: FinishedRun) -> dict[str, np.ndarray]:
    """Gold reward of the test prompts [n]: of the student that the run ends with, and the teachers' mean at last."""
    last = [last_student(run), *((name, measured(run, name)[-1]) for name in run.teachers)]
    student, *teachers = (gold_by_prompt(run, *agent)["gold"] for agent in last)
    return {"student": student, "teachers": np.mean(teachers, 0)}


def beside(runs: Sequence[FinishedRun]) -> dict:
    """{"by_round": gold of the student by round, and each of BESIDE at last}, means over the runs of one method."""
    rounds = sorted(set.intersection(*({*measured(run, "student")} for run in runs)))
    gold = {
        t: float(np.mean([gold_by_prompt(run, "student", t)["gold"].mean() for run in runs]))
        for t in rounds
    }
    ends = [row_at(run, *last_student(run)) for run in runs]
    return {"by_round": gold} | {key: float(np.mean([row[key] for row in ends])) for key in BESIDE}


def compare(paths: list[str]) -> list[dict]:
    """One row per method: mean over seeds of its last student's and teachers' gold, and the difference; `beside`."""
    found, asked, runs = {}, {}, {}  # {method: {seed: gold}}, {seed: test prompts}, {method: runs}
    for run in map(read_run, paths):
        folder, seed, method = (
            run.folder,
            run.config.run.seed,
            re.sub(r"-seed=\d+", "", run.folder.name),
        )
        if run.config.data.path:
            raise UserError(f"{folder}: has no gold reward to compare; see its table")
        if not (folder / FINISHED).is_file():
            raise UserError(f"{folder}: is not finished; go on with it first")
        if seed in found.setdefault(method, {}):
            raise UserError(
                f"{folder}: a run of {method} with seed {seed} is there already; give each once"
            )
        prompts = tuple(read_json(run.stage("data/slices").path / "split.json")["test"])
        if asked.setdefault(seed, prompts) != prompts:
            raise UserError(
                f"{folder}: its test prompts are not those of the other runs with seed {seed}"
            )
        found[method][seed] = last_gold(run)
        runs.setdefault(method, []).append(run)
    first, rows = next(iter(found.values())), []
    for name, seeds in found.items():
        row = {"method": name, "seeds": sorted(seeds)} | beside(runs[name])
        for side in SIDES:
            row[side] = float(np.mean([gold[side].mean() for gold in seeds.values()]))
            pairs = [
                gold[side] - first[seed][side] for seed, gold in seeds.items() if seed in first
            ]
            if pairs and seeds is not first:
                row[f"{side}_difference"] = float(np.mean([pair.mean() for pair in pairs]))
                row[f"{side}_interval"] = paired_interval(pairs)
        rows.append(row)
    return rows


def run_compare(argv: Sequence[str]) -> list[dict]:
    """What `eval.py compare` finds; the page that it may ask for is written."""
    parser = ArgParser(
        "eval.py compare",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--page", type=Path)
    words = parser.parse_args(argv)
    if len(words.runs) < 2:
        raise UserError("compare needs at least two runs")
    if words.page and words.page.exists():
        raise UserError(f"{words.page}: exists already; it is not overwritten")
    found = compare(words.runs)
    if words.page:
        write_atomic(words.page, comparison_page(found))
        print(f"page: {words.page}", file=sys.stderr)
    return found


def cells(rows: list[dict]) -> list[list[str]]:
    """The table's rows as text."""
    lines = []
    for row in rows:
        line = [row["method"], str(len(row["seeds"]))]
        for side in SIDES:
            found = (
                [row[f"{side}_difference"], *row[f"{side}_interval"]]
                if f"{side}_interval" in row
                else []
            )
            apart = (
                bracketed(found, "+.3f") if found else "no seed in common" * (row is not rows[0])
            )
            line += [f"{row[side]:.3f}", apart]
        lines.append(line)
    return lines


def format_comparison(rows: list[dict]) -> str:
    """`compare` as a table for a terminal."""
    return aligned(HEAD, cells(rows))


def comparison_page(rows: list[dict]) -> str:
    """`compare` as a page: the table, the student over the rounds, what its last answers look like."""
    lines = {row["method"]: [*row["by_round"].items()] for row in rows}
    values = [[row["method"], *(f"{row[key]:.3f}" for key in BESIDE)] for row in rows]
    return document(
        "comparison.html",
        name=["Runs side by side"],
        table=[grid(HEAD, cells(rows))],
        picture=[figure("Gold reward of the student", "mean over seeds", lines, main=True)],
        values=[grid(["last student", *(COLUMNS[key][0] for key in BESIDE)], values)],
    )
