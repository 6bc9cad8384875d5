"""What every benchmark writes down: where it ran, and files that are whole or absent."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from latro_kernels import environment

__all__ = ["console", "environment", "write_bytes", "write_csv", "write_json"]

_PIPE_WIDTH = 170


def console(width: int | None = None) -> Console:
    """A console on stdout that takes no text for markup, which an error's message may look like.

    Without a width it has the terminal's: a table cut to a pipe's would lose its numbers.
    """
    made = Console(width=width, markup=False, emoji=False, highlight=False)
    if width is None and not made.is_terminal:
        return console(_PIPE_WIDTH)
    return made


def write_bytes(path: Path, data: bytes) -> None:
    """Write `path` so that a reader, or a crash, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON, written atomically."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """`rows` as CSV under the keys of the first, written atomically; `None` is an empty cell.

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
