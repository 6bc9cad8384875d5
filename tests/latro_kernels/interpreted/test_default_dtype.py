"""The Triton backends under any default dtype: test_triton_interpreted.py runs this."""

from __future__ import annotations

import pytest
import torch

from latro_kernels.linear_logprob.triton import fused as driver
from tests.latro_kernels.op_cases import CASES, assert_default_dtype_does_not_matter

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_any_default_dtype(
    name: str,
    dtype: torch.dtype,
    small_tiles: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "TILE_ROWS", 4)
    assert_default_dtype_does_not_matter(CASES[name], "triton", dtype, torch.bfloat16, 6)
