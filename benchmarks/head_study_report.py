"""The head study's results: kept in files, as tables, against what the op aims at, as charts."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks import linear_logprob
from benchmarks.common import report
from benchmarks.common.problem import Shape
from benchmarks.common.timing import Summary
from benchmarks.linear_logprob import BARE_GEMMS, MEMORY_PHASES, Row

MULTIPLES = {
    ("forward", ""): {"fp32": 1.05, "bf16": 1.05},
    ("full", "keep"): {"fp32": 1.05, "bf16": 1.3},
    ("full", "64mib"): {"fp32": 1.35, "bf16": 1.6},
    ("frozen", ""): {"fp32": 1.1, "bf16": 1.3},
    ("filter", "eps 2^-12"): {"fp32": 1.0, "bf16": 1.0},
}
"""The greatest multiple of the bare GEMMs aimed at: by section and end of our name, by dtype."""

_UNFUSED_TIME = {"fp32": 1.05, "bf16": 1.0}
_UNFUSED_MEMORY = 0.1
_BF16_LOGP_ERROR = 0.5


@dataclass(frozen=True)
class Group:
    """The rows of one section, shape (or axis of the scaling) and dtype, measured in one go."""

    section: str
    name: str
    dtype: str
    rows: list[Row]
    notes: list[str]
    environment: Mapping[str, object]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.section, self.name, self.dtype


@dataclass(frozen=True)
class Check:
    """`measured` beside the greatest value aimed at."""

    where: str
    what: str
    measured: float
    target: float

    @property
    def met(self) -> bool:
        return self.measured <= self.target


class Results:
    """Hold the groups in the files of a folder: those it held, each until it is put again.

    Raises:
        ValueError: the folder's study_head.json is not one of this study's.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._groups: dict[tuple[str, str, str], Group] = {}
        saved = out / "study_head.json"
        if saved.exists():
            try:
                groups = [
                    _group(item) for item in json.loads(saved.read_text(encoding="utf-8"))["groups"]
                ]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{saved}: expected the results of a head study") from error
            self._groups = {group.key: group for group in groups}

    @property
    def groups(self) -> list[Group]:
        return list(self._groups.values())

    def put(self, group: Group) -> None:
        """Add a group, in place of one with the same section, shape and dtype; write the files."""
        self._groups[group.key] = group
        groups = self.groups
        flat = [{"section": of.section} | row.flat() for of in groups for row in of.rows]
        report.write_csv(self.out / "study_head.csv", flat)
        report.write_json(
            self.out / "study_head.json",
            {
                "groups": [asdict(of) for of in groups],
                "checks": [asdict(check) | {"met": check.met} for check in checks(groups)],
                "slopes": {f"{of.name} {of.dtype}": slopes(of) for of in _of(groups, "scaling")},
            },
        )
        report.write_png(self.out / "study_head.png", plot(groups))
        if scaling := _of(groups, "scaling"):
            report.write_png(self.out / "study_head_scaling.png", plot_scaling(scaling))


def _group(item: dict) -> Group:
    rows = [
        Row(
            **row
            | {
                "shape": Shape(**row["shape"]),
                "times": {phase: Summary(**summary) for phase, summary in row["times"].items()},
            }
        )
        for row in item["rows"]
    ]
    return Group(**item | {"rows": rows})


def _of(groups: Iterable[Group], section: str) -> list[Group]:
    return [group for group in groups if group.section == section]


def slopes(group: Group) -> dict[str, float]:
    """Fit the slope of log time of full over log N·V by least squares, for each provider.

    N or V is fixed, so it is the slope over the other: 1 where the cost is linear.
    """
    return {
        provider: statistics.linear_regression(
            [log(row.shape.n * row.shape.v) for row in rows],
            [log(row.times["full"].median) for row in rows],
        ).slope
        for provider, rows in _by_provider(group).items()
    }


def _by_provider(group: Group) -> dict[str, list[Row]]:
    providers: dict[str, list[Row]] = {}
    for row in group.rows:
        providers.setdefault(row.provider, []).append(row)
    return providers


def checks(groups: Iterable[Group]) -> list[Check]:
    """Compare every group with what is aimed at for it, if anything is."""
    return [check for group in groups for check in _checks(group)]


def _checks(group: Group) -> Iterator[Check]:
    where = f"{group.section} {group.name} {group.dtype}"
    ours = {row.provider: row for row in group.rows if row.provider.startswith("latro-")}
    peers = {row.provider: row for row in group.rows if row.provider not in (*ours, BARE_GEMMS)}
    for (section, end), targets in MULTIPLES.items():
        for name, row in ours.items():
            if section == group.section and name.endswith(end) and group.dtype in targets:
                (multiple,) = row.multiples.values()
                yield Check(where, name, measured=multiple, target=targets[group.dtype])
    for (name, row), (peer_name, peer) in itertools.product(ours.items(), peers.items()):
        pair = f"{name} / {peer_name}"
        if group.section == "peers":
            yield from _against_peer(where, pair, row, peer)
        elif (group.section, group.dtype, peer_name) == ("error", "bf16", "unfused"):
            ratio = row.error["logp"] / peer.error["logp"]
            yield Check(where, f"{pair}, error of logp", measured=ratio, target=_BF16_LOGP_ERROR)


def _against_peer(where: str, pair: str, row: Row, peer: Row) -> Iterator[Check]:
    """Compare our 64 MiB with every peer in time, and all of ours with the unfused loss.

    Of ours, the one that keeps nothing is compared with the unfused loss in memory too.
    """
    if peer.provider == "unfused" and row.dtype in _UNFUSED_TIME:
        target = _UNFUSED_TIME[row.dtype]
        mine, theirs = row.memory["full"], peer.memory["full"]
        if row.provider.endswith("recompute") and mine is not None and theirs:
            yield Check(where, f"{pair}, memory", measured=mine / theirs, target=_UNFUSED_MEMORY)
    elif peer.provider != "unfused" and row.provider.endswith("64mib"):
        target = 1.0
    else:
        return
    for phase in (phase for phase in MEMORY_PHASES if phase in row.times):
        ratio = row.times[phase].median / peer.times[phase].median
        yield Check(where, f"{pair}, {phase}", measured=ratio, target=target)


def show(results: Results) -> None:
    """Print all tables, and what is aimed at last."""
    console = report.console()
    for group in results.groups:
        where = group.environment
        console.print(
            f"\n{group.section}, {group.name} {group.dtype}: {report.where(where)}, {where['date']}"
        )
        for note in group.notes:
            console.print(note)
        console.print(
            _scaling_table(group)
            if group.section == "scaling"
            else linear_logprob.table(group.rows, f"{group.section}, ")
        )
    if found := checks(results.groups):
        rows = [
            (of.where, of.what, f"{of.measured:.3g}", f"{of.target:.3g}", "yes" if of.met else "no")
            for of in found
        ]
        headings = ("table", "what", "measured", "at most", "met")
        console.print(report.table("Aims", headings, rows, names=2))
    console.print(f"written: {results.out}/study_head.*")


def _scaling_table(group: Group) -> Table:
    providers = _by_provider(group)
    rows = []
    for same_shape in zip(*providers.values(), strict=True):
        shape = same_shape[0].shape
        times = (f"{row.times['full'].median * 1e3:.2f}" for row in same_shape)
        rows.append((str(shape.n), str(shape.h), str(shape.v), *times))
    headings = ("N", "H", "V", *(f"{name}\nfull ms" for name in providers))
    title = f"scaling, {group.name} {group.dtype}"
    table = report.table(title, headings, rows, names=0)
    table.add_section()
    slope = slopes(group)
    table.add_row("slope", "", "", *(f"{slope[name]:.3f}" for name in providers))
    return table


def plot(groups: Sequence[Group]) -> Figure:
    """Draw a panel for each section that compares times, as multiples of the bare GEMMs."""
    sections: dict[str, list[Row]] = {}
    for group in groups:
        if group.section not in ("scaling", "error"):
            rows = sections.setdefault(group.section, [])
            rows += [row for row in group.rows if row.provider != BARE_GEMMS]
    if not sections:
        return Figure()
    heights = [2 + 0.25 * len(rows) for rows in sections.values()]
    figure = Figure(figsize=(10, sum(heights)))
    axes = figure.subplots(
        len(sections), 1, squeeze=False, gridspec_kw={"height_ratios": heights, "hspace": 0.3}
    )[:, 0]
    for axis, (section, rows) in zip(axes, sections.items(), strict=True):
        phase = "forward" if section == "forward" else "full"
        report.bars(
            axis,
            [row.multiples[phase] for row in rows],
            [_bar_label(row, phase) for row in rows],
            height=0.7,
            color=["C0" if row.provider.startswith("latro-") else "C7" for row in rows],
        )
        names = [f"{row.shape.name} {row.dtype}  {row.provider}" for row in rows]
        axis.set_yticks(range(len(rows)), names, fontsize=7)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{section}: time of {phase} / {BARE_GEMMS}")
        axis.margins(x=0.2)
        if section == "peers":
            axis.set_xscale("log")
    return figure


def _bar_label(row: Row, phase: str) -> str:
    label = f" {row.multiples[phase]:.2f}"
    peak = row.memory.get(phase)
    if peak is not None:
        label += f", {report.mib(peak, 0)} MiB"
    if "skipped %" in row.more:
        label += f", {row.more['skipped %']:.0f} % skipped"
    return label


def plot_scaling(groups: Sequence[Group]) -> Figure:
    """Draw times of full over N, and over V, on logarithmic axes, with the slopes."""
    figure = Figure(figsize=(6 * len(groups), 4.5))
    for axis, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        over = group.name[0]
        slope = slopes(group)
        for provider, rows in _by_provider(group).items():
            sizes = [row.shape.n if over == "N" else row.shape.v for row in rows]
            medians = [row.times["full"].median * 1e3 for row in rows]
            label = f"{provider}: slope {slope[provider]:.3f}"
            axis.loglog(sizes, medians, marker="o", label=label)
        fixed = rows[0].shape
        other = f"V = {fixed.v}" if over == "N" else f"N = {fixed.n}"
        axis.set_xlabel(over)
        axis.set_ylabel("full, ms")
        axis.set_title(f"{group.dtype}, H = {fixed.h}, {other}")
        axis.legend(fontsize=8)
        axis.grid(which="both", alpha=0.3)
    figure.tight_layout()
    return figure
