"""The Triton kernels of linear_logprob in Triton's interpreter."""

from __future__ import annotations

import pytest

from tests.latro_kernels import interpreter

pytestmark = pytest.mark.long


def test_linear_logprob() -> None:
    interpreter.run("linear_logprob")
