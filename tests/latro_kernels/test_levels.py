"""The libraries of a wheel, one for each level of x86-64: which is loaded, and what it computes.

They are built here as for a wheel, by setup.py, of one op's source, which takes seconds.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from latro_kernels import native
from tests.latro_kernels.ops.op import DTYPES, assert_same, check
from tests.latro_kernels.ops.table import GATHER_LOGPROB

ROOT = Path(__file__).parents[2]
OF_THE_OP = ("gather_logprob.cpp", "softmax.h", "vector_math.h")
LEVELS = list(native._LEVELS)
SSE = "fpu sse sse2 ssse3 sse4_1 sse4_2 popcnt"
AVX2 = f"{SSE} avx avx2 bmi1 bmi2 f16c fma abm movbe"
AVX512 = f"{AVX2} avx512f avx512dq avx512cd avx512bw avx512vl avx512_bf16"
# What this processor runs, from torch, which asks it and not the kernel.
BEST = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}.get(
    torch.backends.cpu.get_cpu_capability(), "x86-64"
)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (AVX512, ["x86-64-v4", "x86-64-v3", "x86-64"]),
        (AVX2, ["x86-64-v3", "x86-64"]),
        # The first with AVX-512 had neither of these.
        (AVX512.replace(" avx512bw", "").replace(" avx512vl", ""), ["x86-64-v3", "x86-64"]),
        # AVX2 is no level without FMA, nor is what only begins like a flag one.
        (AVX2.replace(" fma", " fma4"), ["x86-64"]),
        (SSE, ["x86-64"]),
        ("", ["x86-64"]),
    ],
)
def test_levels_of_a_processor(flags: str, expected: list[str]) -> None:
    cpuinfo = "processor\t: 0\nmodel name\t: some\nflags\t\t: {}\nbugs\t\t: avx512f\n\n"
    assert native.levels(cpuinfo.format(flags) * 2) == expected
    assert native.levels("processor\t: 0\nFeatures\t: fp asimd\n") == ["x86-64"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a package as in a wheel, with one op's functions in its libraries."""
    if platform.machine() != "x86_64":
        pytest.skip("levels are of x86-64")
    if not (ROOT / "setup.py").exists():
        pytest.skip("setup.py lies in a clone, not in an installed package")
    if shutil.which(os.environ.get("CXX") or "c++") is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("levels")
    (folder / "csrc/cpu").mkdir(parents=True)
    (folder / "latro_kernels").mkdir()
    shutil.copy(ROOT / "setup.py", folder)
    for name in OF_THE_OP:
        shutil.copy(ROOT / "csrc/cpu" / name, folder / "csrc/cpu")
    header = (ROOT / "csrc/latro.h").read_text()
    others = r"^LATRO_API int32_t latro_(?!cpu_gather_logprob)[^;]*;"
    (folder / "csrc/latro.h").write_text(re.sub(others, "", header, flags=re.MULTILINE))
    # Of an earlier build for one processor.
    (folder / "latro_kernels/_cpu.so").write_bytes(b"no library")
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | {"LATRO_MARCH": "portable", "CUDACXX": ""},
        check=True,
        capture_output=True,
    )
    return folder / "latro_kernels"


@pytest.fixture
def package(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a copy of the folder, of which libraries are loaded."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(native, "_HERE", tmp_path)
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """Have the libraries loaded again."""
    cached: list[Callable[..., object]] = [native.header, native.constants, native.signatures]
    for function in [*cached, native.library, native._function]:
        function.cache_clear()  # type: ignore[attr-defined]


def test_the_best_library_is_loaded(package: Path) -> None:
    files = {path.name for path in package.iterdir()}
    assert files == {"latro.h", *(f"_cpu_{level}.so" for level in LEVELS)}
    for level in LEVELS[LEVELS.index(BEST) :]:
        assert native.library("cpu")._name == str(package / f"_cpu_{level}.so")
        (package / f"_cpu_{level}.so").unlink()
        forget()
    # What is left, if anything, is for better processors than this.
    assert not native.available("cpu")


def test_a_library_for_this_processor_comes_first(package: Path) -> None:
    shutil.copy(package / "_cpu_x86-64.so", package / "_cpu.so")
    assert native.library("cpu")._name == str(package / "_cpu.so")


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_passes_the_gate(package: Path, level: str) -> None:
    if LEVELS.index(level) < LEVELS.index(BEST):
        pytest.skip(f"this processor runs {BEST} at most")
    for other in set(LEVELS) - {level}:
        (package / f"_cpu_{other}.so").unlink()
    for dtype in DTYPES:
        for rows in ("random", "peaked", "flat"):
            given = GATHER_LOGPROB.problem((33, 1031), dtype, rows=rows, entropy=True)
            check(given, "cpu")
            few = given.of_rows(slice(5, 18))
            whole, part = given.map(torch.clone).solve("cpu"), few.map(torch.clone).solve("cpu")
            assert_same(part, {name: value[5:18] for name, value in whole.items()})
    assert native.library("cpu")._name == str(package / f"_cpu_{level}.so")
