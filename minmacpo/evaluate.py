"""What a run is worth: test answers of every agent at every round, and the table made of them.

`measure` adds stages to a run while it goes on; `make_table` reads finished stages from the disk,
so the table can be made at any time, also of a run that is still going. The only module, beside
the programs, that knows the world's gold reward.
"""

import functools
import itertools
from pathlib import Path

import numpy as np

from minmacpo import UserError, world
from minmacpo.bases import Ground
from minmacpo.commandline import overlay, read_toml
from minmacpo.config import Config
from minmacpo.data import Pair, Sample
from minmacpo.files import read_json, read_records, read_rows
from minmacpo.macpo import Trained
from minmacpo.stages import sample, score_texts
from minmacpo.workshop import Texts, Workshop

COLUMNS = {  # of the printed table: key, heading, decimals
    "gold": ("gold", 3), "right": ("right", 3), "polite": ("polite", 3), "well_formed": ("formed", 3),
    "pgr": ("PGR", 2), "perplexity": ("ppl", 3), "perplexity_char": ("ppl/char", 3), "accuracy": ("pref.acc", 3),
    "length": ("chars", 1), "hit_length": ("cut", 3), "distinct2": ("distinct-2", 3),
}  # fmt: skip


def measure(shop: Workshop, ground: Ground, trained: Trained) -> None:
    """Sample test answers of an agent and score the true and the worse answers under it and its base."""
    truth, worse = (Texts(ground.slices, "test.jsonl", side) for side in ("chosen", "rejected"))
    base, name = trained.base, f"eval/round{trained.round}_{trained.agent}"
    key, answers = ("eval", trained.agent, trained.round), shop.config.eval.samples
    sample(shop, f"{name}_samples", base, trained.adapter, truth, trained.agent, key, answers)
    for side, texts in (("truth", truth), ("worse", worse)):
        score_texts(shop, f"{name}_{side}", base, trained.adapter, texts)
        score_texts(shop, f"eval/base_{base.name}_{side}", base, None, texts)


# ---- reading a run --------------------------------------------------------------------------


def read_run(path: str | Path) -> tuple[Path, Config]:
    """(folder, configuration) of a run; UserError if the folder is none."""
    folder = Path(path)
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder}: is no run folder (it has no config.toml)")
    return folder, overlay(Config(), read_toml(folder / "config.toml"), str(folder / "config.toml"))


def notes_of(folder: Path) -> dict | None:
    """stage.json of a finished stage, None if it is not finished."""
    return read_json(folder / "stage.json") if (folder / "stage.json").is_file() else None


@functools.lru_cache(maxsize=8)
def town_of(config: Config) -> world.Town | None:
    """The town behind a run of the built-in world, None for real data."""
    return None if config.data.path else world.make_town(config.world, config.run.seed)


@functools.lru_cache(maxsize=8)
def test_pairs(folder: Path) -> list[Pair]:
    """The test slice of a run."""
    return read_records(folder / "data/slices/test.jsonl", Pair)


def agents_of(config: Config) -> list[tuple[str, int, str]]:
    """(agent, round, label) of every row that a run can have, in the table's order."""
    settings = config.macpo
    rows = []
    for k in range(settings.teachers):
        rounds = range(settings.rounds + 1) if settings.update_teachers else (0,)
        rows += [(f"teacher{k + 1}", t, f"teacher {k + 1}, round {t}") for t in rounds]
    rows += [("student", t, f"student, round {t}" + ("" if t else " (naive SFT)")) for t in range(settings.rounds + 1)]
    if settings.controls:
        rows += [("continued", settings.rounds, "naive SFT continued"), ("ceiling", settings.rounds, "ceiling")]
    return rows


def gold_by_prompt(config: Config, folder: Path, agent: str, t: int) -> dict[str, np.ndarray]:
    """{component: [test prompts]}, the mean over each prompt's sampled answers; {} without a world."""
    town, pairs = town_of(config), test_pairs(folder)
    if town is None:
        return {}
    by_id = {pair.id: pair for pair in pairs}
    found: dict[str, dict[str, list[float]]] = {}
    for s in read_records(folder / f"eval/round{t}_{agent}_samples/samples.jsonl", Sample):
        for name, value in world.gold(town, by_id[s.id], s.response, s.finish).items():
            found.setdefault(name, {}).setdefault(s.id, []).append(value)
    return {name: np.array([np.mean(values[pair.id]) for pair in pairs]) for name, values in found.items()}


def interval(values: np.ndarray, draws: int) -> list[float]:
    """95 % bootstrap interval of the mean over prompts [n], the same draws for the same n."""
    picks = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    return np.quantile(values[picks].mean(1), [0.025, 0.975]).round(4).tolist()


def paired_interval(differences: list[np.ndarray], draws: int = 4000) -> list[float]:
    """95 % interval of the mean of paired differences: resamples seeds, then prompts within each."""
    rng = np.random.default_rng(0)
    means = []
    for seeds in rng.integers(0, len(differences), (draws, len(differences))):
        means.append(np.mean([rng.choice(differences[s], len(differences[s])).mean() for s in seeds]))
    return np.quantile(means, [0.025, 0.975]).round(4).tolist()


@functools.lru_cache(maxsize=1024)
def row_of(config: Config, folder: Path, agent: str, t: int, fingerprint: str) -> dict:
    """One row of the table, without its label; `fingerprint` is that of the row's samples."""
    stem = folder / f"eval/round{t}_{agent}"
    samples = read_records(Path(f"{stem}_samples/samples.jsonl"), Sample)
    truth, worse = (list(read_rows(Path(f"{stem}_{side}/scores.jsonl"))) for side in ("truth", "worse"))
    base = "strong" if not agent.startswith("teacher") else f"weak{agent[7:]}"
    plain = [list(read_rows(folder / f"eval/base_{base}_{side}/scores.jsonl")) for side in ("truth", "worse")]
    margins = [(a["logp"] - c["logp"]) - (b["logp"] - d["logp"]) for a, b, c, d in zip(truth, worse, *plain, strict=True)]
    row = {"files": {}}
    files = [pair.meta.get("file") for pair in test_pairs(folder)]
    for file in [None, *sorted({f for f in files if f})]:
        picked = [i for i, f in enumerate(files) if file in (None, f)]
        logp = sum(truth[i]["logp"] for i in picked)
        part = {
            "perplexity": float(np.exp(-logp / sum(truth[i]["tokens"] for i in picked))),
            "perplexity_char": float(np.exp(-logp / sum(truth[i]["characters"] for i in picked))),
            "accuracy": float(np.mean([margins[i] > 0 for i in picked])),
        } | diversity([s for s in samples if file in (None, s.meta.get("file"))])
        row = row | part if file is None else row | {"files": row["files"] | {file: part}}
    for name, values in gold_by_prompt(config, folder, agent, t).items():
        row |= {name: float(values.mean()), f"{name}_interval": interval(values, config.eval.bootstrap)}
    return row


def diversity(samples: list[Sample]) -> dict:
    """Mean length in characters, share cut at the limit, distinct-2 (different among all word pairs)."""
    bigrams = [pair for s in samples for words in [s.response.split()] for pair in itertools.pairwise(words)]
    return {
        "length": float(np.mean([len(s.response) for s in samples])),
        "hit_length": float(np.mean([s.finish == "length" for s in samples])),
        "distinct2": len(set(bigrams)) / max(len(bigrams), 1),
    }


def make_table(path: str | Path) -> dict:
    """Everything that is known of a run so far, as JSON: rows, filter, negatives, warnings, cost."""
    folder, config = read_run(path)
    rows = []
    for agent, t, label in agents_of(config):
        notes = [notes_of(folder / f"eval/round{t}_{agent}_{part}") for part in ("samples", "truth", "worse")]
        base = "strong" if not agent.startswith("teacher") else f"weak{agent[7:]}"
        notes.append(notes_of(folder / f"eval/base_{base}_worse"))
        if all(notes):
            rows.append({"agent": agent, "round": t, "label": label} | row_of(config, folder, agent, t, notes[0]["fingerprint"]))
    add_pgr(config, folder, rows)
    negatives = negative_rows(config, folder)
    return {
        "run": folder.name,
        "world": config.data.path is None,
        "rounds": config.macpo.rounds,
        "rows": rows,
        "filter": filter_rows(config, folder),
        "negatives": negatives,
        "warnings": warnings(negatives),
        "cost": cost_rows(folder),
    }


def add_pgr(config: Config, folder: Path, rows: list[dict]) -> None:
    """Performance gap recovered: (row - best teacher at round 0) / (ceiling - that teacher).

    None where the denominator's interval holds zero. Only for rows of the strong base.
    """
    first = [row for row in rows if row["agent"].startswith("teacher") and row["round"] == 0]
    ceiling = next((row for row in rows if row["agent"] == "ceiling"), None)
    if ceiling is None or "gold" not in ceiling or not first:
        return
    best = max(first, key=lambda row: row["gold"])
    values = [gold_by_prompt(config, folder, row["agent"], row["round"])["gold"] for row in (ceiling, best)]
    low, high = interval(values[0] - values[1], config.eval.bootstrap)
    for row in rows:
        if not row["agent"].startswith("teacher"):
            gap = ceiling["gold"] - best["gold"]
            row["pgr"] = None if low <= 0 <= high else (row["gold"] - best["gold"]) / gap


def gold_of(config: Config, pair: Pair, sample: Sample) -> float | None:
    """Gold reward of an answer to the pair's prompt; None without a world."""
    town = town_of(config)
    return None if town is None else world.gold(town, pair, sample.response, sample.finish)["gold"]


def right_share(config: Config, folder: Path, items: list[tuple[str, str, str]]) -> float | None:
    """Share of (prompt id, response, finish) on D2 whose answer is right; None without a world."""
    town = town_of(config)
    if town is None or not items:
        return None
    by_id = d2_pairs(folder)
    return float(np.mean([world.gold(town, by_id[i], text, finish)["right"] for i, text, finish in items]))


@functools.lru_cache(maxsize=8)
def d2_pairs(folder: Path) -> dict[str, Pair]:
    """The D2 slice of a run by id."""
    return {pair.id: pair for pair in read_records(folder / "data/slices/d2.jsonl", Pair)}


@functools.lru_cache(maxsize=256)
def filter_row(config: Config, folder: Path, t: int, fingerprint: str) -> dict:
    """Round `t` of the filter: per source, how often it won and how often it was right then."""
    won: dict[str, list] = {}
    for pair in read_records(folder / f"round{t}/pairs_student/pairs.jsonl", Pair):
        won.setdefault(pair.chosen_by, []).append((pair.id, pair.chosen, "stop"))
    total = sum(map(len, won.values()))
    shares = {
        who: {"won": len(items) / total, "right": right_share(config, folder, items)} for who, items in sorted(won.items())
    }
    every = [item for items in won.values() for item in items]
    return {"round": t, "sources": shares, "right": right_share(config, folder, every)}


def filter_rows(config: Config, folder: Path) -> list[dict]:
    """`filter_row` of every finished round."""
    found = [(t, notes_of(folder / f"round{t}/pairs_student")) for t in range(1, config.macpo.rounds + 1)]
    return [filter_row(config, folder, t, notes["fingerprint"]) for t, notes in found if notes]


@functools.lru_cache(maxsize=256)
def negative_row(config: Config, folder: Path, agent: str, fingerprint: str) -> dict:
    """How many of an agent's first cached negatives are wrong, as they should be."""
    samples = read_records(folder / f"round0/negatives_{agent}/samples.jsonl", Sample)
    right = right_share(config, folder, [(s.id, s.response, s.finish) for s in samples])
    return {"agent": agent, "wrong": None if right is None else 1 - right, "count": len(samples)}


def negative_rows(config: Config, folder: Path) -> list[dict]:
    """Per agent: share of wrong negatives, and in each round the share that equals its positive."""
    rows = []
    for agent in ("student", *(f"teacher{k + 1}" for k in range(config.macpo.teachers))):
        notes = notes_of(folder / f"round0/negatives_{agent}")
        if not notes:
            continue
        row = dict(negative_row(config, folder, agent, notes["fingerprint"]))
        pairs = [notes_of(folder / f"round{t}/pairs_{agent}") for t in range(1, config.macpo.rounds + 1)]
        row["equal"] = [round(n["counts"]["negative_equal"] / row["count"], 4) for n in pairs if n]
        rows.append(row)
    return rows


def warnings(negatives: list[dict]) -> list[str]:
    """What breaks the method first: negatives that are right, or equal to their positive."""
    found = []
    for row in negatives:
        if row["wrong"] is not None and row["wrong"] < 0.7:
            found.append(f"only {row['wrong']:.0%} of {row['agent']}'s cached negatives are wrong (70 % expected)")
        if max(row["equal"], default=0) > 0.1:
            found.append(f"{max(row['equal']):.0%} of {row['agent']}'s negatives equal their positive (10 % at most)")
    return found


def cost_rows(folder: Path) -> list[dict]:
    """Time, tokens and memory of every finished stage, in the order they were computed."""
    stages = [read_json(file) for file in folder.glob("*/*/stage.json")]
    stages.sort(key=lambda notes: notes["started"])
    keys = ("name", "kind", "seconds", "cpu_seconds", "peak_mb", "linked_from")
    return [{k: n.get(k) for k in keys} | {"tokens": n["counts"].get("tokens")} for n in stages]


# ---- as text --------------------------------------------------------------------------------


def format_table(table: dict) -> str:
    """The table for a terminal."""
    keys = [k for k in COLUMNS if any(k in row for row in table["rows"])]
    lines = [[table["run"], *(COLUMNS[k][0] for k in keys)]]
    for row in table["rows"]:
        lines.append([row["label"], *(cell(row, k) for k in keys)])
        for file, part in row.get("files", {}).items() if len(row.get("files", {})) > 1 else ():
            lines.append([f"  {file}", *(cell(part, k) for k in keys)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines]  # fmt: skip
    text.insert(1, "-" * len(text[0]))
    for row in table["filter"]:
        shares = ", ".join(f"{who} {v['won']:.0%}{right_words(v['right'])}" for who, v in row["sources"].items())
        text.append(f"round {row['round']}: the student learned from {shares}{right_words(row['right'])}")
    for row in table["negatives"]:
        wrong = "" if row["wrong"] is None else f"{row['wrong']:.0%} wrong, "
        equal = ", ".join(f"{share:.1%}" for share in row["equal"]) or "no round yet"
        text.append(f"negatives of {row['agent']}: {wrong}equal to their positive: {equal}")
    return "\n".join(text + [f"WARNING: {warning}" for warning in table["warnings"]])


def right_words(share: float | None) -> str:
    """" (93% right)", or nothing without a world."""
    return "" if share is None else f" ({share:.0%} right)"


def cell(row: dict, key: str) -> str:
    """One number of the table, gold with its interval."""
    value = row.get(key)
    if value is None:
        return "–"
    text = f"{value:.{COLUMNS[key][1]}f}"
    return text + (" [{:.3f}, {:.3f}]".format(*row["gold_interval"]) if key == "gold" else "")
