"""How likely given texts are under the model that is loaded: summed log-probability, perplexity."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from minmacpo import UserError
from minmacpo.core.batching import collate, halved, plan_scoring, plan_shared, worth_sharing
from minmacpo.data.tokenizer import Tokens
from minmacpo.kernels.fused_logps import sequence_logps
from minmacpo.runtime.device import normalize_oom
from minmacpo.runtime.distributed import SINGLE_PROCESS, Distributed
from minmacpo.runtime.progress import Progress


def perplexity(logp: float, tokens: int) -> float:
    """exp(-logp / tokens), capped at 1e30 so that it stays a number in JSON (paper eq. 6, as a product)."""
    return math.exp(min(-logp / tokens, 69.0))


def win_or_tie(margins: Sequence[float]) -> np.ndarray:
    """[N] of margins between a better and a worse answer: 1 where it is above 0, 0.5 where it is 0, 0 below."""
    margins = np.asarray(margins, float)
    return (margins > 0) + 0.5 * (margins == 0)


@torch.inference_mode()
def score(
    model,
    rows: Sequence[Tokens],
    budget: int,
    progress: Progress | None = None,
    dist: Distributed = SINGLE_PROCESS,
    log: Callable[[str], None] = print,
    share: bool = False,
) -> list[float]:
    """Summed log-probability of each row's masked tokens; at most `budget` padded tokens per forward pass, half of it from
    where memory is short. Passes are divided among `ranks`, which may be stopped between two of them; `share`: prompts that
    rows have in common are computed once, where that saves enough."""
    logps, groups = [0.0] * len(rows), plan_scoring([len(row.ids) for row in rows], budget)
    if share and rows:
        close = plan_shared(rows, budget)
        share, words = worth_sharing([rows[i] for i in group] for group in close)
        groups = close if share else groups
        log(words)
    most = math.inf  # padded tokens that may be tried

    def one_pass(group: list[int]) -> list[float]:
        """Log-probabilities of the rows of a group, in parts where memory is short."""
        nonlocal most
        found, parts = [], [group]
        while parts:
            part = parts.pop(0)
            if len(part) > 1 and len(part) * max(len(rows[i].ids) for i in part) > most:
                parts[:0] = halved([part])
                continue
            batch = collate([rows[i] for i in part], next(model.parameters()).device, share)
            try:
                with normalize_oom():
                    found += sequence_logps(
                        model, batch.tokens, batch.mask, shared=batch.shared
                    ).tolist()
            except torch.OutOfMemoryError:
                if dist.is_sharded:
                    raise UserError(
                        "out of memory while texts are scored; lower run.max_tokens_per_batch"
                    ) from None
                if len(part) == 1:
                    raise UserError(
                        f"out of memory: a text of {batch.tokens.numel()} tokens is too long to be scored here"
                    ) from None
                most, parts[:0] = min(most, budget) // 2, halved([part])
                dist.warn(
                    f"out of memory: from here at most {most} tokens per forward pass (run.max_tokens_per_batch is the limit that was tried)",
                    log,
                )
        return found

    for group, found in zip(groups, dist.parallel_map(groups, one_pass), strict=True):
        for i, logp in zip(group, found, strict=True):
            logps[i] = logp
        if progress:
            progress.step(len(found))
    return logps
