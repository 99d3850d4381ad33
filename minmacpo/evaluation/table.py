"""The table of a run: what its agents' test answers are worth, and signs of what goes wrong.

Everything is read from finished stages on the disk, so that a table can be made at any time. What
was read of a stage is remembered with the stage's fingerprint.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minmacpo.config.schema import Config
from minmacpo.core.scoring import win_or_tie
from minmacpo.data.records import Sample
from minmacpo.data.splits import TOO_FEW
from minmacpo.data.text_metrics import distinct2, refuses, self_bleu
from minmacpo.evaluation.bootstrap import estimate_ratio, mean_interval, proportion_interval
from minmacpo.evaluation.finished_run import (
    FinishedRun,
    agent_label,
    answers_stage,
    read_samples,
)
from minmacpo.evaluation.gold import (
    gold_by_prompt,
    gold_reward,
    mean_gold_by_prompt,
    right_fraction,
)
from minmacpo.method.monitor import alarms, signs
from minmacpo.pipeline.stage import Stage
from minmacpo.runtime.files import read_rows

# Agents that are measured once, with their labels in the table
CONTROLS = {
    "kept": "student kept by the monitor",
    "continued": "naive SFT continued",
    "ceiling": "ceiling",
}

# Why a pair of a chosen and a rejected answer was put together, or was not
PAIR_COUNTS = ("pairs", "all_empty", "negative_empty", "negative_equal", "over_long")

MIN_WRONG_NEGATIVES = 0.7  # fewer wrong answers among the negatives, and they teach the wrong thing
MAX_EQUAL_NEGATIVES = 0.1  # more negatives that equal their positive, and there is little to learn


def make_table(run: FinishedRun) -> dict:
    """Everything that is known of a run so far, as JSON."""
    rows = result_rows(run)
    add_pgr(run, rows)
    negatives = negative_rows(run)
    monitored = monitor_rows(run)
    return {
        "run": run.name,
        "method": run.config.run.method,
        "world": run.has_gold,
        "rounds": run.config.macpo.rounds,
        "rows": rows,
        "filter": filter_rows(run),
        "negatives": negatives,
        "monitor": monitored,
        "warnings": too_few_warnings(run, rows) + warnings(negatives, monitored),
        "cost": cost_rows(run),
    }


# ---- how good the test answers are -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PromptScores:
    """What scoring the true and the worse answer to one test prompt gave."""

    prompt_id: str
    logp: float  # of the true answer under the agent, summed over its tokens, in nats
    tokens: int
    characters: int
    margin: float | None  # implicit reward, true minus worse answer; None without a worse one


def result_rows(run: FinishedRun) -> list[dict]:
    """One row per agent and round that has been measured."""
    rows = []
    for agent in [*run.teachers, "student", *CONTROLS]:
        for t in range(run.config.macpo.rounds + 1):
            measured = row_at(run, agent, t)
            if measured is not None:
                name = {"agent": agent, "round": t, "label": row_label(agent, t)}
                rows.append(name | measured)
    return rows


def row_label(agent: str, t: int) -> str:
    """What a row of the table is called."""
    if agent in CONTROLS:
        return CONTROLS[agent]
    label = f"{agent_label(agent)}, round {t}"
    if agent == "student" and t == 0:
        label += " (naive SFT)"
    return label


def measured_stages(run: FinishedRun, agent: str, t: int) -> list[Stage] | None:
    """The stages that `row_of` reads for an agent after round t; None if one is not finished."""
    name = f"eval/round{t}_{agent}"
    base = "eval/base_strong"
    if agent.startswith("teacher"):
        base = "eval/base_" + agent.replace("teacher", "weak")
    names = [
        answers_stage(agent, t),
        f"{name}_truth",
        f"{name}_worse",
        f"{base}_truth",
        f"{base}_worse",
    ]
    for name in names:
        if name not in run:
            return None
    return [run.stage(name) for name in names]


def row_at(run: FinishedRun, agent: str, t: int) -> dict | None:
    """The measures of an agent after round t; None where its measurement is not whole."""
    stages = measured_stages(run, agent, t)
    if stages is None:
        return None
    return row_of(run.config, *stages)


@functools.cache
def read_prompt_scores(
    truth: Stage, worse: Stage, base_truth: Stage, base_worse: Stage
) -> list[PromptScores]:
    """The scores of every test prompt's answers, in the prompts' order."""
    columns = []
    for stage in (truth, worse, base_truth, base_worse):
        columns.append(read_rows(stage.path / "scores.jsonl"))

    scores = []
    for good, bad, base_good, base_bad in zip(*columns, strict=True):
        margin = None
        if bad["characters"]:  # data of true answers alone have an empty text as the worse one
            gain_of_good = good["logp"] - base_good["logp"]
            gain_of_bad = bad["logp"] - base_bad["logp"]
            margin = gain_of_good - gain_of_bad
        scores.append(
            PromptScores(
                prompt_id=good["id"],
                logp=good["logp"],
                tokens=good["tokens"],
                characters=good["characters"],
                margin=margin,
            )
        )
    return scores


@functools.cache
def row_of(config: Config, samples: Stage, *scored: Stage) -> dict:
    """The measures of one agent after one round.

    Args:
        samples: the agent's answers to the test prompts.
        scored: the true and the worse answers under the agent, then under its base.

    Returns:
        The measures of all files together; under "files", those of each file, if the test prompts
        come from several; and in the built-in world the gold reward with its components.
    """
    answers = read_samples(samples)
    scores = read_prompt_scores(*scored)
    draws = config.eval.bootstrap

    # --- The test prompts of each file; scores do not know it, but have the prompts' order
    file_of_prompt = {answer.id: answer.meta.get("file") for answer in answers}
    files = {file for file in file_of_prompt.values() if file}  # the built-in world has none
    by_file = {}
    for file in sorted(files):
        answers_of_file = [answer for answer in answers if file_of_prompt[answer.id] == file]
        scores_of_file = []
        for score, file_of_score in zip(scores, file_of_prompt.values(), strict=True):
            if file_of_score == file:
                scores_of_file.append(score)
        by_file[file] = measures(answers_of_file, scores_of_file, draws)

    # --- All of them together
    row = {"files": by_file} | measures(answers, scores, draws)
    if config.data.path is None:
        for component, values in mean_gold_by_prompt(config, samples).items():
            row[component] = float(values.mean())
            row[f"{component}_interval"] = mean_interval(values, draws)
    return row


def measures(answers: Sequence[Sample], scores: Sequence[PromptScores], draws: int) -> dict:
    """What needs no gold reward: likelihood of the true answers, and the look of one's own."""
    # --- The true answers: a token counts the same in a short one and in a long one
    logp = sum(score.logp for score in scores)
    tokens = sum(score.tokens for score in scores)
    characters = sum(score.characters for score in scores)

    # --- One's own answers
    responses = []
    lengths = []
    is_cut = []
    is_refusal = []
    for answer in answers:
        responses.append(answer.response)
        lengths.append(len(answer.response))
        is_cut.append(answer.finish == "length")
        is_refusal.append(refuses(answer.response))

    values = {
        "prompts": len(scores),
        "perplexity": float(np.exp(-logp / tokens)),
        "perplexity_interval": perplexity_interval(scores, draws),
        "perplexity_char": float(np.exp(-logp / characters)),
        "length": float(np.mean(lengths)),
        "hit_length": float(np.mean(is_cut)),
        "refusals": float(np.mean(is_refusal)),
        "distinct2": distinct2(responses),
        "self_bleu": self_bleu(responses),
    }

    # --- True against worse answers, of the prompts that have a worse one
    margins = known_margins(scores)
    if margins:
        wins = win_or_tie(margins)
        values["pairs"] = len(margins)
        values["accuracy"] = float(wins.mean())
        values["accuracy_interval"] = proportion_interval(wins)
    return values


def known_margins(scores: Sequence[PromptScores]) -> list[float]:
    """The margins of the prompts that have a worse answer."""
    return [score.margin for score in scores if score.margin is not None]


def perplexity_interval(scores: Sequence[PromptScores], draws: int) -> list[float]:
    """The 95 % interval of the perplexity per token, over prompts."""
    logps = [score.logp for score in scores]
    tokens = [score.tokens for score in scores]
    prompts = [score.prompt_id for score in scores]
    low, high = estimate_ratio(logps, tokens, prompts, draws).interval  # of log-probability
    # The higher the log-probability, the lower the perplexity: the bounds change places
    return [round(float(np.exp(-high)), 4), round(float(np.exp(-low)), 4)]


def too_few_to_tell(run: FinishedRun, rows: Sequence[dict]) -> int | None:
    """The number of test rows of a run on own data, if they are too few; None otherwise."""
    if run.has_gold or not rows:
        return None
    count = rows[0].get("pairs", rows[0]["prompts"])
    if count >= TOO_FEW:
        return None
    return count


def too_few_warnings(run: FinishedRun, rows: Sequence[dict]) -> list[str]:
    """A sentence for a run whose test rows tell nothing about its agents."""
    count = too_few_to_tell(run, rows)
    if count is None:
        return []
    return [f"{count} test rows are too few to tell the agents apart; give at least {TOO_FEW}"]


# ---- performance gap recovered (Burns et al. 2023) -------------------------------------------


def add_pgr(run: FinishedRun, rows: list[dict]) -> None:
    """Give the rows of the strong base their PGR: (row - start) / (ceiling - start).

    The start is the best teacher after round 0. The measure is the gold reward, and on own data
    the preference accuracy. PGR is None where the interval of the gap reaches 0.
    """
    # --- The two ends of the gap
    measure = "gold" if run.has_gold else "accuracy"
    starts = [row for row in rows if row["agent"].startswith("teacher") and row["round"] == 0]
    ceilings = [row for row in rows if row["agent"] == "ceiling"]
    if not starts or not ceilings or measure not in ceilings[0]:
        return
    if too_few_to_tell(run, rows) is not None:
        return
    start = max(starts, key=lambda row: row[measure])
    ceiling = ceilings[0]

    # --- Is there a gap? A ratio to what may be 0 says nothing
    draws = run.config.eval.bootstrap
    values_of_start = values_by_prompt(run, start)
    gap_by_prompt = values_by_prompt(run, ceiling) - values_of_start
    lowest_gap, _ = mean_interval(gap_by_prompt, draws)
    has_gap = lowest_gap > 0

    # --- How much of it each row of the strong base has closed
    gap = ceiling[measure] - start[measure]
    prompts = [str(i) for i in range(len(gap_by_prompt))]  # every value is of another prompt
    for row in rows:
        if row["agent"].startswith("teacher"):
            continue
        row["pgr"] = None
        if has_gap:
            gain_by_prompt = values_by_prompt(run, row) - values_of_start
            estimate = estimate_ratio(gain_by_prompt, gap_by_prompt, prompts, draws)
            row["pgr"] = (row[measure] - start[measure]) / gap
            row["pgr_interval"] = [round(bound, 4) for bound in estimate.interval]


def values_by_prompt(run: FinishedRun, row: dict) -> np.ndarray:
    """What PGR is made of: gold reward by test prompt, or 1, 0.5, 0 by test pair, (N,)."""
    if run.has_gold:
        return gold_by_prompt(run, row["agent"], row["round"])
    _, *scored = measured_stages(run, row["agent"], row["round"])
    return win_or_tie(known_margins(read_prompt_scores(*scored)))


# ---- whose answers the student learns ---------------------------------------------------------


def filter_rows(run: FinishedRun) -> list[dict]:
    """By round: of each source, how often it was chosen and how often it was right then."""
    rows = []
    for t in range(1, run.config.macpo.rounds + 1):
        name = f"round{t}/pairs_student"
        if name in run:
            rows.append({"round": t} | filter_row(run, t, run.stage(name)))
    return rows


def filter_row(run: FinishedRun, t: int, pairs: Stage) -> dict:
    """What the student's pairs of round t say about the filter."""
    # --- How many answers of each source were chosen; the counts also say why others were not
    counts = run.metadata[pairs.name]["counts"]
    chosen = {}
    for key, count in counts.items():
        if key.startswith("chosen_"):
            chosen[key.removeprefix("chosen_")] = count

    # --- Their share, and how often they were right
    sources = {}
    for source in sorted(chosen):
        if chosen[source]:
            sources[source] = {
                "won": chosen[source] / counts["pairs"],
                "right": right_fraction(run.config, pairs, source),
            }
    row = {"sources": sources, "right": right_fraction(run.config, pairs)}

    # --- What there was to choose from
    # With self_fraction, only one's own answers to some prompts count, and to the others only the
    # others': there is no set of answers that was offered for all prompts
    if 0 < run.config.macpo.self_fraction < 1:
        return row
    stages = []
    for source in chosen:
        stage = offered_answers(run, t, source)
        if stage is not None:
            stages.append(stage)
    return row | offered(run.config, *stages)


def offered_answers(run: FinishedRun, t: int, source: str) -> Stage | None:
    """The answers of a source that the student could choose from in round t, if they exist."""
    for name in (f"round{t}/own_{source}", f"round{t}/positives_{source}"):
        if name in run:
            return run.stage(name)
    return None


@functools.cache
def offered(config: Config, *stages: Stage) -> dict[str, float | None]:
    """What a perfect filter could have reached with the answers of these stages.

    Returns:
        "offered", the fraction of prompts with a right answer among those given (None on own
        data), and "different", the mean fraction of a prompt's answers that differ; {} of none.
    """
    # By prompt, from all sources
    responses: dict[str, list[str]] = {}
    best: dict[str, float] = {}
    for stage in stages:
        for sample in read_samples(stage):
            right = gold_reward(config, sample, sample.response).get("right", 0.0)
            responses.setdefault(sample.id, []).append(sample.response)
            best[sample.id] = max(right, best.get(sample.id, 0.0))
    if not best:
        return {}

    offered_right = None
    if config.data.path is None:
        offered_right = float(np.mean(list(best.values())))
    different = [len(set(texts)) / len(texts) for texts in responses.values()]
    return {"offered": offered_right, "different": float(np.mean(different))}


# ---- what the students' answers are preferred to ----------------------------------------------


def negative_rows(run: FinishedRun) -> list[dict]:
    """By agent: the fraction of its negatives that are wrong, and by round, that are of no use.

    Where macpo.negatives is not "agent", the negatives are those that were rejected in round 1.
    """
    from_agent = run.config.macpo.negatives == "agent"
    rows = []
    for agent in ("student", *run.teachers):
        name = f"round0/negatives_{agent}"
        if name not in run:
            continue

        # --- How wrong they are: those that the agent was asked for, or else those of the pairs
        rejected_from = name
        if not from_agent:
            rejected_from = f"round1/pairs_{agent}"
        wrong = None
        if rejected_from in run:
            right = right_fraction(run.config, run.stage(rejected_from), column="rejected")
            if right is not None:  # it is None on own data
                wrong = 1 - right

        # --- How many pairs of each round fell away because of them
        equal = []
        for t in range(1, run.config.macpo.rounds + 1):
            pairs = run.metadata.get(f"round{t}/pairs_{agent}")
            if pairs:
                equal.append(equal_fraction(pairs["counts"]))

        count = run.metadata[name]["counts"]["answers"]
        row = {"agent": agent, "wrong": wrong, "count": count, "equal": equal}
        if not from_agent:
            row["rejected"] = True
        rows.append(row)
    return rows


def equal_fraction(counts: dict[str, int]) -> float:
    """Of the pairs that a stage put together, those dropped because both answers were equal."""
    total = sum(counts[key] for key in PAIR_COUNTS)
    if total == 0:
        return 0.0
    return round(counts["negative_equal"] / total, 4)


# ---- the monitor ------------------------------------------------------------------------------


def monitor_rows(run: FinishedRun) -> list[dict]:
    """The monitor's signs and alarms of every agent by round."""
    rows = []
    for agent in ("student", *run.teachers):
        history = []
        for t in run.measured_rounds(agent):
            stages = monitor_inputs(run, agent, t)
            measured = signs_once(run.folder, agent, t, *stages)
            history.append(measured)  # alarms compare a round with those before it
            rows.append({"agent": agent, "round": t, "alarms": alarms(history)} | measured)
    return rows


def monitor_inputs(run: FinishedRun, agent: str, t: int) -> list[Stage]:
    """The finished stages that the signs of an agent after round t are read from."""
    names = [
        answers_stage(agent, t),
        answers_stage(agent, t - 1),
        f"round{t}/pairs_{agent}",
        f"eval/round{t}_{agent}_under_base",
        f"round{t}/{agent}_pos",
    ]
    return [run.stage(name) for name in names if name in run]


@functools.cache
def signs_once(folder: Path, agent: str, t: int, *stages: Stage) -> dict[str, float]:
    """The monitor's signs, read once for the same stages: a run that goes on has more of them."""
    return signs(folder, agent, t)


def warnings(negatives: Sequence[dict], monitored: Sequence[dict] = ()) -> list[str]:
    """Sentences about what breaks the method first: the monitor's alarms, and bad negatives."""
    sentences = []

    # --- Alarms of the monitor
    for row in monitored:
        if row["alarms"]:
            alarm_names = ", ".join(row["alarms"])
            label = f"{agent_label(row['agent'])}, round {row['round']}"
            sentences.append(f"{label}: {alarm_names} (monitor)")

    # --- Negatives that are right, or that say what the positive says
    for row in negatives:
        agent = row["agent"]
        wrong = row["wrong"]
        equal = max(row["equal"], default=0)
        if wrong is not None and wrong < MIN_WRONG_NEGATIVES:
            what = "rejected answers of round 1" if row.get("rejected") else "cached negatives"
            sentences.append(f"only {wrong:.0%} of {agent}'s {what} are wrong (70 % expected)")
        if equal > MAX_EQUAL_NEGATIVES:
            sentences.append(
                f"{equal:.0%} of {agent}'s negatives equal their positive (10 % at most)"
            )
    return sentences


# ---- cost -------------------------------------------------------------------------------------


def cost_rows(run: FinishedRun) -> list[dict]:
    """What every stage cost, in the order in which they were computed."""
    rows = []
    for metadata in sorted(run.metadata.values(), key=lambda metadata: metadata["started"]):
        rows.append(
            {
                "name": metadata["name"],
                "kind": metadata["kind"],
                "seconds": metadata["seconds"],
                "cpu_seconds": metadata["cpu_seconds"],
                "linked_from": metadata.get("linked_from"),
                "tokens": metadata["counts"].get("tokens"),
                "peak_mb": metadata.get("peak_gpu_mb", metadata["peak_mb"]),
            }
        )
    return rows
