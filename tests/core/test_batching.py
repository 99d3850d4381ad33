"""Plans: every unit once per epoch, within the budget, the same for the same seed."""

import itertools
import random
from collections import Counter

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


@pytest.mark.parametrize("budget", [30, 60])
@pytest.mark.parametrize("units", [1, 7, 8, 9, 40])
def test_every_unit_once_per_epoch(units, budget, rng):
    lengths = [rng.randrange(1, 50) for _ in range(units)]
    each = steps_per_epoch(units, 8)
    assert each == sum(1 for _ in range(0, units, 8))
    plan = plan_steps(lengths, 8, 3 * each, rng.random(), budget)
    assert len(plan) == 3 * each
    shuffles = []
    for epoch in range(3):
        steps = plan[epoch * each : (epoch + 1) * each]
        sizes = [sum(map(len, step)) for step in steps]
        assert sizes[:-1] == [8] * (each - 1) and 1 <= sizes[-1] <= 8
        order = [unit for step in steps for group in step for unit in group]
        assert Counter(order) == Counter(range(units))
        shuffles.append(tuple(frozenset(u for g in step for u in g) for step in steps))
    if units == 40:
        assert len(set(shuffles)) == 3, "every epoch needs a shuffle of its own"


def test_micro_batches_stay_within_the_budget(rng):
    lengths = [rng.randrange(1, 50) for _ in range(200)]
    for budget in (1, 60, 200, 10**6):
        for step in plan_steps(lengths, 32, 7, 3, budget):
            for group in step:
                size = max(lengths[u] for u in group) * len(group)
                assert size <= budget or len(group) == 1, "a unit that is too big stands alone"
            ordered = [lengths[u] for group in step for u in group]
            assert ordered == sorted(ordered)
            for group, after in itertools.pairwise(step):  # and no group could be larger
                assert lengths[after[0]] * (len(group) + 1) > budget


def test_the_budget_does_not_change_which_units_a_step_holds(rng):
    lengths = [rng.randrange(1, 50) for _ in range(57)]
    plans = [plan_steps(lengths, 10, 9, 4, budget) for budget in (50, 300, 10**6)]
    held = [[{u for g in step for u in g} for step in plan] for plan in plans]
    assert held[0] == held[1] == held[2] and all(len(step) == 1 for step in plans[2])


def test_a_plan_is_a_function_of_its_arguments(rng):
    lengths = [rng.randrange(1, 50) for _ in range(40)]
    first = plan_steps(lengths, 8, 12, 5)
    random.seed(99)
    assert plan_steps(list(lengths), 8, 12, 5) == first
    assert plan_steps(lengths, 8, 12, 6) != first
    assert plan_steps(lengths, 8, 7, 5) == first[:7], "fewer steps are the first of the same plan"


def test_the_last_step_may_end_inside_an_epoch(rng):
    assert [len(plan_steps([1] * 20, 8, steps, 0)) for steps in (0, 1, 2, 3, 4, 11)] == [
        0,
        1,
        2,
        3,
        4,
        11,
    ]


def test_scoring_holds_every_unit_once_within_the_budget(rng):
    lengths = [rng.randrange(1, 90) for _ in range(150)]
    for budget in (1, 100, 999, 10**6):
        groups = plan_scoring(lengths, budget)
        assert Counter(u for g in groups for u in g) == Counter(range(150))
        assert all(max(lengths[u] for u in g) * len(g) <= budget or len(g) == 1 for g in groups)
    assert len(groups) == 1 and plan_scoring([], 10) == []


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
    assert batch.tokens.dtype == torch.int64 and batch.mask.dtype == torch.bool
    for row, tokens, mask in zip(rows, batch.tokens.tolist(), batch.mask.tolist(), strict=True):
        fill = 6 - len(row.ids)
        assert tokens == row.ids + [0] * fill and mask == row.mask + [False] * fill


def test_runs_of_like_length(rng):
    lengths = sorted(rng.randrange(10, 400) for _ in range(100))
    groups = group_by_token_budget([*range(100)], lengths, 10**6, max_length_ratio=1.5)
    assert [unit for group in groups for unit in group] == [*range(100)]
    assert all(lengths[group[-1]] <= 1.5 * lengths[group[0]] for group in groups)
    assert all(
        lengths[after[0]] > 1.5 * lengths[group[0]] for group, after in itertools.pairwise(groups)
    )
