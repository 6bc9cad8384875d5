"""Tensors without values, of the meta device and fake ones: every op gives the shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.latro_kernels.op_cases import CASES

each_case = pytest.mark.parametrize("name", CASES)


def to_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)


def forms(tensors: list[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in tensors]


def backends(name: str) -> list[str]:
    """Those that have the case: the reference has no backward in place."""
    return ["auto", "cpu"] if name == "in place" else ["auto", "cpu", "reference"]


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_meta_device(name: str, dtype: torch.dtype) -> None:
    expected = CASES[name].solve("cpu", CASES[name].inputs(6, dtype))
    for backend in backends(name):
        inputs = tuple(to_meta(t) for t in CASES[name].inputs(6, dtype))
        results = CASES[name].solve(backend, inputs)
        assert all(t.is_meta for t in results)
        assert forms(results) == forms(expected)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors(name: str, dtype: torch.dtype) -> None:
    expected = CASES[name].solve("cpu", CASES[name].inputs(6, dtype))
    for backend in backends(name):
        mode = FakeTensorMode()
        inputs = tuple(mode.from_tensor(t) for t in CASES[name].inputs(6, dtype))
        with mode:
            results = CASES[name].solve(backend, inputs)
        assert all(isinstance(t, FakeTensor) for t in results)
        assert forms(results) == forms(expected)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "filtered"])
def test_the_shapes_of_a_backend_that_cannot_run_here(name: str, backend: str) -> None:
    expected = CASES[name].solve("cpu", CASES[name].inputs(6, torch.bfloat16))
    inputs = tuple(to_meta(t) for t in CASES[name].inputs(6, torch.bfloat16))
    assert forms(CASES[name].solve(backend, inputs)) == forms(expected)
