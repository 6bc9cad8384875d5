"""linear_logprob's dz in Triton: products become gradients where they are made, in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from latro_kernels.linear_logprob.triton.products import (
    LOG2_E,
    block_products,
    block_ptr,
    capped_products,
    descriptors,
    place,
    quarters,
)
from latro_kernels.triton.softmax import expm1, flags


@triton.heuristics(
    flags(
        HAS_ROWS="rows_ptr",
        HAS_BIAS="bias_ptr",
        WITH_OFFSET="offset_ptr",
        WITH_SQUARE="grad_square_ptr",
        IS_CACHED="cached_ptr",
        WITH_FILTER="block_max_ptr",
    )
    | descriptors
)
# Whether these are 1 or multiples of 16 changes no load and no store; see `forward_kernel`.
@triton.jit(do_not_specialize=["M", "V", "row_blocks", "column_blocks"])
def grad_kernel(
    hidden,
    weight,
    cached_ptr,
    rows_ptr,
    bias_ptr,
    target_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    offset_ptr,
    grad_square_ptr,
    logp_ptr,
    row_max_ptr,
    log_sum_ptr,
    block_max_ptr,
    active_ptr,
    dz_ptr,
    M,
    H,
    V,
    begin,
    end,
    stride_xn,
    stride_xh,
    stride_wv,
    stride_wh,
    stride_cn,
    row_blocks,
    column_blocks,
    grad_filter,
    softcap,
    temperature,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_OFFSET: tl.constexpr,
    WITH_SQUARE: tl.constexpr,
    IS_CACHED: tl.constexpr,
    WITH_FILTER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write dz[M, end - begin] of columns begin .. end, a slice of which weight and bias_ptr hold.

    hidden holds the M rows; rows_ptr their indices, by which cached_ptr (from column `begin` on)
    and block_max_ptr are read.
    """
    row_block, column_block = place(tl.program_id(0), row_blocks, column_blocks, GROUP)
    first_row = row_block * BLOCK_N
    i = first_row + tl.arange(0, BLOCK_N)
    in_rows = i < M
    index = i.to(tl.int64)
    if HAS_ROWS:
        index = tl.load(rows_ptr + i, mask=in_rows, other=0)
    column = begin + column_block * BLOCK_V
    PART: tl.constexpr = BLOCK_V // 4
    # What is known of the rows.
    target = tl.load(target_ptr + i, mask=in_rows, other=-1)
    grad_logp = tl.load(grad_logp_ptr + i, mask=in_rows, other=0.0)
    logp = tl.load(logp_ptr + i, mask=in_rows, other=0.0)
    row_max = tl.load(row_max_ptr + i, mask=in_rows, other=0.0)
    log_sum = tl.load(log_sum_ptr + i, mask=in_rows, other=0.0)
    grad_entropy = tl.zeros((BLOCK_N,), tl.float32)
    offset = tl.zeros((BLOCK_N,), tl.float32)
    if WITH_OFFSET:
        grad_entropy = tl.load(grad_entropy_ptr + i, mask=in_rows, other=0.0)
        offset = tl.load(offset_ptr + i, mask=in_rows, other=0.0)
    has_gradient = (grad_logp != 0.0) | (grad_entropy != 0.0) | (offset != 0.0)
    grad_square = tl.zeros((BLOCK_N,), tl.float32)
    if WITH_SQUARE:
        grad_square = tl.load(grad_square_ptr + i, mask=in_rows, other=0.0)
        has_gradient |= grad_square != 0.0
    is_active = True
    if WITH_FILTER:
        # Whether |dz| may reach the threshold in any row, by the block's largest logit.
        blocks = tl.cdiv(V, BLOCK_V)
        from_ptr = block_max_ptr + index * blocks + column // BLOCK_V
        log_p = (tl.load(from_ptr, mask=in_rows, other=0.0) - row_max) - log_sum
        size = tl.abs(grad_logp + offset)
        if WITH_OFFSET:
            # exp(x) |x| grows up to x = -1 and is bounded by this beyond.
            size += tl.abs(grad_entropy) * tl.maximum(-log_p, 1.0)
        if WITH_SQUARE:
            size += tl.abs(grad_square) * tl.exp(log_p)
        is_target_here = (target >= column) & (target < column + BLOCK_V)
        # NaN reaches the threshold.
        reaches = tl.where(size * tl.exp(log_p) < grad_filter, 0, 1)
        reaches = tl.where(is_target_here, 1, reaches)
        is_active = tl.max(tl.where(in_rows & has_gradient, reaches, 0), 0) > 0
        tl.store(active_ptr + row_block * column_blocks + column_block, is_active.to(tl.int8))
    if is_active:
        if not IS_CACHED:
            shape, corner = (M, end - begin, H), (first_row, column - begin)
            strides = (stride_xn, stride_xh, stride_wv, stride_wh)
            block = block_products(
                hidden, weight, corner, shape, strides, DESCRIPTORS, BLOCK_N, BLOCK_V, BLOCK_H
            )
            parts = quarters(block, BLOCK_N, BLOCK_V)
        # The gradient is p times a factor of the row; the target's is one number of its row.
        inverse = 1.0 / temperature
        is_here = (target >= column) & (target < column + BLOCK_V)
        local = tl.where(is_here, target - column, -1).to(tl.int32)
        has_target = tl.max(local, 0) >= 0
        for quarter in tl.static_range(4):
            left = column + quarter * PART
            j = left + tl.arange(0, PART)
            in_block = in_rows[:, None] & (j < end)[None, :]
            if IS_CACHED:
                cached = cached_ptr + (index * stride_cn)[:, None] + (j - begin)[None, :]
                products = tl.load(cached, mask=in_block, other=0.0)
            else:
                products = parts[quarter]
            capped = capped_products(
                products, bias_ptr, j - begin, j < end, softcap, HAS_BIAS, HAS_SOFTCAP
            )
            below = capped * inverse - row_max[:, None]
            p = tl.exp2(below * LOG2_E - (log_sum * LOG2_E)[:, None])
            factor = (-grad_logp)[:, None]
            if WITH_OFFSET:
                # h log p + offset; 0 * -inf counts as 0: exp(-128) is 0 in fp32.
                at_max = grad_entropy * log_sum - offset - grad_logp
                factor = at_max[:, None] - tl.maximum(below, -128.0) * grad_entropy[:, None]
            if WITH_SQUARE:
                factor += p * grad_square[:, None]
            dz = p * (factor * inverse)
            if has_target:
                # 1 - p by expm1: exact where p is close to 1.
                of_target = -grad_logp * expm1(logp)
                if WITH_OFFSET:
                    target_p = tl.exp(logp)
                    of_offset = target_p * (grad_entropy * logp + offset)
                    if WITH_SQUARE:
                        of_offset -= target_p * target_p * grad_square
                    of_target -= tl.where(target_p == 0.0, 0.0, of_offset)
                of_part = local - quarter * PART
                is_target = tl.arange(0, PART)[None, :] == of_part[:, None]
                dz = tl.where(is_target, (of_target * inverse)[:, None], dz)
            if HAS_SOFTCAP:
                tanh = capped * (1.0 / softcap)
                dz *= 1.0 - tanh * tanh
            if WITH_FILTER:
                # Nothing comes of a row that nobody asks about, whatever is in it.
                dz = tl.where(has_gradient[:, None], dz, 0.0)
            dz_block = block_ptr(dz_ptr, end - begin, first_row, left - begin, BLOCK_N, PART)
            tl.store(dz_block, dz, mask=in_block)
    else:
        # The sum of db reads all of dz.
        in_range = column + tl.arange(0, BLOCK_V) < end
        to = block_ptr(dz_ptr, end - begin, first_row, column - begin, BLOCK_N, BLOCK_V)
        nothing = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        tl.store(to, nothing, mask=in_rows[:, None] & in_range[None, :])
