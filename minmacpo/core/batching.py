"""Which rows go into which forward pass: plans made before any work, and padded batches.

A plan depends on lengths, sizes and seed only, so a step's denominators are known before its first backward.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minmacpo.core.model import PackedIndex
from minmacpo.data.tokenizer import Tokens

WORTH = 0.05  # share of the padded tokens that must be saved: taking rows apart for attention costs 1-2 % of a step


CPU_TOKENS = 1024  # most tokens of a micro-batch of rows of like length on a CPU: what it computes with then lies in its cache (bench/dpo.py)


ALIKE = 1.5  # times as long may a row be as the shortest of its batch, where only attention is done on padding


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens [B, T] int64 and mask [B, T] bool, padded at the right with 0 / False; `shared` says which tokens are
    computed, where that is not all of them."""

    tokens: Tensor
    mask: Tensor
    shared: PackedIndex | None = None


def collate(rows: Sequence[Tokens], device="cpu", share: bool = False) -> Batch:
    """Rows of any length as one Batch; there is no attention mask, see model.py. `share`: padding is not computed, nor is
    a prompt a second time."""
    tokens = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    mask = pad_sequence([torch.tensor(row.mask) for row in rows], batch_first=True)
    shared = (
        PackedIndex(*(part.to(device, non_blocking=True) for part in distinct(rows)))
        if share
        else None
    )
    return Batch(tokens.to(device, non_blocking=True), mask.to(device, non_blocking=True), shared)


def prompt_of(row: Tokens) -> tuple[int, ...]:
    """The ids before the first one under the mask."""
    return tuple(row.ids[: row.mask.index(True)]) if True in row.mask else ()


def distinct(rows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """(kept [N], origin [B, T]) of `PackedIndex`: every answer, and of rows with equal prompts the first one's."""
    width, kept, origin, known = max(len(row.ids) for row in rows), [], [], {}
    for number, row in enumerate(rows):
        prompt = prompt_of(row)
        first = known.get(prompt)
        own = len(prompt) if first is not None else 0  # its own tokens begin here
        place = [
            *range(first or 0, (first or 0) + own),
            *range(len(kept), len(kept) + len(row.ids) - own),
        ]
        known.setdefault(prompt, len(kept))
        kept += range(number * width + own, number * width + len(row.ids))
        origin.append(place + [0] * (width - len(place)))
    return torch.tensor(kept), torch.tensor(origin)


def token_counts(groups: Iterable[Sequence[Tokens]]) -> tuple[int, int, int]:
    """(tokens padding included, without it, without the prompts that an earlier row of the batch has) of batches of rows."""
    padded = real = computed = 0
    for rows in groups:
        prompts = [prompt_of(row) for row in rows]
        size = sum(len(row.ids) for row in rows)
        padded, real = padded + len(rows) * max(len(row.ids) for row in rows), real + size
        computed += size - sum(map(len, prompts)) + sum(map(len, set(prompts)))
    return padded, real, computed


def worth_sharing(groups: Iterable[Sequence[Tokens]]) -> tuple[bool, str]:
    """(whether `share` saves enough, what the log says) for batches of rows that are planned."""
    padded, real, computed = token_counts(groups)
    worth = padded - computed >= WORTH * max(padded, 1)
    words = (
        f"padding is {1 - real / max(padded, 1):.1%} of {padded:,} tokens in a pass over the rows"
    )
    found = f"; none of it and each common prompt once outside attention: {computed:,} are computed ({1 - computed / max(padded, 1):.0%} saved)"
    return worth, words + (found if worth else "")


def cut(
    order: Sequence[int],
    lengths: Sequence[int],
    budget: int,
    counts: Sequence[int] | None = None,
    alike: float = math.inf,
) -> list[list[int]]:
    """`order` cut into runs whose padded size (longest · units, or · rows where units have `counts` of them) is at most
    `budget`, or of one unit; none is more than `alike` times as long as the first of its run."""
    groups, longest, rows = [], 0, 0
    for unit in order:
        count = 1 if counts is None else counts[unit]
        longest, rows = max(longest, lengths[unit]), rows + count
        if groups and longest * rows <= budget and lengths[unit] <= alike * lengths[groups[-1][0]]:
            groups[-1].append(unit)
        else:
            groups.append([unit])
            longest, rows = lengths[unit], count
    return groups


def halved(groups: list[list[int]]) -> list[list[int]]:
    """The groups, each cut in two."""
    return [
        half
        for group in groups
        for half in (group[: len(group) // 2], group[len(group) // 2 :])
        if half
    ]


def plan_steps(
    lengths: Sequence[int],
    batch: int,
    steps: int,
    seed: int,
    budget: int = 16384,
    alike: float = math.inf,
) -> list[list[list[int]]]:
    """`steps` optimiser steps, each a list of micro-batches of at most `budget` tokens, each a list of units (see `cut`).
    Every epoch is shuffled anew, and its last step may be smaller; within a step, units go by length."""
    plan = []
    for epoch in range(math.ceil(steps / steps_per_epoch(len(lengths), batch))):
        order = list(range(len(lengths)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, len(order), batch):
            units = sorted(order[start : start + batch], key=lambda unit: (lengths[unit], unit))
            plan.append(cut(units, lengths, budget, alike=alike))
    return plan[:steps]


def steps_per_epoch(units: int, batch: int) -> int:
    """Optimiser steps of one pass over `units`."""
    return math.ceil(units / batch)


def limits(max_tokens_per_batch: int, device: str, close: bool) -> tuple[int, float]:
    """(tokens of a micro-batch, how unlike its rows may be), for plan_steps; `close`: rows of like length, which on a CPU
    stay within its cache."""
    if not close:
        return max_tokens_per_batch, math.inf
    return min(max_tokens_per_batch, CPU_TOKENS) if device == "cpu" else max_tokens_per_batch, ALIKE


def scoring_tokens(max_tokens_per_batch: int, device: str) -> int:
    """Tokens of a pass of scoring, which keeps nothing: on a CPU four times what training takes (see `limits`)."""
    return min(max_tokens_per_batch, 4 * CPU_TOKENS) if device == "cpu" else max_tokens_per_batch


def plan_scoring(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """All units once, sorted by length, in groups of at most `budget` padded tokens."""
    return cut(sorted(range(len(lengths)), key=lengths.__getitem__), lengths, budget)


def plan_shared(rows: Sequence[Tokens], budget: int) -> list[list[int]]:
    """`plan_scoring` of rows, those with equal prompts side by side: together, if a group has room for them."""
    prompts: dict = {}
    for i, row in enumerate(rows):
        prompts.setdefault(prompt_of(row), []).append(i)
    sizes = [len(row.ids) for row in rows]
    units = [part for unit in prompts.values() for part in cut(unit, sizes, budget)]
    lengths = [max(sizes[i] for i in unit) for unit in units]
    order = sorted(range(len(units)), key=lengths.__getitem__)
    return [
        [i for unit in group for i in units[unit]]
        for group in cut(order, lengths, budget, [*map(len, units)])
    ]
