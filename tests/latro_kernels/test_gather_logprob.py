"""What gather_logprob alone has: a backward in place, and logits that are −∞ themselves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from latro_kernels import gather_logprob
from tests.latro_kernels.ops.gather_logprob import STATISTICS, problem
from tests.latro_kernels.ops.op import (
    INTERPRETED,
    device_of,
    each_backend,
    each_dtype,
    each_fused_backend,
    gate,
)

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"entropy": True},
    {"temperature": 0.7, "softcap": 5.0},
    {"temperature": 0.9, "statistics": ("log_sum_exp",)},
    {"temperature": 1.3, "softcap": 30.0, "statistics": STATISTICS},
]


@each_fused_backend
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@each_dtype
def test_in_place_backward_gives_the_same_bits(
    dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    N, V = (6, 70) if INTERPRETED else (33, 1031)
    given = problem((N, V), dtype, **options).on(backend)
    expected = given.solve(backend)
    wide = torch.full((N, V + 69), 7.0, dtype=dtype, device=device_of(backend))
    for logits in (given["logits"].clone(), wide[:, 3 : V + 3].copy_(given["logits"])):
        ours = given.but(logits=logits).solve(backend, inplace_backward=True)
        for name, value in expected.items():
            assert torch.equal(ours[name], value), name
        assert torch.equal(logits, expected["dlogits"]), "the gradient is not where the logits were"
    assert (wide[:, :3] == 7).all()
    assert (wide[:, V + 3 :] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_those_of_fp32_rounded_once(dtype: torch.dtype) -> None:
    """At every size of a gradient: subnormal, normal and beyond the largest."""
    low = problem((64, 509), dtype)
    low.upstream["logp"].sign_().mul_(2.0 ** torch.linspace(-40, 40, 64))
    ours = low.solve("cpu")["dlogits"]
    expected = low.but(logits=low["logits"].float()).solve("cpu")["dlogits"].to(dtype)
    assert torch.equal(ours, expected)
    if dtype == torch.float16:
        assert ours.isinf().any()
        assert ((ours != 0) & (ours.abs() < torch.finfo(dtype).smallest_normal)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reads_every_number_of_two_bytes(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    logits = torch.stack([every, torch.zeros_like(every)], 1)
    target = torch.zeros(len(every), dtype=torch.int64)
    ours, expected = (gather_logprob(a, target) for a in (logits, logits.float()))
    assert torch.equal(ours.nan_to_num(7.0), expected.nan_to_num(7.0))


@each_backend
def test_target_of_minus_infinity(backend: str) -> None:
    """Its row's log-prob is -inf, and the gradients are those of a target whose p is 0."""
    ruled_out, nearly = (problem((6, 300), entropy=True) for _ in range(2))
    for given, value in ((ruled_out, -torch.inf), (nearly, -1e4)):
        given["logits"].scatter_(1, given["target"][:, None], value)
    ours, exact, plain = ruled_out.on(backend).solve(backend), nearly.truth(), nearly.unfused()
    assert (ours["logp"] == -torch.inf).all()
    for name in ("entropy", "dlogits"):
        gate(name, ours[name].cpu(), exact[name], plain[name])


@each_backend
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_gradient_where_a_logit_is_minus_infinity(softcap: float | None, backend: str) -> None:
    """By hand: log-prob and entropy of [1, −∞, 2], where a softcap c makes −c of −∞."""
    capped = [5 * math.tanh(z / 5) for z in (1.0, 2.0)] if softcap else [1.0, 2.0]
    others = math.exp(-5) if softcap else 0.0
    total = sum(map(math.exp, capped)) + others
    p = [math.exp(capped[0]) / total, others / total, math.exp(capped[1]) / total]
    entropy = -sum(x * math.log(x) for x in p if x)
    slope = [1 - (z / 5) ** 2 if softcap else 1.0 for z in capped]
    slope = [slope[0], 0.0 if softcap else 1.0, slope[1]]
    expected = [
        s * (0.5 * (float(j == 0) - x) - 0.25 * x * ((math.log(x) if x else 0) + entropy))
        for j, (x, s) in enumerate(zip(p, slope, strict=True))
    ]
    given = problem((1, 3), softcap=softcap, entropy=True)
    given = given.but(logits=torch.tensor([[1.0, -torch.inf, 2.0]]), target=torch.tensor([0]))
    given.upstream["logp"].fill_(0.5)
    given.upstream["entropy"].fill_(0.25)
    got = given.on(backend).solve(backend)
    torch.testing.assert_close(got["entropy"].item(), entropy)
    torch.testing.assert_close(got["dlogits"].cpu(), torch.tensor([expected]))


def test_the_references_second_derivative_where_a_logit_is_minus_infinity() -> None:
    """That of the logits that are left, in fp64."""
    given = torch.tensor([[1.0, -torch.inf, 2.0, 0.5]], dtype=torch.float64)
    second = []
    for logits, target in ((given, 2), (given[:, [0, 2, 3]], 1)):
        leaf = logits.clone().requires_grad_()
        results = gather_logprob(
            leaf, torch.tensor([target]), return_entropy=True, backend="reference"
        )
        (first,) = torch.autograd.grad(sum(r.sum() for r in results), leaf, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert second[0][0, 1] == 0
    torch.testing.assert_close(second[0][:, [0, 2, 3]], second[1])


def test_second_backward_after_one_in_place_is_refused() -> None:
    given = problem((9, 31))
    leaf = given["logits"].clone().requires_grad_()
    logp = gather_logprob(leaf * 1, given["target"], inplace_backward=True).sum()
    logp.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward has overwritten the logits"):
        logp.backward()


def test_backward_in_place_is_seen_by_others_that_saved_the_logits() -> None:
    given = problem((9, 31))
    logits = given["logits"].clone().requires_grad_() * 1
    other = logits.square().sum()
    logp = gather_logprob(logits, given["target"], inplace_backward=True)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_columns_apart_are_copied_before_a_backward_in_place() -> None:
    given = problem((9, 31))
    logits = given["logits"].t().contiguous().t()
    got = given.but(logits=logits).solve("cpu", inplace_backward=True)
    assert torch.equal(logits, given["logits"])
    assert torch.equal(got["dlogits"], given.solve("cpu")["dlogits"])


def test_one_row_may_have_any_stride() -> None:
    given = problem((1, 31))
    row = given["logits"].as_strided((1, 31), (0, 1))
    column = given["logits"][0].repeat_interleave(3)[::3].view(31, 1)
    given.but(logits=row).solve("cpu", inplace_backward=True)
    of_one = replace(given, upstream={}).but(logits=column, target=torch.zeros(31).long())
    assert not of_one.solve("cpu", inplace_backward=True, return_entropy=False)["logp"].any()
