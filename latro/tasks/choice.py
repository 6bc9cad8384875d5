"""Tasks whose answer is one of a few options: reading which, from text.

A row has a column `choices` with the lists "label" and "text". The label of the right option is
what completions are graded against: `ground_truth`, or else `answer`.

The rule. The statement behind the answer template names an option by its label ("B", "(b)", "<B>",
"option B.", "B) the whole text", "B is right") or by its whole text, never by a part of it. One
that names no option or more than one is no answer. A label that a "." or "!" ends is the answer,
whatever sentence follows, unless that is another option itself. Case and closing marks count only
where options differ in nothing else, as in "Ww" and "WW". A statement that is one option's label
and another's text is the label, which is what the prompt asks for.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .base import Task, first_sentence

_MARKS = " .!?*_\"'`“”‘’"
_MARKUP = r"[\s*_\"'`“”‘’]*"
# A bare label needs a mark behind it: "A stone" begins with an article, "3 metres" with a number.
_LABELLED = re.compile(
    rf"{_MARKUP}(?:(?:option|choice)\b{_MARKUP})?[(\[<{{]?(?P<label>\w){_MARKUP}"
    r"(?:[)\]>}][*_]*\s*[.!?:,;]?|[.!?](?!\w)|[:,;]|$|(?<=\s)[-–](?=\s)|—|(?<=\s)(?=\()"
    r"|(?=\b(?:because|is\s+(?:the\s+)?(?:right|correct))\b))",
    re.IGNORECASE,
)
# "A wind" begins with an article, "I know" with a pronoun; "A is" and "A or" begin with a label.
_NO_LABEL = re.compile(
    r"\b(?:[Ii](?=['’])|[AaIi](?=\s+(?!(?:and|or|nor|is|are|too|because)\b)[a-z]))"
)


@dataclass(frozen=True)
class _Stated:
    """The label that a line begins with."""

    label: str
    spelled: str
    """The label in the case of the line."""
    rest: str
    """What follows it and the mark behind it."""
    ends: bool
    """Whether that mark ends a statement."""


class ChoiceTask(Task):
    """A task whose canonical answer is the label of an option."""

    def same(self, predicted: str, answer: str) -> bool:
        return predicted == answer

    def _canonical(self, statement: str, example: Mapping[str, Any]) -> str | None:
        labels, texts = example["choices"]["label"], example["choices"]["text"]
        whole = unicodedata.normalize("NFC", statement).strip(" \t\r\n:")
        line = whole.partition("\n")[0].strip()
        stated = _leading_label(line, labels)
        if stated and (
            not stated.rest.strip(_MARKS)
            or stated.label in _options_with_text(stated.rest, labels, texts)
        ):
            return stated.label
        # An option's text may itself hold line breaks and sentences, so the longest comes first.
        candidates = [whole, line]
        sentence = first_sentence(line)
        if stated is None or len(sentence) > len(line) - len(stated.rest):  # more than the label
            candidates.append(sentence)
        for candidate in candidates:
            named = _options_with_text(candidate, labels, texts)
            if named:
                return named[0] if len(named) == 1 else None
        if stated is None or _names_another(stated, labels, texts):
            return None
        return stated.label


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
    return " ".join(unicodedata.normalize("NFC", text).split())


def _bare(text: str) -> str:
    collapsed = _collapsed(text)
    return collapsed.strip(_MARKS) or collapsed


def _caseless(text: str) -> str:
    return _bare(text).casefold()


def _leading_label(line: str, labels: list[str]) -> _Stated | None:
    match = _LABELLED.match(line)
    if match is not None:
        for label in labels:
            if label.upper() == match["label"].upper():
                ends = match[0][-1] in ".!"
                return _Stated(label, match["label"], line[match.end() :], ends)
    return None


def _names_another(stated: _Stated, labels: list[str], texts: list[str]) -> bool:
    """Whether the text behind a label names another option, by its label or its whole text."""
    others = {label for label in labels if label != stated.label}
    if stated.ends:
        sentence = first_sentence(stated.rest)
        return sentence in others or bool(_options_with_text(sentence, labels, texts))

    def hidden(found: re.Match[str]) -> str:
        return "_" if stated.label in _options_with_text(found[0], labels, texts) else found[0]

    # The longest first, so that none is found inside another's text.
    longest_first = sorted(map(_bare, texts), key=len, reverse=True)
    text = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)
    sentence = first_sentence(text.sub(hidden, _collapsed(stated.rest)))
    words = set(re.findall(r"\w+", _NO_LABEL.sub("", sentence)))
    if stated.spelled != stated.label:  # "b or c"
        others |= {label.swapcase() for label in others}
    return bool(text.search(sentence) or others & words)
