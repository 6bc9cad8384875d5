"""The cheaper forms of linear_logprob: frozen head, memory budget, gradient filter, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from latro_kernels import linear_logprob
from latro_kernels.linear_logprob.cpu import FILTER_COLUMNS, FILTER_ROWS
from tests.latro_kernels.logprob_cases import (
    Problem,
    assert_filter_keeps_its_bound,
    fused,
    problem,
    solve,
    solve_all,
    trained_like,
    truth,
    unfused,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True, "temperature": 0.7},
    {"softcap": 5.0, "entropy": True},
    {"bias": True, "softcap": 30.0, "temperature": 1.3, "entropy": True},
]
# Several slices of the vocabulary, the last a narrow one; rows for a chunk and a bit.
SLICES = (53, 2048, 1203)
# Several blocks of rows.
BLOCKS = (1100, 130, 200)
Gate = Callable[[str, Tensor, Tensor, Tensor], None]


def device_of(backend: str) -> str:
    return "cpu" if backend == "cpu" else "cuda"


def ours(given: Problem, backend: str = "cpu", **options: Any) -> dict[str, Tensor | None]:
    return solve(fused(backend, given.grad_entropy is not None, **options), given)


@cache
def solved(
    shape: tuple[int, int, int], dtype: torch.dtype, options: tuple[tuple[str, Any], ...]
) -> tuple[Problem, dict[str, Tensor | None], dict[str, Tensor | None]]:
    """A problem with its truth and its unfused solution: torch's fp16 is slow on a CPU."""
    given = problem(shape, dtype, **dict(options))
    return given, truth(given), solve(unfused, given)


@pytest.mark.parametrize("backend", ["cpu", *GPU])
@pytest.mark.parametrize("budget", [0, 10**6, 10**9])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("shape", [SLICES, BLOCKS], ids=["slices", "blocks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination_matches_fp64(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    options: dict[str, Any],
    frozen: bool,
    budget: int,
    backend: str,
    gate: Gate,
) -> None:
    if frozen and budget:
        pytest.skip("a frozen head keeps nothing")
    given, exact, plain = solved(shape, dtype, tuple(options.items()))
    given = given.to(device_of(backend))
    got = ours(given, frozen=frozen, memory_budget=budget, backend=backend)
    for name, value in got.items():
        if value is not None:
            gate(name, value.cpu(), exact[name], plain[name])


@pytest.mark.parametrize("backend", ["cpu", *GPU])
@pytest.mark.parametrize("rows", ["peaked", "flat"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_head_at_the_extremes(
    dtype: torch.dtype, rows: str, backend: str, gate: Gate
) -> None:
    given = problem((40, 256, 1031), dtype, rows=rows).to(device_of(backend))
    for name, *results in solve_all(given, backend, frozen=True):
        gate(name, *results)


@pytest.mark.parametrize("backend", ["cpu", *GPU])
@pytest.mark.parametrize("skip_rows", [False, True])
@pytest.mark.parametrize("shape", [SLICES, BLOCKS, (3, 5, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_depends_on_the_budget(
    dtype: torch.dtype, shape: tuple[int, int, int], skip_rows: bool, backend: str
) -> None:
    given = problem(shape, dtype, bias=True, entropy=True)
    if skip_rows:
        given.grad_logp[1::3] = 0
        given.grad_entropy[1::3] = 0
    given = given.to(device_of(backend))
    runs = [ours(given, memory_budget=b, backend=backend) for b in (0, 200_000, 10**6, 10**9)]
    for run in runs[1:]:
        for name, first in runs[0].items():
            assert torch.equal(first, run[name]), name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, frozen: bool) -> None:
    given = problem(SLICES, dtype, bias=True)
    whole = ours(given, frozen=frozen)
    for rows in (slice(0, 1), slice(5, 18), slice(40, 53)):
        part = replace(
            given,
            hidden=given.hidden[rows],
            target=given.target[rows],
            grad_logp=given.grad_logp[rows],
        )
        alone = ours(part, frozen=frozen)
        for name in ("logp", "dx"):
            assert torch.equal(alone[name], whole[name][rows]), name


@pytest.mark.parametrize("shape", [SLICES, BLOCKS], ids=["slices", "blocks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_number_of_threads(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    given = problem(shape, dtype, bias=True, entropy=True)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (threads, threads, 1, 3):
            torch.set_num_threads(count)
            runs.append(ours(given, grad_filter=1e-4))
            runs[-1]["frozen dx"] = ours(given, frozen=True)["dx"]
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for name, first in runs[0].items():
            assert torch.equal(first, run[name]), name


@pytest.mark.parametrize("backend", ["cpu", *GPU])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_head_with_first_columns_of_minus_infinity(
    dtype: torch.dtype, backend: str, gate: Gate, small_tiles: None
) -> None:
    """Of several tiles, and of the first slice where Triton holds no tile in memory."""
    given = problem((20, 16, 9000), dtype, bias=True)
    given.bias[:8500] = -torch.inf
    given = replace(given, target=8500 + given.target % 500).to(device_of(backend))
    for name, *results in solve_all(given, backend, frozen=True):
        gate(name, *results)


def test_frozen_head_makes_no_logits_again() -> None:
    """The backward does not look at the weight beyond the targets' rows."""
    given = problem((20, 16, 300))
    hidden, weight = given.hidden.requires_grad_(), given.weight.clone()
    logp = linear_logprob(hidden, weight, given.target)
    others = torch.ones(300, dtype=torch.bool)
    others[given.target] = False
    with torch.autograd._unsafe_preserve_version_counter(weight):
        weight[others] = torch.nan
    logp.backward(given.grad_logp)
    exact = truth(given)["dx"]
    torch.testing.assert_close(hidden.grad.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_head_with_rows_that_do_not_count(dtype: torch.dtype, gate: Gate) -> None:
    """NaN in a row of upstream gradient 0 stays out of dx."""
    given = problem((20, 130, 300), dtype)
    given.grad_logp[3] = 0
    hidden = given.hidden.clone()
    hidden[3] = torch.nan
    got = ours(replace(given, hidden=hidden), frozen=True)["dx"]
    gate("dx", got, truth(given)["dx"], solve(unfused, given)["dx"])
    assert not got[3].any()


# The filter.


def left_out(given: Problem, eps: float) -> Tensor:
    """bool [N, V]: the rule of the documentation, block by block, in fp64."""
    hidden, weight, bias = (t.double() for t in (given.hidden, given.weight, given.bias))
    size = torch.softmax(hidden @ weight.T + bias, 1) * given.grad_logp[:, None].abs()
    columns = torch.arange(size.shape[1]).split(FILTER_COLUMNS)
    largest = torch.stack([size[:, c].amax(1) for c in columns], 1)
    order = (largest >= eps).sum(1).argsort(stable=True)
    below = torch.zeros(size.shape, dtype=torch.bool)
    for rows in order.split(FILTER_ROWS):
        for block, c in enumerate(columns):
            target = given.target[rows]
            hit = bool(((target >= c[0]) & (target <= c[-1])).any())
            below[rows[:, None], c] = not hit and bool((largest[rows, block] < eps).all())
    return below


def test_filter_puts_rows_together_that_are_alike() -> None:
    given = trained_like(torch.float32, False)
    sure = given.hidden.clone()
    # Every second row is sure of token 7, and of nothing else.
    sure[::2] = 20 * given.weight[7] / given.weight[7].square().sum()
    given.target[::2] = 7
    given = replace(given, hidden=sure)
    below = left_out(given, 2**-10)
    assert below[::2].float().mean() > 0.9 > below[1::2].float().mean()


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("budget", [0, 10**6, 10**9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filter_keeps_its_bound(
    dtype: torch.dtype, budget: int, entropy: bool, backend: str
) -> None:
    given = trained_like(dtype, entropy).to(device_of(backend))
    logp = assert_filter_keeps_its_bound(given, 2**-10, backend, memory_budget=budget)
    if backend == "cpu" or dtype != torch.float32:  # Triton multiplies fp32 itself with a filter
        assert torch.equal(*logp)


def test_filter_leaves_out_what_it_says() -> None:
    """Its gradient is the exact one with the left-out entries of dz at 0."""
    eps = 2**-10
    given = trained_like(torch.float32, False)
    below = left_out(given, eps)
    assert 0.3 < below.float().mean() < 1
    hidden, weight, bias = (t.double() for t in (given.hidden, given.weight, given.bias))
    dz = -torch.softmax(hidden @ weight.T + bias, 1)
    dz[torch.arange(len(hidden)), given.target] += 1
    dz = torch.where(below, 0, dz * given.grad_logp[:, None].double())
    got = ours(given, grad_filter=eps)
    plain = solve(unfused, given)
    exact = truth(given)
    for name, expected in (("dx", dz @ weight), ("dw", dz.T @ hidden), ("db", dz.sum(0))):
        error = (got[name].double() - expected).abs().max()
        of_unfused = (plain[name].double() - exact[name]).abs().max()
        assert error <= 2 * of_unfused + 1e-5 * expected.abs().max().clamp(max=1), name


def test_filter_of_zero_is_exact() -> None:
    given = trained_like(torch.float32, True)
    for name, value in ours(given).items():
        assert torch.equal(value, ours(given, grad_filter=0.0)[name]), name


def test_filter_keeps_nan() -> None:
    given = trained_like(torch.float32, False)
    given.hidden[4] = torch.nan
    assert ours(given, grad_filter=0.5)["dx"][4].isnan().all()


def test_second_backward_of_a_retained_graph() -> None:
    given = problem((20, 16, 300))
    for weight in (given.weight, given.weight.clone().requires_grad_()):
        hidden = given.hidden.clone().requires_grad_()
        logp = linear_logprob(hidden, weight, given.target)
        first, second = (
            torch.autograd.grad(logp, hidden, given.grad_logp, retain_graph=True)[0]
            for _ in range(2)
        )
        assert torch.equal(first, second)
