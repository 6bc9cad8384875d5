"""Tasks whose answer is one of a few options: reading which, from text.

A row has a column `choices` with the lists "label" and "text". The label of the right option is
what completions are graded against: `ground_truth`, or else `answer`.

The rule. The statement behind the answer template names an option by its label ("B", "(b)",
"option B.", "B) the whole text") or by its whole text, never by a part of it. One that names no
option or more than one is no answer. Case and closing marks count only where options differ in
nothing else, as in "Ww" and "WW". A statement that is one option's label and another's text is the
label, which is what the prompt asks for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .base import Task, first_sentence

_MARKUP = r"[\s*_\"'`]*"
# A bare label needs a mark behind it: "A stone" begins with an article, "3 metres" with a number.
_LABELLED = re.compile(
    rf"{_MARKUP}(?:(?:option|choice)\b{_MARKUP})?[(\[]?(?P<label>\w){_MARKUP}"
    r"(?:[)\]][*_]*\s*[.:,;]?|\.(?!\w)|[:,;]|$|(?=\bbecause\b))",
    re.IGNORECASE,
)


class ChoiceTask(Task):
    """A task whose canonical answer is the label of an option."""

    def same(self, predicted: str, answer: str) -> bool:
        return predicted == answer

    def _canonical(self, statement: str, example: Mapping[str, Any]) -> str | None:
        labels, texts = example["choices"]["label"], example["choices"]["text"]
        whole = statement.strip(" \t\r\n:")
        line = whole.partition("\n")[0].strip()
        label, rest = _leading_label(line, labels)
        if label and (not _bare(rest) or label in _options_with_text(rest, labels, texts)):
            return label
        # An option's text may itself hold line breaks and sentences, so the longest comes first.
        for candidate in (whole, line, first_sentence(line)):
            named = _options_with_text(candidate, labels, texts)
            if named:
                return named[0] if len(named) == 1 else None
        if label is None or _names_another(label, rest, labels, texts):
            return None
        return label


def _options_with_text(statement: str, labels: list[str], texts: list[str]) -> list[str]:
    """Labels of the options whose whole text this is, under the strictest reading that has any."""
    for reading in (_collapsed, _bare, _caseless):
        named = [
            label
            for label, text in zip(labels, texts, strict=True)
            if reading(text) == reading(statement)
        ]
        if named:
            return named
    return []


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _bare(text: str) -> str:
    return _collapsed(text).strip(" .!*\"'`")


def _caseless(text: str) -> str:
    return _bare(text).casefold()


def _leading_label(line: str, labels: list[str]) -> tuple[str | None, str]:
    """The label that a line begins with, and what follows it."""
    match = _LABELLED.match(line)
    if match is not None:
        for label in labels:
            if label.upper() == match["label"].upper():
                return label, line[match.end() :]
    return None, line


def _names_another(label: str, rest: str, labels: list[str], texts: list[str]) -> bool:
    """Whether the text behind `label` names another option, by its label or its whole text."""
    sentence = first_sentence(rest)
    words = set(re.findall(r"\w+", sentence))
    return any(
        other != label and (other in words or _caseless(text) in _caseless(sentence))
        for other, text in zip(labels, texts, strict=True)
    )
