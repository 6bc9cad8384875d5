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
from itertools import pairwise
from typing import Protocol

import torch

MIN_REPS = 3


class Clock(Protocol):
    """Takes marks; reads the seconds between them once the work they bracket is done."""

    def mark(self) -> None: ...

    def laps(self) -> list[float]:
        """Return seconds between consecutive marks, and forget the marks."""
        ...


class HostClock:
    """Wall clock, for work that is finished when the call returns (CPU)."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(self._now())

    def laps(self) -> list[float]:
        marks, self._marks = self._marks, []
        return [later - earlier for earlier, later in pairwise(marks)]


class CudaClock:
    """CUDA events on the current stream: marks cost no synchronisation, reading does once."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def laps(self) -> list[float]:
        marks, self._marks = self._marks, []
        torch.cuda.synchronize()
        return [earlier.elapsed_time(later) / 1e3 for earlier, later in pairwise(marks)]


def clock_for(device: torch.device) -> Clock:
    """Return the clock that measures finished work on `device`."""
    return CudaClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Candidate:
    """One thing to time: named laps, run back to back in their order every repetition.

    A lap may leave work for the next one (a forward retained for its backward). What a lap
    returns is held until its end is marked, so freeing a result is not part of the time.
    """

    name: str
    laps: Mapping[str, Callable[[], object]]


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


def _run_once(candidate: Candidate, clock: Clock) -> list[float]:
    seconds = []
    for lap in candidate.laps.values():
        clock.mark()
        result = lap()
        clock.mark()
        seconds += clock.laps()
        del result
    return seconds


def interleave(
    candidates: Sequence[Candidate],
    clock: Clock,
    *,
    reps: int,
    warmup: int = 1,
    budget_s: float = float("inf"),
) -> dict[str, dict[str, list[float]]]:
    """Time every candidate once per repetition, round-robin.

    Args:
        candidates: what to time; names must differ.
        clock: `clock_for(device)`.
        reps: most repetitions a candidate gets.
        warmup: rounds run first whose times are dropped.
        budget_s: seconds of timed work after which a candidate sits out the remaining rounds,
            once it has `MIN_REPS` repetitions (or `reps`, if that is less).

    Returns:
        Seconds per repetition, by candidate name and lap name. Index i of two laps of one
        candidate is the same repetition, so laps may be added sample by sample.

    Raises:
        ValueError: `reps` is not positive, or two candidates share a name.
    """
    if reps < 1:
        raise ValueError(f"reps: expected at least 1, got {reps}")
    names = [candidate.name for candidate in candidates]
    if len(set(names)) != len(names):
        raise ValueError(f"candidates: expected distinct names, got {names}")

    for _ in range(warmup):
        for candidate in candidates:
            _run_once(candidate, clock)

    samples: dict[str, dict[str, list[float]]] = {
        candidate.name: {lap: [] for lap in candidate.laps} for candidate in candidates
    }
    spent = dict.fromkeys(names, 0.0)
    for rep in range(reps):
        for candidate in candidates:
            if rep >= MIN_REPS and spent[candidate.name] > budget_s:
                continue
            seconds = _run_once(candidate, clock)
            spent[candidate.name] += sum(seconds)
            for lap, lap_seconds in zip(candidate.laps, seconds, strict=True):
                samples[candidate.name][lap].append(lap_seconds)
    return samples
