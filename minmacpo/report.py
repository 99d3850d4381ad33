"""One self-contained page about a run, report.html: sentences, curves, tables, samples, costs.

All is read from finished stages on the disk, so the page can be written at any time. page.py says how things
look; how an answer is judged is known to evaluate.py alone.
"""

import math
import time
from pathlib import Path
from statistics import fmean

from minmacpo import evaluate
from minmacpo.config import Config, flatten, toml_value
from minmacpo.data import Pair, Sample
from minmacpo.files import read_json, read_records, read_rows, write_atomic
from minmacpo.page import Html, clip, document, figure, grid, tag, words

WORLD = {"gold": "gold reward"}  # what the story is told in, and what it is told in for real data
REAL = {"accuracy": "preference accuracy", "perplexity": "perplexity of the true answers"}
WORSE = {"accuracy": "fell", "perplexity": "rose"}
CURVES = {
    "gold": ("Gold reward", "of test answers, from 0 to 1, with 95% intervals"),
    "right": ("Right answers", "share of test answers"),
    "accuracy": ("Preference accuracy", "share of test pairs"),
    "perplexity": ("Perplexity of true answers", "per token"),
}
TRAINING = [  # title, note, metric, unit, stages
    ("Loss in the rounds", "DPO + γ SFT", "loss", "round", "round[1-9]*/*_pos"),
    ("Reward margin", "chosen − rejected, β · nats", "rewards/margins", "round", "round[1-9]*/*_pos"),
    ("Ranking accuracy", "share of margins above 0", "rewards/accuracies", "round", "round[1-9]*/*_pos"),
    ("SFT loss", "nats per token", "loss", "epoch", "round0/*_pos", "controls/continued", "controls/ceiling"),
    ("SFT loss, negative", "nats per token", "loss", "epoch", "round0/*_neg"),
    ("Pre-training loss", "nats per token", "loss", "step", "bases/strong", "bases/weak*"),
]


def stands(row: dict, names: dict[str, str]) -> str:
    """"a gold reward of 0.910"."""
    return " and ".join(f"a {name} of {row[key]:.3f}" for key, name in names.items())


def moved(first: dict, last: dict, key: str) -> str:
    """"rose from 0.910 to 0.964"."""
    old, new = f"{first[key]:.3f}", f"{last[key]:.3f}"
    went = "rose" if last[key] > first[key] else "fell"
    return f"stayed at {new}" if old == new else f"{went} from {old} to {new}"


def student_sentence(config: Config, folder: Path, rows: list[dict], names: dict[str, str]) -> str:
    """How far the student came, with the interval of its gain, and what got worse."""
    if not rows:
        return "The student has not been measured yet."
    first, last = rows[0], rows[-1]
    if not last["round"]:
        start = "Before the first round, after naive SFT on teacher 1's answers, the student has"
        return f"{start} {stands(last, names)}."
    text = " and its ".join(f"{name} {moved(first, last, key)}" for key, name in names.items())
    if "gold" in names and first is not last:
        measured = (evaluate.gold_by_prompt(config, folder, "student", row["round"]) for row in (first, last))
        old, new = (golds["gold"] for golds in measured)
        low, high = evaluate.interval(new - old, config.eval.bootstrap)
        chance = ", so it may be chance" if low <= 0 <= high and "stayed" not in text else ""
        text += f" ({(new - old).mean():+.3f}, 95% interval {low:+.3f} to {high:+.3f}{chance})"
        went = {key: moved(first, last, key) for key in REAL}
        worse = [f"its {REAL[key]} {text}" for key, text in went.items() if text.startswith(WORSE[key])]
        text += f", while {' and '.join(worse)}" if worse else ""
    return f"After {last['round']} of {config.macpo.rounds} rounds the student's {text}."


def control_sentence(config: Config, by: dict[str, list[dict]], names: dict[str, str]) -> str:
    """What the same base reached by other means, and how much of the gap the student closed."""
    ways = {"continued": "naive SFT continued", "ceiling": "SFT on the truth, the ceiling,"}
    reached = [f"{way} gives {stands(by[agent][0], names)}" for agent, way in ways.items() if agent in by]
    share = by.get("student", [{}])[-1].get("pgr")
    gap = "; of the gap between the best teacher at the start and the ceiling the student recovered"
    if not reached:
        return f"There is no control and no ceiling to compare with{' yet' * config.macpo.controls}."
    return f"For comparison, {' and '.join(reached)}" + ("." if share is None else f"{gap} {share:.0%}.")


def teacher_sentence(config: Config, by: dict[str, list[dict]], names: dict[str, str]) -> str:
    """How far the teachers came, up to the last round in which all are measured, and which of them fell."""
    key, word = next(iter(names.items()))
    teachers = {name: rows for name, rows in by.items() if name.startswith("teacher")}
    if not teachers:
        return "No teacher has been measured yet."
    last = min(map(len, teachers.values())) - 1
    first, now = ({key: fmean(rows[t][key] for rows in teachers.values())} for t in (0, last))
    if not config.macpo.update_teachers:
        return f"The teachers do not learn in this run; their mean {word} is {first[key]:.3f}."
    went = {words(name): moved(rows[0], rows[last], key) for name, rows in teachers.items()}
    fell = ", ".join(f"{name} {text}" for name, text in went.items() if text.startswith("fell"))
    return f"The teachers' mean {word} {moved(first, now, key)}" + (f"; {fell}." if fell else ".")


def over_rounds(by: dict[str, list[dict]], key: str) -> dict[str, list]:
    """A column of the table; the controls, measured at the end only, go from side to side."""
    lines = {}
    for agent, rows in by.items():
        rows = [rows[0] | {"round": 0}, *rows] if agent in ("continued", "ceiling") else rows
        known = [row for row in rows if math.isfinite(row.get(key, math.nan))]
        lines[agent] = [(row["round"], row[key], *row.get(f"{key}_interval", ())) for row in known]
    return lines


@evaluate.of_finished
def curve(stage: Path, key: str, unit: str) -> list[tuple[float, float]]:
    """A metric of a training stage, about 100 points; a stage is one round long where that is the unit."""
    rows = read_rows(stage / "metrics.jsonl") if (stage / "metrics.jsonl").is_file() else []
    rows = [row for row in rows[:: -max(1, len(rows) // 100)][::-1] if math.isfinite(row.get(key, math.nan))]
    if unit == "round":
        start = int(stage.parent.name.removeprefix("round")) - 1
        return [(start + row["step"] / rows[-1]["step"], row[key]) for row in rows]
    return [(row[unit], row[key]) for row in rows]


def training_figures(folder: Path) -> list[Html]:
    """Losses, margins and accuracies of every training stage."""
    figures = []
    for title, note, key, unit, *patterns in TRAINING:
        lines = {}
        for pattern in patterns:
            for stage in sorted(folder.glob(pattern), key=lambda stage: (len(str(stage)), stage)):
                agent = stage.name.removesuffix("_pos").removesuffix("_neg")
                lines.setdefault(agent, []).extend(curve(stage, key=key, unit=unit))
        figures.append(figure(title, note, lines, unit))
    return figures


def tables(table: dict) -> list[Html]:
    """The tables that are printed too; files of the data are small, the last student is bold."""
    (head, rows), *others = evaluate.tables(table)
    for cells in rows:
        if cells[0].startswith("  "):
            cells[0] = tag("small", cells[0][2:])
        elif cells[0].startswith(f"student, round {table['rounds']}"):
            cells[:] = [tag("b", cell) for cell in cells]
    return [grid(["", *head[1:]], rows), *(grid(*other) for other in others)]


def cost_table(cost: list[dict]) -> Html:
    """Time and tokens by kind of stage."""
    kinds: dict[str, list[dict]] = {}
    for row in (row for row in cost if not row["linked_from"]):
        for kind in (row["kind"].partition("/")[0], "together"):
            kinds.setdefault(kind, []).append(row)
    sums = []
    for kind, rows in sorted(kinds.items(), key=lambda item: item[0] == "together"):
        seconds, tokens = (sum(row[key] or 0 for row in rows) for key in ("seconds", "tokens"))
        clock = f"{seconds:.1f} s" if seconds < 60 else f"{round(seconds) // 60} min {round(seconds) % 60} s"
        cells = [f"{tokens:,}", f"{tokens / seconds:,.0f}"] if tokens and seconds else ["–", "–"]
        sums.append([kind, len(rows), clock, *cells, max(row["peak_mb"] for row in rows)])
    return grid(["kind of stage", "stages", "time", "tokens", "tokens/s", "peak MB"], sums)


def stage_table(cost: list[dict]) -> Html:
    """What every single stage cost, folded away."""
    head = ("stage", "seconds", "CPU seconds", "tokens", "peak MB")
    rows = []
    for row in cost:
        numbers = (f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['tokens'] or 0:,}", row["peak_mb"])
        taken = f" (taken from {row['linked_from']})" if row["linked_from"] else ""
        rows.append((row["name"] + taken, *(numbers if not taken else ("",) * 4)))
    return tag("details", tag("summary", f"All {len(rows)} stages"), grid(head, rows)) if rows else Html()


@evaluate.of_finished
def shown(stage: Path, ids: tuple[str, ...], kind: type = Sample) -> dict:
    """{prompt id: record} of the prompts with these ids in a stage's samples or pairs."""
    file = stage / ("samples.jsonl" if kind is Sample else "pairs.jsonl")
    return {record.id: record for record in read_records(file, kind) if record.id in ids}


def answer(config: Config, pair: Pair, sample: Sample | None, by: str = "") -> Html:
    """An answer with its gold reward, where there is one."""
    if sample is None:
        return Html("–")
    gold = evaluate.judge(config, pair, sample.response, sample.finish).get("gold")
    facts = [by, "" if gold is None else f"gold {gold:.1f}", "cut at the limit" * (sample.finish == "length")]
    return tag("div", clip(sample.response), tag("small", " · ".join(filter(None, facts))), class_="text")


def samples(config: Config, folder: Path, pairs: list[Pair]) -> list[Html]:
    """What the student learned from in every round, and what it answered then, prompt by prompt."""
    cards, ids, own = [], tuple(pair.id for pair in pairs), not config.macpo.mutual
    for pair in pairs:
        rows, bad = [], None
        for t in range(1, config.macpo.rounds + 1):
            bad = shown(folder / f"round{t - 1}/negatives_student", ids=ids).get(pair.id, bad)
            made = shown(folder / f"round{t}/pairs_student", ids=ids, kind=Pair)
            by = made[pair.id].chosen_by if pair.id in made else "nobody"
            good = shown(folder / f"round{t}/positives_{by}", ids=ids).get(pair.id)
            # without mutual positives the student's own of round t come before its update
            later = shown(folder / f"round{t + own}/positives_student", ids=ids).get(pair.id)
            found = ((good, words(by)), (bad,), (later,))
            rows += [[t, *(answer(config, pair, *cell) for cell in found)]] if made else []
        before = f"After {len(pair.prompt) - 1} earlier turns. " if len(pair.prompt) > 1 else ""
        truth = tag("p", f"{before}True answer: {clip(pair.chosen)}", class_="note text")
        table = grid(["round", "positive", "negative", "student, after the round"], rows, "samples")
        title = tag("h3", clip(pair.prompt[-1].content), class_="text")
        cards += [tag("article", title, truth, table)] if rows else []
    return cards


def settings(config: Config) -> list[Html]:
    """The resolved configuration; departures from the defaults stand out."""
    plain, blocks = flatten(Config()), {}
    for key, value in flatten(config).items():
        part, name = key.split(".")
        line = f"{name} = {toml_value(value)}\n"
        blocks.setdefault(part, [f"[{part}]\n"]).append(line if value == plain[key] else tag("b", line))
    return [tag("pre", *lines) for lines in blocks.values()]


def state(folder: Path, seed: int) -> str:
    """How far the run is."""
    stages = sorted((file.stat().st_mtime, file) for file in folder.glob("*/*/stage.json"))
    if not stages:
        return "Still running · no stage is finished yet · reload to see more"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stages[-1][0]))
    if (folder / "eval/table.json").is_file():
        return f"Finished {when} · {len(stages)} stages · seed {seed}"
    last = f"{stages[-1][1].parent.relative_to(folder)} at {when}"
    return f"Still running (or stopped) · {len(stages)} stages finished, last {last} · reload to see more"


def write_report(path: Path) -> None:
    """Write `<run>/report.html` from what is finished: one file that needs no other, and no script."""
    folder, config = evaluate.read_run(path)
    table, by = evaluate.make_table(folder), {}
    for row in sorted(table["rows"], key=lambda row: row["agent"] != "student"):
        by.setdefault(row["agent"], []).append(row)
    names = WORLD if table["world"] else REAL
    student = student_sentence(config, folder, by.get("student", []), names)
    story = (student, control_sentence(config, by, names), teacher_sentence(config, by, names))
    main, *curves = (figure(*CURVES[key], over_rounds(by, key), main=key == "gold") for key in CURVES)
    results, *choices = tables(table)
    pairs = [*evaluate.pairs_of(folder, "d2").values()] if evaluate.notes_of(folder / "data/slices") else []
    environment = read_json(folder / "env.json") if (folder / "env.json").is_file() else {}
    page = document(
        name=[config.run.name or folder.name],
        state=[state(folder, config.run.seed)],
        story=[tag("p", sentence) for sentence in story],
        warnings=[tag("p", f"Warning: {warning}.", class_="warning") for warning in table["warnings"]],
        main=[main],
        curves=curves,
        results=[results],
        choices=choices,
        training=training_figures(folder),
        samples=samples(config, folder, pairs[:: len(pairs) // 5 or 1][:5]),
        cost=[cost_table(table["cost"]), stage_table(table["cost"])],
        settings=settings(config),
        environment=[" · ".join(f"{key} {value}" for key, value in environment.items())],
    )
    write_atomic(folder / "report.html", page)
