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

from minmacpo.model import Branches
from minmacpo.tokenizer import Tokens

WORTH = 48  # tokens that a shared prompt must save per answer: below, its mask costs more time (bench/shared.py)


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens [B, T] int64 and mask [B, T] bool, padded at the right with 0 / False. `branches` where a line holds
    several answers behind their common prompt; else every line is one row."""

    tokens: Tensor
    mask: Tensor
    branches: Branches | None = None

    @property
    def sizes(self) -> Tensor:
        """Tokens under the mask of each answer [answers]; position 0, which nothing precedes, is not counted."""
        if self.branches is None:
            return self.mask[:, 1:].sum(1)
        return torch.bincount(self.branches.owner[self.mask], minlength=self.branches.answers)


def collate(rows: Sequence[Tokens], device="cpu") -> Batch:
    """Rows of any length as one Batch; there is no attention mask, see model.py."""
    tokens = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    mask = pad_sequence([torch.tensor(row.mask) for row in rows], batch_first=True)
    return Batch(tokens.to(device, non_blocking=True), mask.to(device, non_blocking=True))


def prompt_of(row: Tokens) -> int:
    """Tokens before the first one under the mask."""
    return row.mask.index(True) if True in row.mask else len(row.ids)


def collate_lines(lines: Sequence[Sequence[Tokens]], device="cpu") -> Batch:
    """A line for each group of rows: their common prompt once, then their answers side by side. Lines of one row
    alone give what `collate` gives."""
    if all(len(rows) == 1 for rows in lines):
        return collate([row for rows in lines for row in rows], device)
    joined, fields, answers = [], [], 0
    for rows in lines:
        start = prompt_of(rows[0])
        line = Tokens(rows[0].ids[:start], rows[0].mask[:start])
        owner, positions, before = [-1] * start, [*range(start)], [max(i - 1, 0) for i in range(start)]
        for row in rows:
            size, here = len(row.ids) - start, len(line.ids)
            before += [start - 1, *range(here, here + size - 1)][:size]
            positions += range(start, start + size)
            owner += [answers] * size
            line = Tokens(line.ids + row.ids[start:], line.mask + row.mask[start:])
            answers += 1
        joined.append(line)
        fields.append((owner, positions, before))
    pads = zip(zip(*fields, strict=True), (-2, 0, 0), strict=True)
    padded = (pad_sequence([torch.tensor(each) for each in field], True, pad).to(device) for field, pad in pads)
    plain = collate(joined, device)
    return Batch(plain.tokens, plain.mask, Branches(*padded, answers))


def common_prompts(rows: Sequence[Tokens]) -> list[list[int]]:
    """The rows' numbers, those with the same prompt in one group, in the order of their first."""
    groups: dict = {}
    for i, row in enumerate(rows):
        start = prompt_of(row)
        shares = 0 < start < len(row.ids)  # an answer's first token needs a token before it
        groups.setdefault(tuple(row.ids[:start]) if shares else i, []).append(i)
    return [*groups.values()]


def line_length(rows: Sequence[Tokens]) -> int:
    """Tokens of the line that `collate_lines` makes of rows with a common prompt."""
    return sum(len(row.ids) for row in rows) - (len(rows) - 1) * prompt_of(rows[0])


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
