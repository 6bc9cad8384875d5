"""Generated word problems that a model of a million parameters can learn.

"Tom has 10 pens. Tom loses 2. Tom gets 7. How many?" has the answer 15. A problem starts from 2 to
20 things; two to four changes of 1 to 9 follow, and the count never falls below zero. A row has a
third column, `rationale`: the sum, one change at a time, "10 - 2 = 8. 8 + 7 = 15."

A problem belongs to the split that its start and changes hash to, so a held-out sum is never in
"train", under any seed, number of examples, or choice of words.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Task, stable_bucket
from .numeric import NumericTask

NAMES = ("Tom", "Ann", "Sam", "Mia", "Ben", "Eva", "Leo", "Zoe")
OBJECTS = ("pens", "cards", "coins", "books", "shells", "apples", "stamps", "marbles")
GAINS = ("gets", "finds", "buys", "wins")
LOSSES = ("loses", "sells", "drops", "breaks")

_DEFAULT_EXAMPLES = {"train": 10_000, "validation": 500, "test": 500}


@dataclass(frozen=True)
class Problem:
    """A start, the changes that follow it (gains positive), and the words of the story.

    `verbs` holds one verb per change.
    """

    start: int
    changes: tuple[int, ...]
    name: str
    thing: str
    verbs: tuple[str, ...]

    @property
    def prompt(self) -> str:
        story = [f"{self.name} has {self.start} {self.thing}."]
        for verb, change in zip(self.verbs, self.changes, strict=True):
            story.append(f"{self.name} {verb} {abs(change)}.")
        return " ".join([*story, "How many?"])

    @property
    def total(self) -> int:
        return self.start + sum(self.changes)

    @property
    def answer(self) -> str:
        return str(self.total)

    @property
    def row(self) -> dict[str, Any]:
        """Return the dataset row."""
        rationale = " ".join(self.steps())
        return {"prompt": self.prompt, "answer": self.answer, "rationale": rationale}

    def steps(self, slip: tuple[int, int] | None = None) -> list[str]:
        """Return one sentence of the solution per change: "10 - 2 = 8." and "8 + 7 = 15.".

        Args:
            slip: (index, by): make the result of that change wrong by so much, though never below
                zero, and continue from the wrong result.
        """
        sentences = []
        count = self.start
        for index, change in enumerate(self.changes):
            result = count + change
            if slip is not None and index == slip[0]:
                result = max(0, result + slip[1])
            sign = "+" if change > 0 else "-"
            sentences.append(f"{count} {sign} {abs(change)} = {result}.")
            count = result
        return sentences

    @property
    def split(self) -> str:
        """Return the split of this sum; "validation" and "test" have a tenth of all sums each."""
        bucket = stable_bucket(" ".join(map(str, (self.start, *self.changes))), 10)
        return {0: "validation", 1: "test"}.get(bucket, "train")


class GeneratedTask(Task):
    """A task that makes its problems: 10,000 train, 500 validation and 500 test by default."""

    @abstractmethod
    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Yield problems of one split without end; now and then a problem repeats."""

    def _rows(
        self, split: str, path: Path | None, num_examples: int | None, seed: int
    ) -> list[dict[str, Any]]:
        if path is not None:
            raise ValueError(f"task {self.name} is generated and takes no dataset_path; got {path}")
        count = _DEFAULT_EXAMPLES[split] if num_examples is None else num_examples
        rows: dict[str, dict[str, Any]] = {}
        for problem in self.problems(split, seed):
            rows[problem.prompt] = problem.row
            if len(rows) == count:
                break
        return list(rows.values())


class Arithmetic(GeneratedTask, NumericTask):
    """The generated problems, answered by their number."""

    name = "arithmetic"

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        return generate_problems(split, seed)


def generate_problems(split: str, seed: int) -> Iterator[Problem]:
    """Yield problems of one split without end; now and then a problem repeats."""
    rng = random.Random(f"arithmetic {split} {seed}")
    while True:
        problem = _random_problem(rng)
        if problem.split == split:
            yield problem


def _random_problem(rng: random.Random) -> Problem:
    start = count = rng.randint(2, 20)
    changes, verbs = [], []
    for _ in range(rng.randint(2, 4)):
        amount = rng.randint(1, 9)
        gains = amount > count or rng.random() < 0.5
        changes.append(amount if gains else -amount)
        verbs.append(rng.choice(GAINS if gains else LOSSES))
        count += changes[-1]
    return Problem(
        start=start,
        changes=tuple(changes),
        name=rng.choice(NAMES),
        thing=rng.choice(OBJECTS),
        verbs=tuple(verbs),
    )
