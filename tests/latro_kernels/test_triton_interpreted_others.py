"""The Triton kernels of the other ops in Triton's interpreter."""

from __future__ import annotations

import pytest

from tests.latro_kernels import interpreter

pytestmark = pytest.mark.long


def test_other_ops() -> None:
    interpreter.run("not linear_logprob")
