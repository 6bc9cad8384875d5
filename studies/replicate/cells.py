"""Run cells as processes of one thread each, several at a time.

A cell's commands run in the study's folder, one after another, with output in `logs/NAME.log`. At
the end `cells/NAME.json` is written, and the cell's model and evaluation are deleted; a base model
stays. A cell counts as done while that file holds the commands that would be run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from latro.files import write_json
from latro.reporting.callbacks import METRICS_FILE
from latro.terminal import Terminal
from latro_kernels import environment
from studies.replicate.study import Cell, base_folder

_POLL_SECONDS = 0.1
_LOG_TAIL = 20
_LAST_UPDATES = 10
_PACKAGES = ("transformers", "accelerate", "datasets")

Record = dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A cell that was not finished, the reason, and the end of its log."""

    name: str
    reason: str
    log_tail: str = ""


def finished(cell: Cell, folder: Path) -> Record | None:
    """Return the record of a cell that the same commands have run, or None."""
    path = _record_path(cell, folder)
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["commands"] != cell.chain:
        return None
    if cell.part == "base model" and not _result_path(cell, folder).exists():
        return None
    return record


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    jobs: int,
    console: Terminal,
    on_finish: Callable[[], object],
) -> list[Failure]:
    """Run the cells that are not finished, in their order, `jobs` at a time.

    A cell waits for its base model. When one fails the others go on. Whatever ends this function
    early (Ctrl-C, or an exception that a signal handler raises) ends its processes too.

    Args:
        cells: base models before what starts from them.
        folder: the study's.
        jobs: processes at a time.
        console: shows progress, a line for each finished cell, and failures.
        on_finish: called after each new record.

    Returns:
        The cells that failed, and those whose base model did.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = {cell.name for cell in cells if finished(cell, folder)}
    waiting = [cell for cell in cells if cell.name not in done]
    failures: list[Failure] = []
    running: list[_Run] = []
    progress = Progress(
        TextColumn("cells", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
    )
    with progress:
        bar = progress.add_task("", total=len(cells), completed=len(done))
        try:
            while waiting or running:
                for cell in _without_base(waiting, failures):
                    waiting.remove(cell)
                    failures.append(Failure(cell.name, "its base model failed"))
                for cell in _ready(waiting, done)[: jobs - len(running)]:
                    waiting.remove(cell)
                    running.append(_Run(cell, folder))
                progress.update(bar, description=", ".join(run.cell.name for run in running))
                time.sleep(_POLL_SECONDS)
                for run in list(running):
                    outcome = run.poll()
                    if outcome is None:
                        continue
                    running.remove(run)
                    progress.advance(bar)
                    if isinstance(outcome, Failure):
                        failures.append(outcome)
                        console.print(f"{outcome.name}: {outcome.reason}", style="red")
                        console.print(outcome.log_tail)
                    else:
                        done.add(run.cell.name)
                        console.print(_line(outcome))
                        on_finish()
        finally:
            for run in running:
                run.kill()
    return failures


def _ready(waiting: Iterable[Cell], done: set[str]) -> list[Cell]:
    return [cell for cell in waiting if cell.base is None or cell.base.name in done]


def _without_base(waiting: Iterable[Cell], failures: Iterable[Failure]) -> list[Cell]:
    failed = {failure.name for failure in failures}
    return [cell for cell in waiting if cell.base is not None and cell.base.name in failed]


def _line(record: Mapping[str, Any]) -> str:
    metrics = record["metrics"]
    shown = [f"{record['name']}: {sum(record['seconds']):.0f} s"]
    for title, key in (("greedy", "accuracy_greedy"), ("maj@8", "maj@8")):
        if key in metrics:
            shown.append(f"{title} {metrics[key]:.1%}")
    return ", ".join(shown)


@dataclass
class _Run:
    """A running cell, with the process of its current command."""

    cell: Cell
    folder: Path
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.log = self.folder / "logs" / f"{self.cell.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        # An interrupted run may have left it.
        shutil.rmtree(self.folder / self.cell.work, ignore_errors=True)
        _record_path(self.cell, self.folder).unlink(missing_ok=True)
        self._start()

    def _start(self) -> None:
        command = self.cell.commands[len(self.seconds)]
        # The processes run in another folder than this one, and import the same code.
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        with self.log.open("a", encoding="utf-8") as log:
            print("$ python -m", *command, file=log, flush=True)
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self.folder,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal goes to a whole process group: it is for the study, which
                # ends its processes itself.
                start_new_session=True,
            )
        self.started = time.perf_counter()

    def poll(self) -> Record | Failure | None:
        """Start the next command when one has ended; return the cell's result, or None."""
        status = self.process.poll()
        if status is None:
            return None
        self.seconds.append(round(time.perf_counter() - self.started, 1))
        if status:
            module = self.cell.commands[len(self.seconds) - 1][0]
            return self._failure(f"{module} ended with status {status}")
        if len(self.seconds) < len(self.cell.commands):
            self._start()
            return None
        if not _result_path(self.cell, self.folder).exists():
            return self._failure(f"it left no {_result_path(self.cell, Path())}")
        record = _record(self.cell, self.folder, self.seconds)
        write_json(_record_path(self.cell, self.folder), record)
        shutil.rmtree(self.folder / self.cell.work, ignore_errors=True)
        return record

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _failure(self, reason: str) -> Failure:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return Failure(self.cell.name, reason, "\n".join(lines[-_LOG_TAIL:]))


def _record_path(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _result_path(cell: Cell, folder: Path) -> Path:
    """Return the file that the last command of a cell writes."""
    if cell.part == "base model":
        return folder / base_folder(cell.architecture, cell.task)
    return folder / cell.work / "evaluation.json"


def _record(cell: Cell, folder: Path, seconds: Sequence[float]) -> Record:
    """Return the record of a finished cell."""
    evaluation: dict[str, Any] = {"problems": None, "metrics": {}}
    if cell.part != "base model":
        evaluation = json.loads(_result_path(cell, folder).read_text(encoding="utf-8"))
    return {
        "name": cell.name,
        "part": cell.part,
        "architecture": cell.architecture,
        "task": cell.task,
        "method": cell.method,
        "seed": cell.seed,
        "settings": dict(cell.settings),
        "changed": dict(cell.changed),
        "commands": cell.chain,
        "seconds": list(seconds),
        "problems": evaluation["problems"],
        "metrics": evaluation["metrics"],
        "training": _end_of_training(folder / cell.work / "model" / METRICS_FILE),
        "environment": environment(torch.device("cpu"), _PACKAGES) | {"threads": 1},
    }


def _end_of_training(path: Path) -> dict[str, float]:
    """Return means over the last logged updates; empty without a log."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    updates = [line for line in lines if "loss" in line][-_LAST_UPDATES:]
    return {
        name: sum(update[name] for update in updates) / len(updates)
        for name in ("reward", "kl", "rationale_length")
        if updates and all(name in update for update in updates)
    }
