"""linear_logprob: values and gradients against fp64, on every backend that runs here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latro_kernels import linear_logprob
from latro_kernels.linear_logprob import reference
from tests.latro_kernels.logprob_cases import (
    Problem,
    fused,
    problem,
    solve,
    solve_all,
    truth,
    unfused,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, H, V: one of everything; odd; prime V; an H for which bf16 is multiplied as such.
SHAPES = [(1, 1, 1), (7, 3, 101), (1, 33, 64), (33, 17, 257), (40, 256, 1031)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True, "entropy": True},
    {"temperature": 0.7, "softcap": 5.0},
    {"temperature": 1.3, "softcap": 30.0, "bias": True, "entropy": True},
]
BACKENDS = [
    "cpu",
    "reference",
    pytest.param("triton", marks=pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
Gate = Callable[[str, Tensor, Tensor, Tensor], None]


def device_of(backend: str) -> str:
    return "cuda" if backend in ("triton", "cuda") else "cpu"


def check(given: Problem, backend: str, gate: Gate) -> None:
    for name, ours, exact, plain in solve_all(given.to(device_of(backend)), backend):
        gate(name, ours, exact, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    options: dict[str, Any],
    backend: str,
    gate: Gate,
    small_tiles: None,
) -> None:
    check(problem(shape, dtype, **options), backend, gate)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("rows", ["peaked", "flat"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64_at_the_extremes(
    dtype: torch.dtype, rows: str, entropy: bool, backend: str, gate: Gate, small_tiles: None
) -> None:
    given = problem((40, 256, 1031), dtype, rows=rows, entropy=entropy)
    if rows == "peaked":
        assert truth(given)["logp"].exp().min() > 0.999
    check(given, backend, gate)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64_with_the_tiles_of_production(
    dtype: torch.dtype, backend: str, gate: Gate
) -> None:
    given = problem((65, 129, 4099), dtype, bias=True, entropy=True)
    check(given, backend, gate)


@settings(max_examples=25, deadline=None)
@given(
    N=st.integers(0, 40),
    H=st.integers(1, 70),
    V=st.integers(1, 500),
    bias=st.booleans(),
    entropy=st.booleans(),
    softcap=st.sampled_from([None, 2.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    N: int, H: int, V: int, bias: bool, entropy: bool, softcap: float | None, seed: int
) -> None:
    given = problem((N, H, V), bias=bias, entropy=entropy, softcap=softcap, seed=seed)
    for name, ours, exact, plain in solve_all(given, "cpu"):
        error, bound = ((x.double() - exact).abs().max().item() if N else 0 for x in (ours, plain))
        assert error <= 2 * bound + 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str, small_tiles: None) -> None:
    given = problem((0, 5, 300), bias=True, entropy=True).to(device_of(backend))
    results = solve(fused(backend, True), given)
    assert results["logp"].shape == results["entropy"].shape == (0,)
    assert results["dx"].shape == (0, 5)
    assert not results["dw"].any()
    assert not results["db"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs(dtype: torch.dtype, backend: str, gate: Gate, small_tiles: None) -> None:
    # On the device first: a copy to it would close the gaps.
    plain = problem((20, 130, 300), dtype, bias=True).to(device_of(backend))
    wide = torch.stack([plain.hidden, plain.hidden], 1)
    strided = replace(
        plain,
        hidden=wide[:, 1],
        weight=plain.weight.t().contiguous().t(),
        target=torch.stack([plain.target, plain.target], 1)[:, 0],
        bias=plain.bias.repeat_interleave(2)[::2],
    )
    assert not strided.weight.is_contiguous()
    check(strided, backend, gate)
    every_second = replace(
        plain,
        weight=plain.weight.repeat_interleave(2, 1)[:, ::2],
        bias=plain.bias[:1].expand(300),
    )
    check(every_second, backend, gate)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_upstream_gradient(backend: str, gate: Gate, small_tiles: None) -> None:
    """sum() hands an upstream gradient of stride 0 to the backward."""
    given = problem((20, 9, 300)).to(device_of(backend))
    given = replace(given, grad_logp=torch.ones(20, device=given.hidden.device))
    hidden = given.hidden.clone().requires_grad_()
    linear_logprob(hidden, given.weight, given.target, backend=backend).sum().backward()
    gate("dx", hidden.grad, truth(given)["dx"], solve(unfused, given)["dx"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_entropy_alone(backend: str, gate: Gate, small_tiles: None) -> None:
    given = problem((20, 9, 300), entropy=True).to(device_of(backend))
    given = replace(given, grad_logp=torch.zeros_like(given.grad_logp))
    check(given, backend, gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_upstream_gradient(dtype: torch.dtype, gate: Gate, small_tiles: None) -> None:
    given = problem((40, 130, 300), dtype, bias=True)
    given.grad_logp[::3] = 0
    check(given, "cpu", gate)
    assert not solve(fused("cpu", False), given)["dx"][::3].any()
    nothing = replace(given, grad_logp=torch.zeros(40))
    results = solve(fused("cpu", False), nothing)
    assert not any(results[name].any() for name in ("dx", "dw", "db"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_gradient_of_one_input_alone(
    backend: str, wanted: str, gate: Gate, small_tiles: None
) -> None:
    given = problem((20, 9, 300), bias=True).to(device_of(backend))
    inputs = {name: getattr(given, name).clone() for name in ("hidden", "weight", "bias")}
    inputs[wanted].requires_grad_()
    linear_logprob(target=given.target, backend=backend, **inputs).backward(given.grad_logp)
    name = {"hidden": "dx", "weight": "dw", "bias": "db"}[wanted]
    gate(name, inputs[wanted].grad, truth(given)[name], solve(unfused, given)[name])


def test_no_gradient_that_nobody_asks_for() -> None:
    """A frozen weight costs no [V, H] tensor."""
    given = problem((20, 16, 3000))
    hidden = given.hidden.requires_grad_()
    with LargestTensor() as largest:
        linear_logprob(hidden, given.weight, given.target).sum().backward()
    assert given.weight.numel() * 4 not in largest.sizes


class LargestTensor(TorchDispatchMode):
    """Records the bytes of every storage that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.sizes.add(value.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_every_run_and_thread_count(dtype: torch.dtype, small_tiles: None) -> None:
    given = problem((50, 256, 1031), dtype, bias=True, entropy=True)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (threads, threads, 1, 2, 3):
            torch.set_num_threads(count)
            runs.append(solve(fused("cpu", True), given))
    finally:
        torch.set_num_threads(threads)
    for name, first in runs[0].items():
        assert torch.equal(first, runs[1][name]), f"{name}: another run"
    for run, name in itertools.product(runs[2:], ("logp", "entropy")):
        assert torch.equal(runs[0][name], run[name]), f"{name}: another number of threads"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits_of_minus_infinity(backend: str, small_tiles: None) -> None:
    """A bias of -inf takes a token out of the vocabulary, with no NaN in any gradient."""
    given = problem((10, 9, 700), bias=True, entropy=True)
    given.bias[200:600] = -torch.inf
    given = replace(given, target=given.target % 200)
    results = solve(fused(backend, True), given)
    kept = torch.cat([torch.arange(200), torch.arange(600, 700)])
    few = replace(given, weight=given.weight[kept], bias=given.bias[kept])
    expected = truth(few)
    for name in ("logp", "entropy", "dx"):
        torch.testing.assert_close(results[name].double(), expected[name], rtol=1e-5, atol=1e-5)
    assert not results["dw"][200:600].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_target_of_minus_infinity(backend: str) -> None:
    given = problem((10, 9, 700), entropy=True)
    given = replace(given, bias=torch.zeros(700))
    given.bias[5] = -torch.inf
    given.target[0] = 5
    results = solve(fused(backend, True), given)
    assert results["logp"][0] == -torch.inf
    for name in ("entropy", "dx", "dw", "db"):
        assert results[name].isfinite().all(), name


def test_nan_stays_in_its_row(small_tiles: None) -> None:
    given = problem((10, 9, 300))
    given.hidden[3, 2] = torch.nan
    logp = linear_logprob(given.hidden, given.weight, given.target)
    assert logp.isnan().nonzero().flatten().tolist() == [3]


def test_more_rows_than_a_grid_dimension(gate: Gate) -> None:
    check(problem((66_000, 2, 3)), "cpu", gate)


def test_more_logits_than_int32(gate: Gate) -> None:
    """The last row and the last column of N·V > 2³¹ logits."""
    given = problem((70_000, 2, 32_000))
    given.target[-1] = 31_999
    hidden = given.hidden.requires_grad_()
    logp = linear_logprob(hidden, given.weight, given.target)
    logp[-3:].backward(given.grad_logp[-3:])
    tail = replace(
        given,
        hidden=given.hidden.detach()[-3:],
        target=given.target[-3:],
        grad_logp=given.grad_logp[-3:],
    )
    exact, plain = truth(tail), solve(unfused, tail)
    gate("logp", logp.detach()[-3:], exact["logp"], plain["logp"])
    gate("dx", hidden.grad[-3:], exact["dx"], plain["dx"])


def test_reference_in_fp64_is_the_formula() -> None:
    given = problem((7, 3, 11), torch.float64, bias=True, temperature=0.7, softcap=3.0)
    logits = given.hidden @ given.weight.T + given.bias
    p = torch.softmax(3.0 * torch.tanh(logits / 3.0) / 0.7, -1)
    logp, entropy = reference(
        given.hidden, given.weight, given.target, given.bias, given.temperature, given.softcap
    )
    torch.testing.assert_close(logp, p[torch.arange(7), given.target].log())
    torch.testing.assert_close(entropy, torch.distributions.Categorical(p).entropy())
    public = linear_logprob(
        given.hidden,
        given.weight,
        given.target,
        bias=given.bias,
        temperature=0.7,
        softcap=3.0,
        backend="reference",
    )
    assert torch.equal(public, logp)
