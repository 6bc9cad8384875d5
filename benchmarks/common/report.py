"""Arguments that every benchmark takes, and how each writes its tables, charts and files."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common.timing import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUT = Path(__file__).resolve().parents[1] / "out"
_PIPE_WIDTH = 170


def arguments(description: str | None, *, reps: int, quick: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all benchmarks take.

    Args:
        description: the docstring of the benchmark's module, which --help shows as it is.
        reps: the default of --reps.
        quick: what --help says of --quick.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reps", type=count, default=reps, help=f"most repetitions (default {reps})"
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=count, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=folder, default=str(OUT), help="folder for what is written")
    return parser


def count(text: str) -> int:
    """Read an argument that is an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def folder(text: str) -> Path:
    """Read an argument that names a folder, which may have to be made, for what is written.

    It is tried before anything is measured, and nothing is left of the trial.
    """
    path = Path(text)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"expected a folder that can be written, got {text!r}: {there}: {error.strerror}"
        ) from error


def _device(text: str) -> str:
    """Read an argument that names a device; `device_of` looks whether it is there."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    return text


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Return the type of an argument that takes a comma-separated list of `known` names."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"expected some of {', '.join(known)}, got {name!r}"
                )
        return names

    return parse


def device_of(args: argparse.Namespace) -> torch.device:
    """Return the device of --device, and let torch use as many threads as --threads says.

    Raises:
        SystemExit: it is a GPU that is not there.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise SystemExit(f"--device: expected a GPU that is there, of {gpus}, got {args.device}")
    return device


def console(width: int | None = None) -> Console:
    """Make a console on stdout that takes no text for markup, as an error's message may look so.

    Without a width it has the terminal's: a table cut to a pipe's would lose its numbers. What
    stdout's encoding lacks is escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    made = Console(width=width, markup=False, emoji=False, highlight=False)
    if width is None and not made.is_terminal:
        return console(_PIPE_WIDTH)
    return made


def table(
    title: str, headings: Iterable[str], rows: Iterable[Iterable[str]], *, names: int = 1
) -> Table:
    """Make a table whose first `names` columns hold names, and whose others hold numbers.

    Multiples, whose headings begin with "×", are bold.
    """
    made = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        is_name = index < names
        made.add_column(
            heading,
            no_wrap=is_name,
            justify="left" if is_name else "right",
            style="bold" if heading.startswith("×") else None,
        )
    for row in rows:
        made.add_row(*row)
    return made


def span(summary: Summary, scale: float = 1.0, digits: int = 2) -> str:
    """Format a median and its range, in seconds times `scale`."""
    median, low, high = (scale * value for value in (summary.median, summary.low, summary.high))
    return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def mib(size: float | None, digits: int = 1) -> str:
    """Format bytes as MiB, and a size that is not known as a dash."""
    return "–" if size is None else f"{size / 2**20:.{digits}f}"


def where(environment: Mapping[str, object]) -> str:
    """Say in a few words where something was measured."""
    return (
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}"
    )


def bars(
    axis: Axes,
    values: Sequence[float],
    labels: Iterable[str],
    *,
    names: Sequence[str] = (),
    below: float = 0.0,
    times: Sequence[Summary] = (),
    **style: object,
) -> None:
    """Draw horizontal bars, the first on top, each with a label at its end.

    Args:
        axis: where to draw.
        values: the length of each bar.
        labels: the text at the end of each bar.
        names: the text at the beginning of each bar.
        below: how far each bar stands below its place, for bars in pairs.
        times: the times whose medians, or multiples of medians, the values are; the range of each
            time is drawn on the same scale.
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
    if names:
        axis.set_yticks(range(len(names)), names)
    axis.yaxis.set_inverted(True)


def write_png(path: Path, figure: Figure) -> None:
    """Write `figure` as a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
    write_bytes(path, image.getvalue())


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write `rows` as CSV under the keys of all; `None` and what is not there leave a cell empty.

    Raises:
        ValueError: `rows` is empty.
    """
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    text = io.StringIO(newline="")
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `path` so that a reader, or a crash, never sees half of it.

    Raises:
        SystemExit: it cannot be written, as on a full disk: one line says which file, and why.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written: {error.strerror}") from error
