"""linear_kl among torch's own machinery, and what it says to wrong arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from latro_kernels import linear_kl
from tests.latro_kernels.kl_cases import fused, problem

OPS = torch.ops.latro_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    given = problem((9, 8, 31), dtype, bias=True)
    arguments = (given.hidden_p, given.weight_p, given.bias_p)
    arguments = (*arguments, given.hidden_q, given.weight_q, None, 0.7, 3.0, "auto")
    torch.library.opcheck(OPS.linear_kl.default, arguments)
    _, *kept = OPS.linear_kl(*arguments)
    for needs in ([True, True, True], [True, False, False]):
        torch.library.opcheck(
            OPS.linear_kl_backward.default, (*arguments, *kept, given.grad_kl, needs)
        )


def test_compiles_as_one_graph() -> None:
    given = problem((9, 8, 31), bias=True, hidden_size_q=5)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        kl = linear_kl(
            *(hidden, weight, given.hidden_q, given.weight_q),
            bias_p=bias,
            bias_q=given.bias_q,
            softcap=3.0,
        )
        return (kl * given.grad_kl).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        inputs = [
            t.clone().requires_grad_() for t in (given.hidden_p, given.weight_p, given.bias_p)
        ]
        value = function(*inputs)
        value.backward()
        results.append([value.detach(), *(t.grad for t in inputs)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_autocast_casts_as_linear_does() -> None:
    given = problem((9, 150, 31), bias=True)
    names = ("hidden_p", "weight_p", "bias_p")
    grown = replace(given, **{n: getattr(given, n).clone().requires_grad_() for n in names})
    with torch.autocast("cpu", torch.bfloat16):
        kl = fused("cpu")(grown)
    names = (*names, "hidden_q", "weight_q", "bias_q")
    low = replace(given, **{n: getattr(given, n).bfloat16() for n in names})
    assert torch.equal(kl, fused("cpu")(low))
    kl.sum().backward()
    assert grown.hidden_p.grad.dtype == grown.weight_p.grad.dtype == torch.float32


def test_double_backward_is_refused() -> None:
    given = problem((9, 8, 31))
    hidden = given.hidden_p.requires_grad_()
    kl = fused("cpu")(given)
    with pytest.raises(RuntimeError, match="linear_kl has no double backward"):
        torch.autograd.grad(kl.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["hidden_q", "weight_q", "bias_q"])
def test_q_is_held_constant(name: str, backend: str) -> None:
    given = problem((9, 8, 31), bias=True)
    trained = replace(given, **{name: getattr(given, name).clone().requires_grad_()})
    with pytest.raises(ValueError, match=rf"{name}: .*not require grad.*pass {name}\.detach\(\)"):
        fused(backend)(trained)
    detached = replace(given, **{name: getattr(trained, name).detach()})
    with torch.no_grad():
        assert torch.equal(fused(backend)(trained), fused(backend)(detached))


GOOD: dict[str, Any] = {
    "hidden_p": torch.zeros(4, 3),
    "weight_p": torch.zeros(5, 3),
    "hidden_q": torch.zeros(4, 2),
    "weight_q": torch.zeros(5, 2),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_p": [1.0]}, TypeError, "hidden_p: expected a tensor, got list"),
        ({"weight_q": None}, TypeError, "weight_q: expected a tensor, got NoneType"),
        ({"hidden_q": torch.zeros(1, 4, 2)}, ValueError, "hidden_q: expected 2 dimensions, got"),
        ({"hidden_q": torch.zeros(3, 2)}, ValueError, "hidden_q: expected 4 rows, .*got 3"),
        ({"weight_p": torch.zeros(5, 2)}, ValueError, r"weight_p: expected shape \[V, H\].*H = 3"),
        ({"weight_p": torch.zeros(0, 3)}, ValueError, "weight_p: .*V > 0"),
        ({"weight_q": torch.zeros(6, 2)}, ValueError, r"weight_q: .*V = 5, as in weight_p.*\(6, 2"),
        ({"weight_q": torch.zeros(5, 3)}, ValueError, r"weight_q: .*H = 2 > 0, as in hidden_q"),
        ({"weight_q": torch.zeros(5, 2).half()}, TypeError, "weight_q: expected the dtype of hid"),
        ({"hidden_q": torch.zeros(4, 2, device="meta")}, ValueError, "hidden_q: expected the dev"),
        ({"hidden_p": torch.zeros(4, 3).int()}, TypeError, "hidden_p: .*got torch.int32"),
        ({"hidden_p": torch.zeros(4, 3).double()}, TypeError, "hidden_p: expected dtype"),
        ({"bias_p": torch.zeros(4)}, ValueError, r"bias_p: expected shape \(5,\).*got 4"),
        ({"bias_q": torch.zeros(5, 1)}, ValueError, "bias_q: expected 1 dimension, got"),
        ({"bias_q": torch.zeros(5).bfloat16()}, TypeError, "bias_q: expected the dtype of hidden"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0"),
        ({"temperature": "1"}, TypeError, "temperature: expected a float, got str"),
        ({"softcap": float("inf")}, ValueError, "softcap: .*got inf"),
        ({"backend": "fast"}, ValueError, "backend: expected 'auto' or one of"),
        ({"backend": None}, TypeError, "backend: expected a str, got NoneType"),
        ({"backend": "cuda"}, (ValueError, RuntimeError), "backend 'cuda'"),
        ({"backend": "triton"}, ValueError, "backend 'triton': expected tensors on cuda, got cpu"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: Any, message: str) -> None:
    linear_kl(**GOOD)
    with pytest.raises(error, match=message):
        linear_kl(**(GOOD | change))
