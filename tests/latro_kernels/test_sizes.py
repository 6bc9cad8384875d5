"""Sizes at which code changes: tiles of production, a grid's dimension, int32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.latro_kernels.ops.op import DTYPES, INTERPRETED, Op, backends, check, gate
from tests.latro_kernels.ops.table import (
    GATHER_LOGPROB,
    LINEAR_KL,
    LINEAR_LOGPROB,
    each_op,
)

BACKENDS = [] if INTERPRETED else backends("cpu", "reference", "triton", "cuda")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("backend", BACKENDS)
@each_dtype
@each_op([LINEAR_LOGPROB, LINEAR_KL])
def test_the_tiles_of_production(op: Op, dtype: torch.dtype, backend: str) -> None:
    options = {} if op is LINEAR_KL else {"entropy": True}
    check(op.problem((65, 129, 4099), dtype, bias=True, **options).on(backend), backend)


@each_dtype
def test_more_rows_than_a_block_of_the_weights_gradient(dtype: torch.dtype) -> None:
    check(LINEAR_KL.problem((1500, 130, 301), dtype, bias=True), "cpu")


@each_op([LINEAR_LOGPROB, LINEAR_KL])
def test_more_rows_than_a_grid_dimension(op: Op) -> None:
    check(op.problem((66_000, 2, 3)), "cpu")


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values != ("reference",)])
def test_more_rows_of_logits_than_a_grid_dimension(backend: str) -> None:
    check(GATHER_LOGPROB.problem((66_000, 3)).on(backend), backend)


@each_op([LINEAR_LOGPROB, LINEAR_KL])
def test_more_logits_than_int32(op: Op) -> None:
    """The last rows and the last column of N·V > 2³¹ logits."""
    given = op.problem((70_000, 2, 32_000))
    if op is LINEAR_LOGPROB:
        given["target"][-1] = 31_999
    hidden = given[op.rows[0]].requires_grad_()
    (output,) = op.named(op.function(**given.arguments)).values()
    (name,) = given.upstream
    output[-3:].backward(given.upstream[name][-3:])
    tail = given.of_rows(slice(-3, None))
    true, plain = tail.truth(), tail.unfused()
    gate(name, output.detach()[-3:], true[name], plain[name])
    gate("dx", hidden.grad[-3:], true["dx"], plain["dx"])


def test_addresses_beyond_int32() -> None:
    """Three rows 2³⁰ elements apart, in memory of which only their pages are ever touched."""
    V, step = 1031, 2**30
    memory = torch.from_numpy(np.zeros(2 * step + V, dtype=np.int16)).view(torch.bfloat16)
    given = GATHER_LOGPROB.problem((3, V), torch.bfloat16)
    logits = memory.as_strided((3, V), (step, 1))
    logits.copy_(given["logits"])
    leaf = logits.detach().requires_grad_()
    logp = GATHER_LOGPROB.function(leaf, given["target"], inplace_backward=True)
    # Not backward(): it would clone a gradient of such strides.
    (dlogits,) = torch.autograd.grad(logp, leaf, given.upstream["logp"])
    assert dlogits.data_ptr() == memory.data_ptr()
    true, plain = given.truth(), given.unfused()
    gate("logp", logp.detach(), true["logp"], plain["logp"])
    gate("dlogits", dlogits, true["dlogits"], plain["dlogits"])
