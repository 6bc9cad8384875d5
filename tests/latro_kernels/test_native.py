"""The binding: what latro.h declares is what the libraries export and what Python passes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latro_kernels import native
from latro_kernels.native import BackendUnavailableError

ROOT = Path(__file__).parents[2]
needs_cuda_library = pytest.mark.skipif(
    not native.available("cuda"), reason="_cuda.so was not built: there was no nvcc"
)


def test_the_header_beside_the_libraries_is_that_of_the_sources() -> None:
    assert (ROOT / "latro_kernels/latro.h").read_text() == (ROOT / "csrc/latro.h").read_text()


def test_types_are_read_from_the_header() -> None:
    result, arguments = native.signatures()["latro_cuda_linear_logprob_fold"]
    pointers, counts = [ctypes.c_void_p], [ctypes.c_int64]
    assert result is ctypes.c_int32
    assert arguments == pointers * 7 + counts * 3 + [ctypes.c_float] * 2 + pointers
    _, arguments = native.signatures()["latro_cpu_group_advantage_forward"]
    assert arguments[-6:] == [*[ctypes.c_double] * 3, *[ctypes.c_int32] * 2, ctypes.c_int64]
    assert native.signatures()["latro_cuda_error_string"] == (ctypes.c_char_p, [ctypes.c_int32])


def test_constants_are_read_from_the_header() -> None:
    assert native.constants()["LATRO_OK"] == 0
    assert native.constants()["LATRO_BAD_DTYPE"] == -1
    codes = {native.dtype_code(d) for d in (torch.float32, torch.bfloat16, torch.float16)}
    assert len(codes) == 3


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_cuda_library)])
def test_the_library_exports_what_the_header_declares_and_nothing_else(name: str) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm to list symbols with")
    path = ROOT / f"latro_kernels/_{name}.so"
    lines = subprocess.run(
        ["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    exported = {line.split()[-1] for line in lines if " T " in line}
    exported -= {"_init", "_fini"}
    assert exported == {s for s in native.signatures() if s.startswith(f"latro_{name}_")}


def test_wrong_number_of_arguments() -> None:
    with pytest.raises(TypeError, match="latro_cpu_linear_logprob_forward takes 24 arguments, got"):
        native.call("latro_cpu_linear_logprob_forward", 1)


def test_a_status_becomes_an_exception() -> None:
    no_matrix, no_results = (None, 0, 0), [None] * 8
    sizes = (0, None, 0, 1, 1, 0.0, 1.0, 1)
    arguments = (*no_matrix, *no_matrix, 99, 0, *no_results, *sizes)
    with pytest.raises(RuntimeError, match="latro_cpu_linear_logprob_forward: LATRO_BAD_DTYPE"):
        native.call("latro_cpu_linear_logprob_forward", *arguments)


@needs_cuda_library
def test_cuda_says_what_is_wrong_in_words() -> None:
    assert native.library("cuda").latro_cuda_error_string(1) == b"invalid argument"


@needs_cuda_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_gpu_raises() -> None:
    arguments = [None] * 7 + [1, 1, 0, 0.0, 1.0, None]
    with pytest.raises(RuntimeError, match=r"latro_cuda_linear_logprob_fold: .*(CUDA|device)"):
        native.call("latro_cuda_linear_logprob_fold", *arguments)


def test_a_missing_library_names_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_HERE", tmp_path)
    native.library.cache_clear()
    try:
        assert not native.available("cuda")
        with pytest.raises(BackendUnavailableError, match=r"_cuda\.so is missing; .*nvcc"):
            native.library("cuda")
        (tmp_path / "_cpu.so").write_bytes(b"no library")
        with pytest.raises(BackendUnavailableError, match=r"backend 'cpu': _cpu\.so: "):
            native.library("cpu")
    finally:
        native.library.cache_clear()


def test_import_is_light() -> None:
    """Neither triton nor transformers comes with `import latro_kernels`."""
    code = (
        "import sys, latro_kernels\n"
        "heavy = {'triton', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
