"""The step benchmark's results as JSON, tables and charts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks import report
from benchmarks.step_measure import Held, Row

AXES = {
    "K": "K, rationales per prompt",
    "P": "P, prompt tokens",
    "R": "R, mean rationale tokens",
    "V": "V, vocabulary",
}


@dataclass
class Result:
    """All that a run has measured so far."""

    environment: Mapping[str, object]
    cannot_run: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    scaling: dict[str, list[Row]] = field(default_factory=dict)
    """By axis, of `AXES`."""
    largest: list[Held] = field(default_factory=list)

    def write(self, out: Path) -> None:
        """step.json, and a chart of each section that has been measured."""
        rows = {axis: [row.as_json() for row in of] for axis, of in self.scaling.items()}
        report.write_json(
            out / "step.json",
            {
                "environment": self.environment,
                "cannot_run": self.cannot_run,
                "rows": [row.as_json() for row in self.rows],
                "scaling": rows,
                "largest": [asdict(held) for held in self.largest],
            },
        )
        if self.rows:
            report.write_bytes(out / "step.png", _plot_rows(self.rows, self._where))
        if self.scaling:
            report.write_bytes(out / "step_scaling.png", _plot_scaling(self.scaling, self._where))

    def show(self) -> None:
        """Print the tables."""
        console = report.console(width=140)
        for reason in self.cannot_run:
            console.print(f"cannot run: {reason}")
        if self.rows:
            console.print(_rows_table(self.rows))
        if self.scaling:
            console.print(_scaling_table(self.scaling))
        if self.largest:
            console.print(_largest_table(self.largest))

    @property
    def _where(self) -> str:
        where = self.environment
        return f"{where['device']}, {where['threads']} threads, torch {where['torch']}"


def value(axis: str, row: Row) -> float:
    """Where a row stands on an axis of `AXES`."""
    setting = row.setting
    if axis == "R":
        return sum(setting.lengths) / setting.K
    return {"K": setting.K, "P": setting.P, "V": setting.V}[axis]


def _mib(peak: int | None) -> str:
    return "–" if peak is None else f"{peak / 2**20:.0f}"


def _rows_table(rows: Sequence[Row]) -> Table:
    s = rows[0].setting
    title = f"G={s.G} K={s.K} P={s.P} R={s.rationale[0]}–{s.rationale[1]} A={s.A} V={s.V}"
    phases = list(rows[0].times)
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for phase in phases:
        for heading in (f"{phase} s\n(range)", "× ours"):
            table.add_column(heading, justify="right")
    counts = ("peak\nMiB", "forwards", "trunk\ntokens", "head\nrows", "step's\nprompt tokens")
    counts += ("gradient's\ndifference",)
    for heading in counts:
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [row.contender]
        for phase in phases:
            t = row.times.get(phase)
            time = "–" if t is None else f"{t.median:.2f} ({t.low:.2f}–{t.high:.2f})"
            cells += [time, "–" if t is None else f"{row.ratio[phase]:.2f}"]
        error = "–" if row.gradient_error is None else f"{row.gradient_error:.0e}"
        cells += [_mib(row.peak), str(len(row.passes)), f"{row.tokens:,}", f"{row.head_rows:,}"]
        cells.append("–" if row.prompt_tokens is None else f"{row.prompt_tokens:,}")
        table.add_row(*cells, error)
    return table


def _scaling_table(scaling: Mapping[str, Sequence[Row]]) -> Table:
    table = Table(title="update, scaling", title_justify="left")
    for heading in ("", "", "contender", "s", "× ours", "trunk tokens", "head rows"):
        table.add_column(heading, justify="right")
    for axis, rows in scaling.items():
        for row in rows:
            table.add_row(
                *(axis, f"{value(axis, row):.0f}", row.contender),
                *(f"{row.times['update'].median:.2f}", f"{row.ratio['update']:.2f}"),
                *(f"{row.tokens:,}", f"{row.head_rows:,}"),
            )
    return table


def _largest_table(largest: Sequence[Held]) -> Table:
    table = Table(title="one batch, until it does not fit", title_justify="left")
    for heading in ("contender", "prompts", "sequences", "s", "sequences/s", "peak MiB"):
        table.add_column(heading, justify="right")
    for held in largest:
        rate = held.sequences / held.seconds
        table.add_row(
            *(held.contender, str(held.G), str(held.sequences), f"{held.seconds:.2f}"),
            *(f"{rate:.1f}", _mib(held.peak)),
        )
    return table


def _plot_rows(rows: Sequence[Row], where: str) -> bytes:
    """Seconds of each phase and peak memory, a bar a contender."""
    phases = list(rows[0].times)
    figure = Figure(figsize=(5 * (len(phases) + 1), 2.4))
    *time_axes, memory_axis = figure.subplots(
        1, len(phases) + 1, squeeze=False, gridspec_kw={"wspace": 0.6}
    )[0]
    for axis, phase in zip(time_axes, phases, strict=True):
        timed = [row for row in rows if phase in row.times]
        times = [row.times[phase] for row in timed]
        spread = [[t.median - t.low for t in times], [t.high - t.median for t in times]]
        names = [row.contender for row in timed]
        bars = axis.barh(names, [t.median for t in times], xerr=spread)
        axis.bar_label(
            bars,
            [f"  {row.times[phase].median:.1f}, × {row.ratio[phase]:.1f}" for row in timed],
            fontsize=8,
        )
        axis.set_title(f"{phase}, seconds")
    names = [row.contender for row in rows]
    bars = memory_axis.barh(names, [(row.peak or 0) / 2**20 for row in rows], color="tab:green")
    memory_axis.bar_label(bars, [f" {_mib(row.peak)}" for row in rows], fontsize=8)
    memory_axis.set_title("update, peak MiB beyond the weights")
    for axis in (*time_axes, memory_axis):
        axis.invert_yaxis()
        axis.margins(x=0.45)
    return _png(figure, where)


def _plot_scaling(scaling: Mapping[str, Sequence[Row]], where: str) -> bytes:
    """Seconds of an update over each axis, a line a contender."""
    figure = Figure(figsize=(4 * len(scaling), 3.6))
    grid = figure.subplots(1, len(scaling), squeeze=False)[0]
    for plot, (axis, rows) in zip(grid, scaling.items(), strict=True):
        for name in dict.fromkeys(row.contender for row in rows):
            _line(plot, axis, [row for row in rows if row.contender == name])
        plot.set_xlabel(AXES[axis])
        plot.set_xscale("log", base=2)
        plot.set_yscale("log", base=2)
        plot.xaxis.set_major_formatter("{x:.0f}")
        plot.yaxis.set_major_formatter("{x:g}")
        plot.grid(alpha=0.3)
    grid[0].set_ylabel("seconds of an update")
    grid[0].legend(fontsize=8)
    return _png(figure, where)


def _line(plot: Axes, axis: str, rows: Sequence[Row]) -> None:
    x = [value(axis, row) for row in rows]
    y = [row.times["update"].median for row in rows]
    plot.plot(x, y, marker="o", label=rows[0].contender)
    for at, seconds, row in zip(x, y, rows, strict=True):
        if row.ratio["update"] != 1:
            plot.annotate(f"× {row.ratio['update']:.1f}", (at, seconds), fontsize=7)


def _png(figure: Figure, where: str) -> bytes:
    figure.suptitle(where, y=1.1, fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
    return image.getvalue()
