"""Errors as a command shows them: those of its input and surroundings in one line."""

from __future__ import annotations


def one_line(error: object) -> str:
    """The text of an error, or of anything else, without line ends and indents."""
    return " ".join(str(error).split())
