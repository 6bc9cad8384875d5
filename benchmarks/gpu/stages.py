"""Stages: commands that run one after the other, each in a process and a time limit of its own.

A stage that fails, hangs or cannot run stops no other. After each, the record of all so far is
written, whole or not at all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

from benchmarks.common import report

ROOT = Path(__file__).resolve().parents[2]
_LEAST_S = 5.0  # an interpreter that imports torch takes about as long
_TAIL_LINES = 40

Obstacle = Callable[[], str | None]
"""Why a stage cannot run here, or None."""


@dataclass(frozen=True)
class Stage:
    """`commands`, run from the checkout one after the other in `limit_s` seconds in all.

    They are not run where one of `obstacles` has a reason. The stage fails where one of them exits
    with another status than 0; the others run all the same. `result` is the file that they leave,
    JSON or pytest's JUnit XML, and `figure` a line made of it, or of None where there is to be no
    file. `environment` is added to what they inherit.
    """

    name: str
    commands: Sequence[Sequence[str]]
    limit_s: float
    obstacles: Sequence[Obstacle] = ()
    result: Path | None = None
    figure: Callable[[Any], str] = lambda _: ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "passed", "failed" or "skipped"; `reason` of the latter two, `figure` of
    one that left something to read, and the last lines that it printed."""

    stage: str
    status: str
    seconds: float
    reason: str | None
    figure: str | None
    tail: list[str]

    @property
    def said(self) -> str:
        """Reason and figure in one line."""
        return "; ".join(filter(None, (self.reason, self.figure)))


def run_all(
    stages: Sequence[Stage],
    record: Path,
    seconds: float,
    paths: Sequence[Path],
    conclude: Callable[[Mapping[str, Any]], Mapping[str, object]],
) -> tuple[list[Outcome], dict[str, Any]]:
    """Run `stages` in their order.

    Args:
        stages: what to run.
        record: the JSON file written after every stage: the outcomes under "stages", what stages
            left to read under "results", and what `conclude` makes of the results. Logs go to
            STAGE.log beside it.
        seconds: for all stages together; one that is started when few are left is skipped.
        paths: where the stages' Python looks for packages first.
        conclude: from the results so far, by stage, to more of the record.

    Returns:
        The outcomes, and the results by stage.
    """
    record.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    results: dict[str, Any] = {}
    for stage in stages:
        print(f"{stage.name} …", file=sys.stderr, flush=True)
        left_s = deadline - time.monotonic()
        outcome, result = _run(stage, record.parent / f"{stage.name}.log", left_s, paths)
        print(
            f"{stage.name}: {outcome.status}, {outcome.seconds:.1f} s {outcome.said}",
            file=sys.stderr,
        )
        outcomes.append(outcome)
        if result is not None:
            results[stage.name] = result
        report.write_json(
            record,
            {
                **conclude(results),
                "stages": [asdict(of) for of in outcomes],
                "results": results,
            },
        )
    return outcomes, results


def _run(
    stage: Stage, log: Path, left_s: float, paths: Sequence[Path]
) -> tuple[Outcome, Any | None]:
    """Run one stage in its limit or `left_s` seconds, whichever is less."""
    if stage.result:
        # What an earlier run left is not this one's.
        stage.result.unlink(missing_ok=True)
    reason = next(filter(None, (obstacle() for obstacle in stage.obstacles)), None)
    if reason is None and left_s < _LEAST_S:
        reason = f"no time left: {max(0.0, left_s):.0f} s of that for all stages"
    if reason is not None:
        return Outcome(stage.name, "skipped", 0.0, reason, None, []), None

    started = time.monotonic()
    end = started + min(stage.limit_s, left_s)
    with log.open("wb") as stream:
        failures = [_call(command, stream, end, stage, paths) for command in stage.commands]
    seconds = time.monotonic() - started
    reason = "; ".join(filter(None, failures)) or None
    result = read_result(stage.result) if stage.result else None
    has_figure = result is not None or stage.result is None
    outcome = Outcome(
        stage=stage.name,
        status="failed" if reason else "passed",
        seconds=round(seconds, 1),
        reason=reason,
        figure=stage.figure(result) if has_figure else None,
        tail=log.read_text(errors="replace").splitlines()[-_TAIL_LINES:],
    )
    return outcome, result


def _call(
    command: Sequence[str], log: BinaryIO, end: float, stage: Stage, paths: Sequence[Path]
) -> str | None:
    """Run one command until `end` of the monotonic clock; why it failed, or None."""
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
        # A group of its own, so that what it has started can be ended with it.
        start_new_session=True,
    )
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"not done after {limit_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit status {status}" if status else None


def read_result(path: Path) -> Any | None:
    """Read what a stage left: JSON, or the counts of JUnit XML; None where nothing is there."""
    if not path.exists():
        return None
    if path.suffix == ".xml":
        totals = ElementTree.parse(path).getroot().find("testsuite").attrib
        return {name: int(totals[name]) for name in ("tests", "failures", "errors", "skipped")}
    return json.loads(path.read_text())
