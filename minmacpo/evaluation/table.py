"""What a run is worth: test answers of every agent at every round, and the table made of them.

`measure` adds stages to a run while it goes on; `make_table` reads finished ones from the disk, at any time,
each once: what it finds there is remembered with the stage's fingerprint. The only module, beside the
programs, that knows the world's gold reward.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minmacpo import UserError
from minmacpo.config.parse import read_settings
from minmacpo.config.schema import Config
from minmacpo.core.scoring import win_or_tie
from minmacpo.data import synthetic as world
from minmacpo.data.formats import released
from minmacpo.data.records import Pair, Sample
from minmacpo.data.text_metrics import distinct2, refuses, self_bleu
from minmacpo.evaluation.bootstrap import interval
from minmacpo.evaluation.html import words
from minmacpo.method.macpo import AgentCheckpoint
from minmacpo.method.monitor import alarms, signs
from minmacpo.pipeline.base_models import Setup
from minmacpo.pipeline.model_pool import Session, TextColumn
from minmacpo.pipeline.run import Stage, verify
from minmacpo.pipeline.sample_stage import sample
from minmacpo.pipeline.score_stage import score_texts
from minmacpo.runtime.files import check_links, fingerprint, read_json, read_rows, write_json

CONTROLS = {
    "kept": "student kept by the monitor",
    "continued": "naive SFT continued",
    "ceiling": "ceiling",
}


NOTES = {"name", "kind", "fingerprint", "counts", "started", "seconds", "cpu_seconds", "peak_mb"}


town_of = functools.lru_cache(maxsize=8)(world.make_town)


check_once = functools.cache(verify)  # files are hashed once


def measure(session: Session, ground: Setup, trained: AgentCheckpoint) -> None:
    """Sample test answers of an agent and score the true and the worse answers under it and its base."""
    truth, worse = (
        TextColumn(ground.slices, "test.jsonl", side) for side in ("chosen", "rejected")
    )
    base, name = trained.base, f"eval/round{trained.round}_{trained.agent}"
    agent = (
        "student" if trained.agent == "kept" else trained.agent
    )  # the same adapter answers the same
    key, answers = ("eval", agent, trained.round), session.config.eval.samples
    said = sample(
        session, f"{name}_samples", base, trained.adapter, truth, trained.agent, key, answers
    )
    if trained.agent not in CONTROLS:
        score_texts(session, f"{name}_under_base", base, None, TextColumn(said))
    for side, texts in (("truth", truth), ("worse", worse)):
        score_texts(session, f"{name}_{side}", base, trained.adapter, texts)
        score_texts(session, f"eval/base_{base.name}_{side}", base, None, texts)


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run as its folder shows it at one moment; `notes`: stage.json of every finished stage by name."""

    folder: Path
    config: Config
    notes: dict[str, dict]

    @property
    def teachers(self) -> list[str]:
        """Their names."""
        return [f"teacher{k + 1}" for k in range(self.config.macpo.teachers)]

    def stage(self, name: str) -> Stage:
        """A finished stage; UserError if it is none, or if a file of it is damaged."""
        if name not in self.notes:
            raise UserError(f"{self.folder / name}: is no finished stage")
        stage = Stage(name, self.folder / name, self.notes[name]["fingerprint"])
        check_once(stage)
        return stage


def read_run(path: str | Path) -> FinishedRun:
    """The run in a folder; UserError if the folder is none, or if a stage.json in it is damaged."""
    folder, settings, notes = Path(path), Path(path) / "config.toml", {}
    if not settings.is_file():
        raise UserError(f"{folder}: is no run folder (it has no config.toml)")
    check_links(folder)
    for file in folder.glob("[!.]*/*/stage.json"):  # not those in folder.PARTIAL
        found = notes[file.parent.relative_to(folder).as_posix()] = read_json(file)
        if found.pop("checksum", None) != fingerprint(found) or not found.keys() >= NOTES:
            raise UserError(
                f"{file}: is damaged, or no stage's; delete {file.parent} and start again"
            )
    return FinishedRun(folder, read_settings(settings), notes)


def judge(
    config: Config, record: Pair | Sample, response: str, finish: str = "stop"
) -> dict[str, float]:
    """Gold reward and its components (world.gold) of an answer to the record's prompt; {} without a world."""
    if config.data.path:
        return {}
    return world.gold(town_of(config.world, config.run.seed), record, response, finish)


@functools.cache
def gold_of(config: Config, samples: Stage) -> dict[str, np.ndarray]:
    """{component: [test prompts]}, the mean over each prompt's sampled answers; {} without a world."""
    said = read_rows(samples.path / "samples.jsonl", Sample)
    judged = [judge(config, s, s.response, s.finish) for s in said]
    golds = {part: np.array([values[part] for values in judged]) for part in judged[0]}
    return {part: values.reshape(-1, config.eval.samples).mean(1) for part, values in golds.items()}


def gold_by_prompt(run: FinishedRun, agent: str, t: int) -> dict[str, np.ndarray]:
    """`gold_of` an agent's test answers after round `t`; UserError if there are none."""
    return gold_of(run.config, run.stage(f"eval/round{t}_{agent}_samples"))


def measured(run: FinishedRun, agent: str) -> list[int]:
    """The rounds after which an agent has been measured, in order."""
    return [
        t
        for t in range(run.config.macpo.rounds + 1)
        if f"eval/round{t}_{agent}_samples" in run.notes
    ]


def last_student(run: FinishedRun) -> tuple[str, int]:
    """(agent, round) of the student that a run ends with: the one that macpo.stop = rollback kept, or else that of the
    last round. UserError if none has been measured."""
    for agent in ("kept", "student"):
        if rounds := measured(run, agent):
            return agent, rounds[-1]
    raise UserError(f"{run.folder}: no answers of its student are finished yet")


@functools.cache
def row_of(config: Config, samples: Stage, *scored: Stage) -> dict:
    """One row of the table; `scored`: true and worse answers under the agent, then under its base."""
    said = read_rows(samples.path / "samples.jsonl", Sample)
    scores = [read_rows(stage.path / "scores.jsonl") for stage in scored]
    margins = [
        (a["logp"] - c["logp"]) - (b["logp"] - d["logp"]) if b["characters"] else None
        for a, b, c, d in zip(*scores, strict=True)
    ]
    files, parts = (
        {s.id: s.meta.get("file") for s in said},
        {},
    )  # files: of the test prompts, in order
    for file in [None, *sorted({f for f in files.values() if f})]:  # None: all files together
        picked = [i for i, f in enumerate(files.values()) if file in (None, f)]
        logp, tokens, size = (
            sum(scores[0][i][k] for i in picked) for k in ("logp", "tokens", "characters")
        )
        mine = [s for s in said if file in (None, s.meta.get("file"))]
        able = [
            margins[i] for i in picked if margins[i] is not None
        ]  # of prompts with a worse answer
        parts[file] = {
            "perplexity": float(np.exp(-logp / tokens)),
            "perplexity_char": float(np.exp(-logp / size)),
            "length": float(np.mean([len(s.response) for s in mine])),
            "hit_length": float(np.mean([s.finish == "length" for s in mine])),
            "refusals": float(np.mean([refuses(s.response) for s in mine])),
            "distinct2": distinct2([s.response for s in mine]),
            "self_bleu": self_bleu([s.response for s in mine]),
        } | ({"accuracy": float(win_or_tie(able).mean())} if able else {})
    row = {"files": parts} | parts.pop(None)
    for part, values in gold_of(config, samples).items():
        row |= {
            part: float(values.mean()),
            f"{part}_interval": interval(values, config.eval.bootstrap),
        }
    return row


def row_at(run: FinishedRun, agent: str, t: int) -> dict | None:
    """`row_of` an agent after round `t`; None where its measurement is not whole."""
    name = f"eval/round{t}_{agent}"
    base = "eval/base_" + (
        agent.replace("teacher", "weak") if agent.startswith("teacher") else "strong"
    )
    names = (f"{name}_samples", f"{name}_truth", f"{name}_worse", f"{base}_truth", f"{base}_worse")
    return row_of(run.config, *map(run.stage, names)) if run.notes.keys() >= set(names) else None


def make_table(run: FinishedRun) -> dict:
    """Everything that is known of a run so far, as JSON: rows, filter, negatives, warnings, cost."""
    rows, rounds = [], run.config.macpo.rounds
    agents = [*run.teachers, "student", *CONTROLS]
    for agent, t in itertools.product(agents, range(rounds + 1)):
        if row := row_at(run, agent, t):
            label = f"{words(agent)}, round {t}" + " (naive SFT)" * ((agent, t) == ("student", 0))
            rows.append({"agent": agent, "round": t, "label": CONTROLS.get(agent, label)} | row)
    add_pgr(run, rows)
    watched = monitor_rows(run)
    negatives, keys = negative_rows(run), ("name", "kind", "seconds", "cpu_seconds", "linked_from")
    stages = sorted(run.notes.values(), key=lambda notes: notes["started"])
    cost = [
        {k: notes.get(k) for k in keys}
        | {
            "tokens": notes["counts"].get("tokens"),
            "peak_mb": notes.get("peak_gpu_mb", notes["peak_mb"]),
        }
        for notes in stages
    ]
    return {
        "run": run.folder.resolve().name,
        "method": run.config.run.method,
        "world": run.config.data.path is None,
        "rounds": rounds,
        "rows": rows,
        "filter": filter_rows(run),
        "negatives": negatives,
        "monitor": watched,
        "warnings": warnings(negatives, watched),
        "cost": cost,
    }


def add_pgr(run: FinishedRun, rows: list[dict]) -> None:
    """Performance gap recovered by the rows of the strong base: (row - best teacher at round 0) / (ceiling -
    that teacher); None where the denominator's interval is not above zero."""
    first = [row for row in rows if row["agent"].startswith("teacher") and row["round"] == 0]
    ceiling = next((row for row in rows if row["agent"] == "ceiling"), None)
    if run.config.data.path or not ceiling or not first:
        return
    best = max(first, key=lambda row: row["gold"])
    top, start = (
        gold_by_prompt(run, row["agent"], row["round"])["gold"] for row in (ceiling, best)
    )
    low, _ = interval(top - start, run.config.eval.bootstrap)
    for row in (row for row in rows if not row["agent"].startswith("teacher")):
        gained, gap = row["gold"] - best["gold"], ceiling["gold"] - best["gold"]
        row["pgr"] = None if low <= 0 else gained / gap


def records_of(stage: Stage) -> list[Pair] | list[Sample]:
    """All that a stage of pairs or of samples holds; UserError for another one."""
    for kind, file in ((Pair, "pairs.jsonl"), (Sample, "samples.jsonl")):
        if (stage.path / file).is_file():
            return read_rows(stage.path / file, kind)
    raise UserError(f"{stage.path}: holds neither pairs nor answers")


def export(run: str, name: str, file: str) -> str:
    """Write the pairs or the answers of a stage as MACPO's authors released theirs; says what was written."""
    past, target = read_run(run), Path(file)
    records, named = (
        records_of(past.stage(name)),
        past.config.data.template == "vicuna-macpo",
    )  # that of their HH runs
    if target.exists():
        raise UserError(f"{target}: exists already; it is not overwritten")
    write_json(target, [released(record, with_speaker=named) for record in records])
    return f"{len(records)} rows: {target}"


@functools.cache
def right_share(
    config: Config, stage: Stage, who: str | None = None, side: str = "chosen"
) -> float | None:
    """Share of a stage's answers to D2 that are right: of its samples, or of a side of its pairs, chosen from `who`
    or from all; None without a world."""
    right = []
    for r in records_of(stage) if config.data.path is None else ():
        text, by = (getattr(r, side), r.chosen_by) if isinstance(r, Pair) else (r.response, None)
        if who in (None, by):
            right.append(judge(config, r, text)["right"])
    return float(np.mean(right)) if right else None


def filter_rows(run: FinishedRun) -> list[dict]:
    """By round: per source, how often it won the filter and how often it was right then; and all together."""
    rows = []
    for t in range(1, run.config.macpo.rounds + 1):
        if (name := f"round{t}/pairs_student") in run.notes:
            counts, stage = run.notes[name]["counts"], run.stage(name)
            won = {
                key.removeprefix("chosen_"): count
                for key, count in counts.items()
                if key.startswith("chosen_")
            }
            sources = {
                who: {
                    "won": won[who] / counts["pairs"],
                    "right": right_share(run.config, stage, who),
                }
                for who in sorted(won)
                if won[who]
            }
            mixed = (
                0 < run.config.macpo.self_fraction < 1
            )  # of a prompt only one's own answers count, or only the others'
            offers = [offer_of(run, t, who) for who in won if not mixed]
            row = {"round": t, "sources": sources, "right": right_share(run.config, stage)}
            rows.append(row | offered(run.config, *filter(None, offers)))
    return rows


def offer_of(run: FinishedRun, t: int, who: str) -> Stage | None:
    """The answers of an agent that the student could choose from in round t, None where they are not on the disk."""
    return next(
        (
            run.stage(n)
            for n in (f"round{t}/own_{who}", f"round{t}/positives_{who}")
            if n in run.notes
        ),
        None,
    )


@functools.cache
def offered(config: Config, *offers: Stage) -> dict[str, float | None]:
    """Of the answers that the student could choose from: the share of prompts with a right one among them (what
    an oracle would reach), and how many of a prompt's answers differ, as a share; {} where none is on the disk."""
    right, texts = {}, {}
    for stage in offers:
        for said in read_rows(stage.path / "samples.jsonl", Sample):
            texts.setdefault(said.id, []).append(said.response)
            found = judge(config, said, said.response).get("right", 0.0)
            right[said.id] = max(found, right.get(said.id, 0.0))
    if not right:
        return {}
    different = float(np.mean([len(set(answers)) / len(answers) for answers in texts.values()]))
    return {
        "offered": None if config.data.path else float(np.mean([*right.values()])),
        "different": different,
    }


def negative_rows(run: FinishedRun) -> list[dict]:
    """By agent: share of its first negatives that are wrong, and by round, that equal their positive. Where these are
    not its negative twin's (macpo.negatives), of those that were rejected in round 1."""
    rows, rounds, own = (
        [],
        range(1, run.config.macpo.rounds + 1),
        run.config.macpo.negatives == "agent",
    )
    for agent in ("student", *run.teachers):
        if (name := f"round0/negatives_{agent}") in run.notes:
            count, first = (
                run.notes[name]["counts"]["answers"],
                name if own else f"round1/pairs_{agent}",
            )
            right = (
                right_share(run.config, run.stage(first), side="rejected")
                if first in run.notes
                else None
            )
            made = [run.notes.get(f"round{t}/pairs_{agent}") for t in rounds]
            equal = [equal_share(notes["counts"]) for notes in made if notes]
            wrong = None if right is None else 1 - right
            rows.append(
                {"agent": agent, "wrong": wrong, "count": count, "equal": equal}
                | ({} if own else {"rejected": True})
            )
    return rows


def equal_share(counts: dict[str, int]) -> float:
    """Of the pairs that a stage put together, those that it dropped because both sides were equal."""
    together = sum(
        counts[key]
        for key in ("pairs", "all_empty", "negative_empty", "negative_equal", "over_long")
    )
    return round(counts["negative_equal"] / together, 4) if together else 0.0


def monitor_rows(run: FinishedRun) -> list[dict]:
    """The monitor's signs and alarms of every agent by round."""
    rows = []
    for agent in ("student", *run.teachers):
        history = []
        for t in range(run.config.macpo.rounds + 1):
            if f"eval/round{t}_{agent}_samples" in run.notes:
                for name in told_by(run, agent, t):
                    run.stage(name)  # what `signs` reads is undamaged
                history.append(signs_of(run.folder, agent, t, fingerprint_of(run, agent, t)))
                rows.append({"agent": agent, "round": t, "alarms": alarms(history)} | history[-1])
    return rows


def fingerprint_of(run: FinishedRun, agent: str, t: int) -> str:
    """What stands for the stages that the signs of an agent are read from, those of the round before included."""
    return repr([(name, run.notes[name]["fingerprint"]) for name in told_by(run, agent, t)])


def told_by(run: FinishedRun, agent: str, t: int) -> list[str]:
    """The finished stages that the signs of an agent are read from."""
    names = [
        f"eval/round{t}_{agent}_samples",
        f"eval/round{t - 1}_{agent}_samples",
        f"round{t}/pairs_{agent}",
        f"eval/round{t}_{agent}_under_base",
        f"round{t}/{agent}_pos",
    ]
    return [name for name in names if name in run.notes]


@functools.cache
def signs_of(folder: Path, agent: str, t: int, stages: str) -> dict[str, float]:
    """`monitor.signs`, read once for the same `stages`."""
    return signs(folder, agent, t)


def warnings(negatives: list[dict], watched: Sequence[dict] = ()) -> list[str]:
    """What breaks the method first: negatives that are right, or equal to their positive; the monitor's alarms."""
    found = [
        f"{words(row['agent'])}, round {row['round']}: {', '.join(row['alarms'])} (monitor)"
        for row in watched
        if row["alarms"]
    ]
    for row in negatives:
        agent, wrong, equal = row["agent"], row["wrong"], max(row["equal"], default=0)
        if wrong is not None and wrong < 0.7:
            what = "rejected answers of round 1" if row.get("rejected") else "cached negatives"
            found.append(f"only {wrong:.0%} of {agent}'s {what} are wrong (70 % expected)")
        if equal > 0.1:
            found.append(f"{equal:.0%} of {agent}'s negatives equal their positive (10 % at most)")
    return found
