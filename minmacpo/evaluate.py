"""What a run is worth: test answers of every agent at every round, and the table made of them.

`measure` adds stages to a run while it goes on; `make_table` reads finished ones from the disk, at any time.
The only module, beside the programs, that knows the world's gold reward.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from minmacpo import UserError, world
from minmacpo.bases import Ground
from minmacpo.commandline import overlay, read_toml
from minmacpo.config import Config
from minmacpo.data import Pair, Sample
from minmacpo.files import read_json, read_records, read_rows
from minmacpo.macpo import Trained
from minmacpo.page import words
from minmacpo.run import Stage, verify
from minmacpo.stages import sample, score_texts
from minmacpo.workshop import Texts, Workshop

COLUMNS = {  # of the printed table: key, heading, decimals
    "gold": ("gold", 3), "right": ("right", 3), "polite": ("polite", 3), "well_formed": ("formed", 3),
    "pgr": ("PGR", 2), "perplexity": ("ppl", 3), "perplexity_char": ("ppl/char", 3),
    "accuracy": ("pref.acc", 3), "length": ("chars", 1), "hit_length": ("cut", 3),
    "distinct2": ("distinct-2", 3),
}  # fmt: skip
town_of = functools.lru_cache(maxsize=8)(world.make_town)


def measure(shop: Workshop, ground: Ground, trained: Trained) -> None:
    """Sample test answers of an agent and score the true and the worse answers under it and its base."""
    truth, worse = (Texts(ground.slices, "test.jsonl", side) for side in ("chosen", "rejected"))
    base, name = trained.base, f"eval/round{trained.round}_{trained.agent}"
    key, answers = ("eval", trained.agent, trained.round), shop.config.eval.samples
    sample(shop, f"{name}_samples", base, trained.adapter, truth, trained.agent, key, answers)
    for side, texts in (("truth", truth), ("worse", worse)):
        score_texts(shop, f"{name}_{side}", base, trained.adapter, texts)
        score_texts(shop, f"eval/base_{base.name}_{side}", base, None, texts)


def read_run(path: str | Path) -> tuple[Path, Config]:
    """(folder, configuration) of a run; UserError if the folder is none."""
    file = Path(path) / "config.toml"
    if not file.is_file():
        raise UserError(f"{file.parent}: is no run folder (it has no config.toml)")
    return file.parent, overlay(Config(), read_toml(file), str(file))


def notes_of(folder: Path) -> dict:
    """stage.json of a finished stage, {} if it is not finished."""
    return read_json(folder / "stage.json") if (folder / "stage.json").is_file() else {}


def whole(stage: Path) -> Path:
    """The folder of a finished stage; UserError if it is not finished or a file of it is damaged."""
    verify(Stage(stage.name, stage, notes_of(stage).get("fingerprint", "")))
    return stage


def of_finished(function: Callable) -> Callable:
    """`function(*stage folders, **more)`, computed once per fingerprints; {} until they are all finished."""
    remembered = functools.lru_cache(maxsize=8192)(lambda prints, stages, **more: function(*map(whole, stages), **more))

    def call(*stages: Path, **more: object) -> object:
        notes = [notes_of(stage) for stage in stages]
        return remembered(tuple(n["fingerprint"] for n in notes), stages, **more) if all(notes) else {}

    return functools.wraps(function)(call)


@functools.lru_cache(maxsize=8)
def pairs_of(folder: Path, name: str) -> dict[str, Pair]:
    """A slice of a run, such as "test", by prompt id."""
    return {pair.id: pair for pair in read_records(whole(folder / "data/slices") / f"{name}.jsonl", Pair)}


def judge(config: Config, pair: Pair, response: str, finish: str = "stop") -> dict[str, float]:
    """Gold reward and its components (world.gold) of an answer to the pair's prompt; {} without a world."""
    if config.data.path:
        return {}
    return world.gold(town_of(config.world, config.run.seed), pair, response, finish)


@functools.lru_cache(maxsize=1024)
def gold_by_prompt(config: Config, folder: Path, agent: str, t: int) -> dict[str, np.ndarray]:
    """{component: [test prompts]}, the mean over each prompt's sampled answers; {} without a world."""
    pairs, found = pairs_of(folder, "test"), {}
    for s in read_records(whole(folder / f"eval/round{t}_{agent}_samples") / "samples.jsonl", Sample):
        for name, value in judge(config, pairs[s.id], s.response, s.finish).items():
            found.setdefault(name, {}).setdefault(s.id, []).append(value)
    return {name: np.array([np.mean(values[i]) for i in pairs]) for name, values in found.items()}


def interval(values: np.ndarray, draws: int) -> list[float]:
    """95 % bootstrap interval of the mean over prompts [n], the same draws for the same n."""
    picks = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    return np.quantile(values[picks].mean(1), [0.025, 0.975]).round(4).tolist()


def paired_interval(differences: list[np.ndarray], draws: int = 4000) -> list[float]:
    """95 % interval of the mean of paired differences: resamples seeds, then prompts within each."""
    rng, count = np.random.default_rng(0), len(differences)
    picks = ([differences[seed] for seed in seeds] for seeds in rng.integers(0, count, (draws, count)))
    means = [np.mean([rng.choice(values, len(values)).mean() for values in pick]) for pick in picks]
    return np.quantile(means, [0.025, 0.975]).round(4).tolist()


def agents_of(config: Config) -> list[tuple[str, int, str]]:
    """(agent, round, label) of every row that a run can have, in the table's order."""
    settings, last = config.macpo, config.macpo.rounds
    taught = range(last * settings.update_teachers + 1)
    teachers = range(1, settings.teachers + 1)
    rows = [(f"teacher{k}", t, f"teacher {k}, round {t}") for k in teachers for t in taught]
    rows += [("student", t, f"student, round {t}{'' if t else ' (naive SFT)'}") for t in range(last + 1)]
    controls = [("continued", last, "naive SFT continued"), ("ceiling", last, "ceiling")]
    return rows + controls * settings.controls


@of_finished
def row_of(samples: Path, *scored: Path, config: Config, agent: str, t: int) -> dict:
    """One row of the table; `scored`: true and worse answers under the agent, then under its base."""
    folder, said = samples.parents[1], read_records(samples / "samples.jsonl", Sample)
    scores = [read_rows(stage / "scores.jsonl") for stage in scored]
    margins = [(a["logp"] - c["logp"]) - (b["logp"] - d["logp"]) for a, b, c, d in zip(*scores, strict=True)]
    files, parts = [pair.meta.get("file") for pair in pairs_of(folder, "test").values()], {}
    for file in [None, *sorted({f for f in files if f})]:  # None: all files together
        picked = [i for i, f in enumerate(files) if file in (None, f)]
        logp, tokens, size = (sum(scores[0][i][k] for i in picked) for k in ("logp", "tokens", "characters"))
        mine = [s for s in said if file in (None, s.meta.get("file"))]
        bigrams = [pair for s in mine for pair in itertools.pairwise(s.response.split())]
        parts[file] = {
            "perplexity": float(np.exp(-logp / tokens)),
            "perplexity_char": float(np.exp(-logp / size)),
            "accuracy": float(np.mean([margins[i] > 0 for i in picked])),
            "length": float(np.mean([len(s.response) for s in mine])),
            "hit_length": float(np.mean([s.finish == "length" for s in mine])),
            "distinct2": len(set(bigrams)) / max(len(bigrams), 1),
        }
    row = {"files": parts} | parts.pop(None)
    for name, values in gold_by_prompt(config, folder, agent, t).items():
        row |= {name: float(values.mean()), f"{name}_interval": interval(values, config.eval.bootstrap)}
    return row


def make_table(path: str | Path) -> dict:
    """Everything that is known of a run so far, as JSON: rows, filter, negatives, warnings, cost."""
    folder, config = read_run(path)
    rows, rounds = [], range(1, config.macpo.rounds + 1)
    for agent, t, label in agents_of(config):
        name = f"round{t}_{agent}"
        base = agent.replace("teacher", "base_weak") if agent.startswith("teacher") else "base_strong"
        stages = (f"{name}_samples", f"{name}_truth", f"{name}_worse", f"{base}_truth", f"{base}_worse")
        if row := row_of(*(folder / "eval" / stage for stage in stages), config=config, agent=agent, t=t):
            rows.append({"agent": agent, "round": t, "label": label} | row)
    add_pgr(config, folder, rows)
    filtered = (filter_row(folder / f"round{t}/pairs_student", config=config, t=t) for t in rounds)
    negatives = negative_rows(config, folder)
    return {
        "run": folder.name,
        "world": config.data.path is None,
        "rounds": config.macpo.rounds,
        "rows": rows,
        "filter": [row for row in filtered if row],
        "negatives": negatives,
        "warnings": warnings(negatives),
        "cost": cost_rows(folder),
    }


def add_pgr(config: Config, folder: Path, rows: list[dict]) -> None:
    """Performance gap recovered by the rows of the strong base: (row - best teacher at round 0) / (ceiling -
    that teacher); None where the denominator's interval holds zero."""
    first = [row for row in rows if row["agent"].startswith("teacher") and row["round"] == 0]
    ceiling = next((row for row in rows if row["agent"] == "ceiling"), None)
    if config.data.path or not ceiling or not first:
        return
    best = max(first, key=lambda row: row["gold"])
    top, start = (gold_by_prompt(config, folder, r["agent"], r["round"])["gold"] for r in (ceiling, best))
    low, high = interval(top - start, config.eval.bootstrap)
    for row in (row for row in rows if not row["agent"].startswith("teacher")):
        gained, gap = row["gold"] - best["gold"], ceiling["gold"] - best["gold"]
        row["pgr"] = None if low <= 0 <= high else gained / gap


def right_share(config: Config, stage: Path, answers: list[tuple[str, str]]) -> float | None:
    """Share of a stage's (prompt id, response) on D2 that are right; None without a world."""
    pairs = {} if config.data.path else pairs_of(stage.parents[1], "d2")
    right = [judge(config, pairs[i], response)["right"] for i, response in answers if pairs]
    return float(np.mean(right)) if right else None


@of_finished
def filter_row(stage: Path, config: Config, t: int) -> dict:
    """Round `t` of the filter: per source, how often it won and how often it was right then."""
    pairs, sources = read_records(stage / "pairs.jsonl", Pair), {}
    for who in sorted({pair.chosen_by for pair in pairs}):
        won = [(pair.id, pair.chosen) for pair in pairs if pair.chosen_by == who]
        sources[who] = {"won": len(won) / len(pairs), "right": right_share(config, stage, won)}
    right = right_share(config, stage, [(pair.id, pair.chosen) for pair in pairs])
    return {"round": t, "sources": sources, "right": right}


@of_finished
def negative_row(stage: Path, config: Config, agent: str) -> dict:
    """How many of an agent's first cached negatives are wrong, as they should be."""
    samples = read_records(stage / "samples.jsonl", Sample)
    right = right_share(config, stage, [(s.id, s.response) for s in samples])
    return {"agent": agent, "wrong": None if right is None else 1 - right, "count": len(samples)}


def negative_rows(config: Config, folder: Path) -> list[dict]:
    """Per agent: share of wrong negatives, and in each round the share that equals its positive."""
    rows = []
    for agent in ("student", *(f"teacher{k + 1}" for k in range(config.macpo.teachers))):
        if row := negative_row(folder / f"round0/negatives_{agent}", config=config, agent=agent):
            notes = [notes_of(folder / f"round{t}/pairs_{agent}") for t in range(1, config.macpo.rounds + 1)]
            equal = [round(n["counts"]["negative_equal"] / row["count"], 4) for n in notes if n]
            rows.append(row | {"equal": equal})
    return rows


def warnings(negatives: list[dict]) -> list[str]:
    """What breaks the method first: negatives that are right, or equal to their positive."""
    found = []
    for row in negatives:
        agent, wrong, equal = row["agent"], row["wrong"], max(row["equal"], default=0)
        if wrong is not None and wrong < 0.7:
            found.append(f"only {wrong:.0%} of {agent}'s cached negatives are wrong (70 % expected)")
        if equal > 0.1:
            found.append(f"{equal:.0%} of {agent}'s negatives equal their positive (10 % at most)")
    return found


def cost_rows(folder: Path) -> list[dict]:
    """Time, tokens and memory of every finished stage, in the order they were computed."""
    stages = sorted(map(read_json, folder.glob("*/*/stage.json")), key=lambda notes: notes["started"])
    keys = ("name", "kind", "seconds", "cpu_seconds", "peak_mb", "linked_from")
    return [{k: n.get(k) for k in keys} | {"tokens": n["counts"].get("tokens")} for n in stages]


def tables(table: dict) -> list[tuple[list[str], list[list[str]]]]:
    """(head, rows) of text: every agent at every round, with several files each of them below; whose answers
    the student chose, and how often they were right; how wrong the cached negatives are."""
    keys = [key for key in COLUMNS if any(key in row for row in table["rows"])]
    results, filtered, negatives = [], [], []
    for row in table["rows"]:
        parts = {f"  {file}": part for file, part in row["files"].items()} if len(row["files"]) > 1 else {}
        parts = {row["label"]: row} | parts
        results += [[name, *(cell(part, key) for key in keys)] for name, part in parts.items()]
    names = sorted({name for row in table["filter"] for name in row["sources"]})
    for row in table["filter"]:
        shares = [row["sources"].get(name, {"won": 0, "right": None}) for name in names] + [row | {"won": 1}]
        right = ["" if s["right"] is None else f" ({s['right']:.0%} right)" for s in shares]
        cells = [f"{s['won']:.0%}{more}" for s, more in zip(shares, right, strict=True)]
        filtered.append([str(row["round"]), *cells])
    for row in table["negatives"]:
        wrong = "–" if row["wrong"] is None else f"{row['wrong']:.0%}"
        negatives.append([words(row["agent"]), wrong, ", ".join(f"{share:.1%}" for share in row["equal"])])
    return [
        ([table["run"], *(COLUMNS[key][0] for key in keys)], results),
        (["chosen in round", *map(words, names), "all"], filtered),
        (["negatives of", "wrong", "equal to their positive, by round"], negatives),
    ]


def cell(row: dict, key: str) -> str:
    """One number of the table, gold with its interval."""
    spread = " [{:.3f}, {:.3f}]".format(*row["gold_interval"]) if key == "gold" else ""
    return "–" if row.get(key) is None else f"{row[key]:.{COLUMNS[key][1]}f}{spread}"


def format_table(table: dict) -> str:
    """The tables for a terminal."""
    text = []
    for head, rows in tables(table):
        first, *widths = (max(map(len, column)) for column in zip(head, *rows, strict=True))
        for name, *cells in [head, *rows] if rows else ():
            text.append("  ".join([f"{name:{first}}", *map(str.rjust, cells, widths)]))
        text.append("")
    return "\n".join(text[:-1] + [f"WARNING: {warning}" for warning in table["warnings"]])
