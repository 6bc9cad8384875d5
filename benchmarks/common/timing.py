"""The one timer of the benchmarks: interleaved repetitions, summarised by median and range.

Machines drift: clocks throttle, caches warm, a neighbour wakes up. Timing one candidate to the
end and then the next turns that drift into a difference between candidates. `interleave` runs
every candidate once per repetition instead, so that all of them see the same machine, and the
spread of each is reported beside its median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_REPS = 3
_FLUSH_BYTES = 2 << 30

Lap = Callable[[], object]
Laps = Mapping[str, Lap]
"""What is timed of one candidate: named laps, run back to back in their order every repetition. A
lap may leave work for the next one, as a forward leaves its graph for the backward."""

Clock = Callable[[Lap], float]
"""Run one lap; return the seconds until its work was done. The result is freed after that."""


def host_clock(lap: Lap, now: Callable[[], float] = time.perf_counter) -> float:
    """Time a lap by the wall clock: for work that is finished when the call returns (CPU)."""
    start = now()
    result = lap()
    seconds = now() - start
    del result
    return seconds


class CudaClock:
    """Time laps by CUDA events on the current stream.

    A `cold` clock first writes a large buffer. While the device writes, the host queues the lap, so
    that the time is that of the device and not of the host, and the device's caches hold none of
    the lap's inputs.
    """

    def __init__(self, device: torch.device, *, cold: bool = False) -> None:
        size = _FLUSH_BYTES if cold else 0
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, lap: Lap) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        result = lap()
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end) / 1e3


def clock_for(device: torch.device, *, cold: bool = False) -> Clock:
    """Return the clock that measures finished work on `device`; `cold` matters on a GPU only."""
    return CudaClock(device, cold=cold) if device.type == "cuda" else host_clock


@dataclass(frozen=True)
class Summary:
    """Median and range of one lap, in seconds."""

    median: float
    low: float
    high: float
    reps: int


def summarize(samples: Sequence[float]) -> Summary:
    """Return the median, least and greatest of `samples` (seconds).

    Raises:
        ValueError: `samples` is empty.
    """
    if not samples:
        raise ValueError("samples: expected at least one time, got none")
    return Summary(
        median=statistics.median(samples), low=min(samples), high=max(samples), reps=len(samples)
    )


def interleave(
    candidates: Mapping[str, Laps],
    clock: Clock,
    *,
    reps: int,
    warmup: int = 1,
    budget_s: float = float("inf"),
) -> dict[str, dict[str, list[float]]]:
    """Time every candidate once per repetition, round-robin.

    Args:
        candidates: the laps of each candidate, by name.
        clock: `clock_for(device)`.
        reps: most repetitions a candidate gets.
        warmup: rounds run first whose times are dropped.
        budget_s: seconds of timed work after which a candidate sits out the remaining rounds,
            once it has `MIN_REPS` repetitions (or `reps`, if that is less).

    Returns:
        Seconds per repetition, by candidate name and lap name. Index i of two laps of one
        candidate is the same repetition, so laps may be added sample by sample.

    Raises:
        ValueError: `reps` is not positive.
    """
    if reps < 1:
        raise ValueError(f"reps: expected at least 1, got {reps}")
    for _ in range(warmup):
        for laps in candidates.values():
            for lap in laps.values():
                clock(lap)

    samples = {name: {lap: [] for lap in laps} for name, laps in candidates.items()}
    spent = dict.fromkeys(candidates, 0.0)
    for rep in range(reps):
        for name, laps in candidates.items():
            if rep >= MIN_REPS and spent[name] > budget_s:
                continue
            for lap_name, lap in laps.items():
                seconds = clock(lap)
                spent[name] += seconds
                samples[name][lap_name].append(seconds)
    return samples


class TrainStep:
    """The laps of a differentiable function; the graph of `forward_grad` waits for `backward`.

    Args:
        function: returns the output that is differentiated.
        leaves: the tensors that get gradients.
        grad: the upstream gradient of the output.
    """

    def __init__(
        self, function: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor
    ) -> None:
        self._function = function
        self._leaves = leaves
        self._grad = grad
        self._output: Tensor | None = None

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self._function()

    def forward_grad(self) -> Tensor:
        self._output = self._function()
        return self._output

    def backward(self) -> tuple[Tensor, ...]:
        output, self._output = self._output, None
        assert output is not None, "forward_grad runs first"
        return torch.autograd.grad(output, self._leaves, self._grad.to(output.dtype))
