"""Bootstrap intervals over prompts and seeds."""

import numpy as np


def interval(values: np.ndarray, draws: int) -> list[float]:
    """95 % bootstrap interval of the mean over prompts [n], the same draws for the same n."""
    picks = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    return np.quantile(values[picks].mean(1), [0.025, 0.975]).round(4).tolist()


def paired_interval(differences: list[np.ndarray], draws: int = 4000) -> list[float]:
    """95 % interval of the mean of paired differences: resamples seeds, then prompts within each."""
    rng, count = np.random.default_rng(0), len(differences)
    picks = (
        [differences[seed] for seed in seeds] for seeds in rng.integers(0, count, (draws, count))
    )
    means = [np.mean([rng.choice(values, len(values)).mean() for values in pick]) for pick in picks]
    return np.quantile(means, [0.025, 0.975]).round(4).tolist()
