"""Under torch.compile: any number of rows in one graph, and errors as without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latro_kernels import gather_logprob, linear_logprob
from tests.latro_kernels.op_cases import CASES, assert_compiles_once_for_any_rows


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("name", CASES)
def test_compiles_once_for_any_number_of_rows(name: str) -> None:
    assert_compiles_once_for_any_rows(CASES[name], "cpu")


@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("op", ["linear_logprob", "gather_logprob"])
def test_targets_are_checked(op: str, has_grad: bool) -> None:
    x, weight = torch.randn(4, 16, requires_grad=has_grad), torch.randn(32, 16)

    def logp(x: Tensor, target: Tensor) -> Tensor:
        if op == "linear_logprob":
            return linear_logprob(x, weight, target)
        return gather_logprob(x @ weight.t(), target)

    compiled = torch.compile(logp, backend="aot_eager", fullgraph=True)
    good, bad = torch.tensor([1, 2, 3, 31]), torch.tensor([1, 2, 3, 32])
    torch.testing.assert_close(compiled(x, good), logp(x, good))
    for function in (logp, compiled):
        with pytest.raises(ValueError, match=r"expected values in 0\.\.31, got 32 in row 3"):
            function(x, bad)
