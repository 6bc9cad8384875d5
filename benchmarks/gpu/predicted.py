"""What `gpu.model` predicts beside what the suite has measured, to tell which assumption was wrong.

The first column of numbers is predicted before anything is measured; the second with the GEMM rate
and the bandwidth that the stage `chip` has measured. Where the second is right and the first is
not, the rates were wrong; where both are wrong, what the model says of our kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.common import report
from benchmarks.common.problem import GPU_SHAPES
from benchmarks.gpu import model
from benchmarks.gpu.goals import OP_LAPS, THREE_GIB, best_op, rows_of, section_of
from benchmarks.gpu.model import Chip

TRITON = "latro-triton"
PLACES = {
    "forward": ("head", TRITON, "forward"),
    model.DEFAULT: ("head", TRITON, "full"),
    "full, 3 GiB": ("full", TRITON + THREE_GIB, "full"),
    "full, all products kept": ("full", f"{TRITON}-keep", "full"),
    "full, none kept": ("full", f"{TRITON}-recompute", "full"),
    model.FROZEN: ("frozen", TRITON, "full"),
}
"""Stage or section of the head study, provider and phase of each form that is measured."""


@dataclass(frozen=True)
class Compared:
    """A number that was predicted, in the unit; None where there is none.

    Args:
        where: the shape or op.
        what: is predicted.
        unit: of the numbers.
        predicted: by the data sheet and the model's shares of it.
        at_rates: by the rates of this GPU.
        measured: the median.
    """

    where: str
    what: str
    unit: str
    predicted: float
    at_rates: float | None
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted, by this GPU's rates where they are known."""
        return None if self.measured is None else self.measured / (self.at_rates or self.predicted)


def compared(results: Mapping[str, Any], device: str) -> list[Compared]:
    """Make every comparison, or none for a device that the model does not know.

    Args:
        results: of the stages by name.
        device: as the driver names it.
    """
    chip = model.chip_of(device)
    if chip is None:
        return []
    return [*_rates(chip, results), *_head(chip, results), *_ops(chip, results)]


def _measured_rates(results: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return operations and bytes a second, or None."""
    if "chip" not in results:
        return None
    gemm, copy = (results["chip"][name]["per_second"]["median"] for name in ("gemm", "copy"))
    return gemm, copy


def _at_rates(chip: Chip, results: Mapping[str, Any]) -> Chip | None:
    rates = _measured_rates(results)
    return None if rates is None else model.at_rates(chip, *rates)


def _rates(chip: Chip, results: Mapping[str, Any]) -> Iterator[Compared]:
    gemm, copy = _measured_rates(results) or (None, None)
    for what, unit, scale, predicted, found in (
        ("bf16 GEMM", "TFLOP/s", 1e12, chip.flops * chip.gemm, gemm),
        ("copy", "TB/s", 1e12, chip.bandwidth * chip.copy, copy),
    ):
        measured = None if found is None else found / scale
        yield Compared(chip.name, what, unit, predicted / scale, at_rates=None, measured=measured)


def _head(chip: Chip, results: Mapping[str, Any]) -> Iterator[Compared]:
    kernels, own = model.counts(chip), _at_rates(chip, results)
    for shape in GPU_SHAPES:
        by_rates = {} if own is None else dict(model.predict(own, shape, kernels))
        for what, time in model.predict(chip, shape, kernels):
            at_rates = 1e3 * by_rates[what].whole if by_rates else None
            measured = _milliseconds(results, shape.name, what)
            yield Compared(shape.name, what, "ms", 1e3 * time.whole, at_rates, measured)


def _milliseconds(results: Mapping[str, Any], shape: str, what: str) -> float | None:
    # What was measured was made as the stage before has chosen, but with a frozen head.
    tuned = results.get("tuning") or [{"config": {}}]
    is_specialized = tuned[-1]["config"].get("warp_specialized", False)
    if what != model.FROZEN and what.endswith(model.SPECIALIZED) is not is_specialized:
        return None
    form = what.removesuffix(model.SPECIALIZED)
    if form not in PLACES:
        return None
    place, provider, phase = PLACES[form]
    rows = rows_of(results, place) if place == "head" else section_of(results, place)
    for row in rows:
        if (row["shape"]["name"], row["provider"]) == (shape, provider) and phase in row["times"]:
            return 1e3 * row["times"][phase]["median"]
    return None


def _ops(chip: Chip, results: Mapping[str, Any]) -> Iterator[Compared]:
    own, first = _at_rates(chip, results), model.predict_ops(chip)
    by_rates = {} if own is None else model.predict_ops(own)
    for op, dtype, lap in OP_LAPS:
        row = best_op(rows_of(results, "ops"), op, dtype, lap)
        at_rates = 1e3 * by_rates[op, lap].whole if by_rates else None
        measured = None if row is None else 1e3 * row["median"]
        yield Compared(op, lap, "ms", 1e3 * first[op, lap].whole, at_rates, measured)


def table(found: list[Compared]) -> Table:
    """Tabulate comparisons, with "–" where there is no number."""

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    rows = [
        (
            of.where,
            f"{of.what}, {of.unit}",
            *map(cell, (of.predicted, of.at_rates, of.measured, of.ratio)),
        )
        for of in found
    ]
    headings = ("where", "what", "predicted", "at this GPU's rates", "measured", "× predicted")
    return report.table("Predicted and measured", headings, rows, names=2)
