"""Find the records of the study's tables."""

from __future__ import annotations

from typing import Any

from studies import records
from studies.records import Record
from studies.replicate.pretrain import SHIPPED
from studies.replicate.study import ARCHITECTURES, LATRO, TASKS


class Study(records.Study):
    """The records of the study's finished cells."""

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
