"""A user's own problems, from a file, a folder or the hub, as a task.

`own_rows` says what a record holds. The splits:

- A folder or a hub data set has the splits that it names; "dev", "val" and "valid" are other names
  of "validation". A prompt of "validation" or "test" is dropped from "train", with a warning.
- Without a "validation" split, a tenth of "train" becomes it, chosen by a hash of the prompt, so
  that a row keeps its split whatever rows join it later.
- A single file is split in the same way, and its "test" is the whole file: training refuses that as
  its held-out split, and evaluation of a separate file uses all of its rows.

A completion's statement, the text after the answer template, is graded

- "exact": as a string. The statement, or its beginning up to the end of a line or sentence, must
  equal the answer. White space, case, quotes, round brackets and closing punctuation around it do
  not count, nor does Markdown or LaTeX markup, unless the answer itself has some. A wrong answer is
  reported with as many lines or sentences as the right one has;
- "number": by value, as in GSM8K (`numeric`);
- "choice": by the option that it names, as in ARC (`choice`); this needs a column `choices`;
- "math": as an expression, a set, an interval or an equation (`mathematics`).
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError

from latro.rollout.prompts import prompt_text

from .base import Task, draw, stable_bucket
from .choice import ChoiceTask
from .markup import unmarked, without_marks
from .mathematics import MathReader
from .numeric import NumericTask, parse_number
from .own_rows import own_row
from .records import FORMATS, Records, in_own_digits, read_records

GRADERS = ("exact", "number", "choice", "math")

_NAMES = {
    "train": ("train",),
    "validation": ("validation", "dev", "val", "valid"),
    "test": ("test",),
}
_VALIDATION_BUCKETS = 10
_WHOLE_FILE = "all"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# An answer that is a number and nothing else; the grader itself reads one among words too.
_BARE_NUMBER = re.compile(
    r"[-\u2212+]?\s?[$€£¥]?\s?[-\d.,/\u066b\u066c]+(?:[eE][-+]?\d+)?\s?[%\u066a]?"
)
_CALL = re.compile(r"!+(?=\W*\Z)")
_MARKS = " .!*\"'`“”‘’"
# The end of a sentence, with closing quotes and asterisks and the white space after it.
_SENTENCE_END = re.compile(r"[.!?]+[*_\"'`”’]*(?:\s+|$)|\n\s*")

_logger = logging.getLogger(__name__)


class OwnData(Task):
    """Rows that were read already, by split; subclasses grade them.

    Attributes:
        grader: the subclass's name for `--grader`.
    """

    grader: str

    def __init__(self, name: str, rows: Mapping[str, list[dict[str, Any]]]) -> None:
        self.name = name
        self._rows_of = rows

    @property
    def description(self) -> str:
        return f"{self.name} (grader: {self.grader})"

    def _rows(
        self, split: str, path: Path | None, num_examples: int | None, seed: int
    ) -> list[dict[str, Any]]:
        if path is not None:
            raise ValueError(f"dataset_path: expected None with {self.name}, got {path}")
        if not self._rows_of.get(split):
            there = ", ".join(name for name, rows in self._rows_of.items() if rows)
            raise ValueError(f"dataset_name: {self.name} has no split {split!r}; it has {there}")
        return draw(self._rows_of[split], num_examples, seed)


class _Exact(OwnData):
    grader = "exact"

    def same(self, predicted: str, answer: str) -> bool:
        return predicted == _plain(answer)

    def _canonical(self, statement: str, example: Mapping[str, Any]) -> str | None:
        truth = self.truth(example).strip()
        right = _plain(truth)
        first = ""
        # Where the right answer has markup, so may the statement: "__init__" is not bold text.
        for spelled in (statement, unmarked(statement) if unmarked(truth) == truth else statement):
            whole = spelled.strip(" \t\r\n:")
            # The answer may itself have sentences and lines: "Dr. Smith" ends two.
            ends = _sentence_ends(whole)[: len(_sentence_ends(truth))]
            parts = [whole[:end] for end in (*ends, len(whole))]
            # "18!" is 18, but no other answer is "18!".
            if any(right in (_plain(part), _plain(_CALL.sub("", part))) for part in parts):
                return right
            first = _plain(whole[: ends[-1]])
        return first or None


class _Number(OwnData, NumericTask):
    grader = "number"


class _Choice(OwnData, ChoiceTask):
    grader = "choice"


class _Math(OwnData):
    grader = "math"

    def __init__(self, name: str, rows: Mapping[str, list[dict[str, Any]]]) -> None:
        super().__init__(name, rows)
        self._reader = MathReader()

    def same(self, predicted: str, answer: str) -> bool:
        return predicted == self._reader.truth(answer)

    def _canonical(self, statement: str, example: Mapping[str, Any]) -> str | None:
        return self._reader.stated(statement, self.truth(example))

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """Raise ValueError if the grader cannot read a row's right answer."""
        if self._reader.truth(self.truth(row)) is None:
            field = "ground_truth" if "ground_truth" in row else "answer"
            raise ValueError(
                f"{where}: grader math: expected mathematics at {field!r}, got {row[field]!r}"
            )


_TASKS: dict[str, type[OwnData]] = {task.grader: task for task in (_Exact, _Number, _Choice, _Math)}


def read_own_data(name: str, *, config: str | None = None, grader: str | None = None) -> OwnData:
    """Return the task of a user's own data.

    Args:
        name: a file in one of `FORMATS`, a folder with one such file per split ("train.jsonl",
            "validation.jsonl", "test.jsonl"), or the id of a data set on the hub, "org/name".
        config: the configuration of a data set on the hub, where it has several.
        grader: one of `GRADERS`. None: "choice" where rows have choices, "number" where every
            answer is a number and nothing else, else "exact".

    Raises:
        ValueError: there is nothing of that name, or a row is malformed; the message names file and
            line.
    """
    if grader is not None and grader not in GRADERS:
        raise ValueError(f"grader: expected one of {', '.join(GRADERS)}, got {grader!r}")
    located = {
        split: [(where, own_row(record, where)) for where, record in records]
        for split, records in _sources(name, config).items()
    }
    everything = [pair for pairs in located.values() for pair in pairs]
    if not everything:
        raise ValueError(f"dataset_name: {name} has no rows")
    rows = [row for _, row in everything]
    derived = grader is None
    grader = grader or _derived_grader(rows)
    for where, row in everything:
        _prepare(row, grader, where, derived=derived)
    _align(rows)
    task = _TASKS[grader](name, _splits(name, located))
    if isinstance(task, _Math):
        for where, row in everything:
            task.check(row, where)
    return task


def _sources(name: str, config: str | None) -> dict[str, Records]:
    """Return the records of each split by its name; a single file is the split `_WHOLE_FILE`."""
    path = Path(name)
    local = path.exists() or path.suffix.lower() in FORMATS
    if not local and _HUB_ID.fullmatch(name):
        return _hub_sources(name, config)
    if config is not None:
        raise ValueError(f"dataset_config: expected with a hub id only, got {config!r} with {name}")
    if path.is_dir():
        return _folder_sources(path)
    if local:
        if not path.exists():
            raise ValueError(f"dataset_name: there is no file {name}")
        return {_WHOLE_FILE: read_records(path)}
    raise ValueError(
        f"dataset_name: expected a task, a file, a folder or a hub id org/name, got {name!r}"
    )


def _folder_sources(folder: Path) -> dict[str, Records]:
    sources: dict[str, Records] = {}
    for split, names in _NAMES.items():
        paths = [folder / f"{name}{suffix}" for name in names for suffix in FORMATS]
        files = [path for path in paths if path.is_file()]
        if len(files) > 1:
            raise ValueError(
                f"dataset_name: expected one file of {split!r} in {folder}, got "
                f"{' and '.join(file.name for file in files)}"
            )
        if files:
            sources[split] = read_records(files[0])
    if not sources:
        raise ValueError(
            f"dataset_name: expected a file train, validation or test in {folder}, ending in one "
            f"of {', '.join(FORMATS)}"
        )
    return sources


def _hub_sources(name: str, config: str | None) -> dict[str, Records]:
    try:
        splits = load_dataset(name, config)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"dataset_name: cannot load {name!r} from the hub, and there is no such file or "
            f"folder: {error}"
        ) from error
    sources: dict[str, Records] = {}
    for split, names in _NAMES.items():
        there = [own for own in names if own in splits]
        if len(there) > 1:
            raise ValueError(
                f"dataset_name: expected one split of {split!r} in {name}, got "
                f"{' and '.join(there)}"
            )
        if there:
            sources[split] = _hub_records(splits, name, there[0])
    if not sources:
        raise ValueError(
            f"dataset_name: expected a split {', '.join(_NAMES)} in {name}, got {', '.join(splits)}"
        )
    return sources


def _hub_records(splits: Mapping[str, Any], name: str, split: str) -> Records:
    rows = splits[split]
    for index, record in enumerate(in_own_digits(rows, rows.features.arrow_schema)):
        yield f"{name} {split} row {index}", record


def _derived_grader(rows: list[dict[str, Any]]) -> str:
    if any("choices" in row for row in rows):
        return "choice"
    truths = [row.get("ground_truth", row["answer"]) for row in rows]
    if all(_BARE_NUMBER.fullmatch(t) and parse_number(t) is not None for t in truths):
        return "number"
    return "exact"


def _prepare(row: dict[str, Any], grader: str, where: str, *, derived: bool) -> None:
    """Check that the grader can read a row's right answer; turn an option's text into its label.

    `derived` tells that the grader was chosen because all answers are numbers, if it is "number".
    """
    field = "ground_truth" if "ground_truth" in row else "answer"
    truth = row[field]
    if grader == "number" and not derived and parse_number(truth) is None:
        raise ValueError(f"{where}: grader number: expected one number at {field!r}, got {truth!r}")
    if grader != "choice":
        row.pop("choices", None)
    else:
        if "choices" not in row:
            raise ValueError(f"{where}: grader choice: expected a list of texts at 'choices'")
        labels, texts = row["choices"]["label"], row["choices"]["text"]
        named = (
            [truth]
            if truth in labels
            else [label for label, text in zip(labels, texts, strict=True) if text.strip() == truth]
        )
        if len(named) != 1:
            raise ValueError(
                f"{where}: expected a label of {labels} or the text of one option at {field!r}, "
                f"got {truth!r}"
            )
        if named[0] != truth:
            row["ground_truth"] = named[0]


def _align(rows: list[dict[str, Any]]) -> None:
    """Give all rows the same columns and form of prompt, since a table has one of each."""
    conversations = any(not isinstance(row["prompt"], str) for row in rows)
    columns = {column for row in rows for column in row}
    for row in rows:
        if conversations and isinstance(row["prompt"], str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        if "ground_truth" in columns:
            row.setdefault("ground_truth", row["answer"])
        if "rationale" in columns:
            row.setdefault("rationale", "")


def _splits(
    name: str, located: Mapping[str, list[tuple[str, dict[str, Any]]]]
) -> dict[str, list[dict[str, Any]]]:
    rows = {split: [row for _, row in pairs] for split, pairs in located.items()}
    if _WHOLE_FILE in rows:
        train, validation = _cut(rows[_WHOLE_FILE])
        return {"train": train, "validation": validation, "test": rows[_WHOLE_FILE]}
    train = rows.get("train", [])
    held_out = {
        prompt_text(row["prompt"]) for split, own in rows.items() if split != "train" for row in own
    }
    kept = [row for row in train if prompt_text(row["prompt"]) not in held_out]
    if len(kept) < len(train):
        _logger.warning(
            "%s: %d rows of train are left out, since validation or test has their prompts",
            name,
            len(train) - len(kept),
        )
    if "validation" in rows:
        return {**rows, "train": kept}
    kept, validation = _cut(kept)
    return {**rows, "train": kept, "validation": validation}


def _cut(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return training and validation rows; with two or more prompts, neither is empty."""
    texts = [prompt_text(row["prompt"]) for row in rows]
    held_out = {text for text in texts if stable_bucket(text, _VALIDATION_BUCKETS) == 0}
    # With only a few prompts the hash may choose none of them, or all.
    by_hash = sorted(set(texts), key=lambda text: stable_bucket(text, 2**64))
    if len(held_out) == len(by_hash):
        held_out = set(by_hash[:-1])
    elif not held_out and len(by_hash) > 1:
        held_out.add(by_hash[0])
    pairs = list(zip(rows, texts, strict=True))
    train = [row for row, text in pairs if text not in held_out]
    return train, [row for row, text in pairs if text in held_out]


def _plain(text: str) -> str:
    """Return the text to compare, without outer punctuation, in one case and with single spaces."""
    collapsed = " ".join(text.split())
    bare = without_marks(collapsed, _MARKS) or collapsed
    behind = collapsed[collapsed.rfind(bare) + len(bare) :]
    caseless = (bare + "!" if _is_factorial(bare, behind) else bare).casefold()
    if bracketed := re.fullmatch(r"\(([^()]+)\)", caseless):  # "(B)", an option in its prompt
        caseless = bracketed[1].strip(_MARKS) or caseless
    return unicodedata.normalize("NFC", caseless)


def _is_factorial(bare: str, behind: str) -> bool:
    """Return whether a "!" behind a text belongs to it: "6!" is another number than 6."""
    return bare[-1:].isdecimal() and behind.startswith("!")


def _sentence_ends(text: str) -> list[int]:
    """Return where each line or sentence of the text ends; the last is its length."""
    inner = (found.end() for found in _SENTENCE_END.finditer(text))
    return [*(end for end in inner if end < len(text)), len(text)]
