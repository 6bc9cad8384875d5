"""linear_logprob among torch's own machinery, and what it says to wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from latro_kernels import linear_logprob
from tests.latro_kernels.logprob_cases import problem

OPS = torch.ops.latro_kernels


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, with_entropy: bool, frozen: bool) -> None:
    given = problem((9, 8, 31), dtype, bias=True, entropy=True)
    inputs = (given.hidden, given.weight, given.target, given.bias, 0.7, 3.0, "auto")
    arguments = (*inputs, True, with_entropy, frozen, not frozen, 0 if frozen else 2**20)
    torch.library.opcheck(OPS.linear_logprob.default, arguments)
    peak, total, picked, _, pull, kept, block_peak = OPS.linear_logprob(*arguments)
    logp = picked - peak - total.log()
    if frozen:
        pulled = (given.weight, given.target, pull, -1 / total, -torch.expm1(logp))
        torch.library.opcheck(OPS.linear_logprob_frozen_backward.default, pulled)
        return
    entropy = logp.clone() if with_entropy else None
    grad_entropy = given.grad_entropy if with_entropy else None
    rows = (logp, entropy, peak, total.log(), given.grad_logp, grad_entropy)
    for needs in ([True, True, True], [True, False, False]):
        arguments = (*inputs, *rows, kept, block_peak, 1e-3, needs)
        torch.library.opcheck(OPS.linear_logprob_backward.default, arguments)


@pytest.mark.parametrize(
    "options", [{}, {"memory_budget": 0}, {"grad_filter": 1e-3}, {"frozen": True}], ids=str
)
@pytest.mark.parametrize("entropy", [False, True])
def test_compiles_as_one_graph(entropy: bool, options: dict[str, Any]) -> None:
    given = problem((9, 8, 31), bias=True, entropy=True)
    frozen = options.pop("frozen", False)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out = linear_logprob(
            hidden, weight, given.target, bias=bias, return_entropy=entropy, **options
        )
        if entropy:
            return (out[0] * given.grad_logp).sum() + (out[1] * given.grad_entropy).sum()
        return (out * given.grad_logp).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        inputs = [t.clone() for t in (given.hidden, given.weight, given.bias)]
        trained = inputs[:1] if frozen else inputs
        for t in trained:
            t.requires_grad_()
        value = function(*inputs)
        value.backward()
        results.append([value.detach(), *(t.grad for t in trained)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_autocast_casts_as_linear_does() -> None:
    given = problem((9, 150, 31), bias=True)
    hidden, weight, bias = (
        t.clone().requires_grad_() for t in (given.hidden, given.weight, given.bias)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(hidden, weight, bias).dtype == torch.bfloat16
        logp = linear_logprob(hidden, weight, given.target, bias=bias)
    low = (t.detach().bfloat16() for t in (hidden, weight))
    expected = linear_logprob(*low, given.target, bias=bias.detach().bfloat16())
    assert torch.equal(logp, expected)
    logp.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


def test_backward_under_autocast() -> None:
    """The products of the backward keep their dtype where autocast is still on."""
    given = problem((9, 8, 31))
    gradients = []
    for enabled in (False, True):
        hidden = given.hidden.clone().requires_grad_()
        logp = linear_logprob(hidden, given.weight, given.target)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logp.sum().backward()
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


def test_double_backward_is_refused() -> None:
    given = problem((9, 8, 31))
    hidden = given.hidden.requires_grad_()
    logp = linear_logprob(hidden, given.weight, given.target)
    with pytest.raises(RuntimeError, match="linear_logprob has no double backward"):
        torch.autograd.grad(logp.sum(), hidden, create_graph=True)


GOOD: dict[str, Any] = {
    "hidden": torch.zeros(4, 3),
    "weight": torch.zeros(5, 3),
    "target": torch.zeros(4, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor, got list"),
        ({"hidden": torch.zeros(1, 4, 3)}, ValueError, "hidden: expected 2 dimensions, got shape"),
        ({"weight": torch.zeros(5)}, ValueError, "weight: expected 2 dimensions, got shape"),
        ({"weight": torch.zeros(5, 2)}, ValueError, r"weight: expected shape \[V, H\].*H = 3"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "weight: .*V > 0"),
        ({"weight": torch.zeros(5, 3).half()}, TypeError, "weight: expected the dtype of hidden"),
        ({"weight": torch.zeros(5, 3, device="meta")}, ValueError, "weight: expected the device"),
        (
            {"hidden": torch.zeros(4, 3).int()},
            TypeError,
            "hidden: expected dtype .*got torch.int32",
        ),
        ({"hidden": torch.zeros(4, 3).double()}, TypeError, "hidden: expected dtype torch.float32"),
        ({"target": torch.zeros(3).long()}, ValueError, r"target: expected shape \(4,\).*got 3"),
        ({"target": torch.zeros(4, 1).long()}, ValueError, "target: expected 1 dimension, got"),
        ({"target": torch.zeros(4).int()}, TypeError, "target: expected dtype torch.int64"),
        ({"target": torch.tensor([0, 4, 5, 9])}, ValueError, r"0\.\.4, got 5 in row 2"),
        ({"target": torch.tensor([0, 4, -1, 9])}, ValueError, r"0\.\.4, got -1 in row 2"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5,\).*got 4"),
        ({"bias": torch.zeros(5, 1)}, ValueError, "bias: expected 1 dimension, got"),
        ({"bias": torch.zeros(5).bfloat16()}, TypeError, "bias: expected the dtype of hidden"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0"),
        ({"temperature": float("nan")}, ValueError, "temperature: .*got nan"),
        ({"temperature": "1"}, TypeError, "temperature: expected a float, got str"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a finite number above 0, got -1"),
        ({"softcap": float("inf")}, ValueError, "softcap: .*got inf"),
        ({"memory_budget": -1}, ValueError, "memory_budget: expected 0 or more bytes, got -1"),
        ({"memory_budget": 1e6}, TypeError, "memory_budget: expected bytes as an int, got float"),
        ({"grad_filter": -0.1}, ValueError, "grad_filter: expected a finite number, 0 or more"),
        ({"grad_filter": "no"}, TypeError, "grad_filter: expected a float, got str"),
        (
            {"grad_filter": 0.1, "backend": "cuda"},
            ValueError,
            "grad_filter: expected 0 with backend 'cuda'",
        ),
        ({"group": 3}, TypeError, "group: expected a ProcessGroup, got int"),
        ({"backend": "fast"}, ValueError, "backend: expected 'auto' or one of"),
        ({"backend": None}, TypeError, "backend: expected a str, got NoneType"),
        ({"backend": "cuda"}, (ValueError, RuntimeError), "backend 'cuda'"),
        ({"backend": "triton"}, ValueError, "backend 'triton': expected tensors on cuda, got cpu"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: Any, message: str) -> None:
    linear_logprob(**GOOD)
    with pytest.raises(error, match=message):
        linear_logprob(**(GOOD | change))


def test_target_values_are_checked_by_the_reference_too() -> None:
    with pytest.raises(ValueError, match="got 5 in row 0"):
        linear_logprob(**(GOOD | {"target": torch.full((4,), 5)}), backend="reference")
