"""The gold reward of stored answers. Only the built-in world has one; no training looks at it."""

import functools

import numpy as np

from minmacpo.config.schema import Config
from minmacpo.data import synthetic as world
from minmacpo.data.records import Pair, Sample
from minmacpo.evaluation.finished_run import (
    FinishedRun,
    answers_stage,
    read_records,
    read_samples,
)
from minmacpo.pipeline.stage import Stage

make_town = functools.lru_cache(maxsize=8)(world.make_town)


def gold_reward(
    config: Config, record: Pair | Sample, response: str, finish: str = "stop"
) -> dict[str, float]:
    """The gold reward of an answer to the record's prompt, and its components by name.

    Args:
        finish: "length" for an answer that was cut at the limit of its length.

    Returns:
        "gold" in [0, 1] and its components (data/synthetic.py); {} for a run on own data.
    """
    if config.data.path is not None:
        return {}
    town = make_town(config.world, config.run.seed)
    return world.gold_reward(town, record, response, finish)


@functools.cache
def mean_gold_by_prompt(config: Config, samples: Stage) -> dict[str, np.ndarray]:
    """By component, the mean over each test prompt's answers, (prompts,); {} on own data."""
    rewards = []
    for sample in read_samples(samples):
        rewards.append(gold_reward(config, sample, sample.response, sample.finish))
    means = {}
    for component in rewards[0]:
        values = np.array([reward[component] for reward in rewards])
        means[component] = values.reshape(-1, config.eval.samples).mean(1)
    return means


def gold_by_prompt(run: FinishedRun, agent: str, t: int) -> np.ndarray:
    """The gold reward of an agent's answers after round t to every test prompt, (prompts,).

    Raises:
        UserError: the agent was not measured after that round.
    """
    return mean_gold_by_prompt(run.config, run.stage(answers_stage(agent, t)))["gold"]


@functools.cache
def right_fraction(
    config: Config, stage: Stage, source: str | None = None, column: str = "chosen"
) -> float | None:
    """The fraction of a stage's answers to D2 that are right.

    Args:
        stage: holds samples, or pairs.
        source: of pairs, count only those whose chosen answer this agent gave.
        column: which answer of a pair is looked at, "chosen" or "rejected".

    Returns:
        None on own data, and where there is no such answer.
    """
    if config.data.path is not None:
        return None
    right = []
    for record in read_records(stage):
        if isinstance(record, Sample):
            response = record.response
        elif source is None or record.chosen_by == source:
            response = getattr(record, column)
        else:
            continue
        right.append(gold_reward(config, record, response)["right"])
    return float(np.mean(right)) if right else None
