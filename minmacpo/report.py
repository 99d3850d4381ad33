"""One self-contained page about a run, report.html: sentences, curves, tables, samples, costs.

All is read from finished stages on the disk, so the page can be written at any time. page.py says
how things look; how an answer is judged is known to evaluate.py alone.
"""

import functools
import math
import time
from pathlib import Path
from statistics import fmean

from minmacpo import evaluate
from minmacpo.config import Config, flatten, toml_value
from minmacpo.data import Pair, Sample
from minmacpo.evaluate import COLUMNS, notes_of
from minmacpo.files import read_json, read_records, read_rows, write_atomic
from minmacpo.page import Html, clip, clock, document, figure, grid, section, side_by_side, tag, words

PROMPTS = 5  # shown with their answers
REAL = {"accuracy": "preference accuracy", "perplexity": "perplexity of the true answers"}
WORSE = dict(zip(REAL.values(), ("fell", "rose"), strict=True))
CURVES = {
    "gold": ("Gold reward", "of test answers, from 0 to 1, with 95% intervals"),
    "right": ("Right answers", "share of test answers"),
    "accuracy": ("Preference accuracy", "share of test pairs"),
    "perplexity": ("Perplexity of true answers", "per token"),
}

# ---- the story ----------------------------------------------------------------------------------


def measures(table: dict) -> list[tuple[str, str]]:
    """Key and name of what the story is told in: gold reward, or what real data allows."""
    return [("gold", "gold reward")] if table["world"] else list(REAL.items())


def moved(old: float, new: float) -> str:
    """"rose from 0.910 to 0.964"."""
    went = "rose" if new > old else "fell"
    return f"stayed at {new:.3f}" if f"{old:.3f}" == f"{new:.3f}" else f"{went} from {old:.3f} to {new:.3f}"


@functools.lru_cache(maxsize=64)
def gain(config: Config, folder: Path, rounds: tuple[int, ...], fingerprints: tuple[str, ...]) -> list[float]:
    """The student of the second round minus that of the first, on the same prompts: mean and interval."""
    first, last = (evaluate.gold_by_prompt(config, folder, "student", t)["gold"] for t in rounds)
    return [float((last - first).mean()), *evaluate.interval(last - first, config.eval.bootstrap)]


def student_sentence(table: dict, rows: list[dict], found: list[float] | None) -> str:
    """How far the student came, and what got worse; `found` is its gain."""
    if not rows:
        return "The student has not been measured yet."
    first, last = rows[0], rows[-1]
    if not last["round"]:
        stands = " and ".join(f"a {name} of {last[key]:.3f}" for key, name in measures(table))
        return f"Before the first round, after naive SFT on teacher 1's answers, the student has {stands}."
    text = " and its ".join(f"{name} {moved(first[key], last[key])}" for key, name in measures(table))
    if found:
        chance = ", so it may be chance" if found[1] <= 0 <= found[2] and "stayed" not in text else ""
        text += f" ({found[0]:+.3f}, 95% interval {found[1]:+.3f} to {found[2]:+.3f}{chance})"
        changes = {name: moved(first[key], last[key]) for key, name in REAL.items()}
        worse = [f"its {name} {went}" for name, went in changes.items() if WORSE[name] in went]
        text += f", while {' and '.join(worse)}" if worse else ""
    return f"After {last['round']} of {table['rounds']} rounds the student's {text}."


def control_sentence(config: Config, table: dict, by: dict[str, list[dict]]) -> str:
    """What the same base reached by other means, and how much of the gap the student closed."""
    reached = []
    for agent, way in (("continued", "naive SFT continued"), ("ceiling", "SFT on the truth, the ceiling,")):
        stands = (f"a {word} of {by[agent][0][key]:.3f}" for key, word in measures(table) if agent in by)
        reached += [f"{way} gives {' and '.join(stands)}"] if agent in by else []
    if not reached:
        return f"There is no control and no ceiling to compare with{' yet' * config.macpo.controls}."
    share = by.get("student", [{}])[-1].get("pgr")
    gap = "the gap between the best teacher at the start and the ceiling"
    closed = f"; of {gap} the student recovered {share:.0%}" if share is not None else ""
    return f"For comparison, {' and '.join(reached)}{closed}."


def teacher_ends(by: dict[str, list[dict]], key: str) -> dict[str, tuple[float, float]]:
    """Each teacher's first number and that of the last round in which all of them are measured."""
    teachers = {name: rows for name, rows in by.items() if name.startswith("teacher")}
    last = min(map(len, teachers.values()), default=0) - 1
    return {name: (rows[0][key], rows[last][key]) for name, rows in teachers.items()}


def teacher_sentence(config: Config, table: dict, by: dict[str, list[dict]]) -> str:
    """How far the teachers came, and which of them fell."""
    key, word = measures(table)[0]
    ends = teacher_ends(by, key)
    if not ends:
        return "No teacher has been measured yet."
    old, new = map(fmean, zip(*ends.values(), strict=True))
    if not config.macpo.update_teachers:
        return f"The teachers do not learn in this run; their mean {word} is {old:.3f}."
    fell = [f"{words(name)} {moved(*pair)}" for name, pair in ends.items() if moved(*pair).startswith("fell")]
    return f"The teachers' mean {word} {moved(old, new)}" + (f"; {', '.join(fell)}." if fell else ".")


def headline(table: dict, by: dict[str, list[dict]], found: list[float] | None) -> Html:
    """The run in a few large numbers."""
    items, (key, word) = [], measures(table)[0]
    student = by.get("student", [{}])[-1]
    for k, name in measures(table) if student else ():
        spread = ", 95% {:.3f} to {:.3f}".format(*student["gold_interval"]) if k == "gold" else ""
        items.append((f"Student, round {student['round']}", f"{student[k]:.3f}", name + spread))
    if found:
        items.append(("Gain", f"{found[0]:+.3f}", f"over naive SFT, 95% {found[1]:+.3f} to {found[2]:+.3f}"))
    if "ceiling" in by:
        items.append(("Ceiling", f"{by['ceiling'][0][key]:.3f}", f"{word} after SFT on the true answers"))
    if student.get("pgr") is not None:
        items.append(("Gap recovered", f"{student['pgr']:.0%}", "PGR: from the best teacher to the ceiling"))
    if ends := teacher_ends(by, key):
        old, new = map(fmean, zip(*ends.values(), strict=True))
        items.append(("Teachers' mean", f"{new:.3f}", f"{word}, {old:.3f} at round 0"))
    blocks = (tag("div", tag("dt", title), tag("dd", value), tag("dd", note)) for title, value, note in items)
    return tag("dl", *blocks, class_="numbers") if items else Html("")


# ---- curves -------------------------------------------------------------------------------------


def over_rounds(by: dict[str, list[dict]], key: str) -> dict[str, list]:
    """A column of the table; the controls, measured at the end only, go from side to side."""
    lines = {}
    for agent, rows in by.items():
        rows = [rows[0] | {"round": 0}, *rows] if agent in ("continued", "ceiling") else rows
        known = [row for row in rows if math.isfinite(row.get(key, math.nan))]
        lines[agent] = [(row["round"], row[key], *row.get(f"{key}_interval", ())) for row in known]
    return lines


@functools.lru_cache(maxsize=4096)
def curve(stage: Path, fingerprint: str, key: str, unit: str, start: int) -> list[tuple[float, float]]:
    """A metric of a training stage, about 100 points; a stage is one round long where that is the unit."""
    rows = list(read_rows(stage / "metrics.jsonl")) if (stage / "metrics.jsonl").is_file() else []
    rows = [row for row in rows[:: -max(1, len(rows) // 100)][::-1] if math.isfinite(row.get(key, math.nan))]
    places = [start + row["step"] / rows[-1]["step"] if unit == "round" else row[unit] for row in rows]
    return [(place, row[key]) for place, row in zip(places, rows, strict=True)]


def training_figures(config: Config, folder: Path) -> list[Html]:
    """Losses, margins and accuracies of every training stage."""
    teachers, rounds = range(1, config.macpo.teachers + 1), range(1, config.macpo.rounds + 1)
    agents = ["student", *(f"teacher{k}" for k in teachers)]
    updates = {agent: [f"round{t}/{agent}_pos" for t in rounds] for agent in agents}
    controls = {agent: [f"controls/{agent}"] for agent in ("continued", "ceiling")}
    bases = {base: [f"bases/{base}"] for base in ("strong", *(f"weak{k}" for k in teachers))}
    shown = [
        ("Loss in the rounds", "DPO + γ SFT", "loss", "round", updates),
        ("Reward margin", "chosen − rejected, β · nats", "rewards/margins", "round", updates),
        ("Ranking accuracy", "share of margins above 0", "rewards/accuracies", "round", updates),
        ("SFT loss", "nats per token", "loss", "epoch", {a: [f"round0/{a}_pos"] for a in agents} | controls),
        ("SFT loss, negative", "nats per token", "loss", "epoch", {a: [f"round0/{a}_neg"] for a in agents}),
        ("Pre-training loss", "nats per token", "loss", "step", bases),
    ]
    figures = []
    for title, note, key, unit, who in shown:
        lines: dict[str, list] = {agent: [] for agent in who}
        for agent, stages in who.items():
            for t, notes in enumerate(notes_of(folder / name) for name in stages):
                lines[agent] += curve(folder / stages[t], notes["fingerprint"], key, unit, t) if notes else []
        figures.append(figure(title, note, lines, unit))
    return figures


# ---- tables -------------------------------------------------------------------------------------


def result_table(table: dict) -> Html:
    """Every agent at every round; with several data files, each of them below."""
    keys, rows = [key for key in COLUMNS if any(key in row for row in table["rows"])], []
    for row in table["rows"]:
        cells = [row["label"], *(evaluate.cell(row, key) for key in keys)]
        last = row["agent"] == "student" and row["round"] == table["rounds"]
        rows.append([tag("b", cell) for cell in cells] if last else cells)
        for file, part in row["files"].items() if len(row["files"]) > 1 else ():
            rows.append([tag("small", file), *(evaluate.cell(part, key) for key in keys)])
    return grid(["", *(COLUMNS[key][0] for key in keys)], rows)


def filter_table(table: dict) -> Html:
    """How often the student chose whose answer, and how often that was right."""
    names, rows = sorted({name for row in table["filter"] for name in row["sources"]}), []
    for row in table["filter"]:
        shares = [row["sources"].get(name, {"won": 0, "right": None}) for name in names] + [row | {"won": 1}]
        rows.append([row["round"], *(f"{s['won']:.0%}{evaluate.right_words(s['right'])}" for s in shares)])
    return grid(["chosen in round", *map(words, names), "all"], rows)


def negative_table(table: dict) -> Html:
    """How wrong the cached negatives are, and how many equalled their positive."""
    rows = []
    for row in table["negatives"]:
        wrong = "–" if row["wrong"] is None else f"{row['wrong']:.0%}"
        rows.append([words(row["agent"]), wrong, ", ".join(f"{share:.1%}" for share in row["equal"])])
    return grid(["negatives of", "wrong", "equal to their positive, by round"], rows)


def cost_tables(cost: list[dict]) -> list[Html]:
    """Time and tokens by kind of stage, and, folded away, of every stage."""
    kinds: dict[str, list[dict]] = {}
    own = [row for row in cost if not row["linked_from"]]
    for row in own:
        kinds.setdefault(row["kind"].partition("/")[0], []).append(row)
    sums = []
    for kind, rows in [*kinds.items(), ("together", own)] if own else ():
        seconds, tokens = (sum(row[key] or 0 for row in rows) for key in ("seconds", "tokens"))
        cells = [f"{tokens:,}", f"{tokens / seconds:,.0f}"] if tokens and seconds else ["–", "–"]
        sums.append([kind, len(rows), clock(seconds), *cells, max(row["peak_mb"] for row in rows)])
    keys = ("name", "seconds", "tokens", "peak_mb", "linked_from")
    cells = [["–" if row[key] is None else row[key] for key in keys] for row in cost]
    every = grid(["stage", "seconds", "tokens", "peak MB", "taken from"], cells)
    folded = tag("details", tag("summary", f"All {len(cost)} stages, in order"), every) if cost else Html("")
    return [grid(["kind of stage", "stages", "time", "tokens", "tokens/s", "peak MB"], sums), folded]


# ---- samples ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def read_shown(file: Path, kind: type, ids: tuple[str, ...], fingerprint: str) -> dict:
    """{prompt id: record} of the prompts with these ids."""
    return {record.id: record for record in read_records(file, kind) if record.id in ids}


def shown(folder: Path, ids: tuple[str, ...], kind: type = Sample) -> dict:
    """{prompt id: record} of a stage's folder; {} if it is not finished."""
    notes, file = notes_of(folder), "samples.jsonl" if kind is Sample else "pairs.jsonl"
    return read_shown(folder / file, kind, ids, notes["fingerprint"]) if notes else {}


def answer(config: Config, pair: Pair, sample: Sample | None, by: str = "") -> Html:
    """An answer with its gold reward, where there is one."""
    if sample is None:
        return Html("–")
    gold = evaluate.gold_of(config, pair, sample)
    facts = [by, "" if gold is None else f"gold {gold:.1f}", "cut at the limit" * (sample.finish == "length")]
    return tag("div", clip(sample.response), tag("small", " · ".join(filter(None, facts))), class_="text")


def samples(config: Config, folder: Path, pairs: list[Pair]) -> list[Html]:
    """What the student learned from in every round, and what it answered then, prompt by prompt."""
    ids, negatives = tuple(pair.id for pair in pairs), {}
    rows: dict[str, list] = {i: [] for i in ids}
    for t in range(1, config.macpo.rounds + 1):
        negatives = shown(folder / f"round{t - 1}/negatives_student", ids) or negatives
        made = shown(folder / f"round{t}/pairs_student", ids, Pair)
        # without mutual positives the student's own of round t come before its update
        later = shown(folder / f"round{t + (not config.macpo.mutual)}/positives_student", ids)
        for pair in pairs if made else ():
            by = made[pair.id].chosen_by if pair.id in made else "nobody"
            good = shown(folder / f"round{t}/positives_{by}", ids).get(pair.id)
            found = ((good, words(by)), (negatives.get(pair.id), ""), (later.get(pair.id), ""))
            rows[pair.id].append([t, *(answer(config, pair, *cell) for cell in found)])
    head = ["round", "positive", "negative", "student, after the round"]
    return [card(pair, grid(head, rows[pair.id], "samples")) for pair in pairs if rows[pair.id]]


def card(pair: Pair, answers: Html) -> Html:
    """A prompt's last turn, its true answer, and what was answered."""
    before = f"After {len(pair.prompt) - 1} earlier turns. " if len(pair.prompt) > 1 else ""
    truth = tag("p", f"{before}True answer: {clip(pair.chosen)}", class_="note text")
    return tag("article", tag("h3", clip(pair.prompt[-1].content), class_="text"), truth, answers)


# ---- the page -----------------------------------------------------------------------------------


def settings(config: Config) -> Html:
    """The resolved configuration; departures from the defaults stand out."""
    plain, blocks = flatten(Config()), {}
    for key, value in flatten(config).items():
        part, name = key.split(".")
        line = f"{name} = {toml_value(value)}\n"
        blocks.setdefault(part, [f"[{part}]\n"]).append(line if value == plain[key] else tag("b", line))
    return side_by_side(*(tag("pre", *lines) for lines in blocks.values()))


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
    student, found = by.get("student", []), None
    if table["world"] and len(student) > 1:
        rounds = (student[0]["round"], student[-1]["round"])
        notes = [notes_of(folder / f"eval/round{t}_student_samples") for t in rounds]
        found = gain(config, folder, rounds, tuple(note["fingerprint"] for note in notes))
    story = (student_sentence(table, student, found), control_sentence(config, table, by),
             teacher_sentence(config, table, by))  # fmt: skip
    pairs = list(evaluate.d2_pairs(folder).values()) if notes_of(folder / "data/slices") else []
    environment = read_json(folder / "env.json") if (folder / "env.json").is_file() else {}
    figures = [figure(*CURVES[key], over_rounds(by, key), main=key == "gold") for key in CURVES]
    name = config.run.name or folder.name
    main = tag(
        "main",
        tag("h1", name),
        tag("p", state(folder, config.run.seed), class_="note"),
        tag("div", *(tag("p", sentence) for sentence in story), class_="lead"),
        headline(table, by, found),
        *(tag("p", f"Warning: {warning}.", class_="warning") for warning in table["warnings"]),
        section("Over the rounds", "Every agent after every round, on prompts that none of them was trained "
                "on. Dashed: the student's base after naive SFT continued for as many steps as the rounds "
                "took, and after SFT on the true answers (the ceiling).",
                figures[0], side_by_side(*figures[1:])),
        section("Table", "right, polite, formed: parts of the gold reward. PGR: share of the gap between the "
                "best teacher at round 0 and the ceiling. ppl: perplexity of the true answers, lower is "
                "better. pref.acc: share of test pairs whose better answer gained more over the base. chars: "
                "mean length. cut: share that hit its limit. distinct-2: share of different word pairs.",
                result_table(table)),
        section("Filter and negatives", "For every prompt the student chooses the teachers' answer that "
                "perplexes it least, and learns to prefer it to a bad answer of its own, its negative.",
                filter_table(table), negative_table(table)),
        section("Training", "Each point is a mean over a few optimiser steps.",
                side_by_side(*training_figures(config, folder))),
        section("Samples", "Training prompts, evenly spaced. Positive: the answer that the student chose to "
                "learn, unless the pair was dropped (negative empty or the same). Negative: its own bad one.",
                *samples(config, folder, pairs[:: len(pairs) // PROMPTS or 1][:PROMPTS])),
        section("Cost", "Wall-clock time. A stage that was taken over from an equal one is not counted.",
                *cost_tables(table["cost"])),
        section("Configuration", "Every setting; bold where it departs from the default.", settings(config)),
        tag("p", " · ".join(f"{key} {value}" for key, value in environment.items()), class_="note"),
    )  # fmt: skip
    write_atomic(folder / "report.html", document(f"{name} · minmacpo", main))
