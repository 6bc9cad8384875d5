"""ARC-Challenge: science questions with three to five options (arXiv 1803.05457).

Records are read in AI2's own schema and in the hub's. A row has a third column, `choices`, with
the lists "label" and "text"; `answer` is the label of the right option.

The grading rule. The statement behind the answer template names an option by its label ("B",
"(b)", "option B.", "B) the whole text") or by its whole text, never by a part of it. One that
names no option or more than one is no answer. Case and closing marks count only where options
differ in nothing else, as in "Ww" and "WW". A statement that is one option's label and another's
text is the label, which is what the prompt asks for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset

from .base import Records, Task, draw, first_sentence, read_jsonl, string_field

HUB_DATASET = ("allenai/ai2_arc", "ARC-Challenge")

_INSTRUCTION = 'Reason step by step. Finish with "The answer is <label>".'
_FILES = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}
_CHOICE_COUNTS = range(3, 6)
_MARKUP = r"[\s*_\"'`]*"
# A bare label needs a mark behind it: "A stone" begins with an article, "3 metres" with a number.
_LABELLED = re.compile(
    rf"{_MARKUP}(?:(?:option|choice)\b{_MARKUP})?[(\[]?(?P<label>\w){_MARKUP}"
    r"(?:[)\]][*_]*\s*[.:,;]?|\.(?!\w)|[:,;]|$|(?=\bbecause\b))",
    re.IGNORECASE,
)


class ARCChallenge(Task):
    """ARC-Challenge from the hub, or from a folder with train, dev and test `.jsonl`."""

    name = "arc_challenge"

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

    def _rows(
        self, split: str, path: Path | None, num_examples: int | None, seed: int
    ) -> list[dict[str, Any]]:
        if path is None:
            dataset = load_dataset(*HUB_DATASET, split=split)
            records: Records = (
                (f"{HUB_DATASET[0]} {split} row {i}", r) for i, r in enumerate(dataset)
            )
        else:
            records = read_jsonl(path / _FILES[split])
        return draw([_row(record, where) for where, record in records], num_examples, seed)


def _row(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    question = record.get("question")
    if isinstance(question, dict):  # AI2's schema
        stem = string_field(question, "stem", where)
        choices = question.get("choices")
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            raise ValueError(f"{where}: expected a list of objects at 'choices', got {choices!r}")
        labels = [string_field(choice, "label", where) for choice in choices]
        texts = [string_field(choice, "text", where) for choice in choices]
    else:
        stem = string_field(record, "question", where)
        choices = record.get("choices")
        if not isinstance(choices, dict):
            raise ValueError(f"{where}: expected an object at 'choices', got {choices!r}")
        labels, texts = _strings(choices, "label", where), _strings(choices, "text", where)
    if len(labels) != len(texts) or len(labels) not in _CHOICE_COUNTS:
        raise ValueError(
            f"{where}: expected 3 to 5 choices, a label and a text each; "
            f"got {len(labels)} labels and {len(texts)} texts"
        )
    if not all(re.fullmatch(r"\w", label) for label in labels):
        raise ValueError(f"{where}: expected one letter or digit a label, got {labels}")
    answer = string_field(record, "answerKey", where)
    if labels.count(answer) != 1:
        raise ValueError(f"{where}: expected 'answerKey' among the labels {labels}, got {answer!r}")
    options = "\n".join(f"({label}) {text}" for label, text in zip(labels, texts, strict=True))
    return {
        "prompt": f"{stem.strip()}\n{options}\n\n{_INSTRUCTION}\n",
        "answer": answer,
        "choices": {"label": labels, "text": texts},
    }


def _strings(choices: Mapping[str, Any], field: str, where: str) -> list[str]:
    values = choices.get(field)
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise ValueError(f"{where}: expected a list of strings at {field!r}, got {values!r}")
    return values


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
