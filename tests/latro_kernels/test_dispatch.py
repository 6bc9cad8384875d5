"""backend= to an implementation: by name exactly that one, by "auto" the device's, or an error."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from latro_kernels import native
from latro_kernels.dispatch import BACKENDS, resolve
from latro_kernels.native import BackendUnavailableError
from tests.latro_kernels.ops.op import Op
from tests.latro_kernels.ops.table import (
    GATHER_LOGPROB,
    GROUP_ADVANTAGE,
    LINEAR_KL,
    LINEAR_LOGPROB,
    LINEAR_SAMPLE,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto() -> None:
    assert resolve("auto", CPU) == "cpu"
    assert resolve("auto", torch.device("meta")) == "reference"
    if importlib.util.find_spec("triton"):
        assert resolve("auto", CUDA) == "triton"


@pytest.mark.parametrize("is_built", [True, False])
def test_auto_of_an_op_that_takes_cuda_first(
    is_built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `_cuda.so` has code for the GPU, and Triton elsewhere."""
    asked = []

    def runs_on(device: torch.device) -> bool:
        asked.append(device)
        return is_built

    monkeypatch.setattr(native, "runs_on", runs_on)
    monkeypatch.setattr(native, "library", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert resolve("auto", CUDA, cuda_first=True) == ("cuda" if is_built else "triton")
    assert asked == [CUDA]
    assert resolve("auto", CUDA) == resolve("triton", CUDA, cuda_first=True) == "triton"
    assert resolve("auto", CPU, cuda_first=True) == "cpu"
    assert resolve("auto", torch.device("meta"), cuda_first=True) == "reference"
    assert asked == [CUDA]


class ChosenError(Exception):
    """Stops an op as soon as it asks for its backend."""


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (GATHER_LOGPROB, True),
        (GROUP_ADVANTAGE, True),
        (LINEAR_LOGPROB, False),
        (LINEAR_KL, False),
        (LINEAR_SAMPLE, False),
    ],
    ids=lambda of: getattr(of, "name", None),
)
def test_which_ops_take_cuda_first(op: Op, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without products: linear ones would leave Triton's way without a tile in memory."""

    def chosen(backend: str, device: torch.device, *_: object, cuda_first: bool = False) -> str:
        raise ChosenError(cuda_first)

    monkeypatch.setattr(importlib.import_module(f"latro_kernels.{op.name}.ops"), "resolve", chosen)
    with pytest.raises(ChosenError) as choice:
        op.function(**op.good)
    assert choice.value.args == (expected,)


def test_a_name_is_taken_literally() -> None:
    assert resolve("reference", CPU) == resolve("reference", CUDA) == "reference"
    assert resolve("cpu", CPU) == "cpu"


@pytest.mark.parametrize(
    ("backend", "device"), [("cpu", CUDA), ("cuda", CPU), ("triton", CPU)], ids=str
)
def test_a_backend_for_another_device(backend: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"backend '{backend}': expected tensors on"):
        resolve(backend, device)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"expected 'auto' or one of .*'cuda', got 'tpu'"):
        resolve("tpu", CPU)
    assert set(BACKENDS) == {"reference", "cpu", "triton", "cuda"}


def test_nothing_falls_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_HERE", tmp_path)
    native.library.cache_clear()
    try:
        for backend, device in (("auto", CPU), ("cpu", CPU), ("cuda", CUDA)):
            with pytest.raises(BackendUnavailableError, match="is missing"):
                resolve(backend, device)
    finally:
        native.library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for backend in ("auto", "triton"):
        with pytest.raises(BackendUnavailableError, match="'triton': the package triton is not"):
            resolve(backend, CUDA)
