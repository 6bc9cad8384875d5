"""gather_logprob in Triton: one pass over the logits each way, one program per row.

The formulas stand in `latro_kernels.gather_logprob`. A program reads a block of its row before it
writes the block's gradient, so that the gradient may take the logits' place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latro_kernels.linear_logprob.state import RowGrad
from latro_kernels.triton.softmax import flags, product_grad, row_logits

# Each thread of 8 warps loads twice 16 bytes of 2-byte logits.
BLOCK_V = 4096
NUM_WARPS = 8


@triton.heuristics(flags(WITH_ENTROPY="entropy_ptr", WITH_FURTHER_SUMS="mean_logit_ptr"))
@triton.jit
def forward_kernel(
    logits_ptr,
    target_ptr,
    logp_ptr,
    entropy_ptr,
    log_sum_p_squared_ptr,
    mean_logit_ptr,
    row_max_ptr,
    log_sum_ptr,
    target_logit_ptr,
    stride_n,
    V,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_FURTHER_SUMS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_n
    lane = tl.arange(0, BLOCK_V).to(tl.int64)
    row_max = float("-inf")
    # One sum a lane: they share the row's maximum, and are added up once, at the end.
    sum_exp = tl.zeros((BLOCK_V,), tl.float32)
    weighted_sum = tl.zeros((BLOCK_V,), tl.float32)
    square_sum = 0.0
    logit_sum = 0.0
    # A row whose target is below 0 is ignored, and not read. Its loop begins at its end: another
    # end would be one number more to hold in the loop, whose registers are counted.
    first = tl.where(tl.load(target_ptr + row) < 0, V, 0)
    for begin in range(first, V, BLOCK_V):
        j = begin + lane
        z = row_logits(row_ptr, None, j, j < V, softcap, temperature, False, HAS_SOFTCAP)
        new_max = tl.maximum(row_max, tl.max(z, 0))
        # A row that is -inf so far has no maximum to subtract.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        drop = row_max - shift
        shrink = tl.exp(drop)
        below = z - shift
        e = tl.exp(below)
        if WITH_ENTROPY:
            # 0 * -inf counts as 0.
            weighted_sum = tl.where(shrink == 0.0, 0.0, shrink * (weighted_sum + drop * sum_exp))
            weighted_sum += tl.where(e == 0.0, 0.0, e * below)
        if WITH_FURTHER_SUMS:
            # Added up in each block: lanes of their own would take twice the registers.
            square_sum = square_sum * (shrink * shrink) + tl.sum(e * e, 0)
            logit_sum += tl.sum(tl.where(j < V, z, 0.0), 0)
        sum_exp = sum_exp * shrink + e
        row_max = new_max
    whole_sum = tl.sum(sum_exp, 0)
    log_sum = tl.log(whole_sum)
    hit = tl.load(target_ptr + row)
    is_read = hit >= 0
    is_column = is_read & (hit < V)
    target_logit = row_logits(
        row_ptr, None, hit, is_column, softcap, temperature, False, HAS_SOFTCAP
    )
    tl.store(logp_ptr + row, tl.where(is_read, (target_logit - row_max) - log_sum, 0.0))
    tl.store(row_max_ptr + row, tl.where(is_read, row_max, 0.0))
    tl.store(log_sum_ptr + row, tl.where(is_read, log_sum, 0.0))
    tl.store(target_logit_ptr + row, tl.where(is_read, target_logit, 0.0))
    if WITH_ENTROPY:
        entropy = log_sum - tl.sum(weighted_sum, 0) / whole_sum
        tl.store(entropy_ptr + row, tl.where(is_read, entropy, 0.0))
    if WITH_FURTHER_SUMS:
        log_sum_p_squared = tl.log(square_sum) - 2.0 * log_sum
        tl.store(log_sum_p_squared_ptr + row, tl.where(is_read, log_sum_p_squared, 0.0))
        tl.store(mean_logit_ptr + row, tl.where(is_read, logit_sum / V, 0.0))


@triton.heuristics(flags(WITH_OFFSET="offset_ptr", WITH_SQUARE="grad_square_ptr"))
@triton.jit
def backward_kernel(
    logits_ptr,
    dlogits_ptr,
    target_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    offset_ptr,
    grad_square_ptr,
    logp_ptr,
    row_max_ptr,
    log_sum_ptr,
    stride_n,
    stride_dn,
    V,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    WITH_OFFSET: tl.constexpr,
    WITH_SQUARE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_n
    lane = tl.arange(0, BLOCK_V).to(tl.int64)
    hit = tl.load(target_ptr + row)
    grad_logp = tl.load(grad_logp_ptr + row)
    logp = tl.load(logp_ptr + row)
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    is_read = grad_logp != 0.0
    grad_entropy = 0.0
    offset = 0.0
    grad_square = 0.0
    if WITH_OFFSET:
        grad_entropy = tl.load(grad_entropy_ptr + row)
        offset = tl.load(offset_ptr + row)
        is_read |= (grad_entropy != 0.0) | (offset != 0.0)
    if WITH_SQUARE:
        grad_square = tl.load(grad_square_ptr + row)
        is_read |= grad_square != 0.0
    upstream, forward = (grad_logp, grad_entropy, offset, grad_square), (logp, row_max, log_sum)
    # A row that nobody asks about is not read, and gets 0 whatever is in it.
    length = tl.where(is_read, V, 0)
    for begin in range(0, V, BLOCK_V):
        j = begin + lane
        z = row_logits(row_ptr, None, j, j < length, softcap, temperature, False, HAS_SOFTCAP)
        dz = product_grad(
            z,
            j == hit,
            upstream,
            forward,
            softcap,
            temperature,
            HAS_SOFTCAP,
            WITH_OFFSET,
            WITH_SQUARE,
        )
        dz = tl.where(j < length, dz, 0.0)
        tl.store(dlogits_ptr + row * stride_dn + j, dz, mask=j < V)


def forward(
    logits: Tensor, target: Tensor, rows: list[Tensor | None], temperature: float, softcap: float
) -> None:
    """Fill `rows`, which `ops` names; None: not asked for."""
    N, V = logits.shape
    logp, entropy, log_sum_p_squared, mean_logit, row_max, log_sum, target_logit = rows
    if N == 0:
        return
    with torch.cuda.device_of(logits):
        forward_kernel[(N,)](
            logits_ptr=logits,
            target_ptr=target,
            logp_ptr=logp,
            entropy_ptr=entropy,
            log_sum_p_squared_ptr=log_sum_p_squared,
            mean_logit_ptr=mean_logit,
            row_max_ptr=row_max,
            log_sum_ptr=log_sum,
            target_logit_ptr=target_logit,
            stride_n=logits.stride(0),
            V=V,
            softcap=softcap,
            temperature=temperature,
            BLOCK_V=BLOCK_V,
            num_warps=NUM_WARPS,
        )


def backward(
    logits: Tensor, grad: RowGrad, dlogits: Tensor, temperature: float, softcap: float
) -> None:
    """Fill `dlogits`, which may be the logits."""
    N, V = logits.shape
    if N == 0:
        return
    with torch.cuda.device_of(logits):
        backward_kernel[(N,)](
            logits_ptr=logits,
            dlogits_ptr=dlogits,
            **grad.pointers(),
            stride_n=logits.stride(0),
            stride_dn=dlogits.stride(0),
            V=V,
            softcap=softcap,
            temperature=temperature,
            BLOCK_V=BLOCK_V,
            num_warps=NUM_WARPS,
        )
