"""The Triton kernels of gather_logprob in the interpreter: test_triton_interpreted.py runs this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from latro_kernels.gather_logprob import triton as kernels
from tests.latro_kernels.gather_cases import fused, problem, solve, solve_all, truth, unfused

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
Gate = Callable[[str, Tensor, Tensor, Tensor], None]
CASES: list[tuple[tuple[int, int], torch.dtype, dict[str, Any]]] = [
    ((1, 1), torch.float32, {"softcap": 5.0, "entropy": True}),
    ((5, 101), torch.float32, {"softcap": 5.0, "temperature": 0.7, "entropy": True}),
    ((26, 211), torch.float32, {}),
    ((5, 101), torch.bfloat16, {"softcap": 30.0}),
    ((5, 101), torch.float16, {"entropy": True}),
    ((6, 397), torch.float32, {"rows": "peaked", "entropy": True}),
    ((6, 397), torch.bfloat16, {"rows": "peaked"}),
    ((6, 397), torch.float32, {"rows": "flat", "entropy": True}),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_V", 64)


@pytest.mark.parametrize(("shape", "dtype", "options"), CASES)
def test_matches_fp64(
    shape: tuple[int, int], dtype: torch.dtype, options: dict[str, Any], gate: Gate
) -> None:
    for name, ours, exact, plain in solve_all(problem(shape, dtype, **options), "triton"):
        gate(name, ours, exact, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_apart_and_backward_in_place(dtype: torch.dtype) -> None:
    given = problem((6, 211), dtype, entropy=True)
    expected = solve(fused("triton", True), given)
    wide = torch.full((6, 230), 7.0, dtype=dtype)
    apart = wide[:, 3:214].copy_(given.logits)
    ours = solve(fused("triton", True, inplace_backward=True), replace(given, logits=apart))
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    assert torch.equal(apart, expected["dlogits"])
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 214:] == 7).all()


def test_rows_without_upstream_gradient(gate: Gate) -> None:
    given = problem((6, 211), entropy=True)
    given.grad_logp[::2] = 0
    given.grad_entropy[::3] = 0
    exact, plain = truth(given), solve(unfused, given)
    given.logits[0, 5] = torch.nan
    ours = solve(fused("triton", True), given)
    gate("dlogits", ours["dlogits"], exact["dlogits"], plain["dlogits"])
    assert not ours["dlogits"][0].any()


def test_logits_of_minus_infinity(gate: Gate) -> None:
    given = problem((4, 300), entropy=True)
    given.logits[:, :250] = -torch.inf
    given.target.fill_(260)
    few = replace(given, logits=given.logits[:, 250:], target=given.target - 250)
    ours, exact, plain = solve(fused("triton", True), given), truth(few), solve(unfused, few)
    for name in ("logp", "entropy"):
        gate(name, ours[name], exact[name], plain[name])
    gate("dlogits", ours["dlogits"][:, 250:], exact["dlogits"], plain["dlogits"])
    assert not ours["dlogits"][:, :250].any()


def test_nan_stays_in_its_row() -> None:
    given = problem((4, 300), entropy=True)
    given.logits[2, 270] = torch.nan
    for result in solve(fused("triton", True), given).values():
        assert result.view(4, -1).isnan().any(1).tolist() == [False, False, True, False]
