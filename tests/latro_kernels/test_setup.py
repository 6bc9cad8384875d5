"""What the build asks of nvcc; a script stands for one."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def cuda_archs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    if not SETUP.exists():
        pytest.skip("setup.py lies in a clone, not in an installed package")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.delenv("LATRO_CUDA_ARCHS", raising=False)
    return runpy.run_path(str(SETUP))["cuda_archs"]


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
