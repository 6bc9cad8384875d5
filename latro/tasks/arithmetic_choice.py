"""The generated word problems of `arithmetic`, with four options to choose from.

    Tom has 10 pens. Tom loses 2. Tom gets 7. How many? (A) 14 (B) 15 (C) 16 (D) 17

is answered by the text of the right option, "The answer is 15". It is graded as an option, by label
or by exact text, so a row has the columns `choices` and `ground_truth`, the label (see
`choice.py`). The options are four neighbouring numbers in order, and the right one may be any of
them, so that a rough guess at the sum is worth little. A problem belongs to the same split as its
sum in `arithmetic`.
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
    def row(self) -> dict[str, Any]:
        choices = {"label": list(LABELS), "text": list(map(str, self.options))}
        label = LABELS[self.options.index(self.total)]
        return {**super().row, "ground_truth": label, "choices": choices}


class ArithmeticChoice(GeneratedTask, ChoiceTask):
    """The generated problems, answered by one of four options."""

    name = "arithmetic_choice"

    def problems(self, split: str, seed: int) -> Iterator[ChoiceProblem]:
        rng = random.Random(f"options {split} {seed}")
        for problem in generate_problems(split, seed):
            lowest = max(0, problem.total - rng.randrange(len(LABELS)))
            options = tuple(range(lowest, lowest + len(LABELS)))
            yield ChoiceProblem(**vars(problem), options=options)
