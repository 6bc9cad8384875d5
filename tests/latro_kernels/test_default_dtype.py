"""torch's default dtype is the caller's: no op's memory or result depends on it."""

from __future__ import annotations

import pytest
import torch

from tests.latro_kernels.op_cases import CASES, assert_default_dtype_does_not_matter

GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")]


@pytest.mark.parametrize("backend", ["cpu", *GPU])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_any_default_dtype(
    name: str, dtype: torch.dtype, default: torch.dtype, backend: str, small_tiles: None
) -> None:
    if name == "filtered" and backend == "cuda":
        pytest.skip("cuda has no filter")
    device = "cpu" if backend == "cpu" else "cuda"
    assert_default_dtype_does_not_matter(CASES[name], backend, dtype, default, 30, device)
