"""Print to the terminal, where the text of users and models has no effect but to be shown.

A prompt may contain `[/INST]`, which a rich console takes for markup; a completion, the escape
sequence that clears a screen; a path, characters that the terminal cannot encode. A `Terminal`
shows them literally, in lines as well as in cells and titles of tables.

What is shown ends no run where nobody can see it any more: Ctrl-C at `… | tee log` ends
`tee` too, while the run still has a checkpoint to save.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import unicodedata
from typing import Any, Literal

from rich.console import Console
from rich.text import Text
from tqdm.auto import tqdm

_LONGEST_LINE = 4000
_ACTING_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}
_ACTING_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


class Lasting:
    """The process's standard output or error, where a write that fails is passed over.

    Args:
        name: the stream's name in `sys`.
    """

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        self._name = name

    def write(self, text: str) -> int:
        """Write as the stream does; the text is lost where the stream cannot be written to.

        Characters that its encoding lacks are escaped, as rich's own ellipsis in a narrow table.
        """
        stream = getattr(sys, self._name)
        try:
            try:
                return stream.write(text)
            except UnicodeEncodeError:
                encoded = text.encode(stream.encoding, "backslashreplace")
                return stream.write(encoded.decode(stream.encoding))
        except OSError:
            drop_closed_pipes()
            return len(text)

    def flush(self) -> None:
        """Flush as the stream does."""
        try:
            getattr(sys, self._name).flush()
        except OSError:
            drop_closed_pipes()

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(sys, self._name), name)

    # tqdm clears its bars before a line to a stream that equals theirs: both are one terminal. That
    # neither equals the stream itself keeps tqdm from a flush of its own, which could fail.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lasting)

    def __hash__(self) -> int:
        return hash(Lasting)


def drop_closed_pipes() -> None:
    """Send standard output and error to nowhere where they are pipes that nobody reads any more.

    Until then every write there raises, by whatever library, and at the exit once more.
    """
    for stream in (sys.__stdout__, sys.__stderr__):
        # A stream may be missing, closed, or none of the operating system's.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            handle = stream.fileno()  # type: ignore[union-attr]
            pipe = select.poll()
            pipe.register(handle, 0)
            if any(event & select.POLLERR for _, event in pipe.poll(0)):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, handle)
                os.close(nowhere)


def progress_bar(**options: Any) -> tqdm:
    """Return a bar of tqdm that lasts as long as the run, with or without a terminal.

    In a file it is a line every ten seconds.
    """
    options.setdefault("mininterval", 0.1 if sys.stderr.isatty() else 10)
    return tqdm(file=Lasting("stderr"), dynamic_ncols=True, **options)


class Terminal(Console):
    """A rich console without markup, emoji codes and highlights: every string is text.

    Give styles as arguments (`print(text, style="red")`), not in the text.
    """

    def __init__(self, **options: Any) -> None:
        options = {"file": Lasting("stdout"), **options}
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
