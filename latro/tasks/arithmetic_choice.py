"""The generated word problems of `arithmetic`, with four options to choose from.

    Tom has 10 pens. Tom loses 2. Tom gets 7. How many? (A) 14 (B) 15 (C) 16 (D) 17

has the answer B. The options are four neighbouring numbers in order, and the right one has any
place among them, so that a rough guess at the sum is worth little. In the column `rationale` the
label stands behind the result, "10 - 2 = 8. 8 + 7 = 15 (B)." A row has a column `choices` too (see
`choice.py`). A problem belongs to the split that its sum belongs to in `arithmetic`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .arithmetic import GeneratedTask, Problem, generate_problems
from .choice import ChoiceTask

LABELS = "ABCD"


@dataclass(frozen=True)
class ChoiceProblem(Problem):
    """A problem with the numbers that `LABELS` stand for, in that order; one of them is right."""

    options: tuple[int, ...]

    @property
    def prompt(self) -> str:
        listed = zip(LABELS, self.options, strict=True)
        return " ".join([super().prompt, *(f"({label}) {option}" for label, option in listed)])

    @property
    def answer(self) -> str:
        return LABELS[self.options.index(self.total)]

    def steps(self, slip: tuple[int, int] | None = None) -> list[str]:
        """As of the sum, with the label behind the result: "8 + 7 = 15 (B)."; none after a slip."""
        sentences = super().steps(slip)
        if slip is None:
            sentences[-1] = f"{sentences[-1].removesuffix('.')} ({self.answer})."
        return sentences

    @property
    def row(self) -> dict[str, Any]:
        choices = {"label": list(LABELS), "text": list(map(str, self.options))}
        return {**super().row, "choices": choices}


class ArithmeticChoice(GeneratedTask, ChoiceTask):
    """The generated problems, answered by the label of an option."""

    name = "arithmetic_choice"

    def problems(self, split: str, seed: int) -> Iterator[ChoiceProblem]:
        rng = random.Random(f"options {split} {seed}")
        for problem in generate_problems(split, seed):
            lowest = max(0, problem.total - rng.randrange(len(LABELS)))
            options = tuple(range(lowest, lowest + len(LABELS)))
            yield ChoiceProblem(**vars(problem), options=options)
