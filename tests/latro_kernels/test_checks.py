"""The checks that the ops share, where an op's own tests do not reach."""

from __future__ import annotations

import pytest
import torch

from latro_kernels import few_rows_linear, linear_logprob
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
