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
from latro_kernels.triton.softmax import product_grad, row_logits

# Of 2-byte logits, two loads of 16 bytes for each of the threads of 8 warps.
BLOCK_V = 4096
NUM_WARPS = 8
# What a launch's arguments say of the kernel that it needs.
FLAGS = {
    "HAS_SOFTCAP": lambda args: args["softcap"] > 0,
    "WITH_ENTROPY": lambda args: args["entropy_ptr"] is not None,
}


@triton.heuristics(FLAGS)
@triton.jit
def forward_kernel(
    logits_ptr,
    target_ptr,
    logp_ptr,
    entropy_ptr,
    peak_ptr,
    log_total_ptr,
    stride_n,
    V,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_n
    lane = tl.arange(0, BLOCK_V).to(tl.int64)
    peak = float("-inf")
    # One sum a lane: they share the peak, and are added up once, at the end.
    total = tl.zeros((BLOCK_V,), tl.float32)
    weighted = tl.zeros((BLOCK_V,), tl.float32)
    for begin in range(0, V, BLOCK_V):
        j = begin + lane
        z = row_logits(row_ptr, None, j, j < V, softcap, temperature, False, HAS_SOFTCAP)
        largest = tl.maximum(peak, tl.max(z, 0))
        # A row that is -inf so far has no peak to subtract.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        drop = peak - shift
        shrink = tl.exp(drop)
        below = z - shift
        e = tl.exp(below)
        if WITH_ENTROPY:
            # 0 * -inf counts as 0.
            weighted = tl.where(shrink == 0.0, 0.0, shrink * (weighted + drop * total))
            weighted += tl.where(e == 0.0, 0.0, e * below)
        total = total * shrink + e
        peak = largest
    sum_total = tl.sum(total, 0)
    log_total = tl.log(sum_total)
    hit = tl.load(target_ptr + row)
    picked = row_logits(row_ptr, None, hit, hit < V, softcap, temperature, False, HAS_SOFTCAP)
    tl.store(logp_ptr + row, (picked - peak) - log_total)
    tl.store(peak_ptr + row, peak)
    tl.store(log_total_ptr + row, log_total)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, log_total - tl.sum(weighted, 0) / sum_total)


@triton.heuristics(FLAGS)
@triton.jit
def backward_kernel(
    logits_ptr,
    dlogits_ptr,
    target_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    logp_ptr,
    entropy_ptr,
    peak_ptr,
    log_total_ptr,
    stride_n,
    stride_dn,
    V,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_n
    lane = tl.arange(0, BLOCK_V).to(tl.int64)
    hit = tl.load(target_ptr + row)
    grad_logp = tl.load(grad_logp_ptr + row)
    logp = tl.load(logp_ptr + row)
    peak = tl.load(peak_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    is_read = grad_logp != 0.0
    grad_entropy = 0.0
    entropy = 0.0
    if WITH_ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        is_read |= grad_entropy != 0.0
    # A row that nobody asks about is not read, and gets 0 whatever is in it.
    length = tl.where(is_read, V, 0)
    for begin in range(0, V, BLOCK_V):
        j = begin + lane
        z = row_logits(row_ptr, None, j, j < length, softcap, temperature, False, HAS_SOFTCAP)
        dz = product_grad(
            z,
            j == hit,
            grad_logp,
            grad_entropy,
            logp,
            entropy,
            peak,
            log_total,
            softcap,
            temperature,
            HAS_SOFTCAP,
            WITH_ENTROPY,
        )
        dz = tl.where(j < length, dz, 0.0)
        tl.store(dlogits_ptr + row * stride_dn + j, dz, mask=j < V)


def forward(
    logits: Tensor,
    target: Tensor,
    rows: tuple[Tensor, Tensor | None, Tensor, Tensor],
    *,
    temperature: float,
    softcap: float,
) -> None:
    """Fill `rows`, which are logp, entropy (None: not asked for), peak and log_total."""
    (N, V), (logp, entropy, peak, log_total) = logits.shape, rows
    if N == 0:
        return
    with torch.cuda.device_of(logits):
        forward_kernel[(N,)](
            logits_ptr=logits,
            target_ptr=target,
            logp_ptr=logp,
            entropy_ptr=entropy,
            peak_ptr=peak,
            log_total_ptr=log_total,
            stride_n=logits.stride(0),
            V=V,
            softcap=softcap,
            temperature=temperature,
            BLOCK_V=BLOCK_V,
            num_warps=NUM_WARPS,
        )


def backward(
    logits: Tensor,
    target: Tensor,
    grad: RowGrad,
    dlogits: Tensor,
    *,
    temperature: float,
    softcap: float,
) -> None:
    """Fill `dlogits`, which may be the logits."""
    N, V = logits.shape
    if N == 0:
        return
    with torch.cuda.device_of(logits):
        backward_kernel[(N,)](
            logits_ptr=logits,
            dlogits_ptr=dlogits,
            target_ptr=target,
            grad_logp_ptr=grad.grad_logp,
            grad_entropy_ptr=grad.grad_entropy,
            logp_ptr=grad.logp,
            entropy_ptr=grad.entropy,
            peak_ptr=grad.peak,
            log_total_ptr=grad.log_total,
            stride_n=logits.stride(0),
            stride_dn=dlogits.stride(0),
            V=V,
            softcap=softcap,
            temperature=temperature,
            BLOCK_V=BLOCK_V,
            num_warps=NUM_WARPS,
        )
