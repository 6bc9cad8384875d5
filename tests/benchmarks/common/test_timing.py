from __future__ import annotations

import itertools
import time
from functools import partial

import pytest
import torch

from benchmarks.common import timing


class FakeTime:
    """A time source for a host clock, which laps advance themselves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def clock(self, lap) -> float:
        return timing.host_clock(lap, now=lambda: self.now)

    def lap(self, name: str, seconds: float):
        def run() -> None:
            self.log.append(name)
            self.now += seconds

        return run


def test_median_and_range():
    summary = timing.summarize([3.0, 1.0, 10.0, 2.0])
    assert summary == timing.Summary(median=2.5, low=1.0, high=10.0, reps=4)


def test_nothing_to_summarize():
    with pytest.raises(ValueError, match="samples"):
        timing.summarize([])


def test_candidates_take_turns_and_warmup_is_dropped():
    fake = FakeTime()
    candidates = {
        "first": {"up": fake.lap("a.up", 1.0), "down": fake.lap("a.down", 2)},
        "second": {"up": fake.lap("b.up", 4.0)},
    }
    samples = timing.interleave(candidates, fake.clock, reps=2, warmup=1, budget_s=100)
    assert fake.log == ["a.up", "a.down", "b.up"] * 3
    assert samples == {"first": {"up": [1.0] * 2, "down": [2.0] * 2}, "second": {"up": [4.0] * 2}}


def test_slow_candidate_sits_out_after_the_least_repetitions():
    fake = FakeTime()
    candidates = {
        "slow": {"lap": fake.lap("slow", 50.0)},
        "fast": {"lap": fake.lap("fast", 1.0)},
    }
    samples = timing.interleave(candidates, fake.clock, reps=8, budget_s=10.0)
    assert len(samples["slow"]["lap"]) == timing.MIN_REPS
    assert len(samples["fast"]["lap"]) == 8


def test_time_between_laps_is_not_counted():
    ticks = itertools.count(step=1.0)
    clock = partial(timing.host_clock, now=lambda: next(ticks))
    laps = {"one": lambda: None, "two": lambda: None}
    samples = timing.interleave({"x": laps}, clock, reps=2, warmup=0)
    assert samples == {"x": {"one": [1.0, 1.0], "two": [1.0, 1.0]}}


def test_a_graph_waits_from_forward_to_backward():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    step = timing.TrainStep(x.square, [x], torch.tensor([1.0, 10.0]))
    assert not step.forward().requires_grad
    assert step.forward_grad().tolist() == [1.0, 4.0]
    (gradient,) = step.backward()
    assert gradient.tolist() == [2.0, 40.0]


@pytest.mark.parametrize("reps", [0, -1])
def test_no_repetitions(reps):
    with pytest.raises(ValueError, match="reps"):
        timing.interleave({}, timing.host_clock, reps=reps)


@pytest.mark.gpu
def test_cuda_clock_waits_for_the_work():
    matrix = torch.randn(8192, 8192, device="cuda")
    clock = timing.clock_for(matrix.device)
    laps = {"one": lambda: matrix @ matrix, "two": lambda: [matrix @ matrix for _ in range(4)]}
    samples = timing.interleave({"mm": laps}, clock, reps=3)["mm"]
    ratio = timing.summarize(samples["two"]).median / timing.summarize(samples["one"]).median
    assert 3 < ratio < 5


@pytest.mark.gpu
def test_a_cold_clock_leaves_out_what_the_host_takes():
    clock = timing.clock_for(torch.device("cuda"), cold=True)
    x = torch.zeros(1 << 20, device="cuda")

    def lap() -> None:
        time.sleep(2e-4)
        x.add_(1)

    assert 0 < min(clock(lap) for _ in range(3)) < 1e-4
