"""GSM8K: grade-school word problems with a number for an answer (arXiv 2110.14168).

A record is `{"question", "answer"}`, where "#### " separates the solution from the final answer.
A row has a third column, `rationale`: the solution without calculator annotations ("<<3*4=12>>").
The source has no validation split: a fixed fifteenth of train, about 500 rows chosen by a hash of
the question, is "validation" here and missing from "train".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import load_dataset

from .base import draw, stable_bucket, string_field
from .numeric import NumericTask, parse_number
from .records import Records, read_jsonl

HUB_DATASET = ("openai/gsm8k", "main")

_INSTRUCTION = 'Reason step by step. Finish with "{template} <number>".'
_ANSWER_MARK = "#### "
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
_VALIDATION_BUCKETS = 15


class GSM8K(NumericTask):
    """GSM8K from the hub, or from a folder with `train.jsonl` and `test.jsonl`."""

    name = "gsm8k"

    def _rows(
        self, split: str, path: Path | None, num_examples: int | None, seed: int
    ) -> list[dict[str, Any]]:
        source = "test" if split == "test" else "train"
        if path is None:
            dataset = load_dataset(*HUB_DATASET, split=source)
            records: Records = (
                (f"{HUB_DATASET[0]} {source} row {i}", r) for i, r in enumerate(dataset)
            )
        else:
            records = read_jsonl(path / f"{source}.jsonl")
        instruction = _INSTRUCTION.format(template=self.answer_template)
        rows = []
        for where, record in records:
            question = string_field(record, "question", where).strip()
            rationale, answer = _solution(string_field(record, "answer", where), where)
            held_out = stable_bucket(question, _VALIDATION_BUCKETS) == 0
            if split == "test" or held_out == (split == "validation"):
                prompt = f"{question}\n\n{instruction}\n"
                rows.append({"prompt": prompt, "answer": answer, "rationale": rationale})
        return draw(rows, num_examples, seed)


def _solution(solution: str, where: str) -> tuple[str, str]:
    """Return the solution without calculator annotations, and the canonical final answer."""
    if solution.count(_ANSWER_MARK) != 1:
        raise ValueError(
            f"{where}: expected one {_ANSWER_MARK!r} in 'answer', "
            f"got {solution.count(_ANSWER_MARK)} in {solution!r}"
        )
    worked, _, stated = solution.partition(_ANSWER_MARK)
    value = parse_number(stated)
    if value is None:
        raise ValueError(f"{where}: expected one number after {_ANSWER_MARK!r}, got {stated!r}")
    return _CALCULATOR_MARK.sub("", worked).strip(), str(value)
