"""Cells are run as they should be, with commands that take no time."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from latro.terminal import Terminal
from studies.cells import Cell, Failure, finished, run_cells

# `python -m quick DO…` replaces a cell's command: each word does something.
QUICK = """
import json, os, pathlib, sys, time
name, *words = sys.argv[1:]
work = pathlib.Path("work") / name
work.mkdir(parents=True, exist_ok=True)
with open("order.txt", "a") as file:
    print(name, *words, os.environ["OMP_NUM_THREADS"], file=file)
for word in words:
    if word == "fail":
        print("\\n".join(f"line {i}" for i in range(50)))
        sys.exit(3)
    if word == "sleep":
        pathlib.Path("pid.txt").write_text(str(os.getpid()))
        time.sleep(600)
    if word == "train":
        (work / "model").mkdir()
        log = [{"loss": 1.0, "kl": float(i), "reward": -1.0} for i in range(12)]
        lines = "".join(json.dumps(line) + "\\n" for line in [{"eval": 1}, *log])
        (work / "model" / "metrics.jsonl").write_text(lines)
    if word == "evaluate":
        metrics = {"accuracy_greedy": 0.25, "maj@8": 0.5}
        (work / "evaluation.json").write_text(json.dumps({"metrics": metrics, "problems": 7}))
    if word.startswith("base/"):
        pathlib.Path(word).mkdir(parents=True, exist_ok=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "quick.py").write_text(QUICK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "study"


@pytest.fixture
def run(folder: Path) -> Callable[..., tuple[list[Failure], str]]:
    """Return `run(cells, jobs=1)`, which returns the failures and what was printed."""

    def call(cells: list[Cell], jobs: int = 1) -> tuple[list[Failure], str]:
        console = Terminal(file=io.StringIO(), width=200)
        failures = run_cells(cells, folder, jobs=jobs, console=console, on_finish=lambda: None)
        return failures, console.file.getvalue()

    return call


def cell(name: str, *steps: str, base: Cell | None = None) -> Cell:
    commands = tuple(("quick", name, *step.split()) for step in steps)
    return Cell(name, "main", "llama", "arithmetic", "latro", 1, {"beta": 1}, {}, commands, base)


def base_model() -> Cell:
    command = ("quick", "b", "base/llama-arithmetic")
    return Cell("b", "base model", "llama", "arithmetic", commands=(command,), result=command[2])


def order(folder: Path) -> list[str]:
    return (folder / "order.txt").read_text().splitlines()


def test_a_cell_leaves_its_record_and_nothing_else(folder, run):
    failures, printed = run([cell("a", "train", "evaluate")])
    assert failures == []
    assert "a: " in printed
    assert "greedy 25.0%, maj@8 50.0%" in printed
    record = json.loads((folder / "cells" / "a.json").read_text())
    assert record["metrics"] == {"accuracy_greedy": 0.25, "maj@8": 0.5}
    assert record["problems"] == 7
    assert record["settings"] == {"beta": 1}
    assert record["commands"] == ["python -m quick a train", "python -m quick a evaluate"]
    assert len(record["seconds"]) == 2
    # Means over the last ten of twelve updates; the rationale's length was not logged.
    assert record["training"] == {"kl": 6.5, "reward": -1.0}
    assert record["environment"]["threads"] == 1
    assert str(folder) not in json.dumps(record)
    assert not (folder / "work" / "a").exists()
    assert order(folder) == ["a train 1", "a evaluate 1"]
    assert "$ python -m quick a evaluate" in (folder / "logs" / "a.log").read_text()


def test_a_finished_cell_is_skipped_until_its_commands_change(folder, run):
    first = cell("a", "evaluate")
    run([first])
    run([first, cell("b", "evaluate")])
    assert order(folder) == ["a evaluate 1", "b evaluate 1"]
    changed = cell("a", "train", "evaluate")
    assert finished(changed, folder) is None
    run([changed])
    assert order(folder)[2:] == ["a train 1", "a evaluate 1"]
    assert finished(changed, folder) is not None


def test_what_an_interrupted_run_left_is_cleared(folder, run):
    left = folder / "work" / "a" / "model"
    left.mkdir(parents=True)
    failures, _ = run([cell("a", "train", "evaluate")])  # its mkdir fails where the folder is
    assert failures == []


def test_a_base_model_is_made_once_and_kept(folder, run):
    base = base_model()
    cells = [base, cell("a", "evaluate", base=base), cell("c", "evaluate", base=base)]
    failures, _ = run(cells, jobs=3)
    assert failures == []
    assert order(folder)[0] == "b base/llama-arithmetic 1"
    assert len(order(folder)) == 3
    assert (folder / "base" / "llama-arithmetic").is_dir()
    # A change of the base model's commands changes all cells that start from it.
    other = replace(base, commands=((*base.commands[0], "more"),))
    assert finished(replace(cells[1], base=other), folder) is None
    (folder / "base" / "llama-arithmetic").rmdir()
    assert finished(base, folder) is None


def test_a_failure_is_reported_and_the_others_go_on(folder, run):
    failures, printed = run([cell("a", "train", "fail", "evaluate"), cell("c", "evaluate")])
    assert [(f.name, f.reason) for f in failures] == [("a", "quick ended with status 3")]
    assert failures[0].log_tail.splitlines()[-1] == "line 49"
    assert len(failures[0].log_tail.splitlines()) == 20
    assert "line 49" in printed
    assert not (folder / "cells" / "a.json").exists()
    assert (folder / "cells" / "c.json").exists()
    assert "a evaluate 1" not in order(folder)


def test_a_command_that_leaves_nothing_is_a_failure(run):
    failures, _ = run([cell("a", "train")])
    assert [f.reason for f in failures] == ["it left no work/a/evaluation.json"]


def test_what_starts_from_a_failed_base_model_is_not_run(folder, run):
    base = replace(base_model(), commands=(("quick", "b", "fail"),))
    failures, _ = run([base, cell("a", "evaluate", base=base), cell("c", "evaluate")])
    assert {f.name: f.reason for f in failures} == {
        "b": "quick ended with status 3",
        "a": "its base model failed",
    }
    assert (folder / "cells" / "c.json").exists()


def test_an_interruption_ends_the_processes_and_keeps_what_is_finished(folder):
    def interrupted() -> None:
        deadline = time.monotonic() + 60
        while not (folder / "pid.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        raise KeyboardInterrupt

    cells = [cell("a", "sleep", "evaluate"), cell("c", "evaluate"), cell("d", "evaluate")]
    console = Terminal(file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        run_cells(cells, folder, jobs=2, console=console, on_finish=interrupted)
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid.txt").read_text()), 0)
    assert (folder / "cells" / "c.json").exists()
    assert not (folder / "cells" / "a.json").exists()
    assert not any(line.startswith("d ") for line in order(folder))
