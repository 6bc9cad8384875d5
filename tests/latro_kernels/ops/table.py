"""The table of ops, and how a test is made for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.latro_kernels.ops import (
    gather_logprob,
    group_advantage,
    linear_kl,
    linear_logprob,
    linear_sample,
)
from tests.latro_kernels.ops.op import FUSED, Op

LINEAR_LOGPROB, GATHER_LOGPROB = linear_logprob.OP, gather_logprob.OP
LINEAR_KL, GROUP_ADVANTAGE = linear_kl.OP, group_advantage.OP
LINEAR_SAMPLE = linear_sample.OP
OPS = [LINEAR_LOGPROB, GATHER_LOGPROB, LINEAR_KL, GROUP_ADVANTAGE, LINEAR_SAMPLE]
DIFFERENTIABLE = [LINEAR_LOGPROB, GATHER_LOGPROB, LINEAR_KL]

each_sample = pytest.mark.parametrize(
    ("op", "shape", "dtype", "options"),
    [
        pytest.param(op, *sample, id="-".join([op.name, *map(str, sample)]))
        for op in OPS
        for sample in op.samples
    ],
)


def each_op(ops: Sequence[Op] = OPS) -> pytest.MarkDecorator:
    """Make a test of each op."""
    return pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in ops])


def each_form(
    ops: Sequence[Op] = OPS,
    backends: Sequence[Any] = FUSED,
    where: Callable[[Op, dict[str, Any], str], bool] = lambda op, form, backend: True,
) -> pytest.MarkDecorator:
    """Make a test of each op in each of its forms on each backend that has the form."""
    return pytest.mark.parametrize(
        ("op", "form", "backend"),
        [
            pytest.param(op, form, backend, id=f"{op.name}-{name}-{backend}", marks=of.marks)
            for op in ops
            for name, form in op.forms.items()
            for of in backends
            for backend in of.values
            if _has(form, backend) and where(op, form, backend)
        ],
    )


def _has(form: dict[str, Any], backend: str) -> bool:
    return not ("grad_filter" in form and backend == "cuda") and not (
        "inplace_backward" in form and backend == "reference"
    )
