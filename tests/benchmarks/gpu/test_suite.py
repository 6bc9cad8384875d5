from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import suite as gpu_suite
from benchmarks.gpu.stages import Stage

NAMES = ["build", "peers", "tests", "sanitize", "chip", "tuning", "logprob", "forms", "head", "ops"]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def by_name(tmp_path, wheels=None, data=None) -> dict[str, Stage]:
    stages = gpu_suite.stages(tmp_path, wheels, tmp_path / "installed", data)
    return {stage.name: stage for stage in stages}


def test_stages_stand_in_the_order_of_their_description(tmp_path):
    assert list(by_name(tmp_path)) == NAMES
    described = [gpu_suite.__doc__.index(f"\n- {name}: ") for name in NAMES]
    assert described == sorted(described)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("build", "peers")])
def test_stages_that_need_a_gpu_say_so(tmp_path, no_gpu, name):
    obstacles = [obstacle() for obstacle in by_name(tmp_path)[name].obstacles]
    assert obstacles[0] == "no CUDA GPU"


def test_no_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    *_, tool = by_name(tmp_path)["sanitize"].obstacles
    assert tool() == "no compute-sanitizer on the PATH"


def test_the_sanitizer_sees_every_allocation(tmp_path):
    stage = by_name(tmp_path)["sanitize"]
    assert stage.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tools = [command[command.index("--tool") + 1] for command in stage.commands]
    assert tools == ["memcheck", "racecheck"]
    assert all("--error-exitcode" in command for command in stage.commands)


def test_peers(tmp_path):
    (obstacle,) = by_name(tmp_path)["peers"].obstacles
    assert obstacle() == "no --peers"
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (obstacle,) = by_name(tmp_path, wheels)["peers"].obstacles
    assert obstacle() == f"no wheels in {wheels}"
    for name in ("trl-1.16.0-py3-none-any.whl", "liger_kernel-0.8.5-py3-none-any.whl"):
        (wheels / name).touch()
    stage = by_name(tmp_path, wheels)["peers"]
    assert [obstacle() for obstacle in stage.obstacles] == [None]
    assert stage.figure(None) == "liger_kernel-0.8.5, trl-1.16.0"
    (command,) = stage.commands
    assert {"--no-index", "--no-deps"} <= set(command)
    assert command[command.index("--target") + 1] == str(tmp_path / "installed")


def test_data_goes_to_the_study(tmp_path):
    (command,) = by_name(tmp_path, data=Path("/text"))["head"].commands
    assert command[-2:] == ("--data", "/text")


def test_every_script_that_a_stage_runs_is_there(tmp_path):
    scripts = {
        word
        for stage in by_name(tmp_path).values()
        for command in stage.commands
        for word in command
        if word.endswith(".py")
    }
    assert len(scripts) == 4
    assert all((gpu_suite.ROOT / script).is_file() for script in scripts)


def test_build_is_skipped_where_no_source_is_newer(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_suite, "no_tool", lambda name: "no nvcc")
    source = tmp_path / "csrc" / "cpu" / "op.cpp"
    built = [tmp_path / "latro_kernels" / name for name in ("_cpu.so", "latro.h")]
    for path in (source, tmp_path / "setup.py", *built):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for path in (source, tmp_path / "setup.py"):
        os.utime(path, (1000, 1000))
    assert gpu_suite.nothing_to_build() == "nothing to do: no source is newer than a library"
    os.utime(built[0], (999, 999))
    assert gpu_suite.nothing_to_build() is None
    os.utime(built[0], (1001, 1001))
    monkeypatch.setattr(gpu_suite, "no_tool", lambda name: None)  # nvcc is there, _cuda.so is not
    assert gpu_suite.nothing_to_build() is None


def test_without_a_gpu_the_suite_ends_well(tmp_path, no_gpu, capsys):
    out = tmp_path / "out"
    assert gpu_suite.main(["--out", str(out), "--only", "ops, chip"]) == 0
    record = json.loads((out / "gpu_suite.json").read_text())
    assert [(s["stage"], s["status"], s["reason"]) for s in record["stages"]] == [
        ("chip", "skipped", "no CUDA GPU"),
        ("ops", "skipped", "no CUDA GPU"),
    ]
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"].keys() >= {"device", "nvcc", "triton"}
    assert record["results"] == {}
    assert all(goal["met"] is None for goal in record["goals"])
    printed = capsys.readouterr().out
    assert printed.index("Stages") < printed.index("no CUDA GPU") < printed.index("Goals")


def test_a_failed_stage_is_the_exit_status(tmp_path, monkeypatch, capsys):
    fails = Stage("chip", [(sys.executable, "-S", "-c", "raise SystemExit(2)")], 20)
    monkeypatch.setattr(gpu_suite, "stages", lambda *_: [fails])
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    assert "exit status 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "chip,gpu"], "--only: expected some of build, peers, tests, sanitize, chip"),
        (["--peers", "/nowhere"], "--peers: expected a folder, got '/nowhere'"),
    ],
)
def test_bad_arguments_say_what_was_expected(tmp_path, argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main(["--out", str(tmp_path), *argv])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
