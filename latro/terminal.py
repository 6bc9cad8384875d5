"""Print to the terminal, where the text of users and models has no effect but to be shown.

A prompt may contain `[/INST]`, which a rich console takes for markup; a completion, the escape
sequence that clears a screen; a path, characters that the terminal cannot encode. A `Terminal`
shows them literally, in lines as well as in cells and titles of tables.
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

    Give styles as arguments (`print(text, style="red")`), not in the text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string in printable form; rich calls this for lines, cells and titles."""
        encodable = shown(text).encode(self.encoding, "backslashreplace").decode(self.encoding)
        return super().render_str(encodable, **options)


def shown(text: str) -> str:
    r"""Return `text` with every character escaped that controls a terminal or cannot be written.

    These are control characters except tab and line feed, halves of surrogate pairs, line and
    paragraph separators, and marks of writing direction: "\x1b[2J" becomes "\\x1b[2J".
    """
    if text.isprintable():
        return text
    return "".join(_spelled(c) if _acts(c) else c for c in text)


def one_line(text: str) -> str:
    """Return `text` as one line of bounded length for error messages; cut its middle if too long.

    Messages of libraries may have line breaks, and quoted values may be long.
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
