"""The generated word problems of `arithmetic`, with four options to choose from.

    Tom has 10 pens. Tom loses 2. Tom gets 7. How many? 13 (A) 15 (B) 16 (C) 14 (D)

has the answer B. The options are four neighbouring numbers in any order, and the right one has any
place among them: neither its size nor its position tells it, so that a rough guess at the sum is
worth little. A label stands behind its number, and behind the result in the column `rationale`,
"10 - 2 = 8. 8 + 7 = 15 (B).": a small model finds what followed a number sooner than what preceded
it. A row has a column `choices` too (see `choice.py`). A problem belongs to the split that its sum
belongs to in `arithmetic`.
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
        return " ".join([super().prompt, *(f"{option} ({label})" for label, option in listed)])

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
            options = list(range(lowest, lowest + len(LABELS)))
            rng.shuffle(options)
            yield ChoiceProblem(**vars(problem), options=tuple(options))
