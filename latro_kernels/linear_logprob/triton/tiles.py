"""linear_logprob in Triton: the two folds over a tile of logits, one program per row.

The formulas stand in `latro_kernels.linear_logprob`, the loops around the folds in
`latro_kernels.linear_logprob.tiles`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latro_kernels.head import Head
from latro_kernels.head_gradient import operand_dtype
from latro_kernels.linear_logprob.state import RowGrad, State
from latro_kernels.triton.softmax import fold, product_grad, row_logits

BLOCK_V = 1024


@triton.jit
def fold_kernel(
    tile_ptr,
    bias_ptr,
    target_ptr,
    peak_ptr,
    total_ptr,
    picked_ptr,
    weighted_ptr,
    columns,
    first_column,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * columns
    peak = tl.load(peak_ptr + row)
    total = tl.load(total_ptr + row)
    weighted = 0.0
    if WITH_ENTROPY:
        weighted = tl.load(weighted_ptr + row)
    for begin in range(0, columns, BLOCK_V):
        j = begin + tl.arange(0, BLOCK_V)
        z = row_logits(
            row_ptr, bias_ptr, j, j < columns, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
        )
        peak, total, weighted = fold(z, peak, total, weighted, 0, WITH_ENTROPY)
    tl.store(peak_ptr + row, peak)
    tl.store(total_ptr + row, total)
    if WITH_ENTROPY:
        tl.store(weighted_ptr + row, weighted)
    hit = tl.load(target_ptr + row) - first_column
    is_here = (hit >= 0) & (hit < columns)
    picked = row_logits(
        row_ptr, bias_ptr, hit, is_here, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
    )
    tl.store(picked_ptr + row, picked, mask=is_here)


@triton.jit
def grad_kernel(
    tile_ptr,
    dtile_ptr,
    bias_ptr,
    target_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    logp_ptr,
    entropy_ptr,
    peak_ptr,
    log_total_ptr,
    columns,
    first_column,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * columns
    hit = tl.load(target_ptr + row) - first_column
    grad_logp = tl.load(grad_logp_ptr + row)
    logp = tl.load(logp_ptr + row)
    peak = tl.load(peak_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    grad_entropy = 0.0
    entropy = 0.0
    if WITH_ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    for begin in range(0, columns, BLOCK_V):
        j = begin + tl.arange(0, BLOCK_V)
        mask = j < columns
        z = row_logits(row_ptr, bias_ptr, j, mask, softcap, temperature, HAS_BIAS, HAS_SOFTCAP)
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
        tl.store(dtile_ptr + row * columns + j, dz, mask=mask)


class TritonKernels:
    """The folds as `latro_kernels.linear_logprob.tiles` calls them."""

    @staticmethod
    def fold(
        head: Head,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        state: State,
        first_column: int,
    ) -> None:
        """Add a tile of products to the state of its rows."""
        with torch.cuda.device_of(tile):
            fold_kernel[(len(tile),)](
                *(tile, bias, target),
                *(state.peak, state.total, state.picked, state.weighted),
                *(tile.shape[1], first_column, head.softcap, head.temperature),
                HAS_BIAS=bias is not None,
                HAS_SOFTCAP=head.softcap > 0,
                WITH_ENTROPY=state.weighted is not None,
                BLOCK_V=BLOCK_V,
            )

    @staticmethod
    def grad(
        head: Head,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        grad: RowGrad,
        first_column: int,
    ) -> Tensor:
        """The gradient with respect to a tile of products, in the dtype of the next product."""
        dtype = operand_dtype(head)
        dtile = tile if tile.dtype == dtype else tile.new_empty(tile.shape, dtype=dtype)
        with torch.cuda.device_of(tile):
            grad_kernel[(len(tile),)](
                *(tile, dtile, bias, target),
                *(grad.grad_logp, grad.grad_entropy, grad.logp, grad.entropy),
                *(grad.peak, grad.log_total),
                *(tile.shape[1], first_column, head.softcap, head.temperature),
                HAS_BIAS=bias is not None,
                HAS_SOFTCAP=head.softcap > 0,
                WITH_ENTROPY=grad.grad_entropy is not None,
                BLOCK_V=BLOCK_V,
            )
        return dtile
