from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import stages
from benchmarks.gpu.stages import ROOT, Stage, read_result, run_all


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def run(chosen, out, seconds=60.0, conclude=lambda results: {}):
    outcomes, results = run_all(chosen, out / "record.json", seconds, (ROOT,), conclude)
    return {outcome.stage: outcome for outcome in outcomes}, results


def test_a_stage_that_fails_stops_no_other(tmp_path):
    result = tmp_path / "last.json"
    outcomes, results = run(
        [
            Stage("breaks", [python("print('why'); raise SystemExit(3)")], 20),
            Stage("dies", [python("import os; os.abort()"), python("print('goes on')")], 20),
            Stage(
                "works",
                [python(f"open({str(result)!r}, 'w').write('[1, 2]')")],
                20,
                result=result,
                figure=lambda numbers: f"sum {sum(numbers)}",
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
    assert results == {"works": [1, 2]}


def test_the_record_is_whole_after_every_stage(tmp_path):
    record = tmp_path / "record.json"
    code = f"import json; print(len(json.load(open({str(record)!r}))['stages']))"
    outcomes, _ = run(
        [Stage(name, [python(code)], 20) for name in ("first", "second", "third")],
        tmp_path,
        conclude=lambda results: {"environment": {"device": "none"}},
    )
    # The first finds no file, the others that of the stage before.
    assert [outcome.status for outcome in outcomes.values()] == ["failed", "passed", "passed"]
    assert outcomes["third"].tail[-1] == "2"
    written = json.loads(record.read_text())
    assert written["environment"] == {"device": "none"}
    assert [stage["stage"] for stage in written["stages"]] == ["first", "second", "third"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("first.log", "record.json", "second.log", "third.log")
    ]


def test_an_obstacle_skips_a_stage_and_leaves_no_old_result(tmp_path):
    result = tmp_path / "old.json"
    result.write_text("[1]")
    stage = Stage(
        "stage",
        [python("raise SystemExit(1)")],
        20,
        obstacles=[lambda: None, lambda: "no GPU", lambda: "no compiler"],
        result=result,
    )
    outcomes, results = run([stage], tmp_path)
    assert (outcomes["stage"].status, outcomes["stage"].reason) == ("skipped", "no GPU")
    assert results == {}
    assert not result.exists()


def test_a_stage_over_its_limit_ends_with_what_it_started(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(alive)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    outcomes, _ = run([Stage("slow", [python(code), python("")], 1.0)], tmp_path)
    assert outcomes["slow"].status == "failed"
    assert outcomes["slow"].reason == "not done after 1 s; no time left for its next command"
    time.sleep(1.5)
    assert not alive.exists()


def test_what_a_stage_measured_before_its_limit_is_kept(tmp_path):
    result = tmp_path / "part.json"
    code = f"import time; open({str(result)!r}, 'w').write('[5]'); time.sleep(60)"
    stage = Stage("slow", [python(code)], 1.0, result=result, figure=str)
    outcomes, results = run([stage], tmp_path)
    assert outcomes["slow"].status == "failed"
    assert outcomes["slow"].figure == "[5]"
    assert results == {"slow": [5]}


def test_no_stage_starts_after_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_LEAST_S", 0.5)
    outcomes, _ = run(
        [
            Stage("long", [python("import time; time.sleep(60)")], 20),
            Stage("late", [python("")], 20),
        ],
        tmp_path,
        seconds=1.0,
    )
    # The deadline shortens the limit of the first.
    assert outcomes["long"].status == "failed"
    assert outcomes["long"].seconds == pytest.approx(1.0, abs=0.5)
    assert outcomes["late"].status == "skipped"
    assert outcomes["late"].reason.startswith("no time left")


def test_environment_and_search_path_of_a_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "inherited")
    code = "import os; print(os.environ['PYTHONPATH'], os.environ['OF_ITS_OWN'], os.getcwd())"
    outcomes, _ = run(
        [Stage("stage", [python(code)], 20, environment={"OF_ITS_OWN": "1"})], tmp_path
    )
    assert outcomes["stage"].tail[-1] == f"{ROOT}:inherited 1 {ROOT}"


def test_counts_of_a_junit_file(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(
        '<?xml version="1.0"?><testsuites><testsuite name="pytest" errors="1" failures="2" '
        'skipped="3" tests="10" time="1.5"><testcase/></testsuite></testsuites>'
    )
    assert read_result(path) == {"tests": 10, "failures": 2, "errors": 1, "skipped": 3}
    assert read_result(Path(tmp_path / "absent.xml")) is None
