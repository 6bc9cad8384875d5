"""linear_logprob's forward in Triton: products are folded where they are made, in registers.

`forward_kernel`: a program takes a block of rows and TILES blocks of columns, one after the other,
and writes what it folded of each row into `parts`; `merge_kernel` adds the parts of a row, in their
order. How the columns are shared out depends on V alone, so a row's result does not depend on the
others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latro_kernels.linear_logprob.triton.products import (
    LN_2,
    LOG2_E,
    block_products,
    block_ptr,
    capped_products,
    descriptors,
    fold_exponentials,
    fold_squares,
    place,
    quarters,
    store_exponentials,
)
from latro_kernels.triton.softmax import flags


@triton.heuristics(
    flags(
        HAS_BIAS="bias_ptr",
        WITH_CACHED="cached_ptr",
        WITH_EXP="exp_ptr",
        WITH_BLOCK_MAX="block_max_ptr",
    )
    | descriptors
)
# Triton compiles anew for an integer that is 1 or a multiple of 16. These change no load and no
# store by it; with ragged batches each would come upon such cases in the first updates.
@triton.jit(do_not_specialize=["N", "V", "cached_end", "stride_part", "row_blocks", "splits"])
def forward_kernel(
    hidden,
    weight,
    bias_ptr,
    target_ptr,
    parts_ptr,
    cached_ptr,
    exp_ptr,
    shift_ptr,
    block_max_ptr,
    N,
    H,
    V,
    begin,
    end,
    stride_xn,
    stride_xh,
    stride_wv,
    stride_wh,
    cached_end,
    stride_cn,
    stride_en,
    stride_part,
    row_blocks,
    splits,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_FURTHER_SUMS: tl.constexpr,
    WITH_CACHED: tl.constexpr,
    WITH_EXP: tl.constexpr,
    WITH_BLOCK_MAX: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Fold columns begin .. end, of which weight and bias_ptr hold a slice.

    Products of those below cached_end go to cached_ptr[N, stride_cn]; exponentials, as
    `store_exponentials` stores them, under the rows' shift go to exp_ptr[N, stride_en].
    WITH_FURTHER_SUMS, never without WITH_ENTROPY, is for square_sum and logit_sum.
    """
    row_block, split = place(tl.program_id(0), row_blocks, splits, GROUP)
    first_row = row_block * BLOCK_N
    i = first_row + tl.arange(0, BLOCK_N)
    in_rows = i < N
    first = begin + split * TILES * BLOCK_V
    last = min(first + TILES * BLOCK_V, end)
    target = tl.load(target_ptr + i, mask=in_rows, other=-1)
    target = tl.where((target >= first) & (target < last), target - first, -1).to(tl.int32)
    # In the loop, logits are not yet divided by the temperature; `fold_part` says why.
    scale = LOG2_E / temperature
    row_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    sum_exp = tl.zeros((BLOCK_N,), tl.float32)
    target_logit = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    weighted_sum = tl.zeros((BLOCK_N,), tl.float32)
    square_sum = tl.zeros((BLOCK_N,), tl.float32)
    logit_sum = tl.zeros((BLOCK_N,), tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    if WITH_EXP:
        shift = tl.load(shift_ptr + i, mask=in_rows, other=0.0)
    shape = (N, end - begin, H)
    strides = (stride_xn, stride_xh, stride_wv, stride_wh)
    PART: tl.constexpr = BLOCK_V // 4
    SMALL: tl.constexpr = BLOCK_V // 16
    for column in range(first, last, BLOCK_V):
        corner = (first_row, column - begin)
        products = block_products(
            hidden, weight, corner, shape, strides, DESCRIPTORS, BLOCK_N, BLOCK_V, BLOCK_H
        )
        local = target - (column - first)
        is_here = (local >= 0) & (local < BLOCK_V)
        has_target = tl.max(is_here.to(tl.int32), 0) > 0
        largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        parts = quarters(products, BLOCK_N, BLOCK_V)
        # Fold the logits, a quarter of the block at a time.
        for quarter in tl.static_range(4):
            part, left = parts[quarter], column - begin + quarter * PART
            j = left + tl.arange(0, PART)
            in_range = j < end - begin
            if WITH_CACHED:  # noqa: SIM102 (one is known when it is compiled, the other is not)
                if column < cached_end:
                    # Sixteenths: on their way through shared memory, larger parts would take
                    # registers that the sums of the block have.
                    sixteenths = quarters(part, BLOCK_N, PART)
                    for k in tl.static_range(4):
                        at = left + k * SMALL
                        to = block_ptr(cached_ptr, stride_cn, first_row, at, BLOCK_N, SMALL)
                        in_sixteenth = at + tl.arange(0, SMALL) < end - begin
                        in_block = in_rows[:, None] & in_sixteenth[None, :]
                        tl.store(to, sixteenths[k], mask=in_block)
            capped = capped_products(part, bias_ptr, j, in_range, softcap, HAS_BIAS, HAS_SOFTCAP)
            # The last block alone has columns beyond the end; few blocks hold a row's target.
            if column + BLOCK_V > end:
                capped = tl.where(in_range[None, :], capped, float("-inf"))
            if has_target:
                of_part = local - quarter * PART
                is_target = tl.arange(0, PART)[None, :] == of_part[:, None]
                of_target = tl.sum(tl.where(is_target, capped, 0.0), 1)
                is_in_part = (of_part >= 0) & (of_part < PART)
                target_logit = tl.where(is_in_part, of_target, target_logit)
            if WITH_FURTHER_SUMS:
                logit_sum += tl.sum(tl.where(in_range[None, :], capped, 0.0), 1)
            part_max = tl.max(capped, 1)
            largest = tl.maximum(largest, part_max)
            row_max_before = row_max
            row_max, sum_exp, weighted_sum, e = fold_exponentials(
                capped, part_max, row_max, sum_exp, weighted_sum, scale, WITH_ENTROPY
            )
            if WITH_FURTHER_SUMS:
                square_sum = fold_squares(e, row_max_before, row_max, square_sum, scale)
            if WITH_EXP:
                # From the maximum to the shift, which takes no second exponential of each logit.
                # Where the shift is -inf, what comes of it is made again.
                rise = tl.exp2((row_max - shift) * scale)
                e *= tl.where(row_max == float("-inf"), 0.0, rise)[:, None]
                store_exponentials(
                    exp_ptr,
                    stride_en,
                    (first_row, left),
                    e,
                    capped,
                    local - quarter * PART,
                    in_rows[:, None] & in_range[None, :],
                    has_target,
                    softcap,
                    HAS_SOFTCAP,
                    BLOCK_N,
                    PART,
                )
        if WITH_BLOCK_MAX:
            blocks = tl.cdiv(V, BLOCK_V)
            block_max = block_max_ptr + i.to(tl.int64) * blocks + column // BLOCK_V
            tl.store(block_max, largest * (1.0 / temperature), mask=in_rows)
    to = parts_ptr + split.to(tl.int64) * N + i
    tl.store(to, row_max * (1.0 / temperature), mask=in_rows)
    to += stride_part
    tl.store(to, sum_exp, mask=in_rows)
    to += stride_part
    tl.store(to, target_logit * (1.0 / temperature), mask=in_rows)
    if WITH_ENTROPY:
        to += stride_part
        tl.store(to, weighted_sum * LN_2, mask=in_rows)
    if WITH_FURTHER_SUMS:
        to += stride_part
        tl.store(to, square_sum, mask=in_rows)
        to += stride_part
        tl.store(to, logit_sum * (1.0 / temperature), mask=in_rows)


@triton.heuristics(
    {
        "WITH_ENTROPY": lambda args: args["weighted_sum_ptr"] is not None,
        "WITH_FURTHER_SUMS": lambda args: args["square_sum_ptr"] is not None,
    }
)
@triton.jit(do_not_specialize=["N", "begin", "end", "splits", "split_columns", "stride_part"])
def merge_kernel(
    parts_ptr,
    target_ptr,
    row_max_ptr,
    sum_exp_ptr,
    target_logit_ptr,
    weighted_sum_ptr,
    square_sum_ptr,
    logit_sum_ptr,
    N,
    begin,
    end,
    splits,
    split_columns,
    stride_part,
    WITH_ENTROPY: tl.constexpr,
    WITH_FURTHER_SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add parts[3, 4 or 6, splits, N], of columns begin .. end, to the state of the rows."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = i < N
    row_max = tl.load(row_max_ptr + i, mask=in_rows, other=0.0)
    sum_exp = tl.load(sum_exp_ptr + i, mask=in_rows, other=0.0)
    weighted_sum = tl.zeros((BLOCK_N,), tl.float32)
    if WITH_ENTROPY:
        weighted_sum = tl.load(weighted_sum_ptr + i, mask=in_rows, other=0.0)
    square_sum = tl.zeros((BLOCK_N,), tl.float32)
    logit_sum = tl.zeros((BLOCK_N,), tl.float32)
    if WITH_FURTHER_SUMS:
        square_sum = tl.load(square_sum_ptr + i, mask=in_rows, other=0.0)
        logit_sum = tl.load(logit_sum_ptr + i, mask=in_rows, other=0.0)
    row_max_parts = parts_ptr + i
    sum_exp_parts = row_max_parts + stride_part
    target_logit_parts = sum_exp_parts + stride_part
    weighted_sum_parts = target_logit_parts + stride_part
    square_sum_parts = weighted_sum_parts + stride_part
    logit_sum_parts = square_sum_parts + stride_part
    target = tl.load(target_ptr + i, mask=in_rows, other=-1)
    is_here = in_rows & (target >= begin) & (target < end)
    split = tl.where(is_here, (target - begin) // split_columns, 0)
    tl.store(
        target_logit_ptr + i, tl.load(target_logit_parts + split * N, mask=is_here), mask=is_here
    )
    for _ in range(splits):
        part_max = tl.load(row_max_parts, mask=in_rows, other=0.0)
        part_sum_exp = tl.load(sum_exp_parts, mask=in_rows, other=0.0)
        largest = tl.maximum(row_max, part_max)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        drop = row_max - shift
        part_drop = part_max - shift
        shrink = tl.exp(drop)
        part_shrink = tl.exp(part_drop)
        if WITH_ENTROPY:
            part_weighted = tl.load(weighted_sum_parts, mask=in_rows, other=0.0)
            # 0 * -inf counts as 0.
            weighted_sum = tl.where(shrink == 0.0, 0.0, shrink * (weighted_sum + drop * sum_exp))
            part_weighted = part_shrink * (part_weighted + part_drop * part_sum_exp)
            weighted_sum += tl.where(part_shrink == 0.0, 0.0, part_weighted)
        if WITH_FURTHER_SUMS:
            part_square = tl.load(square_sum_parts, mask=in_rows, other=0.0)
            square_sum = square_sum * (shrink * shrink) + part_square * (part_shrink * part_shrink)
            logit_sum += tl.load(logit_sum_parts, mask=in_rows, other=0.0)
        sum_exp = sum_exp * shrink + part_sum_exp * part_shrink
        row_max = largest
        row_max_parts += N
        sum_exp_parts += N
        weighted_sum_parts += N
        square_sum_parts += N
        logit_sum_parts += N
    tl.store(row_max_ptr + i, row_max, mask=in_rows)
    tl.store(sum_exp_ptr + i, sum_exp, mask=in_rows)
    if WITH_ENTROPY:
        tl.store(weighted_sum_ptr + i, weighted_sum, mask=in_rows)
    if WITH_FURTHER_SUMS:
        tl.store(square_sum_ptr + i, square_sum, mask=in_rows)
        tl.store(logit_sum_ptr + i, logit_sum, mask=in_rows)
