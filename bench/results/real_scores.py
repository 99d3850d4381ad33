"""What the runs of bench/results/real.toml gave, as numbers (assets/results/real.json).

The answers are rated by reward models that have seen none of their prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.results.real_plan import Plan, run_name, splits_of
from bench.results.store import PLACE
from minmacpo.core.scoring import win_or_tie
from minmacpo.data.formats import read_data
from minmacpo.evaluation.experiment_results import mean_with_interval, win_by_prompt
from minmacpo.evaluation.experiments import Case
from minmacpo.evaluation.finished_run import FinishedRun, read_run
from minmacpo.evaluation.reward_model import (
    Rate,
    fitting_pairs,
    rank_pairs,
    read_own_pairs,
    read_test_answers,
)
from minmacpo.evaluation.reward_model import train_reward_model as train_head
from minmacpo.evaluation.table import make_table
from minmacpo.pipeline.run import FINISHED
from minmacpo.runtime.files import read_json, read_rows, write_json

RATED = ("student", "continued", "ceiling")  # agents, all of them on the strong base
Arrays = dict[str, np.ndarray]  # by measure, a value per test prompt


# ---- ratings --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model of a source, and what is known of it."""

    rate: Rate
    facts: dict


def train_reward_model(plan: Plan, source: str, run: FinishedRun) -> RewardModel:
    """A reward model of a source on the run's strong base.

    It learns from the split that nothing else sees, and is tried on the pairs of D2 and test.
    """
    own = read_own_pairs(run, str(plan.split_path(source, "reward")))
    rate = train_head(run, own.pairs)

    pairs = []
    for part in ("d2", "test"):
        rows, _ = read_data(str(plan.split_path(source, part)))
        pairs += rows
    held_out = fitting_pairs(run, pairs)
    seen = {pair.prompt for pair in own.pairs}
    for pair in held_out:
        assert pair.prompt not in seen, "a reward model is tried on what it has seen"

    facts = {
        "source": source,
        "pairs": len(own.pairs),
        "over_long": own.dropped,
        "right": rank_pairs(held_out, rate).tolist(),
    }
    return RewardModel(rate, facts)


def rate(plan: Plan, seed: int) -> None:
    """Rate the test answers of every finished run of a seed that is not rated yet.

    A file each, by agent and round.
    """
    reward_models: dict[str, RewardModel] = {}
    (plan.root / "reward").mkdir(exist_ok=True)
    for name, case in plan.runs(seed).items():
        is_finished = (plan.run_path(name) / FINISHED).is_file()
        if plan.rating_path(name).is_file() or not is_finished:
            continue
        run = read_run(plan.run_path(name))
        source = rated_by(plan, case)
        if source not in reward_models:
            reward_models[source] = train_reward_model(plan, source, run)
        reward_model = reward_models[source]
        scores = rate_answers(run, reward_model.rate)
        write_json(plan.rating_path(name), reward_model.facts | {"scores": scores})


def rate_answers(run: FinishedRun, rate: Rate) -> dict[str, dict[str, list[float]]]:
    """{agent: {round: mean score of each test prompt's samples}}."""
    scores: dict[str, dict] = {agent: {} for agent in RATED}
    for (t, agent), samples in read_test_answers(run).items():
        if agent in RATED:
            answers = [(sample.prompt, sample.response) for sample in samples]
            values = rate(answers)
            means = values.reshape(-1, run.config.eval.samples).mean(1)
            scores[agent][str(t)] = means.round(5).tolist()
    return scores


def rated_by(plan: Plan, case: Case) -> str:
    """Whose reward model rates a case.

    That of its test's source, or of its teachers' where that one has no pairs.
    """
    sources = splits_of(case.flags)
    tested = sources["--data.test"][0]
    if plan.counts()["rows"][tested]["reward"]:
        return tested
    return sources["--data.path"][0]


# ---- numbers --------------------------------------------------------------------------------


def arrays(run: FinishedRun, rating: dict, agent: str, t: int) -> Arrays:
    """What is known of an agent of the strong base after round t, by test prompt.

    "logp" and "tokens" are of the true answer; "prefers": whether it is preferred to the worse one
    more than by the base; "score" and "length" (characters) are of the agent's own answers.
    """

    def scores(name: str) -> list[dict]:
        return read_rows(run.stage(f"eval/{name}").path / "scores.jsonl")

    truth = scores(f"round{t}_{agent}_truth")
    worse = scores(f"round{t}_{agent}_worse")
    base_truth = scores("base_strong_truth")
    base_worse = scores("base_strong_worse")

    margins = []
    for i in range(len(truth)):
        if worse[i]["characters"]:
            better_than_base = truth[i]["logp"] - base_truth[i]["logp"]
            worse_than_base = worse[i]["logp"] - base_worse[i]["logp"]
            margins.append(better_than_base - worse_than_base)

    lengths = np.array([len(sample.response) for sample in read_test_answers(run)[t, agent]])
    logps = []
    tokens = []
    for row in truth:
        logps.append(row["logp"])
        tokens.append(row["tokens"])
    return {
        "logp": np.array(logps),
        "tokens": np.array(tokens),
        "prefers": win_or_tie(margins),
        "score": np.array(rating["scores"][agent][str(t)]),
        "length": lengths.reshape(-1, run.config.eval.samples).mean(1),
    }


def summary(agent: Sequence[Arrays], naive: Sequence[Arrays]) -> dict:
    """One agent against naive SFT of the same runs; both by seed.

    "nats" is per token: below 0 is better.
    """
    perplexities = []
    nats = []
    won = []
    gains = []
    preferences = []
    lengths = []
    for measured, start in zip(agent, naive, strict=True):
        tokens = measured["tokens"]
        perplexities.append(float(np.exp(-measured["logp"].sum() / tokens.sum())))
        nats.append((start["logp"] - measured["logp"]) / tokens.mean())
        won.append(win_by_prompt(measured["score"], start["score"]))
        gains.append(measured["score"] - start["score"])
        preferences.append(measured["prefers"])
        lengths.append(measured["length"].mean())
    return {
        "perplexity": perplexities,
        "nats": mean_with_interval(nats),
        "prefers": mean_with_interval(preferences),
        "wins": mean_with_interval(won),
        "score": mean_with_interval(gains),
        "length": float(np.mean(lengths)),
    }


def row_of(plan: Plan, case: Case, runs: dict[int, FinishedRun], agent: str, label: str) -> dict:
    """What an agent of one case came to at its last round; "naive" is the student's round 0."""
    naive = []
    measured = []
    judged_right = []
    for seed, run in runs.items():
        rating = read_json(plan.rating_path(run_name(case, seed)))
        judged_right.append(np.array(rating["right"]))
        start = arrays(run, rating, "student", 0)
        naive.append(start)
        if agent == "naive":
            measured.append(start)
        else:
            last = run.config.macpo.rounds
            measured.append(arrays(run, rating, agent, last))

    row = {
        "group": case.group,
        "name": label,
        "seeds": list(runs),
        "judge": rating["source"],
        "trust": mean_with_interval(judged_right),
    }
    row |= summary(measured, naive)
    if agent == "student":
        tables = [make_table(run)["rows"] for run in runs.values()]
        row["by_round"] = {}
        for measure in ("perplexity", "length", "distinct2"):
            row["by_round"][measure] = by_round(tables, "student", measure)
        row["teachers"] = by_round(tables, "teacher", "perplexity")
    return row


def by_round(tables: Sequence[list[dict]], agent: str, measure: str) -> list[float | None]:
    """A measure of the agents whose name begins so, after round 0, 1, ...

    Means over seeds; None where none was measured.
    """
    rows = []
    for table in tables:
        rows += [row for row in table if row["agent"].startswith(agent)]
    last = max(row["round"] for row in rows)

    means = []
    for t in range(last + 1):
        values = [row[measure] for row in rows if row["round"] == t]
        means.append(float(np.mean(values)) if values else None)
    return means


def finished_runs(plan: Plan, case: Case, seeds: Sequence[int]) -> dict[int, FinishedRun]:
    """The runs of a case that are finished and rated, by seed."""
    runs: dict[int, FinishedRun] = {}
    if plan.missing(case):
        return runs
    for seed in seeds:
        name = run_name(case, seed)
        path = plan.run_path(name)
        if (path / FINISHED).is_file() and plan.rating_path(name).is_file():
            runs[seed] = read_run(path)
    return runs


def rows_of(plan: Plan, experiment: str, seeds: Sequence[int]) -> list[dict]:
    """The table of an experiment: of each group naive SFT and its controls first."""
    rows = []
    groups = set()
    for case in plan.cases(experiment):
        runs = finished_runs(plan, case, seeds)
        if not runs:
            continue
        if case.group not in groups:
            groups.add(case.group)
            rows.append(row_of(plan, case, runs, "naive", "naive SFT"))
            if experiment == "main":
                rows.append(row_of(plan, case, runs, "continued", "naive SFT continued"))
                rows.append(row_of(plan, case, runs, "ceiling", "ceiling: SFT on the truth"))
        # With other ground truth naive SFT is another one
        if experiment == "noise" and case.name != plan.cases(experiment)[0].name:
            rows.append(row_of(plan, case, runs, "naive", f"naive SFT, {case.name}"))
        rows.append(row_of(plan, case, runs, "student", case.name))
    return rows


def collect(plan: Plan, seeds: Sequence[int]) -> None:
    """Write assets/results/real.json from what is finished, rated first where it is not."""
    for seed in seeds:
        rate(plan, seed)

    splits: dict[str, dict] = {}
    spent: dict[str, float] = {}
    commits = set()
    for seed in seeds:
        for name, case in plan.runs(seed).items():
            run = finished_runs(plan, case, [seed]).get(seed)
            if run:
                splits.setdefault(case.group, run.metadata["data/slices"]["counts"]["splits"])
                spent[name] = 0
                for note in run.metadata.values():
                    if "linked_from" not in note:
                        spent[name] += note["cpu_seconds"]
                        commits.add(note["commit"])

    bases = {}
    for seed in seeds:
        file = plan.bases_path(seed) / "bases.json"
        if file.is_file():
            bases[str(seed)] = read_json(file)

    experiments = {}
    for name in plan.experiments:
        experiments[name] = collect_experiment(plan, name, seeds)

    PLACE.mkdir(parents=True, exist_ok=True)
    content = {
        "seeds": list(seeds),
        "full": plan.full,
        "commits": sorted(commits),
        "split": {name: plan.counts()[name] for name in ("read", "rows")},
        "splits": splits,
        "bases": bases,
        "spent": spent,
        "experiments": experiments,
    }
    write_json(PLACE / "real.json", content)


def collect_experiment(plan: Plan, name: str, seeds: Sequence[int]) -> dict:
    """What is known of one experiment."""
    settings = plan.experiments[name]
    missing = set()
    for case in plan.cases(name):
        missing |= plan.missing(case)
    return {
        "question": settings["question"],
        "world": settings["world"],
        "rows": rows_of(plan, name, seeds),
        "missing": sorted(missing),
        "wanted": len(plan.cases(name)) * len(seeds),
    }
