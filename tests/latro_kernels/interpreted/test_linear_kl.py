"""The Triton kernels of linear_kl in the interpreter: test_triton_interpreted.py runs this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from latro_kernels.linear_kl import triton as kernels
from tests.latro_kernels.kl_cases import fused, nearly_one_hot, problem, solve, solve_all, truth

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
CASES: list[tuple[tuple[int, int, int], torch.dtype, dict[str, Any]]] = [
    ((1, 1, 1), torch.float32, {"bias": True}),
    ((5, 3, 101), torch.float32, {"softcap": 5.0, "temperature": 0.7}),
    ((26, 7, 211), torch.float32, {"hidden_size_q": 4}),
    ((5, 3, 101), torch.bfloat16, {"bias": True, "softcap": 30.0}),
    ((5, 3, 101), torch.float16, {}),
    ((6, 150, 397), torch.float32, {"rows": "peaked"}),
    ((6, 150, 397), torch.bfloat16, {"rows": "peaked", "apart": 0.01}),
    ((6, 9, 397), torch.float32, {"rows": "flat"}),
    ((6, 9, 397), torch.float32, {"apart": 1e-3, "bias": True}),
    ((6, 9, 397), torch.float32, {"apart": 0.3}),
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


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_nearly_one_hot_and_far_apart(
    scale: float,
    gate: Callable[[str, Tensor, Tensor, Tensor], None],
    small_tiles: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "BLOCK_V", 64)
    given = nearly_one_hot(7, 300, scale)
    for name, ours, exact, plain in solve_all(given, "triton"):
        gate(name, ours, exact, plain)
    torch.testing.assert_close(
        solve(fused("triton"), given)["dx"].double(), truth(given)["dx"], rtol=1e-5, atol=0
    )


def test_equal_heads_give_exactly_zero(small_tiles: None) -> None:
    given = problem((26, 9, 211), bias=True, softcap=5.0).equal_heads()
    for case in (given, given.share_weight()):
        for name, value in solve(fused("triton"), case).items():
            assert not value.any(), name


def test_a_small_kl_keeps_its_digits(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_V", 64)
    given = problem((6, 64, 397), apart=1e-4)
    true = truth(given)["kl"]
    assert ((fused("triton")(given) - true).abs() / true).max() < 2**-6


def test_biases_of_any_step(
    gate: Callable[[str, Tensor, Tensor, Tensor], None], small_tiles: None
) -> None:
    given = problem((5, 9, 200), bias=True)
    bias_p, bias_q = given.bias_p.repeat_interleave(2)[::2], given.bias_q[:1].expand(200)
    for name, *results in solve_all(replace(given, bias_p=bias_p, bias_q=bias_q), "triton"):
        gate(name, *results)


def test_logits_of_minus_infinity(small_tiles: None) -> None:
    given = problem((4, 9, 300), bias=True)
    given.bias_p[:250] = -torch.inf
    given.bias_q[:220] = -torch.inf
    ours, exact = solve(fused("triton"), given), truth(given)
    torch.testing.assert_close(ours["kl"].double(), exact["kl"], rtol=1e-5, atol=1e-5)
    assert not ours["dw"][:250].any()
    assert ours["dx"].isfinite().all()
    given.bias_q[260] = -torch.inf
    assert (fused("triton")(given) == torch.inf).all()
