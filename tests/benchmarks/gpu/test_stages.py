from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu import stages
from benchmarks.gpu.stages import ROOT, Stage, run_all


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def run(chosen, logs, seconds=60.0, after=lambda outcomes, results: None):
    outcomes, results = run_all(chosen, logs, seconds=seconds, paths=(ROOT,), after=after)
    return {outcome.stage: outcome for outcome in outcomes}, results


def reading(path: Path) -> Callable[[], str | None]:
    return lambda: path.read_text(encoding="utf-8") if path.exists() else None


def test_a_stage_that_fails_stops_no_other(tmp_path):
    result = tmp_path / "last.txt"
    outcomes, results = run(
        [
            Stage("breaks", [python("print('why'); raise SystemExit(3)")], 20),
            Stage("dies", [python("import os; os.abort()"), python("print('goes on')")], 20),
            Stage(
                "works",
                [python(f"open({str(result)!r}, 'w').write('12')")],
                20,
                read=reading(result),
                figure=lambda text: f"sum {sum(map(int, text))}",
            ),
        ],
        tmp_path,
    )
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "breaks": "failed",
        "dies": "failed",
        "works": "passed",
    }
    assert outcomes["breaks"].reason == "exit status 3"
    assert outcomes["breaks"].tail[-1] == "why"
    assert outcomes["dies"].reason == "exit status -6"
    assert outcomes["dies"].tail[-1] == "goes on"
    assert outcomes["works"].figure == "sum 3"
    assert results == {"works": "12"}


def test_what_is_known_is_told_after_every_stage(tmp_path):
    told = []
    run(
        [
            Stage("first", [python("")], 20, read=lambda: 1),
            Stage("second", [python("raise SystemExit(1)")], 20),
            Stage("third", [python("")], 20, obstacles=[lambda: "no GPU"]),
        ],
        tmp_path,
        after=lambda outcomes, results: told.append(
            ([(of.stage, of.status) for of in outcomes], dict(results))
        ),
    )
    stages = [("first", "passed"), ("second", "failed"), ("third", "skipped")]
    assert told == [(stages[:count], {"first": 1}) for count in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.log", "second.log"]


def test_an_obstacle_skips_a_stage(tmp_path):
    obstacles = [lambda: None, lambda: "no GPU", lambda: "no compiler"]
    stage = Stage("stage", [python("raise SystemExit(1)")], 20, obstacles=obstacles)
    outcomes, results = run([stage], tmp_path)
    assert (outcomes["stage"].status, outcomes["stage"].reason) == ("skipped", "no GPU")
    assert results == {}


def test_a_stage_over_its_limit_ends_with_what_it_started(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(alive)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    outcomes, _ = run([Stage("slow", [python(code), python("")], 1.0)], tmp_path)
    assert outcomes["slow"].status == "failed"
    assert outcomes["slow"].reason == "not done after 1 s; no time left for its next command"
    time.sleep(1.5)
    assert not alive.exists()


def test_a_stage_ends_what_it_leaves_behind(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(alive)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {child!r}])"
    outcomes, _ = run([Stage("leaves", [python(code)], 20)], tmp_path)
    assert outcomes["leaves"].status == "passed"
    time.sleep(2.5)
    assert not alive.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stages_end_with_what_runs_them(tmp_path, number):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(60)"
    code = f"""
import signal, sys
from pathlib import Path
from benchmarks.gpu.stages import Stage, run_all
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
command = (sys.executable, "-S", "-c", {child!r})
run_all([Stage("long", [command], 60)], Path({str(tmp_path)!r}), seconds=60, paths=(),
        after=lambda outcomes, _: print(outcomes[-1].reason))
"""
    suite = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (pid.exists() and pid.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    suite.send_signal(number)
    said, _ = suite.communicate()
    assert suite.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert said == ("interrupted\n" if number == signal.SIGTERM else "")
    time.sleep(0.2)
    status = Path("/proc", pid.read_text().strip(), "status")
    # A process that has ended stays a zombie until its new parent reaps it.
    assert not status.exists() or "State:\tZ" in status.read_text(encoding="utf-8")


def test_what_a_stage_measured_before_its_limit_is_kept(tmp_path):
    result = tmp_path / "part.txt"
    code = f"import time; open({str(result)!r}, 'w').write('5'); time.sleep(60)"
    outcomes, results = run([Stage("slow", [python(code)], 1.0, read=reading(result))], tmp_path)
    assert outcomes["slow"].status == "failed"
    assert outcomes["slow"].figure == "5"
    assert results == {"slow": "5"}


def test_no_stage_starts_after_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_LEAST_S", 0.5)
    long, late = ("import time; time.sleep(60)", "")
    chosen = [Stage("long", [python(long)], 20), Stage("late", [python(late)], 20)]
    outcomes, _ = run(chosen, tmp_path, seconds=1.0)
    # The deadline shortens the limit of the first.
    assert outcomes["long"].status == "failed"
    assert outcomes["long"].seconds == pytest.approx(1.0, abs=0.5)
    assert outcomes["late"].status == "skipped"
    assert outcomes["late"].reason.startswith("no time left")


def test_environment_and_search_path_of_a_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "inherited")
    code = "import os; print(os.environ['PYTHONPATH'], os.environ['OF_ITS_OWN'], os.getcwd())"
    stage = Stage("stage", [python(code)], 20, environment={"OF_ITS_OWN": "1"})
    outcomes, _ = run([stage], tmp_path)
    assert outcomes["stage"].tail[-1] == f"{ROOT}:inherited 1 {ROOT}"
