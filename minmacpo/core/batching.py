"""Which rows go into which forward pass: plans made before any work, and padded batches.

A plan depends on lengths, sizes and seed only, so a step's denominators are known before its first
backward pass. Where memory turns out to be short, a pass is done again in halves (`MemoryLimit`).

Shapes: B rows of T tokens, N of them computed where the rest is padding or a repeated prompt.
"""

import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minmacpo.core.model import PackedIndex
from minmacpo.data.tokenizer import Tokens
from minmacpo.runtime.device import normalize_oom

# Packing is used from this fraction of saved tokens on: taking rows apart costs 1-2 % of a step
MIN_SAVED = 0.05

# Most tokens of a training micro-batch of rows of like length on a CPU: what it computes with then
# lies in the cache (bench/speed/dpo.py)
CPU_TOKENS = 1024

# How many times as long as the shortest row of its batch a row may be
MAX_LENGTH_RATIO = 1.5

Groups = list[list[int]]  # numbers of the rows (or examples) of every forward pass
Result = TypeVar("Result")


# --- Batches


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded at the right, and for preference pairs what is known of them beforehand.

    There is no attention mask: no real token sees the padding (see core/model.py).
    """

    tokens: Tensor  # (B, T) int64, padded with 0
    mask: Tensor  # (B, T) bool: the tokens that are trained on or scored
    packed: PackedIndex | None = None  # which tokens are computed, where that is not all of them
    reference_logps: Tensor | None = None  # (B / 2, 2): chosen, rejected
    weights: Tensor | None = None  # (B / 2,) of the pairs


def collate(rows: Sequence[Tokens], device="cpu", packed: bool = False) -> Batch:
    """Rows of any length as one Batch; `packed`: neither padding nor a prompt twice is computed."""
    tokens = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    mask = pad_sequence([torch.tensor(row.mask) for row in rows], batch_first=True)
    index = None
    if packed:
        token_index, gather_index = build_packed_index(rows)
        index = PackedIndex(
            token_index.to(device, non_blocking=True),
            gather_index.to(device, non_blocking=True),
        )
    return Batch(
        tokens=tokens.to(device, non_blocking=True),
        mask=mask.to(device, non_blocking=True),
        packed=index,
    )


# --- Packing: padding is not computed, and a prompt that several rows share once only


def prompt_of(row: Tokens) -> tuple[int, ...]:
    """The ids before the first one under the mask; none if nothing is under it."""
    if True not in row.mask:
        return ()
    return tuple(row.ids[: row.mask.index(True)])


def build_packed_index(rows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """(N,) numbers of the tokens to compute among B * T, and (B, T): which of the N stands there.

    Every answer is computed, and of rows with equal prompts the first one's prompt.
    """
    width = max(len(row.ids) for row in rows)
    token_index: list[int] = []
    gather_index: list[list[int]] = []
    first_of_prompt: dict[tuple[int, ...], int] = {}  # its first token's place among the N

    for number, row in enumerate(rows):
        prompt = prompt_of(row)
        start = number * width
        end = start + len(row.ids)

        # An earlier row's prompt, then this row's own tokens
        shared = 0
        origin = []
        if prompt in first_of_prompt:
            shared = len(prompt)
            first = first_of_prompt[prompt]
            origin += range(first, first + shared)
        else:
            first_of_prompt[prompt] = len(token_index)
        origin += range(len(token_index), len(token_index) + len(row.ids) - shared)
        token_index += range(start + shared, end)

        padding = [0] * (width - len(row.ids))  # any token would do: nothing looks at it
        gather_index.append(origin + padding)
    return torch.tensor(token_index), torch.tensor(gather_index)


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of planned batches."""

    padded: int  # padding included
    real: int  # without padding
    computed: int  # without padding and without prompts that an earlier row of the batch has


def token_counts(batches: Iterable[Sequence[Tokens]]) -> TokenCounts:
    """What the batches hold, and what packing would leave of it."""
    padded = 0
    real = 0
    computed = 0
    for rows in batches:
        lengths = [len(row.ids) for row in rows]
        prompts = [prompt_of(row) for row in rows]
        repeated = sum(map(len, prompts)) - sum(map(len, set(prompts)))
        padded += len(rows) * max(lengths)
        real += sum(lengths)
        computed += sum(lengths) - repeated
    return TokenCounts(padded, real, computed)


def should_pack(batches: Iterable[Sequence[Tokens]]) -> tuple[bool, str]:
    """Whether packing saves enough of these batches, and a line about it for the log."""
    counts = token_counts(batches)
    padded = max(counts.padded, 1)
    packs = counts.padded - counts.computed >= MIN_SAVED * padded
    padding = 1 - counts.real / padded
    line = f"padding is {padding:.1%} of {counts.padded:,} tokens in a pass over the rows"
    if packs:
        saved = 1 - counts.computed / padded
        line += "; none of it and each common prompt once outside attention: "
        line += f"{counts.computed:,} are computed ({saved:.0%} saved)"
    return packs, line


# --- Plans


def group_by_token_budget(
    order: Sequence[int],
    lengths: Sequence[int],
    max_tokens: int,
    rows_per_item: Sequence[int] | None = None,
    max_length_ratio: float = math.inf,
) -> Groups:
    """Items cut in order into runs of at most `max_tokens` padded tokens, or of one item.

    Args:
        order: the items, each a number that indexes `lengths`.
        lengths: tokens of every item's longest row.
        max_tokens: of a run, which is padded to its longest row.
        rows_per_item: rows of every item; None: one each.
        max_length_ratio: how many times as long as the first of its run an item may be.
    """
    groups: Groups = []
    longest = 0
    rows = 0
    for item in order:
        item_rows = 1
        if rows_per_item is not None:
            item_rows = rows_per_item[item]

        # Would it fit into the present group, and is it like the first one there?
        longest = max(longest, lengths[item])
        rows += item_rows
        fits = longest * rows <= max_tokens
        if groups and fits and lengths[item] <= max_length_ratio * lengths[groups[-1][0]]:
            groups[-1].append(item)
        else:
            groups.append([item])
            longest = lengths[item]
            rows = item_rows
    return groups


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Optimiser steps of one pass over so many examples."""
    return math.ceil(examples / batch_size)


def plan_steps(
    lengths: Sequence[int],
    batch_size: int,
    steps: int,
    seed: int,
    max_tokens: int = 16384,
    max_length_ratio: float = math.inf,
) -> list[Groups]:
    """`steps` optimiser steps, each a list of micro-batches (see `group_by_token_budget`).

    Every epoch is shuffled anew, and its last step may be smaller. Within a step, examples go by
    length.
    """
    plan: list[Groups] = []
    epochs = math.ceil(steps / steps_per_epoch(len(lengths), batch_size))
    for epoch in range(epochs):
        order = list(range(len(lengths)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            batch.sort(key=lambda example: (lengths[example], example))
            micro_batches = group_by_token_budget(
                batch, lengths, max_tokens, max_length_ratio=max_length_ratio
            )
            plan.append(micro_batches)
    return plan[:steps]


def batch_limits(max_tokens: int, device: str, similar_lengths: bool) -> tuple[int, float]:
    """(tokens of a micro-batch, largest ratio of its lengths) for `plan_steps`.

    Rows of similar lengths leave little padding; on a CPU they also stay within its cache.
    """
    if not similar_lengths:
        return max_tokens, math.inf
    if device == "cpu":
        max_tokens = min(max_tokens, CPU_TOKENS)
    return max_tokens, MAX_LENGTH_RATIO


def scoring_tokens(max_tokens: int, device: str) -> int:
    """Tokens of a pass of scoring, which keeps nothing for a backward pass."""
    if device == "cpu":
        return min(max_tokens, 4 * CPU_TOKENS)
    return max_tokens


def plan_scoring(lengths: Sequence[int], max_tokens: int) -> Groups:
    """All rows once, sorted by length, in groups of at most `max_tokens` padded tokens."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return group_by_token_budget(order, lengths, max_tokens)


def plan_packed(rows: Sequence[Tokens], max_tokens: int) -> Groups:
    """`plan_scoring` with rows of equal prompts side by side, so that packing saves the most."""
    # --- Rows of equal prompts are one item, or several if a pass has no room for all
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        by_prompt.setdefault(prompt_of(row), []).append(number)
    lengths = [len(row.ids) for row in rows]
    items: Groups = []
    for members in by_prompt.values():
        items += group_by_token_budget(members, lengths, max_tokens)

    # --- Items go by length
    item_lengths = [max(lengths[row] for row in item) for item in items]
    item_rows = [len(item) for item in items]
    order = sorted(range(len(items)), key=item_lengths.__getitem__)
    groups = []
    for group in group_by_token_budget(order, item_lengths, max_tokens, item_rows):
        group_rows: list[int] = []
        for item in group:
            group_rows += items[item]
        groups.append(group_rows)
    return groups


# --- Short memory


class MemoryLimit:
    """How much is computed at a time; halved, for good, whenever memory proves too short for it.

    Training, scoring and sampling use it alike. What it counts is theirs: padded tokens of a pass,
    or sequences side by side.
    """

    def __init__(self, on_halving: Callable[[int], None], failure: Callable[[int], Exception]):
        """No limit yet.

        Args:
            on_halving: called with every new limit.
            failure: makes the error to raise where not even so little fits.
        """
        self.limit = sys.maxsize
        self.on_halving = on_halving
        self.failure = failure

    def run(self, compute: Callable[[int], Result], size: int, smallest: int = 1) -> Result:
        """compute(n) for the largest n, of `size` and the limit, for which memory suffices.

        Args:
            compute: does all the work, at most n at a time; after a failure it is called again.
            size: how much there is; more at a time would change nothing.
            smallest: less at a time would not help.
        """
        while True:
            tried = min(size, self.limit)
            try:
                with normalize_oom():
                    return compute(tried)
            except torch.OutOfMemoryError:
                if tried <= smallest:
                    raise self.failure(tried) from None
            # Outside of the handler, whose traceback would hold the tensors of the failed pass
            self.limit = max(tried // 2, smallest)
            self.on_halving(self.limit)


def split_to_fit(
    groups: Groups, padded_size: Callable[[list[int]], int], max_tokens: int
) -> Groups:
    """The groups, each halved until it has at most `max_tokens` padded tokens or one member."""
    parts: Groups = []
    for group in groups:
        if len(group) <= 1 or padded_size(group) <= max_tokens:
            parts.append(group)
        else:
            middle = len(group) // 2
            parts += split_to_fit([group[:middle], group[middle:]], padded_size, max_tokens)
    return parts
