"""The charts of all benchmarks: panels of bars, and PNG files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import report
from benchmarks.common.timing import Summary


def bars(
    axis: Axes,
    values: Sequence[float],
    labels: Iterable[str],
    *,
    below: float = 0.0,
    times: Sequence[Summary] = (),
    **style: object,
) -> None:
    """Draw horizontal bars, the first on top, each with a label at its end.

    Args:
        axis: where to draw.
        values: the length of each bar.
        labels: what stands at the end of each.
        below: how far each stands below its place, for bars in pairs.
        times: what the values are medians of, or multiples of medians; the range of each time is
            drawn on the same scale.
        style: more arguments of `Axes.barh`.
    """
    pairs = [*zip(values, times, strict=True)] if times else []
    spread = [
        [value * (1 - time.low / time.median) for value, time in pairs],
        [value * (time.high / time.median - 1) for value, time in pairs],
    ]
    places = [place + below for place in range(len(values))]
    drawn = axis.barh(places, values, xerr=spread if pairs else None, **style)
    axis.bar_label(drawn, labels, fontsize=7)
    axis.yaxis.set_inverted(True)


def write(path: Path, figure: Figure) -> None:
    """Write `figure` as a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
    report.write_bytes(path, image.getvalue())
