"""Compute means, deviations over seeds, and differences from the study's records."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.replicate.pretrain import SHIPPED
from studies.replicate.study import ARCHITECTURES, LATRO, TASKS

CELLS_FILE = "cells.json"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds and their standard deviation, by count − 1; None for one seed."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the estimate from at least one value."""
        mean = math.fsum(values) / len(values)
        if len(values) < 2:
            return cls(mean, None, len(values))
        squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean, math.sqrt(squares / (len(values) - 1)), len(values))


@dataclass(frozen=True)
class Difference:
    """of − than, with the root of the sum of both variances; None where either has one seed."""

    of: Estimate
    than: Estimate

    @property
    def mean(self) -> float:
        return self.of.mean - self.than.mean

    @property
    def deviation(self) -> float | None:
        if self.of.deviation is None or self.than.deviation is None:
            return None
        return math.hypot(self.of.deviation, self.than.deviation)

    @property
    def above(self) -> bool | None:
        """Return whether it is more than two deviations above 0; None without a deviation."""
        return None if self.deviation is None else self.mean > 2 * self.deviation

    @property
    def below(self) -> bool | None:
        """Return whether it is more than two deviations below 0."""
        return None if self.deviation is None else self.mean < -2 * self.deviation


@dataclass(frozen=True)
class Study:
    """The records of a study's finished cells, and how they were made.

    Args:
        command: the shell command.
        jobs: cells at a time.
        records: of all finished cells; see `studies.replicate.cells`.

    Raises:
        ValueError: cells that differ in their seeds alone have different settings.
    """

    command: str
    jobs: int
    records: tuple[Record, ...]

    def __post_init__(self) -> None:
        seen: dict[str, Record] = {}
        for record in self.records:
            what = record["name"].removesuffix(f"-{record['seed']}")
            first = seen.setdefault(what, record)
            for key in ("settings", "problems"):
                if record[key] != first[key]:
                    raise ValueError(
                        f"{CELLS_FILE}: expected cells of one study, got {key} of "
                        f"{record['name']} unlike those of {first['name']}"
                    )

    @classmethod
    def read(cls, folder: Path) -> Study:
        """Return the study in `folder`.

        Raises:
            ValueError: there is none.
        """
        path = folder / CELLS_FILE
        if not path.exists():
            raise ValueError(f"output_dir: expected a study's {CELLS_FILE} in it, got {folder}")
        return cls.of(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Study:
        """Return the study from the output of `as_json`."""
        return cls(document["command"], document["jobs"], tuple(document["cells"]))

    def as_json(self) -> dict[str, Any]:
        """Return the study as JSON, for `of`."""
        return {"command": self.command, "jobs": self.jobs, "cells": list(self.records)}

    def part(self, name: str) -> list[Record]:
        """Return the records of one part: "base model", "main", "ablation" or "tuning"."""
        return [record for record in self.records if record["part"] == name]

    def main(self, architecture: str, task: str, method: str) -> list[Record]:
        """Return the main cells' records of all seeds; empty where none is finished."""
        wanted = (architecture, task, method)
        return [
            record
            for record in self.part("main")
            if (record["architecture"], record["task"], record["method"]) == wanted
        ]

    def pairs(self) -> list[tuple[str, str]]:
        """Return architectures and tasks with any main cell, task by task."""
        there = {(record["architecture"], record["task"]) for record in self.part("main")}
        return [(a, t) for t in TASKS for a in ARCHITECTURES if (a, t) in there]

    def ablation(self, setting: str) -> dict[Any, list[Record]]:
        """Return records by the setting's value, the main cells of the same model among them."""
        of: dict[Any, list[Record]] = {}
        for record in self.part("ablation"):
            if setting in record["changed"]:
                of.setdefault(record["changed"][setting], []).append(record)
        if of:
            main = self.main(*SHIPPED, "latro")
            if main:
                of[LATRO[setting]] = main
        return of


def estimate(records: Iterable[Record], metric: str, group: str = "metrics") -> Estimate | None:
    """Return the estimate of a metric over records; None where no record has it."""
    values = [record[group][metric] for record in records if metric in record[group]]
    return Estimate.of(values) if values else None
