"""backend= to an implementation: by name exactly that one, by "auto" the device's, or an error."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from latro_kernels import native
from latro_kernels.dispatch import BACKENDS, resolve
from latro_kernels.native import BackendUnavailableError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto() -> None:
    assert resolve("auto", CPU) == "cpu"
    assert resolve("auto", torch.device("meta")) == "reference"
    if importlib.util.find_spec("triton"):
        assert resolve("auto", CUDA) == "triton"


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
    with pytest.raises(ValueError, match="expected 'auto' or one of 'reference', got 'cpu'"):
        resolve("cpu", CPU, supported=("reference",))
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
