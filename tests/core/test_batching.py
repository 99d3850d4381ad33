"""Plans: every unit once per epoch, within the budget, the same for the same seed."""

import itertools
import math
import random

import pytest
import torch

from minmacpo.core.batching import (
    collate,
    group_by_token_budget,
    plan_scoring,
    plan_steps,
    steps_per_epoch,
)
from minmacpo.data.tokenizer import Tokens


@pytest.fixture
def rng(seed) -> random.Random:
    return random.Random(seed)


def random_lengths(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1, 50) for _ in range(count)]


def flattened(groups) -> list[int]:
    """The units of all groups, in their order."""
    return list(itertools.chain.from_iterable(groups))


def check_budget(group: list[int], lengths: list[int], budget: int) -> None:
    """Padded, a group is no larger than the budget; a unit that is too big stands alone."""
    longest = max(lengths[unit] for unit in group)
    assert longest * len(group) <= budget or len(group) == 1


@pytest.mark.parametrize("budget", [30, 60])
@pytest.mark.parametrize("units", [1, 7, 8, 9, 40])
def test_every_unit_once_per_epoch(units, budget, rng):
    lengths = random_lengths(rng, units)
    steps_each = steps_per_epoch(units, 8)
    assert steps_each == math.ceil(units / 8)
    plan = plan_steps(lengths, 8, 3 * steps_each, rng.random(), budget)
    assert len(plan) == 3 * steps_each

    shuffles = set()
    for start in range(0, len(plan), steps_each):
        held = [flattened(step) for step in plan[start : start + steps_each]]
        *full, last = map(len, held)
        assert full == [8] * (steps_each - 1)
        assert 1 <= last <= 8
        assert sorted(flattened(held)) == list(range(units))
        shuffles.add(tuple(map(frozenset, held)))
    if units == 40:
        assert len(shuffles) == 3, "every epoch needs a shuffle of its own"


def test_micro_batches_stay_within_the_budget(rng):
    lengths = random_lengths(rng, 200)
    for budget in (1, 60, 200, 10**6):
        for step in plan_steps(lengths, 32, 7, 3, budget):
            for group in step:
                check_budget(group, lengths, budget)
            ordered = [lengths[unit] for unit in flattened(step)]
            assert ordered == sorted(ordered)
            for group, after in itertools.pairwise(step):  # and no group could be larger
                assert lengths[after[0]] * (len(group) + 1) > budget


def test_the_budget_does_not_change_which_units_a_step_holds(rng):
    lengths = random_lengths(rng, 57)
    held_by_budget = []
    for budget in (50, 300, 10**6):
        plan = plan_steps(lengths, 10, 9, 4, budget)
        held_by_budget.append([set(flattened(step)) for step in plan])
    assert held_by_budget[0] == held_by_budget[1] == held_by_budget[2]
    assert {len(step) for step in plan} == {1}, "the last budget has room for whole steps"


def test_a_plan_is_a_function_of_its_arguments(rng):
    lengths = random_lengths(rng, 40)
    first = plan_steps(lengths, 8, 12, 5)
    random.seed(99)
    assert plan_steps(list(lengths), 8, 12, 5) == first
    assert plan_steps(lengths, 8, 12, 6) != first
    assert plan_steps(lengths, 8, 7, 5) == first[:7], "fewer steps are the first of the same plan"


def test_the_last_step_may_end_inside_an_epoch(rng):
    for steps in (0, 1, 2, 3, 4, 11):
        assert len(plan_steps([1] * 20, 8, steps, 0)) == steps


def test_scoring_holds_every_unit_once_within_the_budget(rng):
    lengths = random_lengths(rng, 150)
    for budget in (1, 100, 999, 10**6):
        groups = plan_scoring(lengths, budget)
        assert sorted(flattened(groups)) == list(range(150))
        for group in groups:
            check_budget(group, lengths, budget)
    assert len(groups) == 1
    assert plan_scoring([], 10) == []


def test_groups_follow_the_order_it_is_given():
    assert group_by_token_budget([2, 0, 1], [5, 1, 3], 10) == [[2, 0], [1]]
    assert group_by_token_budget([2, 0, 1], [5, 1, 3], 5) == [[2], [0], [1]]
    assert group_by_token_budget([], [], 10) == []


def test_collate_pads_at_the_right(rng):
    rows = []
    for length in (3, 1, 6, 6):
        ids = [rng.randrange(1, 99) for _ in range(length)]
        rows.append(Tokens(ids, [rng.random() < 0.5 for _ in ids]))
    batch = collate(rows)
    assert batch.tokens.shape == batch.mask.shape == (4, 6)
    assert batch.tokens.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    for row, tokens, mask in zip(rows, batch.tokens.tolist(), batch.mask.tolist(), strict=True):
        padding = 6 - len(row.ids)
        assert tokens == row.ids + [0] * padding
        assert mask == row.mask + [False] * padding


def test_runs_of_like_length(rng):
    lengths = sorted(rng.randrange(10, 400) for _ in range(100))
    groups = group_by_token_budget(range(100), lengths, 10**6, max_length_ratio=1.5)
    assert flattened(groups) == list(range(100))
    for group in groups:
        assert lengths[group[-1]] <= 1.5 * lengths[group[0]]
    for group, after in itertools.pairwise(groups):
        assert lengths[after[0]] > 1.5 * lengths[group[0]]
