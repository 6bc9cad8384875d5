from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import suite as gpu_suite
from benchmarks.gpu.sample import SMOKE
from benchmarks.gpu.stages import ROOT, Stage

MEASURED = ["build", "chip", "tuning", "head", "peers", "ops", "forms"]
CHECKED = ["smoke", "tests", "memcheck", "racecheck"]
PACKAGES = ("datasets", "trl", "liger_kernel", "cut_cross_entropy")
"""Packages that are missing on a machine with only PyTorch and Triton."""


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def by_name(work, device="cuda", wheels=None, data=None) -> dict[str, Stage]:
    stages = gpu_suite.stages(
        work, device=device, wheels=wheels, installed=work / "installed", data=data
    )
    return {stage.name: stage for stage in stages}


def test_stages_stand_in_the_order_of_their_description(tmp_path):
    names = [*MEASURED, *CHECKED]
    assert list(by_name(tmp_path)) == names
    described = [gpu_suite.__doc__.index(f"\n- {name}") for name in names[:-1]]
    assert described == sorted(described)
    assert "\n- memcheck, racecheck: " in gpu_suite.__doc__


@pytest.mark.parametrize("name", [*MEASURED[1:], *CHECKED])
def test_stages_that_need_a_gpu_say_so(tmp_path, no_gpu, name):
    obstacles = [obstacle() for obstacle in by_name(tmp_path)[name].obstacles]
    assert obstacles[0] == "no CUDA GPU"


def test_no_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("memcheck", "racecheck"):
        *_, tool = by_name(tmp_path)[name].obstacles
        assert tool() == "no compute-sanitizer on the PATH"


def test_a_sanitizer_sees_every_allocation_of_our_kernels_and_no_other(tmp_path):
    kernels = {
        name
        for path in (ROOT / "csrc" / "cuda").glob("*.cu*")
        for name in re.findall(
            r"__global__[^;{]*?(\w+)\(\n? *(?:const|int|float|T)", path.read_text()
        )
    }
    assert len(kernels) > 3
    for tool in ("memcheck", "racecheck"):
        stage = by_name(tmp_path)[tool]
        assert stage.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        (command,) = stage.commands
        assert command[command.index("--tool") + 1] == tool
        assert "--error-exitcode" in command
        regex = command[command.index("--kernel-name") + 1].removeprefix("regex=")
        assert all(re.search(regex, kernel) for kernel in kernels)
        assert not re.search(regex, "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x3_tn")


def test_build_is_for_the_gpu_that_is_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu_suite.one_architecture() == {"LATRO_CUDA_ARCHS": "90"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.one_architecture() == {}


def test_wheels_are_installed_before_the_peers_are_measured(tmp_path):
    (measure,) = by_name(tmp_path)["peers"].commands
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("trl-1.16.0-py3-none-any.whl", "liger_kernel-0.8.5-py3-none-any.whl"):
        (wheels / name).touch()
    install, then = by_name(tmp_path, wheels=wheels)["peers"].commands
    assert then == measure
    assert {"--no-index", "--no-deps"} <= set(install)
    assert install[install.index("--target") + 1] == str(tmp_path / "installed")
    assert [Path(word).name for word in install[-2:]] == [
        "liger_kernel-0.8.5-py3-none-any.whl",
        "trl-1.16.0-py3-none-any.whl",
    ]


def test_data_goes_to_the_study(tmp_path):
    (command,) = by_name(tmp_path, data=Path("/text"))["forms"].commands
    assert command[-2:] == ("--data", "/text")


def test_every_script_and_folder_that_a_stage_names_is_there(tmp_path):
    words = {
        word
        for stage in by_name(tmp_path).values()
        for command in stage.commands
        for word in command
        if word.endswith(".py") or word.startswith("tests/")
    }
    assert {word for word in words if word.startswith("tests/")} == set(gpu_suite.FOLDERS)
    assert all((ROOT / word).exists() for word in words)


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


def test_tests_are_counted_up_to_where_they_were_cut_off(tmp_path):
    log = tmp_path / "tests.log"
    log.write_text(
        "tests/a.py::test_one \n"
        "[gw1] [  5%] PASSED tests/a.py::test_one \n"
        "[gw0] [ 10%] FAILED tests/a.py::test_two \n"
        "[gw0] [100%] PASSED tests/a.py::test_three \n"
        "FAILED tests/a.py::test_two - AssertionError\n"
    )
    counts = gpu_suite.counted_tests(log)
    assert counts == {"PASSED": 2, "FAILED": 1}
    assert gpu_suite.tests_figure(counts) == "1 failed, 2 passed"
    assert gpu_suite.tests_figure({}) == "none"


def test_the_best_block_is_kept_and_named(tmp_path, monkeypatch):
    blocks = pytest.importorskip("latro_kernels.linear_logprob.triton.blocks")
    saved = tmp_path / "installed" / "tuned.json"
    monkeypatch.setattr(blocks, "saved_path", lambda: saved)
    assert gpu_suite.saved_blocks(tmp_path) is None
    saved.parent.mkdir()
    block = {"rows": 128, "columns": 256, "depth": 64, "stages": 3, "warps": 8}
    saved.write_text(json.dumps([{"config": block, "milliseconds": 12.345}]))
    found = gpu_suite.saved_blocks(tmp_path)
    assert found == json.loads((tmp_path / "tuned.json").read_text())
    assert gpu_suite.fastest_block(found) == "128 × 256 × 64, 3 stages: 12.35 ms"
    found[-1]["config"]["warp_specialized"] = True
    said = "128 × 256 × 64, 3 stages, warp-specialised: 12.35 ms"
    assert gpu_suite.fastest_block(found) == said


def sampled(tmp_path, part: str) -> set[str]:
    """Return the tests that a part selects of a hundred, of which ten are deselected."""
    path = tmp_path / "test_many.py"
    path.write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(100))\ndef test_of_many(n): pass\n"
    )
    command = (sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.sample", "--part", part)
    command += ("--collect-only", "-q", "-k", "not (91 or 92 or 93)", "--rootdir", str(tmp_path))
    # Options that these tests themselves were given would change what is printed.
    environment = os.environ | {"PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        (*command, str(path)), cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return {line for line in done.stdout.splitlines() if "::" in line}


def test_the_parts_are_forty_even_ones_and_the_rest(tmp_path):
    smoke, rest = sampled(tmp_path, "smoke"), sampled(tmp_path, "rest")
    assert len(smoke) == SMOKE
    assert len(rest) == 97 - SMOKE
    assert not smoke & rest
    numbers = sorted(int(re.search(r"\[(\d+)\]", test)[1]) for test in smoke)
    gaps = {later - earlier for earlier, later in itertools.pairwise(numbers)}
    assert gaps <= {2, 3, 4, 5, 6}


def test_without_a_gpu_the_suite_ends_well(tmp_path, no_gpu, ordinary_signals, capsys):
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
    assert printed.index("Goals") < printed.index("Published elsewhere")


def test_a_failed_stage_is_the_exit_status(tmp_path, monkeypatch, ordinary_signals, capsys):
    fails = Stage("chip", [(sys.executable, "-S", "-c", "raise SystemExit(2)")], 20)
    monkeypatch.setattr(gpu_suite, "stages", lambda *_, **__: [fails])
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    assert "exit status 2" in capsys.readouterr().out


@pytest.mark.long
def test_a_rehearsal_fits_what_a_bare_machine_has_and_what_it_gives_back(tmp_path):
    """Run every stage on the CPU, without what a bare machine does not have."""
    for package in PACKAGES:
        (tmp_path / "hidden" / package).mkdir(parents=True)
        hidden = f"raise ModuleNotFoundError('{package} is hidden')\n"
        (tmp_path / "hidden" / package / "__init__.py").write_text(hidden)
    out = tmp_path / "out"
    command = (sys.executable, "benchmarks/gpu/suite.py", "--device", "cpu", "--out", str(out))
    done = subprocess.run(
        (*command, "--data", str(tmp_path / "absent")),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "hidden")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(out.iterdir())
    assert [path.name for path in files] == ["gpu_suite.json", "gpu_suite.tar.gz"]
    assert all(path.stat().st_size < 16 << 20 for path in files)
    record = json.loads(files[0].read_text())
    status = {stage["stage"]: stage["status"] for stage in record["stages"]}
    assert list(status) == [*MEASURED, *CHECKED]
    skipped = {"tuning", "memcheck", "racecheck"}
    assert {name for name, how in status.items() if how == "skipped"} - {"build"} == skipped
    assert record["results"]["smoke"] == {"SKIPPED": SMOKE}
    assert record["results"]["tests"]["SKIPPED"] > SMOKE
    absent = [line for line in record["results"]["peers"]["cannot_run"] if "is hidden" in line]
    # The other programs need a GPU first of all.
    assert [line.partition(" ")[0] for line in absent] == ["trl", "liger"]
    with tarfile.open(files[1]) as archive:
        kept = Counter(Path(name).suffix for name in archive.getnames())
        assert "forms/study_head.csv" in archive.getnames()
    assert kept[".log"] == len([how for how in status.values() if how != "skipped"])
    assert not kept[".pt"]


def test_the_documented_commands_name_every_stage_and_fit_ten_minutes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wheels").mkdir()
    page = read(ROOT / "docs" / "results.md")
    lines = re.findall(r"^python benchmarks/gpu/suite.py .*$", page.replace("\\\n", ""), re.M)
    chosen = [gpu_suite.parse_args(shlex.split(line)[2:]) for line in lines if "--only" in line]
    assert [args.only for args in chosen] == [MEASURED, ["build", *CHECKED]]
    limits = {name: stage.limit_s for name, stage in by_name(tmp_path).items()}
    for args in chosen:
        assert sum(limits[name] for name in args.only) <= 60 * args.minutes < 600


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "chip,gpu"], "--only: expected some of build, chip, tuning, head, peers, ops"),
        (["--peers", "/nowhere"], "--peers: expected a folder, got '/nowhere'"),
    ],
)
def test_bad_arguments_say_what_was_expected(tmp_path, argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main(["--out", str(tmp_path), *argv])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
