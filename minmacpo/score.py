"""How likely given texts are under the model that is loaded: summed log-probability, perplexity."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from minmacpo import UserError
from minmacpo.batching import collate, halved, plan_scoring, plan_shared, worth_sharing
from minmacpo.losses import sequence_logps
from minmacpo.progress import Progress
from minmacpo.tokenizer import Tokens


def perplexity(logp: float, tokens: int) -> float:
    """exp(-logp / tokens), capped at 1e30 so that it stays a number in JSON (paper eq. 6, as a product)."""
    return math.exp(min(-logp / tokens, 69.0))


def preferred(margins: Sequence[float]) -> np.ndarray:
    """[N] of margins between a better and a worse answer: 1 where it is above 0, 0.5 where it is 0, 0 below."""
    margins = np.asarray(margins, float)
    return (margins > 0) + 0.5 * (margins == 0)


@torch.inference_mode()
def score(model, rows: Sequence[Tokens], budget: int, progress: Progress | None = None,
          check: Callable[[], None] | None = None, log: Callable[[str], None] = print, share: bool = False) -> list[float]:  # fmt: skip
    """Summed log-probability of each row's masked tokens; at most `budget` padded tokens per forward pass, half of it from
    where memory is short. `check` is called between two passes, to stop there; `share`: prompts that rows
    have in common are computed once, where that saves enough."""
    logps, groups = [0.0] * len(rows), plan_scoring([len(row.ids) for row in rows], budget)
    if share and rows:
        close = plan_shared(rows, budget)
        share, words = worth_sharing([rows[i] for i in group] for group in close)
        groups = close if share else groups
        log(words)
    while groups:
        if check:
            check()
        batch = collate([rows[i] for i in groups[0]], next(model.parameters()).device, share)
        try:
            found = sequence_logps(model, batch.tokens, batch.mask, shared=batch.shared).tolist()
        except torch.OutOfMemoryError:
            if len(groups[0]) == 1:
                raise UserError(f"out of memory: a text of {batch.tokens.numel()} tokens is too long to be scored here") from None
            groups, budget = halved(groups), budget // 2
            log(f"out of memory: from here at most {budget} tokens per forward pass (run.micro_tokens is the limit that was tried)")
            continue
        for i, logp in zip(groups.pop(0), found, strict=True):
            logps[i] = logp
        if progress:
            progress.step(len(found))
    return logps
