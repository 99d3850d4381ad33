"""How likely given texts are under the model that is loaded: summed log-probability, perplexity."""

import math
from collections.abc import Callable, Sequence

import torch

from minmacpo.batching import collate, plan_scoring
from minmacpo.losses import sequence_logps
from minmacpo.progress import Progress
from minmacpo.tokenizer import Tokens


def perplexity(logp: float, tokens: int) -> float:
    """exp(-logp / tokens), capped at 1e30 so that it stays a number in JSON (paper eq. 6, as a product)."""
    return math.exp(min(-logp / tokens, 69.0))


@torch.inference_mode()
def score(model, rows: Sequence[Tokens], budget: int, progress: Progress | None = None,
          check: Callable[[], None] | None = None) -> list[float]:  # fmt: skip
    """Summed log-probability of each row's masked tokens; at most `budget` padded tokens per forward pass.
    `check` is called between two passes, to stop there."""
    logps = [0.0] * len(rows)
    for group in plan_scoring([len(row.ids) for row in rows], budget):
        if check:
            check()
        batch = collate([rows[i] for i in group], next(model.parameters()).device)
        for i, logp in zip(group, sequence_logps(model, batch.tokens, batch.mask).tolist(), strict=True):
            logps[i] = logp
        if progress:
            progress.step(len(group))
    return logps
