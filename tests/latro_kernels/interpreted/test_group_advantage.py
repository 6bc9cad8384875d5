"""The Triton kernel of group_advantage in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings

from tests.latro_kernels.group_cases import (
    SETTINGS,
    Batch,
    assert_equal_rewards_give_zero,
    assert_exact_advantages,
    assert_gate,
    assert_nan_stays_in_its_group,
    assert_same,
    assert_without_weight_an_infinite_kl_is_not_seen,
    batches,
    make_batch,
    run,
)

each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(s.values()))


@each_setting
@given(batch=batches())
@settings(max_examples=5, deadline=None)
def test_gate(setting: dict[str, str], batch: Batch) -> None:
    assert_gate(batch, "triton", beta=0.3, answer_weight=0.7, **setting)


@each_setting
def test_long_segments_and_many_sequences(setting: dict[str, str]) -> None:
    assert_gate(make_batch([20_000, 3, 0, 511], 2), "triton", **setting)
    draw = random.Random(0)
    finished = [draw.random() < 0.9 for _ in range(40)]
    lengths = [draw.randrange(9) for _ in range(80)]
    assert_gate(make_batch(lengths, 40, finished=finished), "triton", **setting)


def test_rewards_large_and_close_together() -> None:
    assert_exact_advantages("triton", "cpu")


def test_equal_rewards_give_exactly_zero() -> None:
    assert_equal_rewards_give_zero("triton", "cpu")


@each_setting
def test_nan_stays_in_its_group(setting: dict[str, str]) -> None:
    batch = make_batch([2, 3] * 9, 3, finished=[s != 4 for s in range(9)])
    assert_nan_stays_in_its_group(batch, "triton", 4, **setting)
    if setting["unfinished"] == "floor":
        assert_nan_stays_in_its_group(batch, "triton", 24, **setting)


@each_setting
def test_without_weight_an_infinite_kl_is_not_seen(setting: dict[str, str]) -> None:
    batch = make_batch([3, 2, 0, 1, 4, 3, 2, 5], 2, finished=[True, False, True, True])
    assert_without_weight_an_infinite_kl_is_not_seen(batch, "triton", **setting)


def test_same_bits_twice() -> None:
    batch = make_batch([600, 40, 700, 7], 2)
    assert_same(run(batch, "triton"), run(batch, "triton"))
