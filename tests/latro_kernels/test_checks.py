"""The checks that the ops share, where an op's own tests do not reach."""

from __future__ import annotations

import pytest
import torch

from latro_kernels.checks import check_float_dtype, check_positive, check_type


def test_only_the_reference_takes_fp64() -> None:
    x = torch.zeros(1, dtype=torch.float64)
    check_float_dtype("x", x, "reference")
    with pytest.raises(
        TypeError, match=r"x: expected dtype torch\.float32 or .*got torch\.float64"
    ):
        check_float_dtype("x", x, "auto")


@pytest.mark.parametrize("value", [True, "1", None])
def test_a_number_is_neither_bool_nor_str(value: object) -> None:
    with pytest.raises(TypeError, match="x: expected a float, got"):
        check_positive("x", value)


def test_numbers_may_be_ints() -> None:
    check_positive("x", 2)
    with pytest.raises(ValueError, match="x: expected a finite number above 0, got 0"):
        check_positive("x", 0)


def test_type_is_named() -> None:
    check_type("x", True, bool)
    with pytest.raises(TypeError, match="x: expected a str, got int"):
        check_type("x", 3, str)
