"""What linear_logprob alone has: frozen head, memory budget, gradient filter."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from latro_kernels import linear_logprob, native
from latro_kernels.linear_logprob.cpu import FILTER_COLUMNS, FILTER_ROWS
from tests.latro_kernels.ops.linear_logprob import OP, STATISTICS, problem, trained_like
from tests.latro_kernels.ops.op import (
    DTYPES,
    HALF,
    INTERPRETED,
    Problem,
    Results,
    assert_same,
    backends,
    check,
    each_dtype,
    each_fused_backend,
    gate,
)

# Elsewhere the tiles are those of production.
pytestmark = [
    *([pytest.mark.usefixtures("small_tiles")] if INTERPRETED else []),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True, "temperature": 0.7},
    {"softcap": 5.0, "entropy": True},
    {"bias": True, "softcap": 30.0, "temperature": 1.3, "statistics": STATISTICS},
    {"statistics": ("log_sum_exp",)},
]
EXTREMES: list[dict[str, Any]] = [{"rows": "peaked"}, {"rows": "flat"}]
CASES = [
    *product(OP.uneven, DTYPES, OPTIONS),
    *product([(40, 256, 1031)], DTYPES, EXTREMES),
]
# In the interpreter, room for the first slice of 10 rows in fp16 or bf16, in fp32, and for all.
BUDGETS = (0, 1_500, 3_000, 10**6) if INTERPRETED else (0, 200_000, 10**6, 10**9)
each_filtered_backend = pytest.mark.parametrize("backend", backends("cpu", "triton"))
EPS = 2**-8 if INTERPRETED else 2**-10


@cache
def solved(
    shape: tuple[int, int, int], dtype: torch.dtype, options: tuple[tuple[str, Any], ...]
) -> tuple[Problem, Results, Results]:
    """Return a problem, its truth and its unfused solution, once: torch's fp16 is slow on a CPU."""
    given = problem(shape, dtype, **dict(options))
    return given, given.truth(), given.unfused()


@each_fused_backend
@pytest.mark.parametrize("budget", ["frozen", *([1_500] if INTERPRETED else BUDGETS)])
@pytest.mark.parametrize(("shape", "dtype", "options"), OP.samples if INTERPRETED else CASES)
def test_every_combination_matches_fp64(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    options: dict[str, Any],
    budget: int | str,
    backend: str,
) -> None:
    """A frozen head keeps nothing.

    In the interpreter some products are kept and some made again; the bits are those of any budget.
    """
    given, exact, plain = solved(shape, dtype, tuple(options.items()))
    if budget == "frozen":
        got = replace(given, trained=("hidden",)).on(backend).solve(backend)
        assert "dw" not in got
    else:
        got = given.on(backend).solve(backend, memory_budget=budget)
    for name, value in got.items():
        gate(name, value.cpu(), exact[name], plain[name], given)


@each_fused_backend
@pytest.mark.parametrize("skip_rows", [True] if INTERPRETED else [False, True])
@pytest.mark.parametrize(
    "shape", [(10, 9, 70)] if INTERPRETED else [*OP.uneven, (3, 5, 1)], ids=str
)
@each_dtype
def test_no_bit_depends_on_the_budget(
    dtype: torch.dtype, shape: tuple[int, int, int], skip_rows: bool, backend: str
) -> None:
    options = {"bias": True, "temperature": 0.7, "softcap": 5.0, "statistics": STATISTICS}
    given = problem(shape, dtype, **options)
    if skip_rows:
        for upstream in given.upstream.values():
            upstream[1::3] = 0
    given = given.on(backend)
    runs = [given.solve(backend, memory_budget=budget) for budget in BUDGETS]
    for run in runs[1:]:
        assert_same(run, runs[0])


def test_frozen_head_makes_no_logits_again() -> None:
    """The backward does not look at the weight beyond the targets' rows."""
    given = problem((20, 16, 300))
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].clone()
    logp = linear_logprob(hidden, weight, given["target"])
    others = torch.ones(300, dtype=torch.bool)
    others[given["target"]] = False
    with torch.autograd._unsafe_preserve_version_counter(weight):
        weight[others] = torch.nan
    logp.backward(given.upstream["logp"])
    exact = given.truth()["dx"]
    torch.testing.assert_close(hidden.grad.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_target_of_minus_infinity(backend: str) -> None:
    given = problem((10, 9, 700), entropy=True).but(bias=torch.zeros(700))
    given["bias"][5] = -torch.inf
    given["target"][0] = 5
    results = given.solve(backend)
    assert results["logp"][0] == -torch.inf
    for name in ("entropy", "dx", "dw", "db"):
        assert results[name].isfinite().all(), name


# Ignored rows.


@each_fused_backend
@pytest.mark.parametrize("grad_filter", [0.0, EPS])
@each_dtype
def test_no_bit_of_kept_rows_depends_on_the_budget(
    dtype: torch.dtype, grad_filter: float, backend: str
) -> None:
    if grad_filter and backend == "cuda":
        pytest.skip("has no filter")
    shape = (4, 9, 70) if INTERPRETED else (20, 130, 700)
    given = problem(shape, dtype, bias=True, statistics=STATISTICS, batch=True).on(backend)
    kept = given["target"] != given["ignore_index"]
    few = given.of_rows(kept).but(ignore_index=None)
    expected = few.solve(backend, memory_budget=0, grad_filter=grad_filter)
    for budget in BUDGETS:
        got = given.solve(backend, memory_budget=budget, grad_filter=grad_filter)
        for name in OP.row_results:
            got[name] = got[name][kept]
        assert_same(got, expected)


def test_a_driver_gets_the_rows_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def recorded(symbol: str, *arguments: Any) -> None:
        calls.append((symbol, [t.shape for t in arguments if isinstance(t, Tensor)]))
        call(symbol, *arguments)

    call = native.call
    monkeypatch.setattr(native, "call", recorded)
    given = problem((8, 16, 50), batch=True, bias=True)
    kept = int((given["target"] >= 0).sum())
    given.solve("cpu")
    assert len(calls) == 2
    for _, shapes in calls:
        assert shapes[0] == (kept, 16)
        assert (24,) not in shapes


# The filter.

FILTERED: list[tuple[str, ...]] = [(), *((name,) for name in STATISTICS), STATISTICS]


def like_trained(dtype: torch.dtype, statistics: tuple[str, ...] = ()) -> Problem:
    return trained_like(dtype, statistics, (10, 20, 110) if INTERPRETED else (150, 160, 3000))


def left_out(given: Problem, eps: float) -> Tensor:
    """Return, as bool [N, V], the rule of the documentation, block by block, in fp64."""
    hidden, weight, bias = (given[name].double() for name in ("hidden", "weight", "bias"))
    size = torch.softmax(hidden @ weight.T + bias, 1) * given.upstream["logp"][:, None].abs()
    columns = torch.arange(size.shape[1]).split(FILTER_COLUMNS)
    largest = torch.stack([size[:, c].amax(1) for c in columns], 1)
    order = (largest >= eps).sum(1).argsort(stable=True)
    below = torch.zeros(size.shape, dtype=torch.bool)
    for rows in order.split(FILTER_ROWS):
        for block, c in enumerate(columns):
            target = given["target"][rows]
            hit = bool(((target >= c[0]) & (target <= c[-1])).any())
            below[rows[:, None], c] = not hit and bool((largest[rows, block] < eps).all())
    return below


def test_filter_puts_rows_together_that_are_alike() -> None:
    given = like_trained(torch.float32)
    sure, weight = given["hidden"].clone(), given["weight"]
    # Every second row is sure of token 7, and of nothing else.
    sure[::2] = 20 * weight[7] / weight[7].square().sum()
    given["target"][::2] = 7
    below = left_out(given.but(hidden=sure), 2**-10)
    assert below[::2].float().mean() > 0.9 > below[1::2].float().mean()


@each_filtered_backend
@pytest.mark.parametrize(
    ("budget", "statistics"),
    [(0, ()), (3_000, STATISTICS)] if INTERPRETED else list(product(BUDGETS, FILTERED)),
)
@each_dtype
def test_filter_keeps_its_bound(
    dtype: torch.dtype, budget: int, statistics: tuple[str, ...], backend: str
) -> None:
    """Something is left out, and no entry is off by more than the documentation says."""
    given = like_trained(dtype, statistics).on(backend)
    exact = given.solve(backend, memory_budget=budget)
    some = given.solve(backend, memory_budget=budget, grad_filter=EPS)
    hidden, weight = given["hidden"].double(), given["weight"].double()
    bounds = {
        "dx": EPS * weight.abs().sum(0),
        "dw": EPS * hidden.abs().sum(0),
        "db": EPS * len(hidden),
    }
    for name, bound in bounds.items():
        rounding = 4 * torch.finfo(dtype).eps * exact[name].double().abs()
        difference = (some[name].double() - exact[name].double()).abs()
        assert (difference <= bound + rounding).all(), name
        assert difference.any(), f"{name}: nothing was left out"
    if backend == "cpu" or dtype != torch.float32:  # Triton multiplies fp32 itself with a filter
        assert torch.equal(exact["logp"], some["logp"])


@each_filtered_backend
@each_dtype
def test_a_filter_that_leaves_nothing_out(dtype: torch.dtype, backend: str) -> None:
    check(like_trained(dtype, STATISTICS).on(backend), backend, grad_filter=1e-30)


def test_filter_leaves_out_what_it_says() -> None:
    """Its gradient is the exact one with the left-out entries of dz at 0."""
    eps = 2**-10
    given = like_trained(torch.float32)
    below = left_out(given, eps)
    assert 0.3 < below.float().mean() < 1
    hidden, weight, bias = (given[name].double() for name in ("hidden", "weight", "bias"))
    dz = -torch.softmax(hidden @ weight.T + bias, 1)
    dz[torch.arange(len(hidden)), given["target"]] += 1
    dz = torch.where(below, 0, dz * given.upstream["logp"][:, None].double())
    got, plain, exact = given.solve("cpu", grad_filter=eps), given.unfused(), given.truth()
    for name, expected in (("dx", dz @ weight), ("dw", dz.T @ hidden), ("db", dz.sum(0))):
        gate(name, got[name], expected, expected + (plain[name].double() - exact[name]))


def test_filter_of_zero_is_exact() -> None:
    given = like_trained(torch.float32, STATISTICS)
    assert_same(given.solve("cpu", grad_filter=0.0), given.solve("cpu"))


@each_filtered_backend
def test_filter_keeps_nan(backend: str) -> None:
    given = like_trained(HALF if INTERPRETED else torch.float32).on(backend)
    given["hidden"][4] = torch.nan
    assert given.solve(backend, grad_filter=0.5)["dx"][4].isnan().all()
