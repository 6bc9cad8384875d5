"""Find the implementation that runs for `backend="auto"` or `backend=<name>`, or raise.

auto, tensors on a CUDA device   triton; of some ops cuda, where it is built for that GPU
auto, tensors on the CPU         cpu, the C++ kernels
a name                           that backend, or an error: nothing falls back in silence
"""

from __future__ import annotations

import importlib.util

import torch

from latro_kernels import native
from latro_kernels.native import BackendUnavailableError

BACKENDS = ("reference", "cpu", "triton", "cuda")


def resolve(backend: str, device: torch.device, *, cuda_first: bool = False) -> str:
    """Return the backend that will run for tensors on `device`.

    Args:
        backend: "auto", or one of `BACKENDS`.
        device: where the op's tensors live.
        cuda_first: whether "auto" is "cuda" where `_cuda.so` has code for the GPU.

    Raises:
        ValueError: an unknown name, or a backend that cannot take tensors of this device.
        BackendUnavailableError: the backend's library or package is not installed.
    """
    if backend == "auto":
        cuda = cuda_first and device.type == "cuda" and native.runs_on(device)
        backend = "cuda" if cuda else default_backend(device)
    if backend not in BACKENDS:
        raise ValueError(
            f"backend: expected 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        )
    if backend == "cpu":
        _require_device(backend, device, "cpu")
        native.library("cpu")
    elif backend == "cuda":
        _require_device(backend, device, "cuda")
        native.library("cuda")
    elif backend == "triton":
        if importlib.util.find_spec("triton") is None:
            raise BackendUnavailableError(
                "backend 'triton': the package triton is not installed; `pip install triton`"
            )
        if device.type != "cuda" and not _interpreted():
            _require_device(backend, device, "cuda")
    return backend


def default_backend(device: torch.device) -> str:
    """Return what "auto" stands for, but for ops that take "cuda" first."""
    return {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")


def _interpreted() -> bool:
    """Return whether Triton runs its kernels in its interpreter, which takes CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _require_device(backend: str, device: torch.device, expected: str) -> None:
    if device.type != expected:
        raise ValueError(f"backend {backend!r}: expected tensors on {expected}, got {device.type}")
