"""One self-contained page about a run, report.html: sentences, curves, tables, samples, costs.

All is read from finished stages on the disk, so the page can be written at any time. page.py says how things
look; how an answer is judged is known to evaluate.py alone.
"""

import fnmatch
import functools
import itertools
import math
import re
import time
from pathlib import Path

from minmacpo.config.parse import to_toml
from minmacpo.config.schema import Config
from minmacpo.data.records import Pair, Sample
from minmacpo.evaluation import table as evaluate
from minmacpo.evaluation.html import Html, clip, document, figure, grid, tag, words
from minmacpo.evaluation.table import FinishedRun
from minmacpo.evaluation.text_tables import format_table, tables
from minmacpo.pipeline.run import FINISHED, Run, Stage
from minmacpo.runtime.files import read_json, read_rows, write_atomic, write_json
from minmacpo.runtime.progress import escape_control_chars

CURVES = {
    "gold": ("Gold reward", "of test answers, from 0 to 1, with 95% intervals"),
    "right": ("Right answers", "share of test answers"),
    "accuracy": ("Preference accuracy", "share of test pairs"),
    "perplexity": ("Perplexity of true answers", "per token"),
}


TRAINING = [  # title, note, metric, unit, stages
    ("Loss in the rounds", "of each step", "loss", "epoch", "round[1-9]*/*_pos"),
    (
        "Reward margin",
        "chosen − rejected, β · nats",
        "rewards/margins",
        "epoch",
        "round[1-9]*/*_pos",
    ),
    (
        "Ranking accuracy",
        "share of margins above 0",
        "rewards/accuracies",
        "epoch",
        "round[1-9]*/*_pos",
    ),
    ("SFT loss", "nats per token", "loss", "epoch", "round0/*_pos", "controls/*"),
    ("SFT loss, negative", "nats per token", "loss", "epoch", "round[0-9]*/*_neg"),
    ("Pre-training loss", "nats per token", "loss", "step", "bases/strong", "bases/weak*"),
]


def moved(rows: list[dict], key: str) -> str:
    """ "rose from 0.910 to 0.964": a column, from an agent's first row of the table to its last."""
    old, new = f"{rows[0][key]:.3f}", f"{rows[-1][key]:.3f}"
    if old == new:
        return f"{'stayed at' if len(rows) > 1 else 'is'} {new}"
    return f"{'rose' if rows[-1][key] > rows[0][key] else 'fell'} from {old} to {new}"


def student_sentence(run: FinishedRun, rows: list[dict]) -> str:
    """How far the student came, with the interval of its gain."""
    *told, last = (
        f"{CURVES[key][0].lower()} {moved(rows, key)}" for key in CURVES if key in rows[0]
    )
    if "gold" in rows[0] and len(rows) > 1:
        old, new = (
            evaluate.gold_by_prompt(run, "student", rows[i]["round"])["gold"] for i in (0, -1)
        )
        low, high = evaluate.interval(new - old, run.config.eval.bootstrap)
        chance = ", which may be chance" if low <= 0 <= high else ""
        told[0] += f" ({(new - old).mean():+.3f}, 95% interval {low:+.3f} to {high:+.3f}{chance})"
    when = f"After {rows[-1]['round']} of {run.config.macpo.rounds} rounds"
    return f"{when} the student's {' and its '.join([', its '.join(told)] * bool(told) + [last])}."


def story(run: FinishedRun, rows: list[dict]) -> list[str]:
    """What happened, in three sentences: of the student, of what it is compared with, of the teachers."""
    by = {agent: [*group] for agent, group in itertools.groupby(rows, lambda row: row["agent"])}
    key, student = (
        next((key for key in ("gold", "accuracy") if key in [*rows, {}][0]), "perplexity"),
        by.get("student"),
    )
    if "kept" in by:  # it was rolled back: what came later is not what the run ends with
        student = [row for row in student if row["round"] <= by["kept"][0]["round"]]
    name = CURVES[key][0].lower()
    ways = {"continued": "naive SFT continued", "ceiling": "the ceiling, SFT on the true answers,"}
    reached = [
        f"{way} reaches {by[agent][0][key]:.3f}" for agent, way in ways.items() if agent in by
    ]
    compared = f"For comparison, in {name} {' and '.join(reached)}"
    if student and student[-1].get("pgr") is not None:
        gap, share = (
            "the gap between the best teacher at the start and the ceiling",
            student[-1]["pgr"],
        )
        compared += (
            f"; of {gap} the student recovered {share:.0%}"
            if share >= 0
            else "; the student ends below the best teacher at the start"
        )
    came = [
        f"{words(agent)} {moved(rows, key)}"
        for agent, rows in by.items()
        if agent.startswith("teacher")
    ]
    return [
        student_sentence(run, student) if student else "The student has not been measured yet.",
        f"{compared}." if reached else "No control and no ceiling has been measured.",
        f"The {name} of {', of '.join(came)}." if came else "No teacher has been measured yet.",
    ]


def over_rounds(rows: list[dict], key: str) -> dict[str, list]:
    """A column of the table as lines; the controls, measured at the end only, go from side to side."""
    lines: dict[str, list] = {}
    for row in rows:
        if (
            math.isfinite(row.get(key, math.nan)) and row["agent"] != "kept"
        ):  # that is a student of the line already
            where = (0, row["round"]) if row["agent"] in evaluate.CONTROLS else (row["round"],)
            points = [(t, row[key], *row.get(f"{key}_interval", ())) for t in where]
            lines.setdefault(row["agent"], []).extend(points)
    return lines


@functools.cache
def curve(stage: Stage, key: str, unit: str) -> list[tuple[float, float]]:
    """A metric of a training stage over its steps or epochs, about 100 points."""
    rows = read_rows(stage.path / "metrics.jsonl")
    return [(row[unit], row[key]) for row in rows[:: -max(1, len(rows) // 100)][::-1] if key in row]


def training_figures(run: FinishedRun) -> list[Html]:
    """Losses, margins and accuracies of every training stage; an agent's rounds follow each other."""
    figures = []
    for title, note, key, unit, *patterns in TRAINING:
        lines: dict[str, list] = {}
        names = [name for pattern in patterns for name in fnmatch.filter(run.notes, pattern)]
        for name in sorted(names, key=lambda name: (len(name), name)):
            line = lines.setdefault(re.sub("_(pos|neg)$", "", name.partition("/")[2]), [])
            start = line[-1][0] if line else 0
            line += [(start + x, y) for x, y in curve(run.stage(name), key, unit)]
        figures.append(figure(title, note, lines, unit))
    return figures


def cost_cells(stages: list[dict]) -> list[str]:
    """Time, CPU time, tokens, tokens per second and memory of stages together."""
    keys = ("seconds", "cpu_seconds", "tokens")
    seconds, cpu, tokens = (sum(row[key] or 0 for row in stages) for key in keys)
    speed, peak = (
        tokens / seconds if seconds else 0,
        max((row["peak_mb"] for row in stages), default=0),
    )
    return [
        f"{seconds:,.1f}",
        f"{cpu:,.1f}",
        *(f"{n:,.0f}" if n else "–" for n in (tokens, speed, peak)),
    ]


def cost_tables(stages: list[dict]) -> list[Html]:
    """What each kind of stage cost, and, folded away, what every single one cost."""
    paid, kinds = [row for row in stages if not row["linked_from"]], {}
    for row in paid:
        kinds.setdefault(row["kind"].partition("/")[0], []).append(row)
    every = [
        [row["name"] + " (taken over)" * bool(row["linked_from"]), *cost_cells([row])]
        for row in stages
    ]
    sums = [
        [kind, len(rows), *cost_cells(rows)] for kind, rows in (kinds | {"together": paid}).items()
    ]
    head = ("seconds", "CPU seconds", "tokens", "tokens/s", "peak MB")
    folded = tag(
        "details", tag("summary", f"All {len(every)} stages"), grid(("stage", *head), every)
    )
    return [grid(("kind of stage", "stages", *head), sums), folded] if stages else []


@functools.cache
def prompts(slices: Stage, most: int = 5) -> list[Pair]:
    """Training prompts, evenly spaced, with their true answers."""
    pairs = read_rows(slices.path / "d2.jsonl", Pair)
    return pairs[:: len(pairs) // most or 1][:most]


@functools.cache
def shown(stage: Stage, ids: tuple[str, ...]) -> dict[str, Pair | Sample]:
    """{prompt id: record} of the prompts with these ids in a stage of samples or pairs."""
    return {record.id: record for record in evaluate.records_of(stage) if record.id in ids}


@functools.cache
def cut(stage: Stage, ids: tuple[str, ...]) -> set[tuple[str, str]]:
    """(prompt id, text) of a stage's answers to these prompts that were cut at the limit, which a pair does not know."""
    said = read_rows(stage.path / "samples.jsonl", Sample)
    return {(s.id, s.response) for s in said if s.id in ids and s.finish == "length"}


def answer_cell(
    config: Config, record: Pair | Sample, text: str, by: str = "", finish: str = "stop"
) -> Html:
    """An answer to the record's prompt with its gold reward, where there is one; `by`: whose it is."""
    gold = evaluate.judge(config, record, text, finish).get("gold")
    facts = [words(by), "" if gold is None else f"gold {gold:.1f}"]
    facts += ["cut at the limit"] if finish == "length" else []
    return tag("div", clip(text), tag("small", " · ".join(filter(None, facts))), class_="text")


def samples(run: FinishedRun) -> list[Html]:
    """What the student learned from in every round, and what it answered then, prompt by prompt."""
    pairs = prompts(run.stage("data/slices")) if "data/slices" in run.notes else []
    rows, cards = {pair.id: [] for pair in pairs}, []
    sampled = [
        name
        for name, notes in run.notes.items()
        if name.startswith("round") and notes["kind"].startswith("sample/")
    ]
    over = set().union(*(cut(run.stage(name), tuple(rows)) for name in sampled))

    def at(t: int, name: str) -> dict:
        stage = f"round{t}/{name}"
        return shown(run.stage(stage), tuple(rows)) if stage in run.notes else {}

    for t in range(1, run.config.macpo.rounds + 1):
        # self-play and own positives use the student's answers of round t before its update
        later = at(
            t + (run.config.run.method != "macpo" or not run.config.macpo.mutual_positives),
            "positives_student",
        )
        for name, pair in at(t, "pairs_student").items():
            sides = (
                (text, by, "length" if (name, text) in over else "stop")
                for text, by in ((pair.chosen, pair.chosen_by), (pair.rejected, pair.rejected_by))
            )
            said = later.get(name)
            after = (
                answer_cell(run.config, said, said.response, finish=said.finish)
                if said
                else Html("–")
            )
            rows[name].append([t, *(answer_cell(run.config, pair, *side) for side in sides), after])
    for pair in (pair for pair in pairs if rows[pair.id]):
        before = f"After {len(pair.prompt) - 1} earlier turns. " if len(pair.prompt) > 1 else ""
        title = tag("h3", clip(pair.prompt[-1].content), class_="text")
        truth = tag("p", f"{before}True answer: {clip(pair.chosen)}", class_="note text")
        table = grid(
            ["round", "positive", "negative", "student, after the round"], rows[pair.id], "samples"
        )
        cards.append(tag("article", title, truth, table))
    return cards


def finish(run: Run) -> str:
    """Write what the run has come to; it is whole, unless one stage alone was asked for. Returns its table as text."""
    table = evaluate.make_table(evaluate.read_run(run.path))
    if not run.only:
        run.end()
        write_json(run.path / FINISHED, table)
    with run.turn():
        write_report(run.path)
    return f"{escape_control_chars(format_table(table))}\n\nreport, with what the columns mean: {run.path / 'report.html'}"


def write_report(path: Path) -> None:
    """Write `<run>/report.html` from what is finished: one file that needs no other, and no script."""
    run = evaluate.read_run(path)
    table, config, now = evaluate.make_table(run), run.config, time.strftime("%Y-%m-%d %H:%M:%S")
    ended = (run.folder / FINISHED).is_file()
    state = "Finished" if ended else "Still running, or stopped; reload to see more"
    lines = {key: over_rounds(table["rows"], key) for key in CURVES}
    main, *curves = (figure(*CURVES[key], lines[key], main=key == "gold") for key in CURVES)
    (head, rows), *choices, watched = tables(table)
    reached = max((row["round"] for row in table["rows"] if row["agent"] == "student"), default=0)
    last, environment = f"student, round {reached}", read_json(run.folder / "env.json")
    rows = [
        [tag("b", cell) for cell in cells] if cells[0].startswith(last) else cells for cells in rows
    ]
    page = document(
        "page.html",
        name=[config.run.name or run.folder.name],
        state=[f"{state} · {len(run.notes)} stages, {now} · seed {config.run.seed}"],
        story=[tag("p", sentence) for sentence in story(run, table["rows"])],
        warnings=[
            tag("p", f"Warning: {warning}.", class_="warning") for warning in table["warnings"]
        ],
        main=[main],
        curves=curves,
        results=[grid(["", *head[1:]], rows)],
        choices=[grid(*choice) for choice in choices],
        monitor=[grid(*watched)],
        training=training_figures(run),
        samples=samples(run),
        cost=cost_tables(table["cost"]),
        settings=[tag("pre", section) for section in to_toml(config).split("\n\n")],
        environment=[" · ".join(f"{key} {value}" for key, value in environment.items())],
    )
    write_atomic(run.folder / "report.html", page)
