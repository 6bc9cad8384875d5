"""Prints what a run has to tell, in which text of users and models is never more than text.

A prompt may hold `[/INST]`, which a rich console takes for markup, a completion the escape sequence
that clears a screen, a path what the terminal cannot encode. A `Terminal` shows each to the letter,
in lines, in cells of tables and in their titles alike.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

_LONGEST_LINE = 4000
_ACTING_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}
_ACTING_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


class Terminal(Console):
    """A rich console without markup, emoji codes and highlights: every string is text.

    Styles go beside the text (`print(text, style="red")`), never into it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make what is printed of a string; rich calls it for lines, cells and titles."""
        encodable = shown(text).encode(self.encoding, "backslashreplace").decode(self.encoding)
        return super().render_str(encodable, **options)


def shown(text: str) -> str:
    """Return `text` with every character spelled out that acts on a terminal or cannot be written.

    These are the control characters but tab and line feed, halves of surrogate pairs, separators of
    lines and paragraphs, and what turns the direction of writing: "\\x1b[2J" becomes "\\\\x1b[2J".
    """
    if text.isprintable():
        return text
    return "".join(_spelled(c) if _acts(c) else c for c in text)


def one_line(text: str) -> str:
    """Return `text` as one line of bounded length, as a command ends with: its middle is left out.

    Messages of libraries have line breaks, and those that quote a value are as long as it is.
    """
    line = re.sub(r"\s*\n\s*", " ", shown(text).strip())
    if len(line) <= _LONGEST_LINE:
        return line
    half = _LONGEST_LINE // 2
    return f"{line[:half]} … {line[-half:]}"


def _acts(character: str) -> bool:
    return character not in "\t\n" and (
        unicodedata.category(character) in _ACTING_CATEGORIES
        or unicodedata.bidirectional(character) in _ACTING_DIRECTIONS
    )


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
