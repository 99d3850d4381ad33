"""How likely given texts are under a model: summed log-probability, perplexity."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from minmacpo import UserError
from minmacpo.core.batching import (
    Groups,
    MemoryLimit,
    collate,
    plan_packed,
    plan_scoring,
    should_pack,
    split_to_fit,
)
from minmacpo.data.tokenizer import Tokens
from minmacpo.kernels.fused_logps import sequence_logps
from minmacpo.runtime.distributed import SINGLE_PROCESS, Distributed

MAX_LOG_PERPLEXITY = 69.0  # exp of it is 1e30, which is still a number in JSON


def perplexity(logp: float, tokens: int) -> float:
    """exp(-logp / tokens) of a summed log-probability, at most 1e30 (paper, eq. 6)."""
    return math.exp(min(-logp / tokens, MAX_LOG_PERPLEXITY))


def win_or_tie(margins: Sequence[float]) -> np.ndarray:
    """(N,) of margins between a better and a worse answer: 1 above 0, 0.5 at 0, 0 below."""
    margins = np.asarray(margins, float)
    wins = (margins > 0).astype(float)
    ties = (margins == 0).astype(float)
    return wins + 0.5 * ties


@torch.inference_mode()
def score(
    model,
    rows: Sequence[Tokens],
    max_tokens: int,
    progress=None,
    dist: Distributed = SINGLE_PROCESS,
    log: Callable[[str], None] = print,
    log_detail: Callable[[str], None] | None = None,
    packed: bool = False,
) -> list[float]:
    """Log-probability of every row, summed over the tokens under its mask; nats.

    Args:
        max_tokens: of a forward pass, padding included; half of it from where memory is short.
        progress: has `step(rows)`, called after every pass.
        dist: the ranks that divide the passes; they may be stopped between two of them.
        log: gets a line on short memory.
        log_detail: gets a line on what packing saves; None: `log` gets it.
        packed: prompts that rows have in common are computed once, where that saves enough.
    """
    lengths = [len(row.ids) for row in rows]
    device = next(model.parameters()).device

    # --- Which rows go into which pass
    groups = plan_scoring(lengths, max_tokens)
    if packed and rows:
        packed_groups = plan_packed(rows, max_tokens)
        packed, line = should_pack(rows_of_groups(rows, packed_groups))
        if packed:
            groups = packed_groups
        (log_detail or log)(line)

    # --- How a pass is done, in smaller ones where memory is short
    memory = scoring_memory_limit(dist, log)

    def padded_size(group: list[int]) -> int:
        return len(group) * max(lengths[i] for i in group)

    def score_group(group: list[int]) -> list[float]:
        def score_parts(limit: int) -> list[float]:
            logps = []
            for part in split_to_fit([group], padded_size, limit):
                batch = collate([rows[i] for i in part], device, packed)
                part_logps = sequence_logps(model, batch.tokens, batch.mask, packed=batch.packed)
                logps += part_logps.tolist()
            return logps

        size = padded_size(group)
        smallest = max(lengths[i] for i in group)
        if dist.is_sharded:
            smallest = size  # all ranks must make equally many passes: none is divided
        return memory.run(score_parts, size, smallest)

    # --- All passes, and every score back to its row
    scores = [0.0] * len(rows)
    for group, logps in zip(groups, dist.parallel_map(groups, score_group), strict=True):
        for row, logp in zip(group, logps, strict=True):
            scores[row] = logp
        if progress:
            progress.step(len(group))
    return scores


def rows_of_groups(rows: Sequence[Tokens], groups: Groups) -> Iterator[list[Tokens]]:
    """The rows of every pass, by the numbers that its group has."""
    for group in groups:
        yield [rows[number] for number in group]


def scoring_memory_limit(dist: Distributed, log: Callable[[str], None]) -> MemoryLimit:
    """The padded tokens of a pass of scoring."""

    def on_halving(limit: int) -> None:
        dist.warn(
            f"out of memory: from here at most {limit} tokens per forward pass "
            f"(run.max_tokens_per_batch is the limit that was tried)",
            log,
        )

    def failure(limit: int) -> UserError:
        if dist.is_sharded:
            return UserError("out of memory while texts are scored; lower run.max_tokens_per_batch")
        return UserError(f"out of memory: a text of {limit} tokens is too long to be scored here")

    return MemoryLimit(on_halving, failure)
