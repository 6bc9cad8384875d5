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
    block_logits,
    block_products,
    block_ptr,
    place,
    quarters,
)
from latro_kernels.triton.softmax import fold


@triton.jit
def _fold_columns(
    products,
    bias_ptr,
    kept_ptr,
    target,
    first_row,
    column,
    N,
    begin,
    end,
    kept_end,
    kept_step,
    softcap,
    temperature,
    state,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The state of the rows with COLUMNS more from `column` on, and the largest of these logits."""
    peak, total, weighted, picked = state
    j = column + tl.arange(0, COLUMNS)
    if WITH_KEPT:  # noqa: SIM102 (one is known when it is compiled, the other is not)
        if column < kept_end:
            to = block_ptr(kept_ptr, kept_step, first_row, column - begin, ROWS, COLUMNS)
            in_rows = first_row + tl.arange(0, ROWS) < N
            tl.store(to, products, mask=in_rows[:, None] & (j < end)[None, :])
    z = block_logits(
        products, bias_ptr, j - begin, j < end, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
    )
    is_here = (target >= column) & (target < column + COLUMNS)
    is_target = tl.arange(0, COLUMNS)[None, :] == (target - column).to(tl.int32)[:, None]
    picked = tl.where(is_here, tl.sum(tl.where(is_target, z, 0.0), 1), picked)
    largest = tl.max(z, 1)
    peak, total, weighted = fold(z, peak, total, weighted, 1, WITH_ENTROPY)
    return (peak, total, weighted, picked), largest


@triton.jit
def forward_kernel(
    hidden,
    weight,
    bias_ptr,
    target_ptr,
    parts_ptr,
    kept_ptr,
    block_peak_ptr,
    N,
    H,
    V,
    begin,
    end,
    hidden_row_step,
    hidden_col_step,
    weight_row_step,
    weight_col_step,
    kept_end,
    kept_step,
    part_step,
    row_blocks,
    splits,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_KEPT: tl.constexpr,
    WITH_BLOCK_PEAK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Columns begin .. end, of which weight and bias_ptr hold a slice.

    Products of those below kept_end go to kept_ptr[N, kept_step].
    """
    row_block, split = place(tl.program_id(0), row_blocks, splits, GROUP)
    first_row = row_block * BLOCK_N
    i = first_row + tl.arange(0, BLOCK_N)
    in_rows = i < N
    target = tl.load(target_ptr + i, mask=in_rows, other=-1)
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    picked = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    first = begin + split * TILES * BLOCK_V
    for column in range(first, min(first + TILES * BLOCK_V, end), BLOCK_V):
        products = block_products(
            hidden,
            weight,
            first_row,
            column - begin,
            N,
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
        parts = quarters(products, BLOCK_N, BLOCK_V)
        state = (peak, total, weighted, picked)
        largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        for quarter in tl.static_range(4):
            state, of_part = _fold_columns(
                parts[quarter],
                bias_ptr,
                kept_ptr,
                target,
                first_row,
                column + quarter * (BLOCK_V // 4),
                N,
                begin,
                end,
                kept_end,
                kept_step,
                softcap,
                temperature,
                state,
                HAS_BIAS,
                HAS_SOFTCAP,
                WITH_ENTROPY,
                WITH_KEPT,
                BLOCK_N,
                BLOCK_V // 4,
            )
            largest = tl.maximum(largest, of_part)
        peak, total, weighted, picked = state
        if WITH_BLOCK_PEAK:
            blocks = tl.cdiv(V, BLOCK_V)
            to = block_peak_ptr + i.to(tl.int64) * blocks + column // BLOCK_V
            tl.store(to, largest, mask=in_rows)
    to = parts_ptr + split.to(tl.int64) * N + i
    tl.store(to, peak, mask=in_rows)
    to += part_step
    tl.store(to, total, mask=in_rows)
    to += part_step
    tl.store(to, picked, mask=in_rows)
    if WITH_ENTROPY:
        to += part_step
        tl.store(to, weighted, mask=in_rows)


@triton.jit
def merge_kernel(
    parts_ptr,
    target_ptr,
    peak_ptr,
    total_ptr,
    picked_ptr,
    weighted_ptr,
    N,
    begin,
    end,
    splits,
    split_columns,
    part_step,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds parts[3 or 4, splits, N], of columns begin .. end, to the state of the rows."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = i < N
    peak = tl.load(peak_ptr + i, mask=in_rows, other=0.0)
    total = tl.load(total_ptr + i, mask=in_rows, other=0.0)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    if WITH_ENTROPY:
        weighted = tl.load(weighted_ptr + i, mask=in_rows, other=0.0)
    peaks = parts_ptr + i
    totals = peaks + part_step
    picks = totals + part_step
    moments = picks + part_step
    target = tl.load(target_ptr + i, mask=in_rows, other=-1)
    is_here = in_rows & (target >= begin) & (target < end)
    split = tl.where(is_here, (target - begin) // split_columns, 0)
    tl.store(picked_ptr + i, tl.load(picks + split * N, mask=is_here), mask=is_here)
    for _ in range(splits):
        part_peak = tl.load(peaks, mask=in_rows, other=0.0)
        part_total = tl.load(totals, mask=in_rows, other=0.0)
        largest = tl.maximum(peak, part_peak)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        drop = peak - shift
        part_drop = part_peak - shift
        shrink = tl.exp(drop)
        part_shrink = tl.exp(part_drop)
        if WITH_ENTROPY:
            part_weighted = tl.load(moments, mask=in_rows, other=0.0)
            # 0 * -inf counts as 0.
            weighted = tl.where(shrink == 0.0, 0.0, shrink * (weighted + drop * total))
            part_weighted = part_shrink * (part_weighted + part_drop * part_total)
            weighted += tl.where(part_shrink == 0.0, 0.0, part_weighted)
        total = total * shrink + part_total * part_shrink
        peak = largest
        peaks += N
        totals += N
        moments += N
    tl.store(peak_ptr + i, peak, mask=in_rows)
    tl.store(total_ptr + i, total, mask=in_rows)
    if WITH_ENTROPY:
        tl.store(weighted_ptr + i, weighted, mask=in_rows)
