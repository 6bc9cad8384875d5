"""Stages: commands that run one after the other, each in a process and a time limit of its own.

A stage that fails, hangs or cannot run stops no other. What a stage has started ends with it, and
with the process that runs the stages.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[2]
_LEAST_S = 5.0  # an interpreter that imports torch takes about as long
_TAIL_LINES = 40
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Obstacle = Callable[[], str | None]
"""Say why a stage cannot run here, or return None."""


@dataclass(frozen=True)
class Stage:
    """Commands that belong together, run from the checkout one after the other.

    The stage fails where one of them exits with another status than 0; the others run all the same.

    Args:
        name: of the stage, and of its log, NAME.log.
        commands: what is run.
        limit_s: seconds for all commands together.
        obstacles: where one of them has a reason, the commands are not run.
        read: returns what the commands have measured, also when the limit cut them off; None where
            there is nothing.
        figure: makes a line of what was read.
        environment: is added to what the commands inherit.
    """

    name: str
    commands: Sequence[Sequence[str]]
    limit_s: float
    obstacles: Sequence[Obstacle] = ()
    read: Callable[[], Any] = lambda: None
    figure: Callable[[Any], str] = str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    Attributes:
        stage: its name.
        status: "passed", "failed" or "skipped".
        seconds: the time that it took.
        reason: why it failed or was skipped.
        figure: a line about what it measured.
        tail: the last lines that it printed.
    """

    stage: str
    status: str
    seconds: float
    reason: str | None
    figure: str | None = None
    tail: Sequence[str] = ()

    @property
    def said(self) -> str:
        """Reason and figure in one line."""
        return "; ".join(filter(None, (self.reason, self.figure)))


def run_all(
    stages: Sequence[Stage],
    logs: Path,
    *,
    seconds: float,
    paths: Sequence[Path],
    after: Callable[[Sequence[Outcome], Mapping[str, Any]], None],
) -> tuple[list[Outcome], dict[str, Any]]:
    """Run `stages` in their order; return how they ended, and what was measured by stage.

    Args:
        stages: what to run.
        logs: the folder for what each stage prints.
        seconds: for all stages together; one that is started when few are left is skipped.
        paths: where the stages' Python looks for packages first.
        after: is called after each stage, also one that is interrupted, with all outcomes so far
            and what was measured by stage.
    """
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    results: dict[str, Any] = {}
    for stage in stages:
        print(f"{stage.name} …", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            outcome, result = _run(stage, logs, deadline, paths)
        except (KeyboardInterrupt, SystemExit):
            ran = time.monotonic() - started
            after([*outcomes, Outcome(stage.name, "failed", ran, "interrupted")], results)
            raise
        outcomes.append(outcome)
        if result is not None:
            results[stage.name] = result
        line = f"{stage.name}: {outcome.status}, {outcome.seconds:.1f} s {outcome.said}"
        print(line, file=sys.stderr, flush=True)
        after(outcomes, results)
    return outcomes, results


def _run(
    stage: Stage, logs: Path, deadline: float, paths: Sequence[Path]
) -> tuple[Outcome, Any | None]:
    """Run one stage in its limit, or until `deadline` if that is sooner."""
    started = time.monotonic()
    left_s = deadline - started
    reason = next(filter(None, (obstacle() for obstacle in stage.obstacles)), None)
    if reason is None and left_s < _LEAST_S:
        reason = f"no time left: {max(0.0, left_s):.0f} s of that for all stages"
    if reason is not None:
        return Outcome(stage.name, "skipped", 0.0, reason), None

    end = started + min(stage.limit_s, left_s)
    log = logs / f"{stage.name}.log"
    with log.open("wb") as stream:
        failures = [_call(command, stream, end, stage, paths) for command in stage.commands]
    reason = "; ".join(filter(None, failures)) or None
    result = stage.read()
    outcome = Outcome(
        stage=stage.name,
        status="failed" if reason else "passed",
        seconds=round(time.monotonic() - started, 1),
        reason=reason,
        figure=None if result is None else stage.figure(result),
        tail=log.read_text(errors="replace").splitlines()[-_TAIL_LINES:],
    )
    return outcome, result


def _call(
    command: Sequence[str], log: BinaryIO, end: float, stage: Stage, paths: Sequence[Path]
) -> str | None:
    """Run one command until `end` of the monotonic clock; return why it failed, or None."""
    limit_s = end - time.monotonic()
    if limit_s <= 0:
        return "no time left for its next command"
    inherited = os.environ.get("PYTHONPATH")
    search = os.pathsep.join([*map(str, paths), *([inherited] if inherited else [])])
    log.write(f"$ {' '.join(command)}\n".encode())
    log.flush()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": search, **stage.environment},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=_bind_to_parent,  # noqa: PLW1509 - this process has one thread
    )
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"not done after {limit_s:.0f} s"
    finally:
        _end_group(process.pid)
        process.wait()
    return f"exit status {status}" if status else None


def _bind_to_parent() -> None:
    """Make this process the first of a group, and let the kernel end it when its parent dies.

    It stays in its parent's session, in which a machine ends what a command has left behind.
    """
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_group(pid: int) -> None:
    """End all processes that a command has started and left behind."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # none is left
