"""gather_logprob: values and gradients against fp64, on every backend that runs here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from latro_kernels import gather_logprob
from latro_kernels.gather_logprob import reference
from tests.latro_kernels.gather_cases import (
    Problem,
    fused,
    problem,
    solve,
    solve_all,
    truth,
    unfused,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, V: one of everything; a prime V; more than a block of every backend's, in odd numbers.
SHAPES = [(1, 1), (7, 101), (1, 64), (33, 1031), (5, 9001)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"entropy": True},
    {"temperature": 0.7, "softcap": 5.0},
    {"temperature": 1.3, "softcap": 30.0, "entropy": True},
]
FUSED = [
    "cpu",
    pytest.param("triton", marks=pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
BACKENDS = [*FUSED, "reference"]
Gate = Callable[[str, Tensor, Tensor, Tensor], None]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_fused_backend = pytest.mark.parametrize("backend", FUSED)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def device_of(backend: str) -> str:
    return "cuda" if backend in ("triton", "cuda") else "cpu"


def check(given: Problem, backend: str, gate: Gate) -> None:
    for name, ours, exact, plain in solve_all(given.to(device_of(backend)), backend):
        gate(name, ours, exact, plain)


@each_backend
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_dtype
def test_matches_fp64(
    dtype: torch.dtype, shape: tuple[int, int], options: dict[str, Any], backend: str, gate: Gate
) -> None:
    check(problem(shape, dtype, **options), backend, gate)


@each_backend
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("rows", ["peaked", "flat"])
@each_dtype
def test_matches_fp64_at_the_extremes(
    dtype: torch.dtype, rows: str, entropy: bool, backend: str, gate: Gate
) -> None:
    given = problem((40, 1031), dtype, rows=rows, entropy=entropy)
    if rows == "peaked":
        assert truth(given)["logp"].exp().min() > 0.999
    check(given, backend, gate)


@settings(max_examples=25, deadline=None)
@given(
    N=st.integers(0, 40),
    V=st.integers(1, 3000),
    entropy=st.booleans(),
    softcap=st.sampled_from([None, 2.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(N: int, V: int, entropy: bool, softcap: float | None, seed: int) -> None:
    given = problem((N, V), entropy=entropy, softcap=softcap, seed=seed)
    for name, ours, exact, plain in solve_all(given, "cpu"):
        error, bound = ((x.double() - exact).abs().max().item() if N else 0 for x in (ours, plain))
        assert error <= 2 * bound + 1e-5, name


@each_backend
def test_no_rows(backend: str) -> None:
    results = solve(fused(backend, True), problem((0, 30), entropy=True).to(device_of(backend)))
    assert results["logp"].shape == results["entropy"].shape == (0,)
    assert results["dlogits"].shape == (0, 30)


@each_backend
@each_dtype
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_strided_inputs(offset: int, dtype: torch.dtype, backend: str, gate: Gate) -> None:
    """Rows that lie apart and begin anywhere, columns that lie apart, a target with a stride."""
    plain = problem((20, 1031), dtype, entropy=True)
    wide = torch.zeros(20, 1100, dtype=dtype)
    apart = wide[:, offset : offset + 1031]
    apart.copy_(plain.logits)
    target = torch.stack([plain.target, plain.target], 1)[:, 0]
    transposed = plain.logits.t().contiguous().t()
    for logits in (apart, transposed):
        strided = replace(plain, logits=logits, target=target).to(device_of(backend))
        leaf = strided.logits.detach().requires_grad_()
        assert leaf.stride() == logits.stride()
        logp, entropy = gather_logprob(leaf, strided.target, return_entropy=True, backend=backend)
        torch.autograd.backward([logp, entropy], [strided.grad_logp, strided.grad_entropy])
        exact, unfused_results = truth(strided), solve(unfused, strided)
        ours = {"logp": logp.detach(), "entropy": entropy.detach(), "dlogits": leaf.grad}
        for name, value in ours.items():
            gate(name, value, exact[name], unfused_results[name])


@each_backend
def test_expanded_upstream_gradient(backend: str, gate: Gate) -> None:
    """sum() hands an upstream gradient of stride 0 to the backward."""
    given = problem((20, 300)).to(device_of(backend))
    given = replace(given, grad_logp=torch.ones_like(given.grad_logp))
    leaf = given.logits.clone().requires_grad_()
    gather_logprob(leaf, given.target, backend=backend).sum().backward()
    gate("dlogits", leaf.grad, truth(given)["dlogits"], solve(unfused, given)["dlogits"])


@each_backend
def test_gradient_of_the_entropy_alone(backend: str, gate: Gate) -> None:
    given = problem((20, 300), entropy=True).to(device_of(backend))
    check(replace(given, grad_logp=torch.zeros_like(given.grad_logp)), backend, gate)


@each_fused_backend
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@each_dtype
def test_rows_without_upstream_gradient(
    dtype: torch.dtype, entropy: bool, in_place: bool, backend: str, gate: Gate
) -> None:
    """Their gradient is exactly 0, whatever they hold."""
    given = problem((40, 1031), dtype, entropy=entropy)
    given.grad_logp[::3] = 0
    if entropy:
        given.grad_entropy[::3] = 0
    check(given, backend, gate)
    given.logits[::6, 5] = torch.nan
    ours = solve(fused(backend, entropy, in_place), given.to(device_of(backend)))["dlogits"]
    assert torch.equal(ours[::3], torch.zeros_like(ours[::3]))
    assert ours.isfinite().all()


@each_fused_backend
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@each_dtype
def test_in_place_backward_gives_the_same_bits(
    dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    given = problem((33, 1031), dtype, **options).to(device_of(backend))
    entropy = given.grad_entropy is not None
    expected = solve(fused(backend, entropy), given)["dlogits"]
    wide = torch.full((33, 1100), 7.0, dtype=dtype, device=given.logits.device)
    for logits in (given.logits.clone(), wide[:, 3:1034].copy_(given.logits)):
        ours = solve(fused(backend, entropy, True), replace(given, logits=logits))["dlogits"]
        assert torch.equal(ours, expected)
        assert torch.equal(logits, expected), "the gradient is not where the logits were"
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 1034:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_those_of_fp32_rounded_once(dtype: torch.dtype) -> None:
    """At every size of a gradient: subnormal, normal and beyond the largest."""
    low = problem((64, 509), dtype)
    low = replace(low, grad_logp=low.grad_logp.sign() * 2.0 ** torch.linspace(-40, 40, 64))
    high = replace(low, logits=low.logits.float())
    ours = solve(fused("cpu", False), low)["dlogits"]
    expected = solve(fused("cpu", False), high)["dlogits"].to(dtype)
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


def allocations(function: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What `function` returns, and the bytes that each operator within took from torch."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    return result, [e.self_cpu_memory_usage for e in recorded.events()]


@each_dtype
def test_memory(dtype: torch.dtype) -> None:
    """A few numbers a row; for an ordinary backward one [N, V] in the logits' dtype as well."""
    N, V = 30, 4001
    given = problem((N, V), dtype, entropy=True)
    for in_place in (False, True):
        leaf = given.logits.clone().requires_grad_()

        def forward(leaf: Tensor = leaf, in_place: bool = in_place) -> Tensor:
            both = gather_logprob(
                leaf, given.target, return_entropy=True, inplace_backward=in_place
            )
            return both[0] + both[1]

        logp, of_forward = allocations(forward)
        assert sum(b for b in of_forward if b > 0) <= 100 * N
        _, of_backward = allocations(lambda logp=logp: logp.backward(given.grad_logp))
        large = [b for b in of_backward if b > 100 * N]
        assert large == ([] if in_place else [N * V * dtype.itemsize])
    _, of_unfused = allocations(lambda: unfused(given.logits, given.target, 1.0, None))
    assert max(of_unfused) >= N * V * 4


def test_same_bits_on_every_thread_count() -> None:
    given = problem((50, 2051), torch.bfloat16, entropy=True)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            runs.append(solve(fused("cpu", True), given))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for name, first in runs[0].items():
            assert torch.equal(first, run[name]), name


@each_backend
@each_dtype
def test_logits_of_minus_infinity(dtype: torch.dtype, backend: str, gate: Gate) -> None:
    """-inf takes a token out of the vocabulary, with no NaN in any gradient."""
    few = problem((10, 700), dtype, entropy=True)
    # Whole blocks of them come first, some more in between.
    kept = torch.arange(700) * 2 + 5000
    logits = torch.full((10, 6500), -torch.inf, dtype=dtype)
    logits[:, kept] = few.logits
    many = replace(few, logits=logits, target=kept[few.target])
    ours = solve(fused(backend, True), many.to(device_of(backend)))
    exact, plain = truth(few), solve(unfused, few)
    dlogits = ours["dlogits"].cpu()
    for name, value in (("logp", ours["logp"]), ("entropy", ours["entropy"])):
        gate(name, value.cpu(), exact[name], plain[name])
    gate("dlogits", dlogits[:, kept], exact["dlogits"], plain["dlogits"])
    dlogits[:, kept] = 0
    assert not dlogits.any()


@each_backend
def test_target_of_minus_infinity(backend: str, gate: Gate) -> None:
    """Its row's log-prob is -inf, and the gradients are those of a target whose p is 0."""
    ruled_out, nearly = (problem((6, 300), entropy=True) for _ in range(2))
    ruled_out.logits.scatter_(1, ruled_out.target[:, None], -torch.inf)
    nearly.logits.scatter_(1, nearly.target[:, None], -1e4)
    ours = solve(fused(backend, True), ruled_out.to(device_of(backend)))
    exact, plain = truth(nearly), solve(unfused, nearly)
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
    upstream = 0.5, 0.25
    expected = [
        s
        * (
            upstream[0] * (float(j == 0) - x)
            - upstream[1] * x * ((math.log(x) if x else 0) + entropy)
        )
        for j, (x, s) in enumerate(zip(p, slope, strict=True))
    ]
    logits = torch.tensor([[1.0, -torch.inf, 2.0]], device=device_of(backend), requires_grad=True)
    target = torch.zeros(1, dtype=torch.int64, device=device_of(backend))
    results = gather_logprob(logits, target, softcap=softcap, return_entropy=True, backend=backend)
    (got,) = torch.autograd.grad(
        results, logits, [torch.full_like(r, u) for r, u in zip(results, upstream, strict=True)]
    )
    torch.testing.assert_close(results[1].item(), entropy)
    torch.testing.assert_close(got.cpu(), torch.tensor([expected]))


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


@each_fused_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_row(bad: float, backend: str) -> None:
    given = problem((10, 300), entropy=True).to(device_of(backend))
    given.logits[3, 2] = bad
    for result in solve(fused(backend, True), given).values():
        rows = result.view(10, -1).isnan().any(1)
        assert rows.nonzero().flatten().tolist() == [3]


@each_fused_backend
def test_more_rows_than_a_grid_dimension(backend: str, gate: Gate) -> None:
    check(problem((66_000, 3)), backend, gate)


def test_addresses_beyond_int32(gate: Gate) -> None:
    """Three rows 2³⁰ elements apart, in memory of which only their pages are ever touched."""
    V, step = 1031, 2**30
    memory = torch.from_numpy(np.zeros(2 * step + V, dtype=np.int16)).view(torch.bfloat16)
    given = problem((3, V), torch.bfloat16)
    logits = memory.as_strided((3, V), (step, 1))
    logits.copy_(given.logits)
    leaf = logits.detach().requires_grad_()
    logp = gather_logprob(leaf, given.target, inplace_backward=True)
    # Not backward(): it would clone a gradient of such strides.
    (dlogits,) = torch.autograd.grad(logp, leaf, given.grad_logp)
    assert dlogits.data_ptr() == memory.data_ptr()
    exact, plain = truth(given), solve(unfused, given)
    gate("logp", logp.detach(), exact["logp"], plain["logp"])
    gate("dlogits", dlogits, exact["dlogits"], plain["dlogits"])


def test_reference_in_fp64_is_the_formula() -> None:
    given = problem((7, 11), torch.float64, temperature=0.7, softcap=3.0)
    p = torch.softmax(3.0 * torch.tanh(given.logits / 3.0) / 0.7, -1)
    logp, entropy = reference(given.logits, given.target, 0.7, 3.0)
    torch.testing.assert_close(logp, p[torch.arange(7), given.target].log())
    torch.testing.assert_close(entropy, torch.distributions.Categorical(p).entropy())
    public = gather_logprob(
        given.logits, given.target, temperature=0.7, softcap=3.0, backend="reference"
    )
    assert torch.equal(public, logp)
