"""Put tables between the markers of pages: what the scripts that write tables share.

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from studies.markdown import table

ROOT = Path(__file__).resolve().parents[1]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    return table(header, rows, left=1)


def fill(text: str, tables: Mapping[str, str], page: str) -> str:
    """Return the `text` of a `page` with each table between its markers.

    Raises:
        ValueError: a table's markers are missing.
    """
    for name, lines in tables.items():
        block = f"<!-- begin {name} -->\n{lines}\n<!-- end {name} -->"
        pattern = rf"<!-- begin {name} -->\n.*?<!-- end {name} -->"
        text, count = re.subn(pattern, lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page}: expected one pair of markers of {name}, got {count}")
    return text


def rewrite(
    pages: Iterable[Path],
    render: Callable[[str, Path], str],
    description: str | None,
    argv: Sequence[str] | None,
) -> None:
    """Run the command that writes tables into `pages`, or with --check looks whether they differ.

    Args:
        pages: the files.
        render: makes a page's text anew.
        description: the docstring of the command's module.
        argv: the command line.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a change")
    args = parser.parse_args(argv)
    for page in pages:
        old = page.read_text(encoding="utf-8")
        new = render(old, page)
        if not args.check:
            page.write_text(new, encoding="utf-8")
        elif new != old:
            sys.exit(f"{page.name}: a table is out of date; run {sys.argv[0]}")
