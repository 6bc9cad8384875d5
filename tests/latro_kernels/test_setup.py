"""What the build asks of the compilers; a script stands for nvcc."""

from __future__ import annotations

import platform
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools

from latro_kernels import native

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the names of setup.py, without any of its settings."""
    if not SETUP.exists():
        pytest.skip("setup.py lies in a clone, not in an installed package")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for setting in ("LATRO_CUDA_ARCHS", "LATRO_MARCH", "CXX"):
        monkeypatch.delenv(setting, raising=False)
    return runpy.run_path(str(SETUP))


@pytest.fixture
def cuda_archs(build: dict[str, Any]) -> Callable[[str], list[str]]:
    return build["cuda_archs"]


def marches(build: dict[str, Any]) -> dict[str, set[str]]:
    """Return what -march the sources of each library are compiled for, by the library's file."""
    text = build["ninja_file"](None, Path("out"))
    compiled = dict(
        re.findall(r"^build (\S+\.o): .*\n  flags = .*-march=(\S+)", text, re.MULTILINE)
    )
    linked = re.findall(r"^build out/(\S+\.so): cxxlink (.*)", text, re.MULTILINE)
    return {library: {compiled[o] for o in objects.split()} for library, objects in linked}


@pytest.mark.parametrize("march", ["native", "x86-64-v3"])
def test_one_library_for_one_processor(
    build: dict[str, Any], march: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATRO_MARCH", march)
    assert marches(build) == {"_cpu.so": {march}}


def test_a_wheel_has_a_library_for_each_level_that_is_looked_for(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATRO_MARCH", "portable")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert marches(build) == {f"_cpu_{level}.so": {level} for level in native._LEVELS}


def test_a_wheel_for_other_processors_is_refused(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATRO_MARCH", "portable")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(SystemExit, match=r"LATRO_MARCH: expected .* got 'portable' on aarch64"):
        build["cpu_libraries"]()


def nvcc(folder: Path, *archs: int) -> str:
    path = folder / "nvcc"
    lines = "".join(f"echo compute_{arch}\n" for arch in archs)
    path.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] || exit 1\n{lines}')
    path.chmod(0o755)
    return str(path)


def test_every_architecture_that_is_known(
    cuda_archs: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cuda_archs(nvcc(tmp_path, 75, 80, 90, 100, 120)) == ["80", "90", "100"]
    assert capsys.readouterr().err == ""


def test_an_older_compiler_is_not_asked_for_more(
    cuda_archs: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cuda_archs(nvcc(tmp_path, 50, 80, 90)) == ["80", "90"]
    assert "does not know sm_100" in capsys.readouterr().err


def test_a_compiler_that_knows_none(cuda_archs: Callable[[str], list[str]], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="knows none of sm_80, sm_90, sm_100"):
        cuda_archs(nvcc(tmp_path, 120))


def test_what_the_user_names_is_taken(
    cuda_archs: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATRO_CUDA_ARCHS", "86;89")
    assert cuda_archs(nvcc(tmp_path, 50)) == ["86", "89"]
