"""What becomes of a tile of `linear_logprob`, in Triton: one program per row.

The formulas stand in `latro_kernels.linear_logprob`, the loops around the two kernels in
`latro_kernels.linear_logprob.tiles`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latro_kernels.head import Head
from latro_kernels.linear_logprob.state import RowGrad, State
from latro_kernels.logit_tiles import Tile
from latro_kernels.triton.softmax import flags, fold_logits, product_grad, row_logits

BLOCK_V = 1024


@triton.heuristics(
    flags(HAS_BIAS="bias_ptr", WITH_ENTROPY="weighted_sum_ptr", WITH_FURTHER_SUMS="square_sum_ptr")
)
@triton.jit
def fold_kernel(
    tile_ptr,
    bias_ptr,
    target_ptr,
    row_max_ptr,
    sum_exp_ptr,
    target_logit_ptr,
    weighted_sum_ptr,
    square_sum_ptr,
    logit_sum_ptr,
    columns,
    first_column,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_FURTHER_SUMS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Add a row of a tile to the row's state."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * columns
    row_max = tl.load(row_max_ptr + row)
    sum_exp = tl.load(sum_exp_ptr + row)
    weighted_sum = 0.0
    square_sum = 0.0
    logit_sum = 0.0
    if WITH_ENTROPY:
        weighted_sum = tl.load(weighted_sum_ptr + row)
    if WITH_FURTHER_SUMS:
        square_sum = tl.load(square_sum_ptr + row)
        logit_sum = tl.load(logit_sum_ptr + row)
    for begin in range(0, columns, BLOCK_V):
        j = begin + tl.arange(0, BLOCK_V)
        mask = j < columns
        z = row_logits(row_ptr, bias_ptr, j, mask, softcap, temperature, HAS_BIAS, HAS_SOFTCAP)
        row_max, sum_exp, weighted_sum, square_sum, logit_sum = fold_logits(
            z,
            mask,
            row_max,
            sum_exp,
            weighted_sum,
            square_sum,
            logit_sum,
            WITH_ENTROPY=WITH_ENTROPY,
            WITH_FURTHER_SUMS=WITH_FURTHER_SUMS,
        )
    tl.store(row_max_ptr + row, row_max)
    tl.store(sum_exp_ptr + row, sum_exp)
    if WITH_ENTROPY:
        tl.store(weighted_sum_ptr + row, weighted_sum)
    if WITH_FURTHER_SUMS:
        tl.store(square_sum_ptr + row, square_sum)
        tl.store(logit_sum_ptr + row, logit_sum)
    hit = tl.load(target_ptr + row) - first_column
    is_here = (hit >= 0) & (hit < columns)
    target_logit = row_logits(
        row_ptr, bias_ptr, hit, is_here, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
    )
    tl.store(target_logit_ptr + row, target_logit, mask=is_here)


@triton.heuristics(
    flags(HAS_BIAS="bias_ptr", WITH_OFFSET="offset_ptr", WITH_SQUARE="grad_square_ptr")
)
@triton.jit
def grad_kernel(
    tile_ptr,
    dtile_ptr,
    bias_ptr,
    target_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    offset_ptr,
    grad_square_ptr,
    logp_ptr,
    row_max_ptr,
    log_sum_ptr,
    columns,
    first_column,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_OFFSET: tl.constexpr,
    WITH_SQUARE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write dz of a row of a tile."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * columns
    hit = tl.load(target_ptr + row) - first_column
    grad_logp = tl.load(grad_logp_ptr + row)
    logp = tl.load(logp_ptr + row)
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    grad_entropy = 0.0
    offset = 0.0
    grad_square = 0.0
    if WITH_OFFSET:
        grad_entropy = tl.load(grad_entropy_ptr + row)
        offset = tl.load(offset_ptr + row)
    if WITH_SQUARE:
        grad_square = tl.load(grad_square_ptr + row)
    upstream, forward = (grad_logp, grad_entropy, offset, grad_square), (logp, row_max, log_sum)
    for begin in range(0, columns, BLOCK_V):
        j = begin + tl.arange(0, BLOCK_V)
        mask = j < columns
        z = row_logits(row_ptr, bias_ptr, j, mask, softcap, temperature, HAS_BIAS, HAS_SOFTCAP)
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
        tl.store(dtile_ptr + row * columns + j, dz, mask=mask)


def fold(head: Head, tile: Tile, products: Tensor, state: State) -> None:
    """Add a tile's products to the state of its rows, in place."""
    with torch.cuda.device_of(products):
        fold_kernel[(len(products),)](
            tile_ptr=products,
            bias_ptr=tile.bias,
            target_ptr=state.target,
            row_max_ptr=state.row_max,
            sum_exp_ptr=state.sum_exp,
            target_logit_ptr=state.target_logit,
            weighted_sum_ptr=state.weighted_sum,
            square_sum_ptr=state.square_sum,
            logit_sum_ptr=state.logit_sum,
            columns=products.shape[1],
            first_column=tile.columns.start,
            softcap=head.softcap,
            temperature=head.temperature,
            BLOCK_V=BLOCK_V,
        )


def grad(head: Head, tile: Tile, products: Tensor, grad: RowGrad, dz: Tensor) -> None:
    """Write dz of a tile, which may take the place of its products."""
    with torch.cuda.device_of(products):
        grad_kernel[(len(products),)](
            tile_ptr=products,
            dtile_ptr=dz,
            bias_ptr=tile.bias,
            **grad.pointers(),
            columns=products.shape[1],
            first_column=tile.columns.start,
            softcap=head.softcap,
            temperature=head.temperature,
            BLOCK_V=BLOCK_V,
        )
