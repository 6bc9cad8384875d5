"""The records of a study's finished cells, in one file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latro.errors import reading
from studies.estimates import Estimate

CELLS_FILE = "cells.json"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """The records of a study's finished cells, and how they were made.

    Args:
        command: the shell command.
        jobs: cells at a time.
        records: of all finished cells; see `studies.cells`.

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
            ValueError: there is none, or its file is damaged.
        """
        path = folder / CELLS_FILE
        if not path.exists():
            raise ValueError(f"output_dir: expected a study's {CELLS_FILE} in it, got {folder}")
        with reading("output_dir", path):
            document = json.loads(path.read_text(encoding="utf-8"))
        try:
            return cls.of(document)
        except (KeyError, TypeError) as error:
            raise ValueError(f"output_dir: {path} holds no study: {error!r}") from error

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Study:
        """Return the study from the output of `as_json`."""
        return cls(document["command"], document["jobs"], tuple(document["cells"]))

    def as_json(self) -> dict[str, Any]:
        """Return the study as JSON, for `of`."""
        return {"command": self.command, "jobs": self.jobs, "cells": list(self.records)}

    def part(self, name: str) -> list[Record]:
        """Return the records of one part: such as "main"."""
        return [record for record in self.records if record["part"] == name]


def estimate(records: Iterable[Record], metric: str, group: str = "metrics") -> Estimate | None:
    """Return the estimate of a metric over records; None where no record has it."""
    values = [record[group][metric] for record in records if metric in record[group]]
    return Estimate.of(values) if values else None
