"""A block of products of hidden states and weight, in registers.

The kernels that keep no tile of logits in memory start from it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from latro_kernels.triton.softmax import tanh

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
"""A GPU has an instruction for 2^x: exp(x) is 2^(x · LOG2_E)."""
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

descriptors = {"DESCRIPTORS": lambda args: isinstance(args["hidden"], TensorDescriptor)}
"""A heuristic of kernels that take hidden and weight, by address or by descriptor."""


@triton.jit
def place(program, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Return a program's block of rows and of columns.

    Programs are numbered by groups of GROUP row blocks, in a group by columns, then by rows.
    """
    group = program // (GROUP * column_blocks)
    in_group = min(row_blocks - group * GROUP, GROUP)
    within = program - group * GROUP * column_blocks
    return group * GROUP + within % in_group, within // in_group


@triton.jit
def block_ptr(ptr, stride, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the addresses of a block of a matrix: its corner's in 64 bits, from there in 32."""
    corner = ptr + tl.cast(first_row, tl.int64) * stride + first_column
    return corner + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def block_products(
    hidden,
    weight,
    corner,
    shape,
    strides,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Return fp32 [BLOCK_N, BLOCK_V], anything at all in rows from N and columns from V on.

    corner: the first row and column; shape: N, V and H; strides: of hidden, then of weight.
    """
    first_row, first_column = corner
    N, V, H = shape
    stride_xn, stride_xh, stride_wv, stride_wh = strides
    sums = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if DESCRIPTORS:
        for h in range(0, H, BLOCK_H):
            x = hidden.load([first_row, h])
            w = weight.load([first_column, h])
            sums = tl.dot(x, w.T, sums, input_precision="ieee")
    else:
        # Rows beyond the end read the last one again, which costs no mask.
        i = tl.minimum(first_row + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        j = tl.minimum(first_column + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
        k = tl.arange(0, BLOCK_H)
        x_ptr = hidden + i[:, None] * stride_xn + k[None, :] * stride_xh
        w_ptr = weight + j[None, :] * stride_wv + k[:, None] * stride_wh
        for h in range(0, H, BLOCK_H):
            x = tl.load(x_ptr, mask=k[None, :] < H - h, other=0.0)
            w = tl.load(w_ptr, mask=k[:, None] < H - h, other=0.0)
            sums = tl.dot(x, w, sums, input_precision="ieee")
            x_ptr += BLOCK_H * stride_xh
            w_ptr += BLOCK_H * stride_wh
    return sums


@triton.jit
def capped_products(
    products,
    bias_ptr,
    columns,
    in_range,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Return the logits of a block of products before they are divided by the temperature."""
    capped = products
    if HAS_BIAS:
        capped += tl.load(bias_ptr + columns, mask=in_range, other=0.0)[None, :]
    if HAS_SOFTCAP:
        capped = softcap * tanh(capped * (1.0 / softcap))
    return capped


@triton.jit
def fold_part(capped, part_max, row_max, sum_exp, weighted_sum, scale, WITH_ENTROPY: tl.constexpr):
    """Add logits that are not yet divided by the temperature to row_max, sum_exp and weighted_sum.

    part_max: their maximum in each row. Their differences to the maximum are multiplied by scale =
    LOG2_E / temperature, which does that and makes exp(x) of 2^x; weighted_sum is LOG2_E times too
    large.
    """
    row_max, sum_exp, weighted_sum, _ = fold_exponentials(
        capped, part_max, row_max, sum_exp, weighted_sum, scale, WITH_ENTROPY
    )
    return row_max, sum_exp, weighted_sum


@triton.jit
def fold_exponentials(
    capped, part_max, row_max, sum_exp, weighted_sum, scale, WITH_ENTROPY: tl.constexpr
):
    """Do as `fold_part` does, and return the exponentials, under the new row_max, as well."""
    new_max = tl.maximum(row_max, part_max)
    # A row that is -inf so far has no maximum to subtract.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    # What was summed so far, seen from the new maximum.
    drop = (row_max - shift) * scale
    shrink = tl.exp2(drop)
    below = (capped - shift[:, None]) * scale
    e = tl.exp2(below)
    if WITH_ENTROPY:
        # 0 * -inf counts as 0: 2^-256 is 0 in fp32.
        moment = tl.sum(e * tl.maximum(below, -256.0), 1)
        weighted_sum = shrink * (weighted_sum + drop * sum_exp)
        weighted_sum = tl.where(shrink == 0.0, 0.0, weighted_sum) + moment
    return new_max, sum_exp * shrink + tl.sum(e, 1), weighted_sum, e


@triton.jit
def fold_squares(e, row_max_before, row_max, square_sum, scale):
    """Add to square_sum what `fold_exponentials` has made e of."""
    # A row that is -inf so far has summed up nothing.
    drop = tl.where(row_max == float("-inf"), 0.0, (row_max_before - row_max) * scale)
    return square_sum * tl.exp2(2.0 * drop) + tl.sum(e * e, 1)


@triton.jit
def store_exponentials(
    exp_ptr,
    stride_en,
    corner,
    e,
    capped,
    target,
    mask,
    has_target,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store e · (1 − tanh²), the slope of the softcap, and 0 in the column `target` of each row.

    corner: the first row and column in exp_ptr; has_target: whether any row may have one here.
    """
    if HAS_SOFTCAP:
        tanh = capped * (1.0 / softcap)
        e *= 1.0 - tanh * tanh
    if has_target:
        e = tl.where(tl.arange(0, COLUMNS)[None, :] == target[:, None], 0.0, e)
    first_row, first_column = corner
    tl.store(block_ptr(exp_ptr, stride_en, first_row, first_column, ROWS, COLUMNS), e, mask=mask)


@triton.jit
def quarters(block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Cut a block from left to right in four: what is made of a quarter takes few registers."""
    left, right = _halves(block, ROWS, COLUMNS)
    first, second = _halves(left, ROWS, COLUMNS // 2)
    third, fourth = _halves(right, ROWS, COLUMNS // 2)
    return first, second, third, fourth


@triton.jit
def _halves(block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    pairs = tl.reshape(block, (ROWS, 2, COLUMNS // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))
