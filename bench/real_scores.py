"""What the runs of bench/real.py gave: ratings by reward models that have seen none of their prompts, the numbers of the
page (assets/results/real.json), and its section of RESULTS.md."""

from collections.abc import Sequence

import numpy as np

from bench.real import PARTS, Plan, name_of, runs_of, slices_of
from bench.results import PLACE, markdown, read
from minmacpo.core.scoring import win_or_tie
from minmacpo.data.formats import read_data
from minmacpo.evaluation.experiment_results import mean_with_interval, win_by_prompt
from minmacpo.evaluation.experiments import Case
from minmacpo.evaluation.finished_run import FinishedRun, read_run
from minmacpo.evaluation.reward_model import (
    Rate,
    fitting,
    informative,
    ranked,
    read_test_answers,
    trained_here,
    unseen,
)
from minmacpo.evaluation.table import make_table
from minmacpo.evaluation.text_tables import bracketed
from minmacpo.pipeline.run import FINISHED
from minmacpo.runtime.files import read_json, read_rows, write_json

RATED = ("student", "continued", "ceiling")  # agents, all of them on the strong base
Arrays = dict[str, np.ndarray]  # by measure, a value per test prompt


# ---- ratings -------------------------------------------------------------------------------------


def judge_of(plan: Plan, source: str, run: FinishedRun) -> tuple[Rate, dict]:
    """A reward model of a source on the run's strong base, and what is known of it: it learns from the slice that nothing
    else sees, and is tried on the pairs of D2 and test, of which it has seen none."""
    place = plan.root / "data" / source
    learned, dropped, _ = unseen(run, str(place / "reward.jsonl"))
    rate = trained_here(run, learned)
    held = fitting(
        run,
        [pair for part in ("d2", "test") for pair in read_data(str(place / f"{part}.jsonl"))[0]],
    )
    assert not {pair.prompt for pair in held} & {pair.prompt for pair in learned}, (
        "a reward model is tried on what it has seen"
    )
    return rate, {
        "source": source,
        "pairs": len(learned),
        "over_long": dropped,
        "right": ranked(held, rate).tolist(),
    }


def rate(plan: Plan, seed: int) -> None:
    """Rate the test answers of every finished run of a seed that is not rated yet: a file each, by agent and round."""
    judges: dict[str, tuple[Rate, dict]] = {}
    (plan.root / "reward").mkdir(exist_ok=True)
    for name, case in runs_of(plan, seed).items():
        if plan.rating(name).is_file() or not (plan.root / "runs" / name / FINISHED).is_file():
            continue
        run, source = read_run(plan.root / "runs" / name), rated_by(plan, case)
        if source not in judges:
            judges[source] = judge_of(plan, source, run)
        judge, known = judges[source]
        scores: dict[str, dict] = {agent: {} for agent in RATED}
        for (t, agent), samples in read_test_answers(run).items():
            if agent in RATED:
                values = (
                    judge([(s.prompt, s.response) for s in samples])
                    .reshape(-1, run.config.eval.samples)
                    .mean(1)
                )
                scores[agent][str(t)] = values.round(5).tolist()
        write_json(plan.rating(name), known | {"scores": scores})


def rated_by(plan: Plan, case: Case) -> str:
    """Whose reward model rates a case: that of its test's source, or of its teachers' where that one has no pairs."""
    sources = slices_of(case.flags)
    tested = sources["--data.test"][0]
    return tested if plan.counts()["rows"][tested]["reward"] else sources["--data.path"][0]


# ---- numbers -------------------------------------------------------------------------------------


def arrays(run: FinishedRun, rating: dict, agent: str, t: int) -> Arrays:
    """What is known of an agent of the strong base after round t, by test prompt: log-probability and tokens of the true
    answer, whether it is win_or_tie to the worse one (more than the base does), characters and score of its own."""
    names = [
        f"eval/round{t}_{agent}_truth",
        f"eval/round{t}_{agent}_worse",
        "eval/base_strong_truth",
        "eval/base_strong_worse",
    ]
    truth, worse, base_truth, base_worse = (
        read_rows(run.stage(name).path / "scores.jsonl") for name in names
    )
    margins = [
        (a["logp"] - c["logp"]) - (b["logp"] - d["logp"])
        for a, b, c, d in zip(truth, worse, base_truth, base_worse, strict=True)
        if b["characters"]
    ]
    said = read_test_answers(run)[t, agent]
    return {
        "logp": np.array([row["logp"] for row in truth]),
        "tokens": np.array([row["tokens"] for row in truth]),
        "prefers": win_or_tie(margins),
        "score": np.array(rating["scores"][agent][str(t)]),
        "length": np.array([len(s.response) for s in said])
        .reshape(-1, run.config.eval.samples)
        .mean(1),
    }


def summary(mine: Sequence[Arrays], naive: Sequence[Arrays]) -> dict:
    """One agent against naive SFT of the same runs, by seed."""
    both = list(zip(mine, naive, strict=True))
    return {
        "perplexity": [
            float(np.exp(-a["logp"].sum() / a["tokens"].sum())) for a in mine
        ],  # by seed
        "nats": mean_with_interval(
            [(b["logp"] - a["logp"]) / a["tokens"].mean() for a, b in both]
        ),  # per token, below 0 is better
        "prefers": mean_with_interval([a["prefers"] for a in mine]),
        "wins": mean_with_interval([win_by_prompt(a["score"], b["score"]) for a, b in both]),
        "score": mean_with_interval([a["score"] - b["score"] for a, b in both]),
        "length": float(np.mean([a["length"].mean() for a in mine])),
    }


def row_of(plan: Plan, case: Case, runs: dict[int, FinishedRun], agent: str, label: str) -> dict:
    """What an agent of one case came to, at its last round; "naive" is the student's round 0."""
    ratings = [read_json(plan.rating(name_of(case, seed))) for seed in runs]
    rounds = next(iter(runs.values())).config.macpo.rounds
    naive = [
        arrays(run, rating, "student", 0)
        for run, rating in zip(runs.values(), ratings, strict=True)
    ]
    mine = (
        naive
        if agent == "naive"
        else [
            arrays(run, rating, agent, rounds)
            for run, rating in zip(runs.values(), ratings, strict=True)
        ]
    )
    found = {
        "group": case.group,
        "name": label,
        "seeds": [*runs],
        "judge": ratings[0]["source"],
        "trust": mean_with_interval([np.array(rating["right"]) for rating in ratings]),
    }
    found |= summary(mine, naive)
    if agent == "student":
        tables = [make_table(run)["rows"] for run in runs.values()]
        found["by_round"] = {
            key: by_round(tables, "student", key) for key in ("perplexity", "length", "distinct2")
        }
        found["teachers"] = by_round(tables, "teacher", "perplexity")
    return found


def by_round(tables: Sequence[list[dict]], agent: str, key: str) -> list[float | None]:
    """A measure of the agents whose name begins so, after round 0, 1, …: means over seeds; None where none was measured."""
    rows = [row for table in tables for row in table if row["agent"].startswith(agent)]
    found = [
        [row[key] for row in rows if row["round"] == t]
        for t in range(1 + max(row["round"] for row in rows))
    ]
    return [float(np.mean(values)) if values else None for values in found]


def finished(plan: Plan, case: Case, seeds: Sequence[int]) -> dict[int, FinishedRun]:
    """The runs of a case that are finished and rated, by seed."""
    names = {seed: name_of(case, seed) for seed in seeds if not plan.missing(case)}
    return {
        seed: read_run(plan.root / "runs" / name)
        for seed, name in names.items()
        if (plan.root / "runs" / name / FINISHED).is_file() and plan.rating(name).is_file()
    }


def rows_of(plan: Plan, name: str, seeds: Sequence[int]) -> list[dict]:
    """The table of an experiment: of each group naive SFT and its controls first, then its variants."""
    rows, groups = [], set()
    for case in plan.cases(name):
        if not (runs := finished(plan, case, seeds)):
            continue
        if case.group not in groups:
            groups.add(case.group)
            rows.append(row_of(plan, case, runs, "naive", "naive SFT"))
            if name == "main":
                rows += [
                    row_of(plan, case, runs, agent, label)
                    for agent, label in (
                        ("continued", "naive SFT continued"),
                        ("ceiling", "ceiling: SFT on the truth"),
                    )
                ]
        rows.append(row_of(plan, case, runs, "student", case.name))
        if name == "noise" and case.name != plan.cases(name)[0].name:
            rows.insert(-1, row_of(plan, case, runs, "naive", f"naive SFT, {case.name}"))
    return rows


def collect(plan: Plan, seeds: Sequence[int]) -> None:
    """Write assets/results/real.json from what is finished, rated first where it is not."""
    for seed in seeds:
        rate(plan, seed)
    slices, spent, commits = {}, {}, set()
    for seed in seeds:
        for name, case in runs_of(plan, seed).items():
            if run := finished(plan, case, [seed]).get(seed):
                slices.setdefault(case.group, run.metadata["data/slices"]["counts"]["slices"])
                own = [notes for notes in run.metadata.values() if "linked_from" not in notes]
                spent[name], commits = (
                    sum(notes["cpu_seconds"] for notes in own),
                    commits | {notes["commit"] for notes in own},
                )
    made = {seed: plan.root / "runs" / f"bases-seed={seed}" / "bases.json" for seed in seeds}
    bases = {str(seed): read_json(file) for seed, file in made.items() if file.is_file()}
    found = {
        name: {
            "question": asked["question"],
            "world": asked["world"],
            "rows": rows_of(plan, name, seeds),
            "missing": sorted(
                {source for case in plan.cases(name) for source in plan.missing(case)}
            ),
            "wanted": len(plan.cases(name)) * len(seeds),
        }
        for name, asked in plan.experiments.items()
    }
    PLACE.mkdir(parents=True, exist_ok=True)
    write_json(
        PLACE / "real.json",
        {
            "seeds": list(seeds),
            "full": plan.full,
            "commits": sorted(commits),
            "split": {k: plan.counts()[k] for k in ("read", "rows")},
            "slices": slices,
            "bases": bases,
            "spent": spent,
            "experiments": found,
        },
    )


# ---- the page ------------------------------------------------------------------------------------


def judged(row: dict) -> tuple[str, str]:
    """(what the reward model says of a row, how far it can be trusted)."""
    trust = bracketed(row["trust"], ".2f")
    if not informative(row["trust"][1:]):
        return bracketed(row["wins"]) + ", not informative", f"{trust}: not informative"
    return bracketed(row["wins"]), trust


def predicted(world: dict, row: dict) -> str:
    """What the gold-reward world has for the same comparison: the student's win rate over naive SFT."""
    if row["name"] not in world:
        return "–"
    file, group, name = world[row["name"]]
    rows = (read(file) or {"variants": []})["variants"]
    found = next((r for r in rows if (r.get("group", ""), r["name"]) == (group, name)), None)
    return bracketed(found["wins"]) if found else "–"


def cells(world: dict, row: dict) -> list[str]:
    """A row of an experiment's table."""
    nats = (
        ""
        if row["name"].startswith("naive SFT") and not any(row["nats"])
        else bracketed(row["nats"], "+.3f")
    )
    return [
        f"{row['group']}: {row['name']}",
        str(len(row["seeds"])),
        " / ".join(f"{p:.1f}" for p in row["perplexity"]),
        nats,
        bracketed(row["prefers"]),
        *(judged(row) if nats else ("", judged(row)[1])),
        predicted(world, row),
        f"{row['length']:.0f}",
    ]


HEAD = (
    "student",
    "seeds",
    "perplexity of true answers, by seed",
    "its logarithm − naive SFT's [95 %]",
    "preference accuracy",
    "win rate over naive SFT, by the reward model",
    "the reward model's held-out accuracy",
    "the world: win rate by gold reward",
    "characters",
)


def experiment(name: str, found: dict) -> str:
    """Table and curves of one experiment, or why there is none."""
    head = f"### {name}\n\n*{found['question']}*\n"
    if not found["rows"]:
        why = (
            f"no file of {', '.join(found['missing'])} was given"
            if found["missing"]
            else "no run was finished"
        )
        return f"{head}\nNot measured: {why}.\n"
    done = sum(len(row["seeds"]) for row in found["rows"] if "by_round" in row)
    students = [row for row in found["rows"] if "by_round" in row]
    short = f"{done} of {found['wanted']} runs are finished.\n" if done < found["wanted"] else ""
    longest = max(len(row["by_round"]["perplexity"]) for row in students)
    curve = [
        [
            f"{row['group']}: {row['name']}, {label}",
            *("" if v is None else f"{v:{form}}" for v in values),
        ]
        for row in students
        for label, form, values in (
            ("perplexity", ".1f", row["by_round"]["perplexity"]),
            ("its teachers'", ".1f", row["teachers"]),
            ("distinct-2", ".2f", row["by_round"]["distinct2"]),
        )
    ]
    curve = [line + [""] * (longest + 1 - len(line)) for line in curve]
    return "\n".join(
        [
            head,
            short,
            markdown(HEAD, [cells(found["world"], row) for row in found["rows"]]),
            markdown(["by round", *(f"r{t}" for t in range(longest))], curve),
        ]
    )


def section(found: dict, written: str) -> str:
    """ "Real files": what happened, beside what the world predicted."""
    first = next(iter(found["bases"].values()), {})
    sizes = [
        [
            base,
            f"{notes['counts']['parameters']:,}",
            f"{notes['counts']['rows']:,}",
            f"{notes['counts']['tokens']:,}",
            " / ".join(f"{made[base]['counts']['loss']:.2f}" for made in found["bases"].values()),
        ]
        for base, notes in first.items()
    ]
    rows = [
        [source, *(str(counts[part]) for part in PARTS)]
        for source, counts in found["split"]["rows"].items()
    ]
    kept = [
        [
            group,
            *(
                ", ".join(f"{reason} {n}" for reason, n in slices[part].items())
                for part in ("d1", "d2", "test")
            ),
        ]
        for group, slices in found["slices"].items()
    ]
    cost = sum(found["spent"].values()) + sum(
        n["cpu_seconds"] for made in found["bases"].values() for n in made.values()
    )
    return "\n".join(
        [
            "## Real files\n",
            "`python -m bench.real --helpful=FILE --harmless=FILE --pku=FILE --alpaca=FILE` (sizes: `minmacpo/config/presets/hh-real.toml"
            f"{', --full' if found['full'] else ''}`; experiments: `bench/real.toml`), then `--collect` and `python -m bench.results`. "
            f"Seeds of which bases are finished: {', '.join(found['bases']) or 'none'}; {cost:,.0f} CPU seconds. Brackets are 95 % "
            f"bootstraps over seeds, then prompts. Commits of the stages: {', '.join(found['commits']) or 'none'}.\n",
            written,
            "First human turns are in one slice each:\n",
            markdown(["rows of", *PARTS], rows),
            *([markdown(["used by", "d1", "d2", "test"], kept)] if kept else []),
            *(
                [
                    markdown(
                        [
                            "base",
                            "parameters",
                            "documents",
                            "tokens trained on",
                            "last loss, by seed",
                        ],
                        sizes,
                    )
                ]
                if sizes
                else []
            ),
            *(experiment(name, part) for name, part in found["experiments"].items()),
        ]
    )
