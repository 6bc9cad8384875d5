"""linear_kl: values and gradients against fp64, on every backend that runs here."""

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

from latro_kernels import linear_kl
from tests.latro_kernels.kl_cases import (
    Problem,
    exact,
    fused,
    nearly_one_hot,
    of_logits,
    problem,
    solve,
    solve_all,
    truth,
    unfused,
)
from tests.latro_kernels.test_linear_logprob import LargestTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, H, V: one of everything; odd; prime V; an H for which bf16 is multiplied as such.
SHAPES = [(1, 1, 1), (7, 3, 101), (1, 33, 64), (61, 17, 257), (61, 256, 1031)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True, "hidden_size_q": 130},
    {"temperature": 0.7, "softcap": 5.0},
    {"temperature": 1.3, "softcap": 30.0, "bias": True, "apart": 0.1},
    {"apart": 1e-3},
]
BACKENDS = [
    "cpu",
    "reference",
    pytest.param("triton", marks=pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Gate = Callable[[str, Tensor, Tensor, Tensor], None]


def device_of(backend: str) -> str:
    return "cuda" if backend in ("triton", "cuda") else "cpu"


def check(given: Problem, backend: str, gate: Gate) -> None:
    for name, ours, true, plain in solve_all(given.to(device_of(backend)), backend):
        gate(name, ours, true, plain)


@each_backend
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_dtype
def test_matches_fp64(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    options: dict[str, Any],
    backend: str,
    gate: Gate,
    small_tiles: None,
) -> None:
    check(problem(shape, dtype, **options), backend, gate)


@each_backend
@pytest.mark.parametrize("apart", [None, 0.01])
@pytest.mark.parametrize("rows", ["peaked", "flat"])
@each_dtype
def test_matches_fp64_at_the_extremes(
    dtype: torch.dtype,
    rows: str,
    apart: float | None,
    backend: str,
    gate: Gate,
    small_tiles: None,
) -> None:
    given = problem((40, 256, 1031), dtype, rows=rows, apart=apart)
    check(given, backend, gate)


@each_backend
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64_with_large_upstream_gradients(
    shape: tuple[int, int, int],
    options: dict[str, Any],
    backend: str,
    gate: Gate,
    small_tiles: None,
) -> None:
    """The gate's 1e-5 is then little beside the gradients."""
    given = problem(shape, **options)
    check(replace(given, grad_kl=100 * given.grad_kl), backend, gate)


@each_backend
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 3), (20, 11), (7, 300)], ids=str)
def test_nearly_one_hot_and_far_apart(
    shape: tuple[int, int], scale: float, backend: str, gate: Gate, small_tiles: None
) -> None:
    """The gradient at the likely token is a millionth of what it is the difference of."""
    given = nearly_one_hot(*shape, scale).to(device_of(backend))
    check(given, backend, gate)
    if backend != "reference":
        dx, true = solve(fused(backend), given)["dx"], truth(given)["dx"]
        torch.testing.assert_close(dx.double(), true, rtol=1e-5, atol=0)


@each_backend
def test_one_likely_token_among_three(backend: str, gate: Gate) -> None:
    zp = torch.tensor([[40.363994581876426, 4.30750576201069, 2.2369950442807793]])
    zq = torch.tensor([[-59.33355497818053, -15.327916284520228, 38.43913177334029]])
    for scale in (1.0, 100.0):
        given = of_logits(zp, zq, torch.tensor([scale])).to(device_of(backend))
        check(given, backend, gate)
        if backend != "reference":
            got = solve(fused(backend), given)["dx"][0, 0].item()
            assert got == pytest.approx(scale * 2.19e-14, rel=0.05)


@each_backend
@each_dtype
def test_matches_fp64_with_the_tiles_of_production(
    dtype: torch.dtype, backend: str, gate: Gate
) -> None:
    check(problem((65, 129, 4099), dtype, bias=True), backend, gate)


@each_dtype
def test_more_rows_than_a_block_of_the_weights_gradient(dtype: torch.dtype, gate: Gate) -> None:
    check(problem((1500, 130, 301), dtype, bias=True), "cpu", gate)


# The same problems every time: two rounding errors are compared, and theirs may be small by chance.
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 110),
    H=st.integers(1, 70),
    hidden_size_q=st.integers(1, 70),
    V=st.integers(1, 500),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0, 50.0]),
    scale=st.sampled_from([1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    N: int,
    H: int,
    hidden_size_q: int,
    V: int,
    bias: bool,
    softcap: float | None,
    scale: float,
    seed: int,
) -> None:
    given = problem((N, H, V), hidden_size_q=hidden_size_q, bias=bias, softcap=softcap, seed=seed)
    given = replace(given, grad_kl=scale * given.grad_kl)
    for name, ours, true, plain in solve_all(given, "cpu"):
        error, bound = ((x.double() - true).abs().max().item() if N else 0 for x in (ours, plain))
        assert error <= 2 * bound + 1e-5, name


@each_backend
@pytest.mark.parametrize("options", OPTIONS[::2], ids=lambda o: "-".join(o) or "plain")
@each_dtype
def test_equal_heads_give_exactly_zero(
    dtype: torch.dtype, options: dict[str, Any], backend: str, small_tiles: None
) -> None:
    """With a weight of its own or p's, at any place in the batch; the reference's dx is rounded."""
    given = problem((61, 256, 1031), dtype, bias=True, **options).equal_heads()
    for case in (given, given.share_weight()):
        results = solve(fused(backend), case.to(device_of(backend)))
        assert (results["kl"] == 0).all()
        if backend != "reference":
            assert not any(results[name].any() for name in ("dx", "dw", "db"))


@each_backend
def test_a_small_kl_keeps_its_digits(backend: str, small_tiles: None) -> None:
    """Heads 1e-4 apart have a KL of 4e-8, below the rounding of their log-probs."""
    given = problem((40, 64, 1031), apart=1e-4).to(device_of(backend))
    true = truth(given)["kl"]
    assert true.max() < 1e-7
    if backend != "reference":
        error = (fused(backend)(given) - true).abs() / true
        assert error.max() < 2**-6
    assert ((exact(given) - true).abs() / true).max() > 1


@pytest.mark.parametrize("H", [1, 2, 3])
def test_few_products_a_logit(H: int, gate: Gate) -> None:
    """Then little is rounded by torch, too."""
    for seed in range(40):
        for softcap in (None, 5.0):
            given = problem((20, H, 50), bias=True, softcap=softcap, seed=seed)
            check(replace(given, grad_kl=100 * given.grad_kl), "cpu", gate)


@each_backend
def test_logits_that_differ_by_a_constant(backend: str, gate: Gate, small_tiles: None) -> None:
    """The softmax does not see it: the KL stays as it was, also where that is 0."""
    given = problem((20, 9, 300), bias=True, apart=0.1)
    shifted = replace(given, bias_q=given.bias_q + 3.0).to(device_of(backend))
    check(shifted, backend, gate)
    equal = replace(given.equal_heads(), bias_q=given.bias_p + 3.0).to(device_of(backend))
    assert fused(backend)(equal).abs().max() < 1e-6


@each_backend
@each_dtype
def test_a_shared_weight_changes_nothing(
    dtype: torch.dtype, backend: str, gate: Gate, small_tiles: None
) -> None:
    given = problem((61, 130, 300), dtype, bias=True).to(device_of(backend)).share_weight()
    check(given, backend, gate)
    apart = replace(given, weight_q=given.weight_p.clone())
    shared, separate = (solve(fused(backend), case) for case in (given, apart))
    for name, value in shared.items():
        assert torch.equal(value, separate[name]), name


@each_backend
def test_no_rows(backend: str, small_tiles: None) -> None:
    given = problem((0, 5, 300), bias=True).to(device_of(backend))
    results = solve(fused(backend), given)
    assert results["kl"].shape == (0,)
    assert results["dx"].shape == (0, 5)
    assert not results["dw"].any()
    assert not results["db"].any()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs(dtype: torch.dtype, backend: str, gate: Gate, small_tiles: None) -> None:
    # On the device first: a copy to it would close the gaps.
    plain = problem((20, 130, 300), dtype, bias=True).to(device_of(backend))
    strided = replace(
        plain,
        hidden_p=torch.stack([plain.hidden_p, plain.hidden_p], 1)[:, 1],
        weight_p=plain.weight_p.t().contiguous().t(),
        hidden_q=plain.hidden_q.repeat_interleave(2, 1)[:, ::2],
        weight_q=plain.weight_q.repeat_interleave(2, 1)[:, ::2],
        bias_p=plain.bias_p.repeat_interleave(2)[::2],
        bias_q=plain.bias_q[:1].expand(300),
    )
    assert not strided.weight_p.is_contiguous()
    check(strided, backend, gate)
    check(strided.share_weight(), backend, gate)


@each_backend
def test_expanded_upstream_gradient(backend: str, gate: Gate, small_tiles: None) -> None:
    """sum() hands an upstream gradient of stride 0 to the backward."""
    given = problem((20, 9, 300)).to(device_of(backend))
    given = replace(given, grad_kl=torch.ones(20, device=given.hidden_p.device))
    hidden = given.hidden_p.clone().requires_grad_()
    fused(backend)(replace(given, hidden_p=hidden)).sum().backward()
    gate("dx", hidden.grad, truth(given)["dx"], solve(unfused, given)["dx"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_upstream_gradient(dtype: torch.dtype, gate: Gate) -> None:
    given = problem((61, 130, 300), dtype, bias=True)
    given.grad_kl[::3] = 0
    check(given, "cpu", gate)
    assert not solve(fused("cpu"), given)["dx"][::3].any()
    nothing = replace(given, grad_kl=torch.zeros(61))
    results = solve(fused("cpu"), nothing)
    assert not any(results[name].any() for name in ("dx", "dw", "db"))


@each_backend
@pytest.mark.parametrize("wanted", ["hidden_p", "weight_p", "bias_p"])
def test_gradient_of_one_input_alone(backend: str, wanted: str, small_tiles: None) -> None:
    given = problem((20, 9, 300), bias=True).to(device_of(backend))
    every = solve(fused(backend), given)
    alone = getattr(given, wanted).clone().requires_grad_()
    fused(backend)(replace(given, **{wanted: alone})).backward(given.grad_kl)
    expected = every[{"hidden_p": "dx", "weight_p": "dw", "bias_p": "db"}[wanted]]
    assert torch.equal(alone.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(dtype: torch.dtype) -> None:
    """Nothing of N × V exists."""
    N, H, V = 640, 160, 1500
    given = problem((N, H, V), dtype)
    with LargestTensor() as recorded:
        solve(fused("cpu"), given)
    assert max(recorded.sizes) == V * H * dtype.itemsize
    assert N * V * dtype.itemsize > V * H * dtype.itemsize
    with LargestTensor() as recorded:
        unfused(given)
    assert max(recorded.sizes) >= N * V * 4


@each_dtype
def test_same_bits_on_every_run_and_thread_count(dtype: torch.dtype) -> None:
    given = problem((150, 256, 1031), dtype, bias=True)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (threads, threads, 1, 2, 3):
            torch.set_num_threads(count)
            runs.append(solve(fused("cpu"), given))
    finally:
        torch.set_num_threads(threads)
    for run, name in itertools.product(runs[1:], runs[0]):
        assert torch.equal(runs[0][name], run[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    given = problem((61, 130, 300), dtype)
    some = torch.tensor([60, 3, 17])
    few = replace(
        given,
        hidden_p=given.hidden_p[some],
        hidden_q=given.hidden_q[some],
        grad_kl=given.grad_kl[some],
    )
    whole, part = solve(fused("cpu"), given), solve(fused("cpu"), few)
    for name in ("kl", "dx"):
        assert torch.equal(whole[name][some], part[name]), name


@each_backend
def test_logits_of_minus_infinity(backend: str, small_tiles: None) -> None:
    """A token that p rules out counts for q's sum alone; one that q rules out is infinite."""
    given = problem((10, 9, 700), bias=True).to(device_of(backend))
    given.bias_p[200:650] = -torch.inf
    given.bias_q[200:600] = -torch.inf
    results = solve(fused(backend), given)
    kept = torch.cat([torch.arange(200), torch.arange(600, 700)])
    columns = ("weight_p", "weight_q", "bias_p", "bias_q")
    expected = truth(replace(given, **{name: getattr(given, name)[kept] for name in columns}))
    for name in ("kl", "dx"):
        torch.testing.assert_close(results[name].double(), expected[name], rtol=1e-5, atol=1e-5)
    assert not results["dw"][200:650].any()
    given.bias_q[100] = -torch.inf
    assert (fused(backend)(given) == torch.inf).all()
    # Also where that token is p's likeliest.
    given.bias_p[100] = 50
    assert (fused(backend)(given) == torch.inf).all()


@each_backend
def test_nan_stays_in_its_row(backend: str, small_tiles: None) -> None:
    for name in ("hidden_p", "hidden_q"):
        given = problem((10, 9, 300)).to(device_of(backend))
        getattr(given, name)[3, 2] = torch.nan
        assert fused(backend)(given).isnan().nonzero().flatten().tolist() == [3]


def test_more_rows_than_a_grid_dimension(gate: Gate) -> None:
    check(problem((66_000, 2, 3)), "cpu", gate)


def test_more_logits_than_int32(gate: Gate) -> None:
    """The last rows of N·V > 2³¹ logits."""
    given = problem((70_000, 2, 32_000))
    hidden = given.hidden_p.requires_grad_()
    kl = fused("cpu")(given)
    kl[-3:].backward(given.grad_kl[-3:])
    tail = replace(
        given,
        hidden_p=given.hidden_p.detach()[-3:],
        hidden_q=given.hidden_q[-3:],
        grad_kl=given.grad_kl[-3:],
    )
    true, plain = truth(tail), solve(unfused, tail)
    gate("kl", kl.detach()[-3:], true["kl"], plain["kl"])
    gate("dx", hidden.grad[-3:], true["dx"], plain["dx"])


def test_reference_in_fp64_is_the_formula() -> None:
    given = problem((7, 3, 11), torch.float64, bias=True, temperature=0.7, softcap=3.0)
    categorical = [
        torch.distributions.Categorical(logits=3.0 * torch.tanh((x @ w.T + b) / 3.0) / 0.7)
        for x, w, b in (
            (given.hidden_p, given.weight_p, given.bias_p),
            (given.hidden_q, given.weight_q, given.bias_q),
        )
    ]
    kl = exact(given)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(*categorical))
    assert torch.equal(fused("reference")(given), kl)
    assert (
        linear_kl(
            given.hidden_p, given.weight_p, given.hidden_q, given.weight_q, backend="reference"
        ).dtype
        == torch.float64
    )
