"""A product with a matrix of which some blocks are 0 and known to be, in Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from latro_kernels.head_gradient import Gradient
from latro_kernels.linear_logprob.triton.products import block_ptr

# Columns of a block of the result, and how much of an active block is taken at a time. The rows are
# those of the block that is active or not, 256 at most: more columns would not fit the registers.
BLOCK_COLS, BLOCK_DEPTH = 64, 32


# Whether these are 1 or multiples of 16 changes no load and no store; that of `columns`, which lie
# side by side in memory, does.
@triton.jit(do_not_specialize=["rows", "stride_active_m", "stride_active_k"])
def sparse_product_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    active_ptr,
    rows,
    columns,
    H,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bh,
    stride_cm,
    stride_active_m,
    stride_active_k,
    TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """c[M, H] = a[M, K] . b[K, H], or +=, over the blocks of BLOCK_M x BLOCK_K that are active.

    a is a gradient of M = rows and K = columns, or the transposed of one of K rows and M columns.
    """
    M, K = rows, columns
    if TRANSPOSED:
        M, K = columns, rows
    block_m, block_h = tl.program_id(0), tl.program_id(1)
    i = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    h = (block_h * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    depth = tl.arange(0, BLOCK_DEPTH).to(tl.int64)
    in_rows, in_cols = i < M, h < H
    in_block = in_rows[:, None] & in_cols[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    first_row, first_column = block_m * BLOCK_M, block_h * BLOCK_H
    if ADD:
        before = block_ptr(c_ptr, stride_cm, first_row, first_column, BLOCK_M, BLOCK_H)
        sums += tl.load(before, mask=in_block, other=0.0)
    for block_k in range(tl.cdiv(K, BLOCK_K)):
        flag = active_ptr + block_m * stride_active_m + block_k * stride_active_k
        if tl.load(flag) != 0:
            begin = block_k * BLOCK_K
            for k in range(begin, min(begin + BLOCK_K, K), BLOCK_DEPTH):
                of_k = k + depth
                in_depth = of_k < K
                a = tl.load(
                    a_ptr + i[:, None] * stride_am + of_k[None, :] * stride_ak,
                    mask=in_rows[:, None] & in_depth[None, :],
                    other=0.0,
                )
                b = tl.load(
                    b_ptr + of_k[:, None] * stride_bk + h[None, :] * stride_bh,
                    mask=in_depth[:, None] & in_cols[None, :],
                    other=0.0,
                )
                sums = tl.dot(a, b, sums, input_precision="ieee")
    to = block_ptr(c_ptr, stride_cm, first_row, first_column, BLOCK_M, BLOCK_H)
    tl.store(to, sums, mask=in_block)


@dataclass(frozen=True, eq=False)
class SparseGradient(Gradient):
    """A gradient dz of which some blocks are 0, and left out of products.

    Args:
        active: int8, one flag per block, 0 for a block that is 0.
        block: rows and columns of a block.
        transposed: whether dz is the transposed of what was made.
    """

    active: Tensor
    block: tuple[int, int]
    transposed: bool = False

    def t(self) -> SparseGradient:
        """Return the transposed gradient."""
        return SparseGradient(
            dz=self.dz.t(),
            active=self.active.t(),
            block=self.block[::-1],
            transposed=not self.transposed,
        )

    def add_product(self, out: Tensor, other: Tensor, *, first: bool) -> None:
        """Add dz · other to `out`, fp32 with rows of stride 1, or write it there if it is first.

        The first product of a sum may be of any dtype.
        """
        (M, K), H = self.dz.shape, other.shape[1]
        block_m, block_k = self.block
        rows, columns = (K, M) if self.transposed else (M, K)
        with torch.cuda.device_of(out):
            sparse_product_kernel[(triton.cdiv(M, block_m), triton.cdiv(H, BLOCK_COLS))](
                a_ptr=self.dz,
                b_ptr=other,
                c_ptr=out,
                active_ptr=self.active,
                rows=rows,
                columns=columns,
                H=H,
                stride_am=self.dz.stride(0),
                stride_ak=self.dz.stride(1),
                stride_bk=other.stride(0),
                stride_bh=other.stride(1),
                stride_cm=out.stride(0),
                stride_active_m=self.active.stride(0),
                stride_active_k=self.active.stride(1),
                TRANSPOSED=self.transposed,
                ADD=not first,
                BLOCK_M=block_m,
                BLOCK_K=block_k,
                BLOCK_H=BLOCK_COLS,
                BLOCK_DEPTH=min(BLOCK_DEPTH, block_k),
                num_warps=8,
            )
