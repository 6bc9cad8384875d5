"""The log-prob benchmark's results as table, flat rows and chart."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks import report
from benchmarks.problem import Shape
from benchmarks.timing import Summary

BARE_GEMMS = "bare GEMMs"
PHASES = ("forward", "backward", "full")
MEMORY_PHASES = ("forward", "full")
ERRORS = ("logp", "dx", "dw", "dx_peaked")


@dataclass(frozen=True)
class Row:
    """One provider on one shape in one dtype.

    Times are in seconds, by those of `PHASES` that were timed, and `multiples` their medians over
    those of the bare GEMMs; memory is in bytes, by those of `MEMORY_PHASES`; errors are relative,
    by `ERRORS`, over the first `error_rows` rows. `None`: does not apply, or could not be had.
    `more` is what only some tables have, by the heading it gets there.
    """

    shape: Shape
    dtype: str
    provider: str
    times: Mapping[str, Summary]
    multiples: Mapping[str, float]
    memory: Mapping[str, int | None]
    error: Mapping[str, float | None]
    error_rows: int | None
    more: Mapping[str, float] = field(default_factory=dict)


def flat(row: Row) -> dict[str, object]:
    """`row` under one key a number: milliseconds, MiB, relative errors; `None` if there is none."""
    cells: dict[str, object] = {
        "shape": row.shape.name,
        "N": row.shape.n,
        "H": row.shape.h,
        "V": row.shape.v,
        "dtype": row.dtype,
        "provider": row.provider,
        "reps": max((summary.reps for summary in row.times.values()), default=None),
    }
    for phase in PHASES:
        summary = row.times.get(phase)
        for key, seconds in (
            (f"{phase}_ms", summary and summary.median),
            (f"{phase}_ms_min", summary and summary.low),
            (f"{phase}_ms_max", summary and summary.high),
        ):
            cells[key] = None if seconds is None else round(seconds * 1e3, 4)
        cells[f"{phase}_x_gemm"] = round(row.multiples[phase], 4) if summary else None
    for phase in MEMORY_PHASES:
        peak = row.memory.get(phase)
        cells[f"{phase}_peak_extra_mib"] = None if peak is None else round(peak / 2**20, 2)
    for name in ERRORS:
        cells[f"{name}_error"] = row.error.get(name)
    cells["error_rows"] = row.error_rows
    return cells | dict(row.more)


def _time(summary: Summary) -> str:
    median, low, high = (1e3 * s for s in (summary.median, summary.low, summary.high))
    digits = 2 if median < 10 else 0
    return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _mib(peak: int | None) -> str:
    return "–" if peak is None else f"{peak / 2**20:.1f}"


def _error(error: float | None) -> str:
    return "–" if error is None else f"{error:.0e}"


def table(rows: Sequence[Row], title: str = "") -> Table:
    """`rows` of one shape and dtype, with columns for what at least one of them has."""
    shape, dtype = rows[0].shape, rows[0].dtype
    phases = [phase for phase in PHASES if any(phase in row.times for row in rows)]
    memory_phases = [phase for phase in MEMORY_PHASES if any(phase in row.memory for row in rows)]
    more = list(dict.fromkeys(name for row in rows for name in row.more))
    table = Table(
        title=f"{title}{shape.name} {dtype}: N={shape.n} H={shape.h} V={shape.v}",
        title_justify="left",
    )
    table.add_column("provider", no_wrap=True)
    for phase in phases:
        table.add_column(f"{phase} ms\n(range)", justify="right")
        table.add_column("× GEMM", justify="right", style="bold")
    for phase in memory_phases:
        table.add_column(f"{phase}\nextra MiB", justify="right")
    for name in ERRORS:
        table.add_column(f"error\n{name.replace('_', ' ')}", justify="right")
    for name in more:
        table.add_column(name.replace(" ", "\n", 1), justify="right")
    for row in rows:
        cells = [row.provider]
        for phase in phases:
            cells += [_time(row.times[phase]), f"{row.multiples[phase]:.2f}"]
        cells += [_mib(row.memory.get(phase)) for phase in memory_phases]
        cells += [_error(row.error[name]) for name in ERRORS]
        cells += [f"{row.more[name]:.3g}" if name in row.more else "–" for name in more]
        table.add_row(*cells)
    captions = []
    reps = sorted({summary.reps for row in rows for summary in row.times.values()})
    if reps:
        captions.append(
            f"median (least–greatest) of {reps[0]} to {reps[-1]} interleaved repetitions"
        )
    error_rows = max((row.error_rows or 0 for row in rows), default=0)
    if 0 < error_rows < shape.n:
        captions.append(f"errors over the first {error_rows} of {shape.n} rows")
    table.caption = "; ".join(captions)
    return table


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """`rows` by shape and dtype, in order of first appearance."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.shape.name, row.dtype), []).append(row)
    return list(groups.values())


def show(
    rows: Sequence[Row], absent: Sequence[str], where: Mapping[str, object], out: Path
) -> None:
    """Print who cannot run and why, where this ran, and the tables last."""
    console = report.console()
    for line in absent:
        console.print(f"cannot run: {line}")
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    console.print(f"written: {out}/logprob.csv, logprob.json, logprob.png")
    for group in grouped(rows):
        console.print(table(group))


def plot(rows: Sequence[Row], where: Mapping[str, object]) -> bytes:
    """A PNG: time of full and forward over the bare GEMMs, and peak extra memory of full."""
    groups = grouped(rows)
    figure = Figure(figsize=(13, 0.5 + sum(1.1 + 0.42 * len(group) for group in groups)))
    ratios = [len(group) + 1.5 for group in groups]
    axes = figure.subplots(
        len(groups), 2, squeeze=False, gridspec_kw={"height_ratios": ratios, "wspace": 0.3}
    )
    for (time_axis, memory_axis), group in zip(axes, groups, strict=True):
        names = [row.provider for row in group]
        places = range(len(group))
        for offset, phase in ((-0.2, "forward"), (0.2, "full")):
            base = next(row for row in group if row.provider == BARE_GEMMS).times[phase].median
            medians = [row.multiples[phase] for row in group]
            spread = [
                [(row.times[phase].median - row.times[phase].low) / base for row in group],
                [(row.times[phase].high - row.times[phase].median) / base for row in group],
            ]
            bars = time_axis.barh(
                [place + offset for place in places], medians, 0.38, xerr=spread, label=phase
            )
            time_axis.bar_label(bars, [f" {value:.2f}" for value in medians], fontsize=7)
        time_axis.axvline(1.0, color="grey", linewidth=0.8)
        time_axis.set_xscale("log")
        time_axis.set_yticks(places, names)
        time_axis.set_title(f"{group[0].shape.name} {group[0].dtype}: time / bare GEMMs")
        time_axis.legend(fontsize=7)

        peaks = [(row.memory["full"] or 0) / 2**20 for row in group]
        bars = memory_axis.barh(places, peaks, 0.6, color="tab:green")
        memory_axis.bar_label(bars, [f" {_mib(row.memory['full'])}" for row in group], fontsize=7)
        memory_axis.set_yticks(places, names)
        memory_axis.set_title("full: peak MiB beyond inputs and results")
        for axis in (time_axis, memory_axis):
            axis.invert_yaxis()
            axis.margins(x=0.15)
    figure.suptitle(f"{where['device']}, {where['threads']} threads, torch {where['torch']}")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
    return image.getvalue()
