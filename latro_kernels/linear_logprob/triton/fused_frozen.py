"""linear_logprob's sum of dx for a frozen head in Triton: exponentials under a shift known before.

The forward writes e = exp(z − shift) of a slice of the vocabulary as it folds it, and one product
with the slice's weight follows. A row's shift is a logit that it is known to have, its target's; of
no row does the forward know the maximum before it has seen all columns. An exponential is rounded
by a part of itself, whatever the shift, and what is below the shift's own logit is below the row's
maximum: nothing is lost but where e overflows. So where a row's maximum rises more than `limit`
above the shift, `redo_kernel` writes the slice's e of that row again, under the maximum, which is
the shift from then on; `rescale_kernel` brings what was summed before to it.

Shifts are of logits before they are divided by the temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latro_kernels.linear_logprob.triton.products import (
    LOG2_E,
    block_products,
    capped_products,
    descriptors,
    place,
    quarters,
    store_exponentials,
)
from latro_kernels.triton.softmax import flags


@triton.heuristics(flags(HAS_BIAS="bias_ptr"))
@triton.jit(do_not_specialize=["V"])
def shift_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    shift_ptr,
    H,
    V,
    stride_xn,
    stride_xh,
    stride_wv,
    stride_wh,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write a row's logit at its target, or at another column where the weight does not have it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.minimum(tl.maximum(tl.load(target_ptr + row), 0), V - 1) + tl.arange(0, 1)
    sums = tl.zeros((BLOCK_H,), tl.float32)
    for begin in range(0, H, BLOCK_H):
        h = (begin + tl.arange(0, BLOCK_H)).to(tl.int64)
        x = tl.load(hidden_ptr + row * stride_xn + h * stride_xh, mask=h < H, other=0.0)
        w = tl.load(weight_ptr + column * stride_wv + h * stride_wh, mask=h < H, other=0.0)
        sums += x.to(tl.float32) * w.to(tl.float32)
    product = tl.zeros((1, 1), tl.float32) + tl.sum(sums, 0)
    capped = capped_products(product, bias_ptr, column, column < V, softcap, HAS_BIAS, HAS_SOFTCAP)
    tl.store(shift_ptr + row + tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :], capped)


@triton.heuristics(flags(HAS_BIAS="bias_ptr") | descriptors)
# Whether these are 1 or multiples of 16 changes no load and no store; see `forward_kernel`.
@triton.jit(do_not_specialize=["N", "row_blocks", "splits"])
def redo_kernel(
    hidden,
    weight,
    bias_ptr,
    target_ptr,
    shift_ptr,
    row_max_ptr,
    exp_ptr,
    N,
    H,
    begin,
    end,
    stride_xn,
    stride_xh,
    stride_wv,
    stride_wh,
    stride_en,
    row_blocks,
    splits,
    limit,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write e of columns begin .. end again in rows whose maximum is too far above their shift.

    It is exp(z − row_max), as `store_exponentials` stores it. Most programs find no such row.
    """
    row_block, split = place(tl.program_id(0), row_blocks, splits, GROUP)
    first_row = row_block * BLOCK_N
    i = first_row + tl.arange(0, BLOCK_N)
    in_rows = i < N
    shift = tl.load(shift_ptr + i, mask=in_rows, other=0.0)
    row_max = tl.load(row_max_ptr + i, mask=in_rows, other=float("-inf"))
    is_above = row_max - shift * (1.0 / temperature) > limit
    if tl.max(is_above.to(tl.int32), 0) > 0:
        shift = row_max * temperature
        scale = LOG2_E / temperature
        first = begin + split * TILES * BLOCK_V
        last = min(first + TILES * BLOCK_V, end)
        target = tl.load(target_ptr + i, mask=in_rows, other=-1)
        target = tl.where((target >= first) & (target < last), target - first, -1).to(tl.int32)
        shape, strides = (N, end - begin, H), (stride_xn, stride_xh, stride_wv, stride_wh)
        PART: tl.constexpr = BLOCK_V // 4
        for column in range(first, last, BLOCK_V):
            corner = (first_row, column - begin)
            products = block_products(
                hidden, weight, corner, shape, strides, DESCRIPTORS, BLOCK_N, BLOCK_V, BLOCK_H
            )
            parts = quarters(products, BLOCK_N, BLOCK_V)
            for quarter in tl.static_range(4):
                left = column - begin + quarter * PART
                j = left + tl.arange(0, PART)
                in_range = j < end - begin
                capped = capped_products(
                    parts[quarter], bias_ptr, j, in_range, softcap, HAS_BIAS, HAS_SOFTCAP
                )
                store_exponentials(
                    exp_ptr,
                    stride_en,
                    (first_row, left),
                    tl.exp2((capped - shift[:, None]) * scale),
                    capped,
                    target - (column - first) - quarter * PART,
                    is_above[:, None] & in_range[None, :],
                    True,
                    softcap,
                    HAS_SOFTCAP,
                    BLOCK_N,
                    PART,
                )


@triton.heuristics({"HAS_SUM": lambda args: args["dx_sum_ptr"] is not None})
@triton.jit
def rescale_kernel(
    dx_sum_ptr,
    shift_ptr,
    row_max_ptr,
    H,
    limit,
    temperature,
    factor,
    HAS_SUM: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Bring dx_sum[row] from its shift to its maximum if that is more than limit above it.

    The maximum is then the shift. `factor` comes on top; a row with nothing to do costs nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    shift = tl.load(shift_ptr + row)
    row_max = tl.load(row_max_ptr + row)
    # Of a row that is -inf so far the difference is NaN, which is above nothing.
    rise = row_max - shift * (1.0 / temperature)
    if rise > limit:
        tl.store(shift_ptr + row, row_max * temperature)
        factor *= tl.exp(-rise)
    if HAS_SUM:  # noqa: SIM102 (one is known when it is compiled, the other is not)
        if factor != 1.0:
            for begin in range(0, H, BLOCK_H):
                h = begin + tl.arange(0, BLOCK_H)
                at = dx_sum_ptr + row * H + h
                tl.store(at, tl.load(at, mask=h < H, other=0.0) * factor, mask=h < H)
