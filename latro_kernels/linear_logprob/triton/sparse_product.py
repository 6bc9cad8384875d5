"""A product with a matrix of which some blocks are 0 and known to be, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latro_kernels.head_gradient import ActiveBlocks
from latro_kernels.linear_logprob.triton.products import block_ptr

# Columns of a block of the result, and how much of an active block is taken at a time. The rows are
# those of the block that is active or not, 256 at most: more columns would not fit the registers.
BLOCK_COLS, BLOCK_DEPTH = 64, 32


@triton.jit
def sparse_product_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    active_ptr,
    M,
    K,
    H,
    a_row_step,
    a_col_step,
    b_row_step,
    b_col_step,
    c_row_step,
    active_row_step,
    active_col_step,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """c[M, H] = a[M, K] . b[K, H], or +=, over the blocks of BLOCK_M x BLOCK_K that are active."""
    block_m, block_h = tl.program_id(0), tl.program_id(1)
    i = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    h = (block_h * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    depth = tl.arange(0, BLOCK_DEPTH).to(tl.int64)
    in_rows, in_cols = i < M, h < H
    in_block = in_rows[:, None] & in_cols[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    first_row, first_column = block_m * BLOCK_M, block_h * BLOCK_H
    if ADD:
        before = block_ptr(c_ptr, c_row_step, first_row, first_column, BLOCK_M, BLOCK_H)
        sums += tl.load(before, mask=in_block, other=0.0)
    for block_k in range(tl.cdiv(K, BLOCK_K)):
        flag = active_ptr + block_m * active_row_step + block_k * active_col_step
        if tl.load(flag) != 0:
            begin = block_k * BLOCK_K
            for k in range(begin, min(begin + BLOCK_K, K), BLOCK_DEPTH):
                of_k = k + depth
                in_depth = of_k < K
                a = tl.load(
                    a_ptr + i[:, None] * a_row_step + of_k[None, :] * a_col_step,
                    mask=in_rows[:, None] & in_depth[None, :],
                    other=0.0,
                )
                b = tl.load(
                    b_ptr + of_k[:, None] * b_row_step + h[None, :] * b_col_step,
                    mask=in_depth[:, None] & in_cols[None, :],
                    other=0.0,
                )
                sums = tl.dot(a, b, sums, input_precision="ieee")
    to = block_ptr(c_ptr, c_row_step, first_row, first_column, BLOCK_M, BLOCK_H)
    tl.store(to, sums, mask=in_block)


def add_sparse_product(
    out: Tensor, a: Tensor, active: ActiveBlocks, b: Tensor, *, first: bool
) -> None:
    """out += a · b, or = for the first of a sum.

    Args:
        out: [M, H] with steps (·, 1), fp32, or the first product of a sum.
        a: [M, K].
        active: blocks of a.
        b: [K, H].
        first: whether `out` holds nothing yet.
    """
    (M, K), H = a.shape, b.shape[1]
    with torch.cuda.device_of(out):
        sparse_product_kernel[(triton.cdiv(M, active.rows), triton.cdiv(H, BLOCK_COLS))](
            *(a, b, out, active.flags, M, K, H, *a.stride(), *b.stride()),
            *(out.stride(0), *active.flags.stride()),
            ADD=not first,
            BLOCK_M=active.rows,
            BLOCK_K=active.columns,
            BLOCK_H=BLOCK_COLS,
            BLOCK_DEPTH=min(BLOCK_DEPTH, active.columns),
            num_warps=8,
        )
