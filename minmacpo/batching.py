"""Which rows go into which forward pass: plans made before any work, and padded batches.

A plan depends on lengths, sizes and seed only: the denominators of a step are known before its first backward
pass, and the position in the data is one number.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minmacpo.tokenizer import Tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens [B, T] int64 and mask [B, T] bool, padded at the right with 0 / False."""

    tokens: Tensor
    mask: Tensor


def collate(rows: Sequence[Tokens], device="cpu") -> Batch:
    """Rows of any length as one Batch; there is no attention mask, see model.py."""
    width = max(len(row.ids) for row in rows)
    tokens = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
    mask = torch.tensor([row.mask + [False] * (width - len(row.ids)) for row in rows])
    return Batch(tokens.to(device, non_blocking=True), mask.to(device, non_blocking=True))


def cut(order: Sequence[int], lengths: Sequence[int], rows_each: int, budget: int) -> list[list[int]]:
    """`order` cut into runs whose padded size (longest · rows_each · units) stays within `budget`."""
    groups, longest = [], 0
    for unit in order:
        longest = max(longest, lengths[unit])
        if groups and longest * rows_each * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(unit)
        else:
            groups.append([unit])
            longest = lengths[unit]
    return groups


def plan_steps(
    lengths: Sequence[int], batch: int, steps: int, seed: int, rows_each: int = 1, budget: int = 16384
) -> list[list[list[int]]]:
    """`steps` optimiser steps, each a list of micro-batches of at most `budget` tokens, each a list of units.
    A unit is an answer (one row) or a pair (`rows_each` = 2); lengths are of its longest row. Every epoch is
    shuffled anew, and its last step may be smaller; within a step, units are sorted by length."""
    plan = []
    for epoch in range(math.ceil(steps / steps_per_epoch(len(lengths), batch))):
        order = list(range(len(lengths)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, len(order), batch):
            units = sorted(order[start : start + batch], key=lambda unit: (lengths[unit], unit))
            plan.append(cut(units, lengths, rows_each, budget))
    return plan[:steps]


def steps_per_epoch(units: int, batch: int) -> int:
    """Optimiser steps of one pass over `units`."""
    return math.ceil(units / batch)


def plan_scoring(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """All units once, sorted by length, in groups of at most `budget` padded tokens."""
    return cut(sorted(range(len(lengths)), key=lengths.__getitem__), lengths, 1, budget)


def padding_share(groups: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Share of padding among all positions of the batches `groups`."""
    padded = sum(max(lengths[unit] for unit in group) * len(group) for group in groups)
    return 1 - sum(lengths[unit] for group in groups for unit in group) / max(padded, 1)
