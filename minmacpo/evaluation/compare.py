"""The last rounds of several finished runs side by side, with intervals of their differences.

python eval.py compare RUN RUN...                    averages runs that differ in seed alone
python eval.py compare RUN RUN... --page=FILE.html   a page of it, with the student's curves
"""

import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minmacpo import UserError
from minmacpo.config.parse import ArgParser
from minmacpo.evaluation.bootstrap import mean_of_means, paired_interval
from minmacpo.evaluation.charts import Point, figure
from minmacpo.evaluation.finished_run import FinishedRun, read_run
from minmacpo.evaluation.gold import gold_by_prompt
from minmacpo.evaluation.html import document, grid
from minmacpo.evaluation.table import row_at
from minmacpo.evaluation.text_tables import HEADINGS, bracketed, three_decimals
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

# Of a run's table, what is shown of the last student's answers beside the gold reward
LAST_MEASURES = ("perplexity", "length", "hit_length", "refusals", "distinct2", "self_bleu")


@dataclass(slots=True)
class MethodRuns:
    """The runs that differ in their seed alone."""

    name: str
    run_of_seed: dict[int, FinishedRun] = field(default_factory=dict)

    @property
    def runs(self) -> list[FinishedRun]:
        return list(self.run_of_seed.values())

    def last_gold_of_seed(self) -> dict[int, dict[str, np.ndarray]]:
        """What `last_gold` gives for the run of every seed."""
        return {seed: last_gold(run) for seed, run in self.run_of_seed.items()}


def compare(paths: Sequence[str]) -> list[dict]:
    """One row per method: the last gold reward of its student and teachers, means over seeds.

    The first method is what the others are compared with, on the seeds that both have.
    """
    methods = group_by_method([read_run(path) for path in paths])
    first = methods[0]
    gold_of_first = first.last_gold_of_seed()
    rows = []
    for method in methods:
        gold_of_seed = method.last_gold_of_seed()
        row = {"method": method.name, "seeds": sorted(gold_of_seed)}
        row |= student_measures(method.runs)
        for side in SIDES:
            values = []
            differences = []  # to the first method, prompt by prompt
            for seed, gold in gold_of_seed.items():
                values.append(gold[side])
                if seed in gold_of_first:
                    differences.append(gold[side] - gold_of_first[seed][side])
            row[side] = mean_of_means(values)
            if differences and method is not first:
                row[f"{side}_difference"] = mean_of_means(differences)
                row[f"{side}_interval"] = paired_interval(differences)
        rows.append(row)
    return rows


def group_by_method(runs: Sequence[FinishedRun]) -> list[MethodRuns]:
    """The runs by what they have in common beside their seeds, in the order given.

    Raises:
        UserError: a run cannot be compared with the others.
    """
    methods: dict[str, MethodRuns] = {}
    prompts_of_seed: dict[int, tuple] = {}
    for run in runs:
        folder = run.folder
        seed = run.config.run.seed
        if not run.has_gold:
            raise UserError(f"{folder}: has no gold reward to compare; see its table")
        if not (folder / FINISHED).is_file():
            raise UserError(f"{folder}: is not finished; go on with it first")
        name = re.sub(r"-seed=\d+", "", folder.name)
        method = methods.setdefault(name, MethodRuns(name))
        if seed in method.run_of_seed:
            raise UserError(
                f"{folder}: a run of {name} with seed {seed} is there already; give each once"
            )

        # Differences are taken prompt by prompt, so a seed must stand for the same test prompts
        split = read_json(run.stage("data/slices").path / "split.json")
        prompts = tuple(split["test"])
        if prompts_of_seed.setdefault(seed, prompts) != prompts:
            raise UserError(
                f"{folder}: its test prompts are not those of the other runs with seed {seed}"
            )
        method.run_of_seed[seed] = run
    return list(methods.values())


def last_gold(run: FinishedRun) -> dict[str, np.ndarray]:
    """Gold reward by test prompt, (prompts,), of the last student and of the teachers' mean."""
    teachers = []
    for teacher in run.teachers:
        last_round = run.measured_rounds(teacher)[-1]
        teachers.append(gold_by_prompt(run, teacher, last_round))
    return {
        "student": gold_by_prompt(run, *run.last_student()),
        "teachers": np.mean(teachers, axis=0),
    }


def student_measures(runs: Sequence[FinishedRun]) -> dict:
    """The student's gold reward by round, and LAST_MEASURES at the end, means over runs."""
    # A run that the monitor stopped has fewer rounds; a mean is of those that all have
    rounds = set(runs[0].measured_rounds("student"))
    for run in runs[1:]:
        rounds &= set(run.measured_rounds("student"))
    by_round = {}
    for t in sorted(rounds):
        means = [gold_by_prompt(run, "student", t).mean() for run in runs]
        by_round[t] = float(np.mean(means))

    measures = {"by_round": by_round}
    last_rows = [row_at(run, *run.last_student()) for run in runs]
    for key in LAST_MEASURES:
        values = [row[key] for row in last_rows]
        measures[key] = float(np.mean(values))
    return measures


def run_compare(argv: Sequence[str]) -> list[dict]:
    """The rows of `eval.py compare`; the page that it may ask for is written."""
    parser = ArgParser(
        "eval.py compare",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--page", type=Path)
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        raise UserError("compare needs at least two runs")
    if args.page and args.page.exists():
        raise UserError(f"{args.page}: exists already; it is not overwritten")
    rows = compare(args.runs)
    if args.page:
        write_atomic(args.page, comparison_page(rows))
        print(f"page: {args.page}", file=sys.stderr)
    return rows


def comparison_cells(rows: Sequence[dict]) -> list[list[str]]:
    """The rows of the table as text."""
    lines = []
    for row in rows:
        line = [row["method"], str(len(row["seeds"]))]
        for side in SIDES:
            if f"{side}_interval" in row:
                difference = [row[f"{side}_difference"], *row[f"{side}_interval"]]
                difference_text = bracketed(difference, "+.3f")
            elif row is rows[0]:
                difference_text = ""
            else:
                difference_text = "no seed in common"
            line += [f"{row[side]:.3f}", difference_text]
        lines.append(line)
    return lines


def format_comparison(rows: Sequence[dict]) -> str:
    """The comparison as a table for a terminal."""
    return aligned(HEAD, comparison_cells(rows))


def comparison_page(rows: Sequence[dict]) -> str:
    """The comparison as a page: the table, the student over the rounds, its last answers."""
    lines = {}  # of the chart
    last_answers = []
    for row in rows:
        method = row["method"]
        lines[method] = [Point(t, gold) for t, gold in row["by_round"].items()]
        last_answers.append([method, *three_decimals(row[key] for key in LAST_MEASURES)])
    last_head = ["last student"]
    for key in LAST_MEASURES:
        last_head.append(HEADINGS[key])
    return document(
        "comparison.html",
        name=["Runs side by side"],
        table=[grid(HEAD, comparison_cells(rows))],
        picture=[figure("Gold reward of the student", "mean over seeds", lines, is_main=True)],
        values=[grid(last_head, last_answers)],
    )
