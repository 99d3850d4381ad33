"""Which rows go into which forward pass: plans made before any work, and padded batches.

A plan depends on lengths, sizes and seed only, so a step's denominators are known before its first backward.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minmacpo.tokenizer import Tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens [B, T] int64 and mask [B, T] bool, padded at the right with 0 / False."""

    tokens: Tensor
    mask: Tensor


def collate(rows: Sequence[Tokens], device="cpu") -> Batch:
    """Rows of any length as one Batch; there is no attention mask, see model.py."""
    tokens = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    mask = pad_sequence([torch.tensor(row.mask) for row in rows], batch_first=True)
    return Batch(tokens.to(device, non_blocking=True), mask.to(device, non_blocking=True))


def cut(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """`order` cut into runs whose padded size (longest · units) is at most `budget`, or of one unit."""
    groups, longest = [], 0
    for unit in order:
        longest = max(longest, lengths[unit])
        if groups and longest * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(unit)
        else:
            groups.append([unit])
            longest = lengths[unit]
    return groups


def plan_steps(lengths: Sequence[int], batch: int, steps: int, seed: int,
               budget: int = 16384) -> list[list[list[int]]]:  # fmt: skip
    """`steps` optimiser steps, each a list of micro-batches of at most `budget` tokens, each a list of units.
    Every epoch is shuffled anew, and its last step may be smaller; within a step, units go by length."""
    plan = []
    for epoch in range(math.ceil(steps / steps_per_epoch(len(lengths), batch))):
        order = list(range(len(lengths)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, len(order), batch):
            units = sorted(order[start : start + batch], key=lambda unit: (lengths[unit], unit))
            plan.append(cut(units, lengths, budget))
    return plan[:steps]


def steps_per_epoch(units: int, batch: int) -> int:
    """Optimiser steps of one pass over `units`."""
    return math.ceil(units / batch)


def plan_scoring(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """All units once, sorted by length, in groups of at most `budget` padded tokens."""
    return cut(sorted(range(len(lengths)), key=lengths.__getitem__), lengths, budget)
