"""Means over seeds, their deviations, and differences of two of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds and their standard deviation, by count − 1; None for one seed."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the estimate from at least one value."""
        mean = math.fsum(values) / len(values)
        if len(values) < 2:
            return cls(mean, None, len(values))
        squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean, math.sqrt(squares / (len(values) - 1)), len(values))


@dataclass(frozen=True)
class Difference:
    """of − than, with the root of the sum of both variances; None where either has one seed."""

    of: Estimate
    than: Estimate

    @property
    def mean(self) -> float:
        return self.of.mean - self.than.mean

    @property
    def deviation(self) -> float | None:
        if self.of.deviation is None or self.than.deviation is None:
            return None
        return math.hypot(self.of.deviation, self.than.deviation)

    @property
    def above(self) -> bool | None:
        """Return whether it is more than two deviations above 0; None without a deviation."""
        return None if self.deviation is None else self.mean > 2 * self.deviation

    @property
    def below(self) -> bool | None:
        """Return whether it is more than two deviations below 0."""
        return None if self.deviation is None else self.mean < -2 * self.deviation
