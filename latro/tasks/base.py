"""What a task is: where its problems come from, and how a completion is graded.

A dataset row has the columns `prompt` (a string, or {"role", "content"} messages) and `answer` (a
string). Where a task has them there are also `rationale`, the worked solution, `ground_truth`,
which completions are graded against instead of `answer`, and whatever else its grading needs. What
a row leaves out of these is None in its dataset. A completion states its answer after the answer
template, "The answer is 42". The first statement that holds an answer counts, as it is the one that
a rollout ends at. What the model goes on to say does not count, nor does a mention of the template
without an answer ("I hope the answer is correct."), nor anything else in the completion or in the
prompt.
"""

from __future__ import annotations

import hashlib
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset

from latro.rollout.answer_template import template_pattern
from latro.rollout.frame import Chat

SEVERAL = ""
"""The canonical form of a statement that names several answers, or an unclear one."""


class Task(ABC):
    """A source of problems with known answers.

    Attributes:
        name: the task's name for `get_task`.
        answer_template: the words that end a rationale; the whole answer is
            `f"{answer_template} {answer}"`.
        chat: what models' chat templates are given beside a problem's prompt.
        splits: the names of splits that `load` takes.
    """

    name: str
    answer_template: str = "The answer is"
    chat: Chat = Chat()
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")

    def load(
        self,
        split: str,
        *,
        dataset_path: str | os.PathLike[str] | None = None,
        num_examples: int | None = None,
        seed: int = 0,
    ) -> Dataset:
        """Load one split.

        Args:
            split: one of `splits`. No problem of "train" is in "validation" or "test".
            dataset_path: a folder with the task's JSON-lines files, read instead of the hub.
            num_examples: the largest number of rows, drawn without replacement; None: all rows, in
                the order of the source.
            seed: decides that draw, and the problems where the task generates them.

        Returns:
            A dataset with the columns "prompt" and "answer", and those that the task adds.

        Raises:
            ValueError: the split is unknown, `num_examples` is below 1, or a row is malformed.
            FileNotFoundError: `dataset_path` lacks the split's file.
        """
        if split not in self.splits:
            raise ValueError(f"split must be one of {', '.join(self.splits)}; got {split!r}")
        if num_examples is not None and num_examples < 1:
            raise ValueError(f"num_examples must be at least 1; got {num_examples}")
        path = None if dataset_path is None else Path(dataset_path)
        rows = self._rows(split, path, num_examples, seed)
        if not rows:
            raise ValueError(f"task {self.name} has no rows in split {split!r} of {path}")
        # By itself `datasets` takes the first row's columns, and leaves others out.
        columns = list(dict.fromkeys(column for row in rows for column in row))
        return Dataset.from_list([{column: row.get(column) for column in columns} for row in rows])

    def extract(self, completion: str, example: Mapping[str, Any]) -> str | None:
        """Return the answer that a completion states, in canonical form.

        Two completions with the same answer give equal strings, so these can be voted on.

        Args:
            completion: the text that the model wrote after the prompt, without special tokens:
                they would count as text, and "Paris<|im_end|>" is not "Paris".
            example: the dataset row that the completion answers.

        Returns:
            The canonical answer; None where no answer is stated or the statement is ambiguous.
        """
        mentions = list(template_pattern(self.answer_template).finditer(completion))
        for i, mention in enumerate(mentions):
            end = mentions[i + 1].start() if i + 1 < len(mentions) else len(completion)
            statement = completion[mention.end() : end]
            stated = self._canonical(statement, example)
            if stated:
                return stated
            # The line that says "12 or 13" may decide between them; a later line may belong to
            # another problem.
            if stated == SEVERAL and "\n" in statement.lstrip():
                return None
        return None

    def grade(self, completion: str, example: Mapping[str, Any]) -> bool:
        """Return whether the answer that a completion states is the right one."""
        return self.is_correct(self.extract(completion, example), example)

    def truth(self, example: Mapping[str, Any]) -> str:
        """Return the text that a row is graded against: `ground_truth`, or else its `answer`."""
        truth = example.get("ground_truth")
        return example["answer"] if truth is None else truth

    def is_correct(self, predicted: str | None, example: Mapping[str, Any]) -> bool:
        """Return whether what `extract` returned is the right answer."""
        return predicted is not None and self.same(predicted, self.truth(example))

    @property
    def description(self) -> str:
        """Return the description of the data for reports: its name, and its source if known."""
        return self.name

    @abstractmethod
    def same(self, predicted: str, answer: str) -> bool:
        """Return whether two canonical answers are equal: numbers by value, options by label."""

    @abstractmethod
    def _canonical(self, statement: str, example: Mapping[str, Any]) -> str | None:
        """Return the canonical answer in `statement`, the text up to the next answer template.

        Return None where it states no answer, and `SEVERAL` where it names several or an unclear
        one.
        """

    @abstractmethod
    def _rows(
        self, split: str, path: Path | None, num_examples: int | None, seed: int
    ) -> list[dict[str, Any]]:
        """Return the rows of a split; the arguments are those of `load`, already checked."""


def draw(rows: Sequence[dict[str, Any]], num_examples: int | None, seed: int) -> list[dict]:
    """Return at most `num_examples` of the rows, drawn with `seed`; all rows in order if None."""
    if num_examples is None:
        return list(rows)
    return random.Random(seed).sample(rows, min(num_examples, len(rows)))


def stable_bucket(text: str, buckets: int) -> int:
    """Return a number in [0, buckets) that depends only on the text, and not on the machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % buckets


def string_field(record: Mapping[str, Any], field: str, where: str) -> str:
    """Return the non-empty string at `field`; raise ValueError with the place where it is not."""
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: expected a non-empty string at {field!r}, got {value!r}")
    return value
