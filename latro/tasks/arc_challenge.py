"""ARC-Challenge: science questions with three to five options (arXiv 1803.05457).

Records are read in AI2's own schema and in the hub's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset

from .base import draw, string_field
from .choice import ChoiceTask
from .records import Records, read_jsonl

HUB_DATASET = ("allenai/ai2_arc", "ARC-Challenge")

_INSTRUCTION = 'Reason step by step. Finish with "{template} <label>".'
_FILES = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}
_CHOICE_COUNTS = range(3, 6)


class ARCChallenge(ChoiceTask):
    """ARC-Challenge from the hub, or from a folder with train, dev and test `.jsonl`."""

    name = "arc_challenge"

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
        instruction = _INSTRUCTION.format(template=self.answer_template)
        rows = [_row(record, where, instruction) for where, record in records]
        return draw(rows, num_examples, seed)


def _row(record: Mapping[str, Any], where: str, instruction: str) -> dict[str, Any]:
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
        "prompt": f"{stem.strip()}\n{options}\n\n{instruction}\n",
        "answer": answer,
        "choices": {"label": labels, "text": texts},
    }


def _strings(choices: Mapping[str, Any], field: str, where: str) -> list[str]:
    values = choices.get(field)
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise ValueError(f"{where}: expected a list of strings at {field!r}, got {values!r}")
    return values
