"""The Triton kernels of linear_logprob in the interpreter: test_triton_interpreted.py runs this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from latro_kernels.linear_logprob.triton import fused as driver
from latro_kernels.linear_logprob.triton import tiles as kernels
from tests.latro_kernels.logprob_cases import fused, problem, solve, solve_all, truth

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
CASES: list[tuple[tuple[int, int, int], torch.dtype, dict[str, Any]]] = [
    ((1, 1, 1), torch.float32, {"bias": True, "entropy": True}),
    ((5, 3, 101), torch.float32, {"softcap": 5.0, "temperature": 0.7, "entropy": True}),
    ((26, 7, 211), torch.float32, {}),
    ((5, 3, 101), torch.bfloat16, {"bias": True, "softcap": 30.0}),
    ((5, 3, 101), torch.float16, {"entropy": True}),
    ((6, 150, 397), torch.float32, {"rows": "peaked", "entropy": True}),
    ((6, 150, 397), torch.bfloat16, {"rows": "peaked"}),
    ((6, 9, 397), torch.float32, {"rows": "flat", "entropy": True}),
]


@pytest.mark.parametrize(("shape", "dtype", "options"), CASES)
def test_matches_fp64(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    options: dict[str, Any],
    gate: Callable[[str, Tensor, Tensor, Tensor], None],
    small_tiles: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "BLOCK_V", 64)
    for name, ours, exact, plain in solve_all(problem(shape, dtype, **options), "triton"):
        gate(name, ours, exact, plain)


@pytest.mark.parametrize("more", [{"frozen": True}, {"memory_budget": 0}], ids=str)
@pytest.mark.parametrize(("shape", "dtype", "options"), CASES)
def test_forms_match_fp64(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    options: dict[str, Any],
    more: dict[str, Any],
    gate: Callable[[str, Tensor, Tensor, Tensor], None],
    small_tiles: None,
) -> None:
    for name, *results in solve_all(problem(shape, dtype, **options), "triton", **more):
        gate(name, *results)


@pytest.mark.parametrize("budget", [10_000, 10**6])
def test_no_bit_depends_on_the_budget(budget: int, small_tiles: None) -> None:
    given = problem((26, 9, 211), bias=True, entropy=True)
    all_again = solve(fused("triton", True, memory_budget=0), given)
    some_kept = solve(fused("triton", True, memory_budget=budget), given)
    for name, value in all_again.items():
        assert torch.equal(value, some_kept[name]), name


@pytest.mark.parametrize("more", [{}, {"grad_filter": 1e-20}], ids=str)
def test_bias_of_any_step(
    more: dict[str, Any],
    gate: Callable[[str, Tensor, Tensor, Tensor], None],
    small_tiles: None,
) -> None:
    given = problem((5, 9, 200), bias=True)
    for bias in (given.bias.repeat_interleave(2)[::2], given.bias[:1].expand(200)):
        for name, *results in solve_all(replace(given, bias=bias), "triton", **more):
            gate(name, *results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("more", [{}, {"frozen": True}], ids=str)
def test_first_slices_of_minus_infinity(
    more: dict[str, Any],
    dtype: torch.dtype,
    gate: Callable[[str, Tensor, Tensor, Tensor], None],
    small_tiles: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "TILE_COLUMNS", 64)
    given = problem((5, 9, 300), dtype, bias=True)
    given.bias[:200] = -torch.inf
    given = replace(given, target=200 + given.target % 100)
    for name, *results in solve_all(given, "triton", **more):
        gate(name, *results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_of_the_vocabulary_of_minus_infinity(dtype: torch.dtype, small_tiles: None) -> None:
    """As a rank may have it: its pull counts for nothing, which it does not as NaN."""
    given = problem((5, 9, 100), dtype, bias=True)
    settings = (1.0, 0.0, "triton", False, False, True, False, 0)
    peak, _, _, _, pull, *_ = torch.ops.latro_kernels.linear_logprob(
        *(given.hidden, given.weight, given.target, torch.full_like(given.bias, -torch.inf)),
        *settings,
    )
    assert (peak == -torch.inf).all()
    assert not pull.any()


def test_logits_of_minus_infinity(small_tiles: None) -> None:
    given = problem((4, 9, 300), bias=True, entropy=True)
    given.bias[:250] = -torch.inf
    given.target.fill_(260)
    ours = solve(fused("triton", True), given)
    exact = truth(given)
    for name in ("logp", "entropy"):
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-5, atol=1e-5)
    assert not ours["dw"][:250].any()
    assert ours["dx"].isfinite().all()
