"""Draw the study's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from latro.files import replacing
from studies.records import Record, estimate
from studies.replicate.study import ABLATIONS, LATRO, MAJORITY, METHODS
from studies.replicate.summary import Study

_HEADLINES = (("greedy", "accuracy_greedy"), (f"maj@{max(MAJORITY)}", f"maj@{max(MAJORITY)}"))


def draw_main(study: Study, path: Path) -> None:
    """Draw greedy and maj@8 accuracy of every method, a panel for each model and task."""
    pairs = study.pairs()
    figure, axes = _panels(len(pairs))
    for axis, (architecture, task) in zip(axes, pairs, strict=True):
        by_method = {label: study.main(architecture, task, m) for m, label in METHODS.items()}
        _bars(axis, by_method)
        axis.set_title(f"{architecture}, {task}")
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xticks(range(len(METHODS)), [label.replace(", ", ",\n") for label in by_method])
    _save(figure, path)


def draw_majority(study: Study, path: Path) -> None:
    """Draw maj@k over k, a line for each method, a panel for each model and task."""
    pairs = study.pairs()
    figure, axes = _panels(len(pairs))
    for axis, (architecture, task) in zip(axes, pairs, strict=True):
        for method, label in METHODS.items():
            records = study.main(architecture, task, method)
            points = [(k, estimate(records, f"maj@{k}")) for k in MAJORITY]
            there = [(k, e.mean, e.deviation or 0.0) for k, e in points if e is not None]
            if there:
                ks, means, deviations = zip(*there, strict=True)
                axis.errorbar(ks, means, deviations, marker="o", markersize=4, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(MAJORITY, map(str, MAJORITY))
        axis.set_xlabel("k")
        axis.set_title(f"maj@k: {architecture}, {task}")
    _save(figure, path)


def draw_ablations(study: Study, path: Path) -> None:
    """Draw greedy and maj@8 accuracy over each varied setting, a panel each."""
    varied = [setting for setting in ABLATIONS if study.ablation(setting)]
    figure, axes = _panels(len(varied))
    for axis, setting in zip(axes, varied, strict=True):
        of = study.ablation(setting)
        values = [value for value in ABLATIONS[setting] if value in of]
        _bars(axis, {str(value): of[value] for value in values})
        main = values.index(LATRO[setting]) if LATRO[setting] in values else None
        axis.set_xticks(
            range(len(values)),
            [f"{value}\n(main)" if i == main else str(value) for i, value in enumerate(values)],
        )
        axis.set_title(setting)
    _save(figure, path)


def _bars(axis: Axes, groups: Mapping[str, Sequence[Record]]) -> None:
    """Draw two bars, greedy and maj@8, for each group of records, and a dot for each seed."""
    width = 0.38
    for side, (label, metric) in zip((-0.5, 0.5), _HEADLINES, strict=True):
        estimates = [estimate(records, metric) for records in groups.values()]
        places = [i + side * width for i, e in enumerate(estimates) if e is not None]
        there = [e for e in estimates if e is not None]
        axis.bar(
            places,
            [e.mean for e in there],
            width,
            yerr=[e.deviation or 0.0 for e in there],
            capsize=2,
            label=label,
        )
        for place, records in zip(places, filter(None, groups.values()), strict=True):
            seeds = [record["metrics"][metric] for record in records]
            axis.plot([place] * len(seeds), seeds, "k.", markersize=3)
    axis.set_ylim(0, 1.05)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many axes, three in a row."""
    rows = -(-count // 3)
    figure = Figure(figsize=(12, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, 3, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def _save(figure: Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    figure.axes[0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
