"""Intervals: they are as wide as by hand, and cover the truth as often as they say."""

import numpy as np
import pytest

from minmacpo.evaluation.bootstrap import estimate_ratio, proportion_interval


def test_wilsons_interval_by_hand():
    # six of six: low = 1 / (1 + 1.96² / 6), by Wilson's formula with share 1
    low, high = proportion_interval(np.ones(6))

    assert low == pytest.approx(1 / (1 + 1.96**2 / 6), abs=1e-4)
    assert high == 1.0


def test_wilsons_interval_covers_the_share_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        low, high = proportion_interval((rng.random(20) < 0.9).astype(float))
        hits += low <= 0.9 <= high

    assert 0.92 <= hits / 500 <= 0.99


def test_a_ratio_of_sums_and_its_interval():
    # every prompt has the same ratio, so that no draw can have another one
    estimate = estimate_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], ["a", "b", "c"], draws=50)

    assert estimate.value == 2.0
    assert estimate.interval == [2.0, 2.0]


def test_draws_without_a_gap_are_left_out():
    # the second prompt alone would divide by 0, the third one by less
    estimate = estimate_ratio([1.0, 0.0, 0.0], [4.0, 0.0, -1.0], ["a", "b", "c"], draws=200)

    assert np.isfinite(estimate.interval).all()
