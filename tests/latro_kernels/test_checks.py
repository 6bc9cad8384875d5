"""The checks that the ops share, where an op's own tests do not reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from latro_kernels import (
    GroupLayout,
    few_rows_linear,
    gather_logprob,
    group_advantage,
    linear_jsd,
    linear_logprob,
    linear_sample,
    linear_topk,
    segment_of_rows,
)
from latro_kernels.checks import check_float_dtype, check_number, check_positive, check_type


def test_only_the_reference_takes_fp64() -> None:
    x = torch.zeros(1, dtype=torch.float64)
    check_float_dtype("x", x, "reference")
    with pytest.raises(
        TypeError, match=r"x: expected dtype torch\.float32 or .*got torch\.float64"
    ):
        check_float_dtype("x", x, "auto")


@pytest.mark.parametrize("name", ["hidden", "weight", "target", "bias"])
def test_a_sparse_tensor_is_refused_by_name(name: str) -> None:
    tensors = {"hidden": torch.ones(2, 3), "weight": torch.ones(4, 3), "bias": torch.ones(4)}
    tensors["target"] = torch.ones(2, dtype=torch.int64)
    tensors[name] = tensors[name].to_sparse()
    with pytest.raises(TypeError, match=rf"^{name}: expected a dense tensor, got one of torch\.sp"):
        linear_logprob(**tensors)


def test_a_sparse_row_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"^x: expected a dense tensor"):
        few_rows_linear(torch.ones(2, 3).to_sparse(), torch.ones(4, 3))


@pytest.mark.parametrize("value", [True, "1", None])
def test_a_number_is_neither_bool_nor_str(value: object) -> None:
    with pytest.raises(TypeError, match="x: expected a float, got"):
        check_positive("x", value)


def test_numbers_may_be_ints() -> None:
    check_positive("x", 2)
    with pytest.raises(ValueError, match=r"x: expected a finite number above 0, got 0"):
        check_positive("x", 0)


def test_numpys_ints_are_ints() -> None:
    offsets, x, w = torch.arange(5), torch.randn(4, 3), torch.randn(5, 3)
    layout = GroupLayout(offsets, np.int64(2), num_groups=np.int32(3))
    assert type(layout.num_generations) is type(layout.num_groups) is int
    assert torch.equal(segment_of_rows(offsets, np.int64(4)), torch.arange(4))
    assert torch.equal(linear_topk(x, w, np.uint8(2)).token, linear_topk(x, w, 2).token)
    target = torch.tensor([0, -100, 2, 1])
    options: dict[str, Any] = {"ignore_index": np.int64(-100), "memory_budget": np.int64(64)}
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    linear_logprob(ours, w, target, **options).sum().backward()
    linear_logprob(theirs, w, target, ignore_index=-100).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert gather_logprob(x, target, ignore_index=np.int64(-100))[1] == 0
    for wrong in (np.True_, np.float64(2), np.array([2]), torch.tensor(2)):
        with pytest.raises(TypeError, match=r"^k: expected an int, got "):
            linear_topk(x, w, wrong)
    with pytest.raises(ValueError, match=r"^num_generations: expected 2 or more, got 1$"):
        GroupLayout(offsets, np.int64(1))
    with pytest.raises(ValueError, match=r"^ignore_index: expected an int that int64 holds, got 1"):
        gather_logprob(x, target, ignore_index=np.uint64(2**64 - 1))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_numpys_floats_are_floats(backend: str) -> None:
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    target, rows = torch.tensor([0, 1, 2, 2]), torch.arange(4)

    def results(kind: Any) -> tuple[torch.Tensor, ...]:
        scales: Any = {"temperature": kind(2), "softcap": kind(3), "backend": backend}
        layout = GroupLayout(torch.arange(9), 2)
        weights = {"beta": kind(0.25), "answer_weight": kind(2), "backend": backend}
        return (
            linear_logprob(x, w, target, **scales),
            gather_logprob(x, target, **scales),
            linear_jsd(x, w, 2 * x, w, beta=kind(0.25), **scales),
            linear_sample(x, w, rows, rows, temperature=kind(0), backend=backend).token,
            group_advantage(torch.arange(8.0), torch.zeros(8), layout, **weights).coefficient,
        )

    for ours, theirs in zip(results(np.float32), results(float), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.requires_grad == theirs.requires_grad


def test_type_is_named() -> None:
    check_type("x", True, bool)
    with pytest.raises(TypeError, match="x: expected a str, got int"):
        check_type("x", 3, str)


@pytest.mark.parametrize("value", [1e-50, 1e-39, 1e39, 10**39])
def test_a_number_that_fp32_does_not_hold(value: float) -> None:
    """As fp32 it would be 0, infinite, or have lost digits."""
    with pytest.raises(ValueError, match=r"x: expected a number that fp32 holds, of 1.18e-38 to 3"):
        check_positive("x", value)
    if value > 1:
        with pytest.raises(ValueError, match=r"x: expected a number that fp32 holds, up to 3.4e"):
            check_number("x", -value)
    else:
        check_number("x", value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400)])
def test_a_number_is_finite(value: float) -> None:
    with pytest.raises(ValueError, match=r"x: expected a finite number above 0, got -?(nan|inf)$"):
        check_positive("x", value)
    with pytest.raises(ValueError, match=r"x: expected a finite number, got -?(nan|inf)$"):
        check_number("x", value)


def test_the_ends_of_fp32_and_zero() -> None:
    for value in (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max):
        check_positive("x", value)
        check_number("x", -value)
    check_number("x", 0)
