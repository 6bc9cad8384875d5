"""Write numbers and text as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from studies.estimates import Difference, Estimate


def paragraphs(*texts: str) -> str:
    """Return each text filled to lines of up to 98 letters."""
    filled = (
        textwrap.fill(" ".join(text.split()), 98, break_long_words=False, break_on_hyphens=False)
        for text in texts
    )
    return "\n\n".join(filled)


def items(texts: Iterable[str]) -> str:
    """Return a list, each text filled as in `paragraphs`."""
    indented = (textwrap.indent(paragraphs(text), "  ") for text in texts)
    return "\n".join(f"-{text[1:]}" for text in indented)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    """Return a table whose first `left` columns are aligned to the left."""
    rule = ["---" if index < left else "--:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def percent(value: Estimate | None) -> str:
    """Return a share as "95.0 ± 1.0%", without ± for one seed; empty for none."""
    if value is None:
        return ""
    if value.deviation is None:
        return f"{100 * value.mean:.1f}%"
    return f"{100 * value.mean:.1f} ± {100 * value.deviation:.1f}%"


def plain(value: Estimate | None, digits: int) -> str:
    """Return a number with so many decimals, otherwise like `percent`."""
    if value is None:
        return ""
    if value.deviation is None:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} ± {value.deviation:.{digits}f}"


def points(difference: Difference) -> str:
    """Return a difference in points, bold where it is more than two deviations above zero."""
    text = f"{100 * difference.mean:+.1f}"
    if difference.deviation is not None:
        text += f" ± {100 * difference.deviation:.1f}"
    return f"**{text}**" if difference.above else text


def listed(words: Iterable[str]) -> str:
    """Join words as in "a, b and c"; there is at least one."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
