from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.common import timing


class FakeTime:
    """A host clock's time source that laps advance themselves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

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
    time = FakeTime()
    first = timing.Candidate("first", {"up": time.lap("a.up", 1.0), "down": time.lap("a.down", 2)})
    second = timing.Candidate("second", {"up": time.lap("b.up", 4.0)})
    samples = timing.interleave(
        [first, second], timing.HostClock(time), reps=2, warmup=1, budget_s=100
    )
    assert time.log == ["a.up", "a.down", "b.up"] * 3
    assert samples == {"first": {"up": [1.0] * 2, "down": [2.0] * 2}, "second": {"up": [4.0] * 2}}


def test_slow_candidate_sits_out_after_the_least_repetitions():
    time = FakeTime()
    slow = timing.Candidate("slow", {"lap": time.lap("slow", 50.0)})
    fast = timing.Candidate("fast", {"lap": time.lap("fast", 1.0)})
    samples = timing.interleave([slow, fast], timing.HostClock(time), reps=8, budget_s=10.0)
    assert len(samples["slow"]["lap"]) == timing.MIN_REPS
    assert len(samples["fast"]["lap"]) == 8


def test_time_between_laps_is_not_counted():
    ticks = itertools.count(step=1.0)
    clock = timing.HostClock(lambda: next(ticks))
    laps = {"one": lambda: None, "two": lambda: None}
    samples = timing.interleave([timing.Candidate("x", laps)], clock, reps=2, warmup=0)
    assert samples == {"x": {"one": [1.0, 1.0], "two": [1.0, 1.0]}}


@pytest.mark.parametrize("reps", [0, -1])
def test_no_repetitions(reps):
    with pytest.raises(ValueError, match="reps"):
        timing.interleave([], timing.HostClock(), reps=reps)


def test_names_must_differ():
    twice = [timing.Candidate("same", {}), timing.Candidate("same", {})]
    with pytest.raises(ValueError, match="distinct"):
        timing.interleave(twice, timing.HostClock(), reps=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_clock_waits_for_the_work():
    matrix = torch.randn(8192, 8192, device="cuda")
    clock = timing.clock_for(matrix.device)
    laps = {"one": lambda: matrix @ matrix, "two": lambda: [matrix @ matrix for _ in range(4)]}
    samples = timing.interleave([timing.Candidate("mm", laps)], clock, reps=3)["mm"]
    ratio = timing.summarize(samples["two"]).median / timing.summarize(samples["one"]).median
    assert 3 < ratio < 5
