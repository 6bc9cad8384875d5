"""gather_logprob among torch's own machinery, and what it says to wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latro_kernels import gather_logprob
from tests.latro_kernels.gather_cases import problem

OPS = torch.ops.latro_kernels


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype, with_entropy: bool) -> None:
    given = problem((9, 31), dtype, entropy=True)
    arguments = (given.logits, given.target, 0.7, 3.0, with_entropy, "auto")
    torch.library.opcheck(OPS.gather_logprob.default, arguments)
    kept = OPS.gather_logprob(*arguments)
    upstream = given.grad_logp, given.grad_entropy if with_entropy else torch.empty(0)
    for backward in (OPS.gather_logprob_backward, OPS.gather_logprob_backward_):
        torch.library.opcheck(backward.default, (*arguments, *kept, *upstream))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_compiles_as_one_graph(entropy: bool, in_place: bool) -> None:
    given = problem((9, 31), entropy=True)
    weight = torch.randn(31, 31)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ weight
        out = gather_logprob(
            logits, given.target, return_entropy=entropy, inplace_backward=in_place
        )
        if entropy:
            return (out[0] * given.grad_logp).sum() + (out[1] * given.grad_entropy).sum()
        return (out * given.grad_logp).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        hidden = given.logits.clone().requires_grad_()
        value = function(hidden)
        value.backward()
        results.append([value.detach(), hidden.grad])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_double_backward_is_refused() -> None:
    given = problem((9, 31))
    logits = given.logits.requires_grad_()
    logp = gather_logprob(logits, given.target)
    with pytest.raises(RuntimeError, match="gather_logprob has no double backward"):
        torch.autograd.grad(logp.sum(), logits, create_graph=True)


def test_no_gradient_is_asked_for() -> None:
    given = problem((9, 31))
    assert not gather_logprob(given.logits, given.target, inplace_backward=True).requires_grad
    with torch.no_grad():
        logp = gather_logprob(given.logits.clone().requires_grad_(), given.target)
    assert not logp.requires_grad


def test_second_backward_after_one_in_place_is_refused() -> None:
    given = problem((9, 31))
    leaf = given.logits.clone().requires_grad_()
    logp = gather_logprob(leaf * 1, given.target, inplace_backward=True).sum()
    logp.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward has overwritten the logits"):
        logp.backward()


def test_ordinary_backward_may_run_twice() -> None:
    given = problem((9, 31))
    leaf = given.logits.clone().requires_grad_()
    logp = gather_logprob(leaf * 1, given.target).sum()
    logp.backward(retain_graph=True)
    once = leaf.grad.clone()
    logp.backward()
    assert torch.equal(leaf.grad, 2 * once)


def test_backward_in_place_is_seen_by_others_that_saved_the_logits() -> None:
    given = problem((9, 31))
    logits = given.logits.clone().requires_grad_() * 1
    other = logits.square().sum()
    gather_logprob(logits, given.target, inplace_backward=True).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_columns_apart_are_copied_before_a_backward_in_place() -> None:
    given = problem((9, 31))
    logits = given.logits.t().contiguous().t().requires_grad_()
    gather_logprob(logits, given.target, inplace_backward=True).sum().backward()
    assert torch.equal(logits.detach(), given.logits)
    plain = given.logits.clone().requires_grad_()
    gather_logprob(plain, given.target).sum().backward()
    assert torch.equal(logits.grad, plain.grad)


def test_one_row_may_have_any_stride() -> None:
    given = problem((1, 31))
    row = given.logits.as_strided((1, 31), (0, 1)).requires_grad_()
    column = given.logits[0].repeat_interleave(3)[::3].view(31, 1)
    gather_logprob(row, given.target, inplace_backward=True).sum().backward()
    zeros = torch.zeros(31, dtype=torch.int64)
    assert not gather_logprob(column, zeros, inplace_backward=True).any()


GOOD: dict[str, Any] = {
    "logits": torch.zeros(4, 5),
    "target": torch.zeros(4, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits: expected a tensor, got list"),
        ({"logits": torch.zeros(1, 4, 5)}, ValueError, "logits: expected 2 dimensions, got shape"),
        ({"logits": torch.zeros(4, 0)}, ValueError, r"logits: expected shape \[N, V\] with V > 0"),
        ({"logits": torch.zeros(4, 5).int()}, TypeError, "logits: expected dtype .*torch.int32"),
        ({"logits": torch.zeros(4, 5).double()}, TypeError, "logits: expected dtype torch.float32"),
        ({"target": 3}, TypeError, "target: expected a tensor, got int"),
        ({"target": torch.zeros(3).long()}, ValueError, r"target: expected shape \(4,\).*got 3"),
        ({"target": torch.zeros(4, 1).long()}, ValueError, "target: expected 1 dimension, got"),
        ({"target": torch.zeros(4).int()}, TypeError, "target: expected dtype torch.int64"),
        (
            {"target": torch.zeros(4, device="meta").long()},
            ValueError,
            "target: expected the device of logits, cpu, got meta",
        ),
        ({"target": torch.tensor([0, 4, 5, 9])}, ValueError, r"0\.\.4, got 5 in row 2"),
        ({"target": torch.tensor([0, 4, -1, 9])}, ValueError, r"0\.\.4, got -1 in row 2"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0"),
        ({"temperature": float("nan")}, ValueError, "temperature: .*got nan"),
        ({"temperature": "1"}, TypeError, "temperature: expected a float, got str"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a finite number above 0, got -1"),
        ({"softcap": True}, TypeError, "softcap: expected a float, got bool"),
        ({"return_entropy": 1}, TypeError, "return_entropy: expected a bool, got int"),
        ({"inplace_backward": 1}, TypeError, "inplace_backward: expected a bool, got int"),
        (
            {"inplace_backward": True, "backend": "reference"},
            ValueError,
            "inplace_backward: expected False with backend='reference'",
        ),
        (
            {"inplace_backward": True, "logits": torch.zeros(5).expand(4, 5)},
            ValueError,
            r"logits: expected rows that do not overlap.*got strides \(0, 1\)",
        ),
        ({"backend": "fast"}, ValueError, "backend: expected 'auto' or one of"),
        ({"backend": None}, TypeError, "backend: expected a str, got NoneType"),
        ({"backend": "cuda"}, (ValueError, RuntimeError), "backend 'cuda'"),
        ({"backend": "triton"}, ValueError, "backend 'triton': expected tensors on cuda, got cpu"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: Any, message: str) -> None:
    gather_logprob(**GOOD)
    with pytest.raises(error, match=message):
        gather_logprob(**(GOOD | change))


def test_target_values_are_checked_by_the_reference_too() -> None:
    with pytest.raises(ValueError, match="got 5 in row 0"):
        gather_logprob(**(GOOD | {"target": torch.full((4,), 5)}), backend="reference")
