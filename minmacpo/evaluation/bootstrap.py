"""95 % intervals: mostly bootstraps, the same statistic of many samples redrawn with replacement.

The unit that is redrawn is a prompt (and, for differences of methods, the seed of a run): several
answers to one prompt are no independent evidence. The draws are the same in every call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOUNDS = (0.025, 0.975)  # quantiles of a 95 % interval
STANDARD_ERRORS = 1.96  # half the width of a normal 95 % interval


def mean_interval(values: np.ndarray, draws: int) -> list[float]:
    """The interval of the mean of one value per prompt, (N,), as [low, high]."""
    rng = np.random.default_rng(0)
    count = len(values)
    drawn = rng.integers(0, count, (draws, count))  # prompts, as many in each draw as there are
    means = values[drawn].mean(1)  # (draws,)
    return np.quantile(means, BOUNDS).round(4).tolist()


def proportion_interval(wins: np.ndarray) -> list[float]:
    """Wilson's score interval of the mean of values in [0, 1], (N,), as [low, high].

    A bootstrap of six wins in six pairs would be [1, 1], as if it were certain; this is [0.61, 1].
    """
    count = len(wins)
    share = wins.mean()
    z = STANDARD_ERRORS
    shrinkage = 1 + z**2 / count

    # The share is drawn towards 1/2, the more so the fewer values there are
    center = (share + z**2 / (2 * count)) / shrinkage
    variance = share * (1 - share) / count + z**2 / (4 * count**2)
    half_width = z * np.sqrt(variance) / shrinkage

    # In exact numbers both bounds lie within [0, 1]; floats may put them just outside
    low = max(0.0, center - half_width)
    high = min(1.0, center + half_width)
    return [round(float(low), 4), round(float(high), 4)]


def mean_of_means(values_of_seeds: Sequence[np.ndarray]) -> float:
    """The mean of means: every seed counts the same, however many prompts, (N,), it has."""
    means = [values.mean() for values in values_of_seeds]
    return float(np.mean(means))


def paired_interval(differences: Sequence[np.ndarray], draws: int = 4000) -> list[float]:
    """The interval of a mean difference: redraws the seeds, then the prompts within each seed.

    Args:
        differences: for every seed, the difference of two methods on each prompt, (N,).
    """
    rng = np.random.default_rng(0)
    count = len(differences)
    seed_draws = rng.integers(0, count, (draws, count))
    means = []
    for seeds in seed_draws:
        means_by_seed = []
        for seed in seeds:  # one that is drawn twice has its prompts drawn twice, each time anew
            values = differences[seed]
            drawn = rng.choice(values, len(values))
            means_by_seed.append(drawn.mean())
        means.append(np.mean(means_by_seed))
    return np.quantile(means, BOUNDS).round(4).tolist()


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    interval: list[float]  # [low, high]


def estimate_ratio(
    numerators: Sequence[float], denominators: Sequence[float], prompts: Sequence[str], draws: int
) -> Estimate:
    """sum(numerators) / sum(denominators) over rows; redraws prompts, each with all of its rows.

    Draws whose denominator is not above 0 are left out.
    """
    # What the rows of a prompt come to, since they are drawn together
    _, prompt_index = np.unique(prompts, return_inverse=True)
    tops = np.bincount(prompt_index, weights=np.asarray(numerators, float))  # (prompts,)
    bottoms = np.bincount(prompt_index, weights=np.asarray(denominators, float))  # (prompts,)

    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(draws):
        drawn = rng.integers(0, len(tops), len(tops))
        top = tops[drawn].sum()
        bottom = bottoms[drawn].sum()
        if bottom > 0:
            ratios.append(top / bottom)
    value = float(tops.sum() / bottoms.sum())
    return Estimate(value, np.quantile(ratios, BOUNDS).tolist())
