"""Products in registers, in the interpreter: test_triton_interpreted.py runs this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from latro_kernels.head_gradient import Tile
from latro_kernels.linear_logprob.triton import blocks
from latro_kernels.linear_logprob.triton import fused as driver
from tests.latro_kernels.logprob_cases import (
    assert_filter_keeps_its_bound,
    fused,
    problem,
    solve,
    solve_all,
    trained_like,
    truth,
    unfused,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
Gate = Callable[[str, Tensor, Tensor, Tensor], None]
CASES: list[tuple[tuple[int, int, int], torch.dtype, dict[str, Any]]] = [
    ((0, 3, 5), torch.bfloat16, {"bias": True, "entropy": True}),
    ((1, 1, 1), torch.bfloat16, {"bias": True, "entropy": True}),
    ((5, 3, 101), torch.bfloat16, {"bias": True, "softcap": 30.0}),
    ((5, 3, 101), torch.float16, {"entropy": True, "temperature": 0.7}),
    ((40, 17, 331), torch.bfloat16, {"bias": True, "softcap": 5.0, "entropy": True}),
    ((50, 40, 331), torch.float16, {"bias": True, "temperature": 1.3}),
    ((6, 150, 397), torch.bfloat16, {"rows": "peaked", "entropy": True}),
    ((6, 9, 397), torch.bfloat16, {"rows": "flat", "entropy": True}),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and slices of the vocabulary, groups and splits of several blocks."""
    monkeypatch.setattr(driver, "TILE_ROWS", 40)
    monkeypatch.setattr(driver, "TILE_COLUMNS", 192)
    monkeypatch.setattr(driver, "FROZEN_TILE_ROWS", 24)
    monkeypatch.setattr(driver, "TILES", 2)
    monkeypatch.setattr(driver, "GROUP", 2)


@pytest.mark.parametrize(
    "more", [{}, {"frozen": True}, {"memory_budget": 0}, {"memory_budget": 50_000}], ids=str
)
@pytest.mark.parametrize(("shape", "dtype", "options"), CASES)
def test_matches_fp64(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    options: dict[str, Any],
    more: dict[str, Any],
    gate: Gate,
) -> None:
    for name, *results in solve_all(problem(shape, dtype, **options), "triton", **more):
        gate(name, *results)


@pytest.mark.parametrize("budget", [50_000, 10**6])
def test_no_bit_depends_on_the_budget(budget: int) -> None:
    given = problem((50, 9, 300), torch.bfloat16, bias=True, entropy=True)
    given.grad_logp[::3] = given.grad_entropy[::3] = 0
    all_again = solve(fused("triton", True, memory_budget=0), given)
    some_kept = solve(fused("triton", True, memory_budget=budget), given)
    for name, value in all_again.items():
        assert torch.equal(value, some_kept[name]), name


def test_a_row_does_not_depend_on_the_others() -> None:
    given = problem((50, 9, 300), torch.bfloat16, bias=True, entropy=True)
    few = {name: getattr(given, name)[7:12] for name in ("hidden", "target")}
    upstream = {name: getattr(given, name)[7:12] for name in ("grad_logp", "grad_entropy")}
    whole = solve(fused("triton", True), given)
    part = solve(fused("triton", True), replace(given, **few, **upstream))
    for name in ("logp", "entropy"):
        assert torch.equal(part[name], whole[name][7:12]), name


@pytest.mark.parametrize("more", [{}, {"grad_filter": 1e-20}], ids=str)
def test_rows_without_upstream_gradient(more: dict[str, Any], gate: Gate) -> None:
    """Whatever is in them, nothing comes of them."""
    given = problem((50, 9, 300), torch.bfloat16, bias=True, entropy=True)
    given.grad_logp[::3] = given.grad_entropy[::3] = 0
    exact, plain = truth(given), solve(unfused, given)
    given.hidden[3] = torch.nan
    got = solve(fused("triton", True, **more), given)
    for name in ("dx", "dw", "db"):
        gate(name, got[name], exact[name], plain[name])
    assert not got["dx"][::3].any()


def test_no_row_with_an_upstream_gradient() -> None:
    given = problem((50, 9, 300), torch.bfloat16, bias=True)
    given.grad_logp.zero_()
    got = solve(fused("triton", False), given)
    assert not any(got[name].any() for name in ("dx", "dw", "db"))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("budget", [0, 50_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_filter_keeps_its_bound(dtype: torch.dtype, budget: int, entropy: bool) -> None:
    given = trained_like(dtype, entropy, (50, 20, 400))
    without, filtered = assert_filter_keeps_its_bound(given, 2**-8, "triton", memory_budget=budget)
    assert dtype == torch.float32 or torch.equal(without, filtered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_filter_that_leaves_nothing_out(dtype: torch.dtype, gate: Gate) -> None:
    given = trained_like(dtype, True, (50, 20, 400))
    for name, *results in solve_all(given, "triton", grad_filter=1e-30):
        gate(name, *results)


def test_filter_keeps_nan() -> None:
    given = trained_like(torch.bfloat16, False, (50, 20, 600))
    given.hidden[4] = torch.nan
    assert solve(fused("triton", False, grad_filter=0.5), given)["dx"][4].isnan().all()


def test_logits_of_minus_infinity() -> None:
    given = problem((4, 9, 300), torch.bfloat16, bias=True, entropy=True)
    given.bias[:250] = -torch.inf
    given.target.fill_(260)
    exact = truth(given)
    for more in ({}, {"frozen": True}):
        got = solve(fused("triton", True, **more), given)
        for name in ("logp", "entropy"):
            torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-5, atol=1e-5)
        assert got["dx"].isfinite().all()


@pytest.mark.parametrize("more", [{}, {"frozen": True}, {"grad_filter": 1e-20}], ids=str)
def test_operands_by_descriptor(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a chip that copies blocks by itself; H and V are no multiples of a block."""
    given = problem((50, 20, 332), torch.bfloat16, bias=True)
    expected = solve(fused("triton", False, **more), given)
    described = []

    def has_descriptors(device: torch.device) -> bool:
        described.append(device)
        return True

    monkeypatch.setattr(blocks, "has_descriptors", has_descriptors)
    got = solve(fused("triton", False, **more), given)
    assert described
    for name, value in expected.items():
        if value is not None:
            assert torch.equal(got[name], value), name


def test_rows_that_overlap_have_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "has_descriptors", lambda device: True)
    config = blocks.config(torch.device("cpu"), torch.bfloat16, 16, 8)
    row, weight = (torch.zeros(n, 16, dtype=torch.bfloat16) for n in (1, 8))
    for hidden, described in ((row.repeat(4, 1), True), (row.expand(4, 16), False)):
        tile = Tile(slice(0, 4), slice(0, 8), hidden, weight, None)
        operands = driver._operands(tile, config)
        assert all(isinstance(t, TensorDescriptor) is described for t in operands)


@pytest.mark.parametrize("more", [{}, {"frozen": True}], ids=str)
def test_any_steps(more: dict[str, Any]) -> None:
    given = problem((50, 18, 300), torch.bfloat16)
    expected = solve(fused("triton", False, **more), given)
    turned = replace(given, weight=given.weight.t().contiguous().t())
    wide = torch.zeros(50, 40, dtype=torch.bfloat16)
    wide[:, ::2][:, :18] = given.hidden
    turned = replace(turned, hidden=wide[:, ::2][:, :18])
    got = solve(fused("triton", False, **more), turned)
    for name, value in expected.items():
        if value is not None:
            assert torch.equal(got[name], value), name
