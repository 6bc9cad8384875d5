"""Means, deviations and differences."""

from __future__ import annotations

import math

import pytest

from studies.estimates import Difference, Estimate


def test_an_estimate_is_the_mean_and_the_deviation_by_n_minus_one():
    of = Estimate.of([1.0, 2.0, 6.0])
    assert (of.mean, of.count) == (3.0, 3)
    assert of.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert Estimate.of([4.0]) == Estimate(4.0, None, 1)


@pytest.mark.parametrize(
    ("gain", "above", "below"),
    [(0.11, True, False), (0.09, False, False), (-0.09, False, False), (-0.11, False, True)],
)
def test_a_difference_is_measured_in_deviations_of_both(gain, above, below):
    # sqrt(0.03² + 0.04²) = 0.05
    difference = Difference(Estimate(0.5 + gain, 0.03, 3), Estimate(0.5, 0.04, 3))
    assert difference.deviation == pytest.approx(0.05)
    assert (difference.above, difference.below) == (above, below)


def test_one_seed_decides_nothing():
    difference = Difference(Estimate(0.9, None, 1), Estimate(0.1, 0.01, 3))
    assert difference.mean == pytest.approx(0.8)
    assert (difference.deviation, difference.above, difference.below) == (None, None, None)
