"""The Triton backends under torch.compile: test_triton_interpreted.py runs this."""

from __future__ import annotations

import pytest
import torch

from tests.latro_kernels.op_cases import CASES, assert_compiles_once_for_any_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


# The other ops' shapes are the same on every backend.
@pytest.mark.parametrize("name", ["linear_logprob", "frozen"])
def test_compiles_once_for_any_number_of_rows(name: str) -> None:
    torch.compiler.reset()
    assert_compiles_once_for_any_rows(CASES[name], "triton")
