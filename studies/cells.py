"""Cells of a study, and how they are run: as processes, several at a time.

A cell's commands run in the study's folder, one after another, with output in `logs/NAME.log`. At
the end `cells/NAME.json` is written, and the cell's model and evaluation are deleted; a base model
stays. A cell counts as done while that file holds the commands that would be run.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from subprocess import DEVNULL, STDOUT, Popen
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from latro.errors import reading
from latro.files import write_json
from latro.reporting.callbacks import METRICS_FILE
from latro.terminal import Terminal
from latro_kernels import environment

_POLL_SECONDS = 0.1
_LOG_TAIL = 20
_LAST_UPDATES = 10
_EVALUATED = "eval_answer_logp"
_PACKAGES = ("transformers", "accelerate", "datasets")

Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One unit of the study: commands that run one after another, and what they stand for.

    Paths in the commands are relative to the study's folder, so that a record of them says nothing
    of the machine.

    Args:
        name: names its files; `--only` matches it.
        part: of the study: "base model", "main" or another.
        architecture, task: of the model, and what it is trained and evaluated on.
        method: how it is trained, by the study's own names; "" for a base model.
        seed: of training and of the evaluation's samples; None for a base model.
        settings: of training, in full, but for the seed.
        changed: the settings in which it differs from the main cell.
        commands: each a module and its arguments.
        base: the cell that makes the model it starts from; None: it ships.
        result: what the last command leaves; "" for the evaluation in its folder.
    """

    name: str
    part: str
    architecture: str
    task: str
    method: str = ""
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    changed: Mapping[str, Any] = field(default_factory=dict)
    commands: tuple[tuple[str, ...], ...] = ()
    base: Cell | None = None
    result: str = ""

    @property
    def work(self) -> str:
        """Return the folder of its models and its evaluation while it runs."""
        return f"work/{self.name}"

    @property
    def evaluation(self) -> str:
        """Return the file of its evaluation."""
        return f"{self.work}/evaluation.json"

    @property
    def probe(self) -> str:
        """Return the file of its probe, if it makes one."""
        return f"{self.work}/probe.json"

    @property
    def about(self) -> dict[str, Any]:
        """Return what a record says of the cell itself."""
        return {
            "name": self.name,
            "part": self.part,
            "architecture": self.architecture,
            "task": self.task,
            "method": self.method,
            "seed": self.seed,
            "settings": dict(self.settings),
            "changed": dict(self.changed),
            "commands": self.chain,
        }

    @property
    def chain(self) -> list[str]:
        """Return the shell commands that make it from nothing, including its base model's."""
        own = [shlex.join(("python", "-m", *command)) for command in self.commands]
        return own if self.base is None else [*self.base.chain, *own]


def flags(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the arguments of a command that have these settings."""
    for name, value in settings.items():
        yield from (f"--{name}", str(value))


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise unless there is a seed, and each once."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected different ones, at least one, got {seeds}")


def select(everything: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Return the cells whose names match a shell pattern, and the base models that they need.

    Raises:
        ValueError: a pattern matches no name.
    """
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in everything):
            raise ValueError(
                f"only: expected patterns of cell names such as {everything[-1].name}, "
                f"got {pattern!r}, which matches none"
            )
    matched = [c for c in everything if any(fnmatchcase(c.name, p) for p in patterns)]
    needed = {cell.name for cell in matched}
    for cell in reversed(everything):
        if cell.name in needed and cell.base is not None:
            needed.add(cell.base.name)
    return [cell for cell in everything if cell.name in needed]


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
    with reading("output_dir", path):
        record = json.loads(path.read_text(encoding="utf-8"))
    if record["commands"] != cell.chain:
        return None
    if cell.result and not (folder / cell.result).exists():
        return None
    return record


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    jobs: int,
    threads: int = 1,
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
        threads: of each process.
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
                    running.append(_Run(cell, folder, threads))
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
    threads: int
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
        paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        with self.log.open("a", encoding="utf-8") as log:
            print("$ python -m", *command, file=log, flush=True)
            self.process = Popen(
                [sys.executable, "-m", *command],
                cwd=self.folder,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(self.threads),
                    "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                },
                stdin=DEVNULL,
                stdout=log,
                stderr=STDOUT,
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
        result = self.cell.result or self.cell.evaluation
        if not (self.folder / result).exists():
            return self._failure(f"it left no {result}")
        record = _record(self.cell, self.folder, self.seconds, self.threads)
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


def _record(cell: Cell, folder: Path, seconds: Sequence[float], threads: int) -> Record:
    """Return the record of a finished cell."""
    evaluation: dict[str, Any] = {"problems": None, "metrics": {}}
    if not cell.result:
        evaluation = _json(folder / cell.evaluation)
    log = folder / cell.work / "model" / METRICS_FILE
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    logged = [json.loads(line) for line in lines]
    probe = folder / cell.probe
    return {
        **cell.about,
        "seconds": list(seconds),
        "problems": evaluation["problems"],
        "metrics": evaluation["metrics"],
        **({"intervals": evaluation["intervals"]} if probe.exists() else {}),
        "training": _end_of_training(logged),
        **({"likelihood": _likelihood(_json(probe))} if probe.exists() else {}),
        **({"evaluations": found} if (found := [e for e in logged if _EVALUATED in e]) else {}),
        "environment": environment(torch.device("cpu"), _PACKAGES) | {"threads": threads},
    }


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _end_of_training(logged: Sequence[Record]) -> dict[str, float]:
    """Return means over the last logged updates; empty without any."""
    updates = [line for line in logged if "loss" in line][-_LAST_UPDATES:]
    return {
        name: sum(update[name] for update in updates) / len(updates)
        for name in ("reward", "kl", "rationale_length")
        if updates and all(name in update for update in updates)
    }


def _likelihood(probe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a probe's summary, and by kind of rationale each problem's mean log π(y|·)."""
    problems, summary = probe["problems"], probe["summary"]
    values = {
        kind: [fmean(entry["answer_logp"] for entry in problem[kind]) for problem in problems]
        for kind in summary
        if all(kind in problem for problem in problems)
    }
    return {"summary": summary, "problems": values}
