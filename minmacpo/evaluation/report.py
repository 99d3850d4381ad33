"""One self-contained page about a run, report.html: sentences, curves, tables, samples, costs.

All of it is read from finished stages on the disk, so that the page can be written at any time. It
needs no other file and no script.
"""

import fnmatch
import functools
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minmacpo.config.parse import to_toml
from minmacpo.config.schema import Config
from minmacpo.core.losses import PREFERENCE_LOSSES
from minmacpo.data.records import Pair, Sample
from minmacpo.evaluation.charts import Point, figure
from minmacpo.evaluation.finished_run import (
    FinishedRun,
    agent_label,
    by_number,
    read_records,
    read_run,
    read_samples,
)
from minmacpo.evaluation.gold import gold_reward
from minmacpo.evaluation.html import Html, clip, document, grid, legend, tag
from minmacpo.evaluation.story import tell_story
from minmacpo.evaluation.table import CONTROLS, make_table
from minmacpo.evaluation.text_tables import (
    SIGNS,
    TextTable,
    filter_table,
    format_table,
    monitor_table,
    negatives_table,
    results_table,
    shown_columns,
)
from minmacpo.pipeline.run import FINISHED, Run
from minmacpo.pipeline.stage import Stage
from minmacpo.runtime.files import read_json, read_rows, write_atomic, write_json
from minmacpo.runtime.progress import escape_control_chars

CURVES = {  # measure: title and note of its chart
    "gold": ("Gold reward", "of test answers, from 0 to 1, with 95% intervals"),
    "right": ("Right answers", "share of test answers"),
    "accuracy": ("Preference accuracy", "share of test pairs"),
    "perplexity": ("Perplexity of true answers", "per token"),
}

CURVE_POINTS = 100  # of a training curve, about
SHOWN_PROMPTS = 5


@dataclass(frozen=True, slots=True)
class TrainingChart:
    """A metric of training stages over their steps or epochs."""

    title: str
    note: str
    metric: str
    unit: str
    stages: tuple[str, ...]  # patterns of their names


def training_charts(config: Config) -> list[TrainingChart]:
    """The charts of the report's section on training, in the words of the loss that is used."""
    in_rounds = ("round[1-9]*/*_pos",)  # round 0 is SFT alone
    loss = PREFERENCE_LOSSES[config.dpo.loss]
    margin_note = "of chosen over rejected answers, β · nats"
    if loss.requires_reference:
        margin_note += " above the reference policy"
    return [
        TrainingChart(
            title="Loss in the rounds",
            note=f"{loss.title} and SFT, of each step",
            metric="loss",
            unit="epoch",
            stages=in_rounds,
        ),
        TrainingChart(
            title="Reward margin",
            note=margin_note,
            metric="rewards/margins",
            unit="epoch",
            stages=in_rounds,
        ),
        TrainingChart(
            title="Ranking accuracy",
            note="share of margins above 0",
            metric="rewards/accuracies",
            unit="epoch",
            stages=in_rounds,
        ),
        TrainingChart(
            title="SFT loss",
            note="nats per token",
            metric="loss",
            unit="epoch",
            stages=("round0/*_pos", "controls/*"),
        ),
        TrainingChart(
            title="SFT loss, negative",
            note="nats per token",
            metric="loss",
            unit="epoch",
            stages=("round[0-9]*/*_neg",),
        ),
        TrainingChart(
            title="Pre-training loss",
            note="nats per token",
            metric="loss",
            unit="step",
            stages=("bases/strong", "bases/weak*"),
        ),
    ]


def finish(run: Run) -> str:
    """Write the table and the report that the run has come to; returns the table as text.

    The run is finished then, unless one stage alone was asked for.
    """
    table = make_table(read_run(run.path))
    if not run.only:
        run.end()
        write_json(run.path / FINISHED, table)
    with run.lock():  # another process may compute single stages of this run, and write it too
        write_report(run.path)
    text = escape_control_chars(format_table(table))
    return f"{text}\n\nreport, with what the columns mean: {run.path / 'report.html'}"


def write_report(path: Path) -> None:
    """Write `<run>/report.html` from what is finished."""
    run = read_run(path)
    table = make_table(run)

    # --- The table of results, whose first column is named by the page's title
    columns = shown_columns(table)
    meanings = {column.heading: column.meaning for column in columns}
    results = results_table(table, columns)
    results_head = ["", *results.head[1:]]
    results_rows = emphasize_last_student(table, results)

    # --- Charts, settings and the machine
    main_figure, *figures = result_figures(table)
    sections = to_toml(run.config).split("\n\n")
    environment = []
    for key, value in read_json(run.folder / "env.json").items():
        environment.append(f"{key} {value}")

    page = document(
        "page.html",
        name=[run.config.run.name or run.folder.name],
        state=[state_line(run)],
        story=[tag("p", sentence) for sentence in tell_story(run, table["rows"])],
        warnings=warning_lines(table),
        main=[main_figure],
        curves=figures,
        results=[grid(results_head, results_rows)],
        legend=[legend(meanings)],
        choices=[text_grid(filter_table(table)), text_grid(negatives_table(table))],
        monitor=[text_grid(monitor_table(table))],
        signs=[legend(SIGNS)],
        training=training_figures(run),
        samples=sample_cards(run),
        cost=cost_tables(table["cost"]),
        settings=[tag("pre", section) for section in sections],
        environment=[" · ".join(environment)],
    )
    write_atomic(run.folder / "report.html", page)


# ---- head and tables --------------------------------------------------------------------------


def state_line(run: FinishedRun) -> str:
    """Whether the run has ended, what it is, and when the page was written."""
    state = "Still running, or stopped; reload to see more"
    if (run.folder / FINISHED).is_file():
        state = "Finished"
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    config = run.config.run
    return (
        f"{state} · {len(run.metadata)} stages, {now} · method {config.method}, seed {config.seed}"
    )


def warning_lines(table: dict) -> list[Html]:
    """The table's warnings as lines of the page."""
    lines = []
    for warning in table["warnings"]:
        lines.append(tag("p", f"Warning: {warning}.", class_="warning"))
    return lines


def text_grid(table: TextTable) -> Html:
    """A table of text as an element."""
    return grid(table.head, table.rows)


def emphasize_last_student(table: dict, results: TextTable) -> list[list[object]]:
    """The rows of the results, that of the student after its last round in bold."""
    rounds = [row["round"] for row in table["rows"] if row["agent"] == "student"]
    last_label = f"student, round {max(rounds, default=0)}"
    rows = []
    for cells in results.rows:
        if cells[0].startswith(last_label):  # after round 0 it goes on: "(naive SFT)"
            cells = [tag("b", cell) for cell in cells]
        rows.append(cells)
    return rows


# ---- charts -----------------------------------------------------------------------------------


def result_figures(table: dict) -> list[Html]:
    """The charts of all measures over the rounds; the first one is the main one."""
    figures = []
    for measure, (title, note) in CURVES.items():
        lines = over_rounds(table["rows"], measure)
        figures.append(figure(title, note, lines, is_main=measure == "gold"))
    return figures


def over_rounds(rows: Sequence[dict], measure: str) -> dict[str, list[Point]]:
    """A measure of every agent over the rounds; controls go from the first round to the last."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        agent = row["agent"]
        value = row.get(measure, math.nan)
        if not math.isfinite(value):
            continue
        if agent == "kept":  # that is a student of the student's line already
            continue
        interval = None
        if row.get(f"{measure}_interval"):
            interval = tuple(row[f"{measure}_interval"])
        line = lines.setdefault(agent, [])
        if agent in CONTROLS:
            line.append(Point(0, value, interval))
        line.append(Point(row["round"], value, interval))
    return lines


def training_figures(run: FinishedRun) -> list[Html]:
    """Losses, margins and accuracies in training; the rounds of an agent follow each other."""
    figures = []
    for chart in training_charts(run.config):
        names = set()
        for pattern in chart.stages:
            names.update(fnmatch.filter(run.metadata, pattern))

        lines: dict[str, list[Point]] = {}  # by agent
        for name in sorted(names, key=by_number):
            agent = re.sub("_(pos|neg)$", "", name.partition("/")[2])
            line = lines.setdefault(agent, [])
            start = line[-1].x if line else 0  # where the agent's round before has ended
            for x, y in training_curve(run.stage(name), chart.metric, chart.unit):
                line.append(Point(start + x, y))
        figures.append(figure(chart.title, chart.note, lines, chart.unit))
    return figures


@functools.cache
def training_curve(stage: Stage, metric: str, unit: str) -> list[tuple[float, float]]:
    """A metric of a training stage over its steps or epochs, at about CURVE_POINTS of them."""
    rows = read_rows(stage.path / "metrics.jsonl")
    every = max(1, len(rows) // CURVE_POINTS)
    last_first = rows[::-every]  # counted from the end, so that the last row is always shown
    points = []
    for row in reversed(last_first):
        if metric in row:
            points.append((row[unit], row[metric]))
    return points


# ---- samples ----------------------------------------------------------------------------------


def sample_cards(run: FinishedRun) -> list[Html]:
    """By prompt: what the student learned from in every round, and what it answered then."""
    if "data/slices" not in run:
        return []
    pairs = spaced_prompts(run.stage("data/slices"))
    ids = tuple(pair.id for pair in pairs)
    rows_of = sample_rows(run, ids)
    cards = []
    for pair in pairs:
        if not rows_of[pair.id]:  # no round has made pairs yet, or this prompt's was dropped
            continue
        before = ""
        earlier_turns = len(pair.prompt) - 1
        if earlier_turns:
            before = f"After {earlier_turns} earlier turns. "
        title = tag("h3", clip(pair.prompt[-1].content), class_="text")
        truth = tag("p", f"{before}True answer: {clip(pair.chosen)}", class_="note text")
        head = ["round", "positive", "negative", "student, after the round"]
        cards.append(tag("article", title, truth, grid(head, rows_of[pair.id], "samples")))
    return cards


def sample_rows(run: FinishedRun, ids: tuple[str, ...]) -> dict[str, list[list[object]]]:
    """By prompt id, a row for every round with the student's pair and its answer afterwards."""
    config = run.config

    # --- Which answers were cut at the limit: a pair does not know, the samples it is made of do
    cut_answers = set()
    for name, metadata in run.metadata.items():
        if name.startswith("round") and metadata["kind"].startswith("sample/"):
            cut_answers |= read_cut_answers(run.stage(name), ids)

    def pair_cell(pair: Pair, text: str, agent: str) -> Html:
        finish = "length" if (pair.id, text) in cut_answers else "stop"
        return answer_cell(config, pair, text, agent, finish)

    # --- Round by round. Self-play and own positives sample the student's answers of a round
    # before its update, so that those after it are the next round's
    samples_before_update = config.run.method != "macpo" or not config.macpo.mutual_positives
    rows_of: dict[str, list[list[object]]] = {prompt_id: [] for prompt_id in ids}
    for t in range(1, config.macpo.rounds + 1):
        next_sampled = t
        if samples_before_update:
            next_sampled = t + 1
        answers = records_of_prompts(run, f"round{next_sampled}/positives_student", ids)
        pairs = records_of_prompts(run, f"round{t}/pairs_student", ids)
        for prompt_id, pair in pairs.items():
            positive = pair_cell(pair, pair.chosen, pair.chosen_by)
            negative = pair_cell(pair, pair.rejected, pair.rejected_by)
            after = Html("–")
            answer = answers.get(prompt_id)
            if answer:
                after = answer_cell(config, answer, answer.response, finish=answer.finish)
            rows_of[prompt_id].append([t, positive, negative, after])
    return rows_of


@functools.cache
def spaced_prompts(splits: Stage) -> list[Pair]:
    """Training prompts, evenly spaced, with their true answers."""
    pairs = read_rows(splits.path / "d2.jsonl", Pair)
    step = max(1, len(pairs) // SHOWN_PROMPTS)
    return pairs[::step][:SHOWN_PROMPTS]


def records_of_prompts(
    run: FinishedRun, name: str, ids: tuple[str, ...]
) -> dict[str, Pair | Sample]:
    """The records that a stage holds for these prompts, by prompt id; {} if it is not finished."""
    if name not in run:
        return {}
    return read_records_of_prompts(run.stage(name), ids)


@functools.cache
def read_records_of_prompts(stage: Stage, ids: tuple[str, ...]) -> dict[str, Pair | Sample]:
    """The same of a finished stage, read once."""
    return {record.id: record for record in read_records(stage) if record.id in ids}


@functools.cache
def read_cut_answers(stage: Stage, ids: tuple[str, ...]) -> set[tuple[str, str]]:
    """(prompt id, text) of a stage's answers that were cut at the limit of their length."""
    cut = set()
    for sample in read_samples(stage):
        if sample.id in ids and sample.finish == "length":
            cut.add((sample.id, sample.response))
    return cut


def answer_cell(
    config: Config, record: Pair | Sample, text: str, agent: str = "", finish: str = "stop"
) -> Html:
    """An answer to the record's prompt, with the agent that gave it and its gold reward."""
    facts = []
    if agent:
        facts.append(agent_label(agent))
    gold = gold_reward(config, record, text, finish).get("gold")
    if gold is not None:
        facts.append(f"gold {gold:.1f}")
    if finish == "length":
        facts.append("cut at the limit")
    return tag("div", clip(text), tag("small", " · ".join(facts)), class_="text")


# ---- cost -------------------------------------------------------------------------------------


def cost_tables(stages: Sequence[dict]) -> list[Html]:
    """What each kind of stage cost, and, folded away, what every single one cost."""
    if not stages:
        return []
    head = ["seconds", "CPU seconds", "tokens", "tokens/s", "peak MB"]

    # --- By kind: what this run computed itself, and not what it took over from another one
    computed = [stage for stage in stages if not stage["linked_from"]]
    by_kind: dict[str, list[dict]] = {}
    for stage in computed:
        kind, _, _version = stage["kind"].partition("/")
        by_kind.setdefault(kind, []).append(stage)
    by_kind["together"] = computed
    sums = []
    for kind, group in by_kind.items():
        sums.append([kind, len(group), *cost_cells(group)])

    # --- One by one, with what was taken over
    single = []
    for stage in stages:
        name = stage["name"]
        if stage["linked_from"]:
            name += " (taken over)"
        single.append([name, *cost_cells([stage])])
    summary = tag("summary", f"All {len(single)} stages")
    folded = tag("details", summary, grid(["stage", *head], single))
    return [grid(["kind of stage", "stages", *head], sums), folded]


def cost_cells(stages: Sequence[dict]) -> list[str]:
    """Time, CPU time, tokens, tokens per second and memory of stages together."""
    seconds = sum(stage["seconds"] or 0 for stage in stages)
    cpu_seconds = sum(stage["cpu_seconds"] or 0 for stage in stages)
    tokens = sum(stage["tokens"] or 0 for stage in stages)  # None without a model
    tokens_per_second = tokens / seconds if seconds else 0
    peak_mb = max((stage["peak_mb"] for stage in stages), default=0)
    cells = [f"{seconds:,.1f}", f"{cpu_seconds:,.1f}"]
    for number in (tokens, tokens_per_second, peak_mb):
        cells.append(f"{number:,.0f}" if number else "–")
    return cells
