"""Arguments that every benchmark takes, and how each writes its tables and files."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common.timing import Summary
from latro_kernels import environment

__all__ = [
    "arguments",
    "choose",
    "console",
    "environment",
    "mib",
    "span",
    "table",
    "where",
    "write_bytes",
    "write_csv",
    "write_json",
]

_OUT = Path(__file__).resolve().parents[1] / "out"
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
    parser.add_argument("--reps", type=int, default=reps, help=f"most repetitions (default {reps})")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, default=_OUT, help="folder for what is written")
    return parser


def choose(text: str, known: Collection[str], argument: str) -> list[str]:
    """Split a comma-separated list of names.

    Raises:
        ValueError: a name is not in `known`; the message names `argument`.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: expected some of {', '.join(known)}, got {name!r}")
    return names


def console(width: int | None = None) -> Console:
    """Make a console on stdout that takes no text for markup, as an error's message may look so.

    Without a width it has the terminal's: a table cut to a pipe's would lose its numbers.
    """
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


def write_bytes(path: Path, data: bytes) -> None:
    """Write `path` so that a reader, or a crash, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write `rows` as CSV under the keys of the first; `None` becomes an empty cell.

    Raises:
        ValueError: `rows` is empty, or a row has a key that the first lacks.
    """
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())
