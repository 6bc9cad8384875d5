"""linear_logprob's dz in Triton: products become gradients where they are made, in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from latro_kernels.linear_logprob.triton.products import (
    block_logits,
    block_products,
    block_ptr,
    place,
    quarters,
)
from latro_kernels.triton.softmax import product_grad


@triton.jit
def _store_gradient(
    products,
    bias_ptr,
    dz_ptr,
    first_row,
    column,
    begin,
    end,
    in_rows,
    rows,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_FILTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dz of COLUMNS columns from `column` on."""
    target, grad_logp, grad_entropy, logp, entropy, peak, log_total = rows
    j = column + tl.arange(0, COLUMNS)
    in_range = j < end
    z = block_logits(
        products, bias_ptr, j - begin, in_range, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
    )
    dz = product_grad(
        z,
        tl.arange(0, COLUMNS)[None, :] == (target - column).to(tl.int32)[:, None],
        grad_logp[:, None],
        grad_entropy[:, None],
        logp[:, None],
        entropy[:, None],
        peak[:, None],
        log_total[:, None],
        softcap,
        temperature,
        HAS_SOFTCAP,
        WITH_ENTROPY,
    )
    if WITH_FILTER:
        # Nothing comes of a row that nobody asks about, whatever is in it.
        dz = tl.where(((grad_logp != 0.0) | (grad_entropy != 0.0))[:, None], dz, 0.0)
    to = block_ptr(dz_ptr, end - begin, first_row, column - begin, ROWS, COLUMNS)
    tl.store(to, dz, mask=in_rows[:, None] & in_range[None, :])


@triton.jit
def grad_kernel(
    hidden,
    weight,
    kept_ptr,
    rows_ptr,
    bias_ptr,
    target_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    logp_ptr,
    entropy_ptr,
    peak_ptr,
    log_total_ptr,
    block_peak_ptr,
    active_ptr,
    dz_ptr,
    M,
    H,
    V,
    begin,
    end,
    hidden_row_step,
    hidden_col_step,
    weight_row_step,
    weight_col_step,
    kept_step,
    row_blocks,
    column_blocks,
    grad_filter,
    softcap,
    temperature,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    IS_KEPT: tl.constexpr,
    WITH_FILTER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dz[M, end - begin] of columns begin .. end, of which weight and bias_ptr hold a slice.

    hidden holds the M rows; rows_ptr their numbers, by which kept_ptr (from column `begin` on) and
    block_peak_ptr are read.
    """
    row_block, column_block = place(tl.program_id(0), row_blocks, column_blocks, GROUP)
    first_row = row_block * BLOCK_N
    i = first_row + tl.arange(0, BLOCK_N)
    in_rows = i < M
    number = i.to(tl.int64)
    if HAS_ROWS:
        number = tl.load(rows_ptr + i, mask=in_rows, other=0)
    column = begin + column_block * BLOCK_V
    target = tl.load(target_ptr + i, mask=in_rows, other=-1)
    grad_logp = tl.load(grad_logp_ptr + i, mask=in_rows, other=0.0)
    logp = tl.load(logp_ptr + i, mask=in_rows, other=0.0)
    peak = tl.load(peak_ptr + i, mask=in_rows, other=0.0)
    log_total = tl.load(log_total_ptr + i, mask=in_rows, other=0.0)
    grad_entropy = tl.zeros((BLOCK_N,), tl.float32)
    entropy = tl.zeros((BLOCK_N,), tl.float32)
    if WITH_ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + i, mask=in_rows, other=0.0)
        entropy = tl.load(entropy_ptr + i, mask=in_rows, other=0.0)
    rows = (target, grad_logp, grad_entropy, logp, entropy, peak, log_total)
    is_active = True
    if WITH_FILTER:
        blocks = tl.cdiv(V, BLOCK_V)
        from_ptr = block_peak_ptr + number * blocks + column // BLOCK_V
        log_p = (tl.load(from_ptr, mask=in_rows, other=0.0) - peak) - log_total
        size = tl.abs(grad_logp)
        if WITH_ENTROPY:
            # exp(x) (|x| + H) grows up to x = -1 and is bounded by this beyond.
            size += tl.abs(grad_entropy) * (tl.maximum(-log_p, 1.0) + entropy)
        is_target_here = (target >= column) & (target < column + BLOCK_V)
        # NaN reaches the threshold.
        reaches = tl.where(size * tl.exp(log_p) < grad_filter, 0, 1)
        reaches = tl.where(is_target_here, 1, reaches)
        has_gradient = in_rows & ((grad_logp != 0.0) | (grad_entropy != 0.0))
        is_active = tl.max(tl.where(has_gradient, reaches, 0), 0) > 0
        tl.store(active_ptr + row_block * column_blocks + column_block, is_active.to(tl.int8))
    if is_active:
        if not IS_KEPT:
            block = block_products(
                hidden,
                weight,
                first_row,
                column - begin,
                M,
                end - begin,
                H,
                hidden_row_step,
                hidden_col_step,
                weight_row_step,
                weight_col_step,
                DESCRIPTORS,
                BLOCK_N,
                BLOCK_V,
                BLOCK_H,
            )
            parts = quarters(block, BLOCK_N, BLOCK_V)
        for quarter in tl.static_range(4):
            first = column + quarter * (BLOCK_V // 4)
            if IS_KEPT:
                of_slice = first - begin + tl.arange(0, BLOCK_V // 4)
                products = tl.load(
                    kept_ptr + (number * kept_step)[:, None] + of_slice[None, :],
                    mask=in_rows[:, None] & (of_slice < end - begin)[None, :],
                    other=0.0,
                )
            else:
                products = parts[quarter]
            _store_gradient(
                products,
                bias_ptr,
                dz_ptr,
                first_row,
                first,
                begin,
                end,
                in_rows,
                rows,
                softcap,
                temperature,
                HAS_BIAS,
                HAS_SOFTCAP,
                WITH_ENTROPY,
                WITH_FILTER,
                BLOCK_N,
                BLOCK_V // 4,
            )
    else:
        in_range = column + tl.arange(0, BLOCK_V) < end
        to = block_ptr(dz_ptr, end - begin, first_row, column - begin, BLOCK_N, BLOCK_V)
        nothing = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        tl.store(to, nothing, mask=in_rows[:, None] & in_range[None, :])


@triton.jit
def rescale_kernel(pull_ptr, factor_ptr, H, BLOCK_H: tl.constexpr):
    """pull[row] *= factor[row]; a row whose factor is 1 is left alone, and costs nothing."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row)
    if factor != 1.0:
        for begin in range(0, H, BLOCK_H):
            h = begin + tl.arange(0, BLOCK_H)
            at = pull_ptr + row * H + h
            tl.store(at, tl.load(at, mask=h < H, other=0.0) * factor, mask=h < H)
