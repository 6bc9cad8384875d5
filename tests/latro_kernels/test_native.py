"""The binding: what latro.h declares is what the libraries export and what Python passes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
    assert arguments == pointers * 9 + counts * 3 + [ctypes.c_float] * 2 + pointers
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
    with pytest.raises(TypeError, match="latro_cpu_linear_logprob_forward takes 26 arguments, got"):
        native.call("latro_cpu_linear_logprob_forward", 1)


def test_a_status_becomes_an_exception() -> None:
    no_matrix, no_results = (None, 0, 0), [None] * 10
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
    arguments = [None] * 9 + [1, 1, 0, 0.0, 1.0, None]
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


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Have torch speak of a GPU, with tensors of the CPU; return the calls of `_cuda.so`."""
    calls: list[tuple[Any, ...]] = []
    zeros, stream = torch.zeros, SimpleNamespace(cuda_stream=17)

    def on_the_cpu(*size: int, device: torch.device, **options: Any) -> torch.Tensor:
        return zeros(*size, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch, "zeros", on_the_cpu)
    monkeypatch.setattr(native, "available", lambda name: name == "cuda")
    monkeypatch.setattr(native, "call", lambda *arguments: calls.append(arguments))
    native.runs_on.cache_clear()
    yield calls
    native.runs_on.cache_clear()


def test_a_gpu_is_asked_once_by_a_launch(a_gpu: list[tuple[Any, ...]]) -> None:
    first, second = (torch.device("cuda", index) for index in (0, 1))
    assert all(native.runs_on(device) for device in (first, first, second))
    assert len(a_gpu) == 2
    symbol, *arguments = a_gpu[0]
    assert len(arguments) == len(native.signatures()[symbol][1])
    tile, _, target, row_max, sum_exp, target_logit, *_ = arguments
    for room in (tile, target, row_max, sum_exp, target_logit):
        assert room.numel() >= 1
    assert arguments[-6:] == [1, 1, 0, 0.0, 1.0, 17]


def test_a_gpu_is_asked_whatever_the_default_dtype(a_gpu: list[tuple[Any, ...]]) -> None:
    """The kernel writes fp32, which needs room and alignment."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert native.runs_on(torch.device("cuda", 0))
    finally:
        torch.set_default_dtype(before)
    tensors = [a for a in a_gpu[0] if isinstance(a, torch.Tensor)]
    assert {t.dtype for t in tensors} == {torch.float32, torch.int64}


def test_a_library_for_other_gpus_does_not_run_here(
    a_gpu: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(*arguments: Any) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(native, "call", no_kernel)
    assert not native.runs_on(torch.device("cuda", 0))


def test_a_library_that_was_not_built_runs_nowhere(
    a_gpu: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "available", lambda name: False)
    assert not native.runs_on(torch.device("cuda", 0))
    assert a_gpu == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_runs_there() -> None:
    assert not native.runs_on(torch.device("cuda", 0))


@pytest.mark.gpu
@needs_cuda_library
def test_a_gpu_that_the_library_was_built_for() -> None:
    assert native.runs_on(torch.device("cuda", torch.cuda.current_device()))


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


def test_a_locale_that_is_not_utf_8_changes_nothing() -> None:
    code = (
        "import torch, latro_kernels\n"
        "latro_kernels.gather_logprob(torch.zeros(1, 3), torch.tensor([1]), backend='cpu')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
