"""linear_logprob's forward, warp-specialised, in Gluon: folds run beside products.

It does what `fused_forward.forward_kernel` does, but for exponentials, which a frozen head stores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from latro_kernels.linear_logprob.triton.products import LN_2, LOG2_E, place
from latro_kernels.linear_logprob.triton.tensor_memory import (
    BLOCKS,
    SINGLE_REGISTERS,
    SINGLE_WARPS,
    make_accumulators,
    multiply_blocks,
    rows_layout,
)
from latro_kernels.linear_logprob.triton.warp_specialized import (
    WORKER_REGISTERS,
    WORKER_WARPS,
    Work,
    make_ring,
    multiply,
    produce,
)
from latro_kernels.triton.softmax import flags, tanh


class Rows(NamedTuple):
    """Numbers of rows, whether there are such rows, and their targets.

    Targets are counted from an item's first column on, and are -1 where it has none. hits: a bit
    for each block of columns that holds a target: few do, and are searched.
    """

    i: Any
    in_rows: Any
    target: Any
    hits: Any


class Sums(NamedTuple):
    """What rows' logits are folded into. peak: row_max · scale as fp32 rounds it."""

    row_max: Any
    peak: Any
    target_logit: Any
    sum_exp: Any
    weighted_sum: Any


@gluon.constexpr_function
def sums_layout(ROWS, COLUMNS, TENSOR_MEMORY):
    """Return how a consumer's threads have sums: a row stands in few, and is folded apart.

    On sm_90 four, as the instruction that multiplies leaves them; of tensor memory one.
    """
    if TENSOR_MEMORY:
        return rows_layout(ROWS, COLUMNS)
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])


@triton.heuristics(
    flags(HAS_BIAS="bias_ptr", WITH_CACHED="cached_ptr", WITH_BLOCK_MAX="block_max_ptr")
)
@gluon.jit(do_not_specialize=["N", "V", "cached_end", "stride_part", "row_blocks", "splits"])
def warp_specialized_kernel(
    hidden,
    weight,
    bias_ptr,
    target_ptr,
    parts_ptr,
    cached_ptr,
    block_max_ptr,
    N,
    H,
    V,
    begin,
    end,
    cached_end,
    stride_cn,
    stride_part,
    row_blocks,
    splits,
    softcap,
    temperature,
    HAS_BIAS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    WITH_ENTROPY: gl.constexpr,
    WITH_CACHED: gl.constexpr,
    WITH_BLOCK_MAX: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
    TILES: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    TENSOR_MEMORY: gl.constexpr,
):
    """Do what `forward_kernel` does without exponentials; a program does the work of several.

    There have to be no more programs than row_blocks · splits: each needs some work.
    """
    ring = make_ring(hidden, weight, STAGES, 1 if TENSOR_MEMORY else 2)
    work = Work(row_blocks, splits, end - begin, H, TILES, GROUP)
    sizes, scales, inputs = (N, V, begin, end), (softcap, temperature), (bias_ptr, target_ptr)
    outputs = (parts_ptr, stride_part, cached_ptr, cached_end, stride_cn, block_max_ptr)
    # fmt: off
    if TENSOR_MEMORY:
        sums = make_accumulators(BLOCK_N, BLOCK_V)
        gl.warp_specialize(
            [
                (_consume, (
                    sums, work, sizes, scales, inputs, outputs,
                    HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, WITH_CACHED, WITH_BLOCK_MAX,
                    BLOCK_N, BLOCK_V, BLOCK_H, True, 0,
                )),
                (multiply_blocks, (ring, sums, work)),
                (produce, (hidden, weight, ring, work)),
            ],
            SINGLE_WARPS,
            SINGLE_REGISTERS,
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    ring, work, sizes, scales, inputs, outputs,
                    HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, WITH_CACHED, WITH_BLOCK_MAX,
                    BLOCK_N, BLOCK_V, BLOCK_H, False, 0,
                )),
                (_consume, (
                    ring, work, sizes, scales, inputs, outputs,
                    HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, WITH_CACHED, WITH_BLOCK_MAX,
                    BLOCK_N, BLOCK_V, BLOCK_H, False, 1,
                )),
                (produce, (hidden, weight, ring, work)),
            ],
            WORKER_WARPS,
            WORKER_REGISTERS,
        )
    # fmt: on


@gluon.jit
def _consume(
    source,
    work,
    sizes,
    scales,
    inputs,
    outputs,
    HAS_BIAS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    WITH_ENTROPY: gl.constexpr,
    WITH_CACHED: gl.constexpr,
    WITH_BLOCK_MAX: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
    TENSOR_MEMORY: gl.constexpr,
    WHICH: gl.constexpr,
):
    """Fold blocks of sums, which are read from `source`, the accumulators.

    Without tensor memory it is the ring: multiply and fold half the rows of each block, the upper
    ones or, as WHICH = 1, the lower.
    """
    N, V, begin, end = sizes
    softcap, temperature = scales
    bias_ptr, target_ptr = inputs
    parts_ptr, stride_part, cached_ptr, cached_end, stride_cn, block_max_ptr = outputs
    ROWS: gl.constexpr = BLOCK_N if TENSOR_MEMORY else BLOCK_N // 2
    # Columns that are folded at a time.
    WIDTH: gl.constexpr = BLOCK_V // 4 if TENSOR_MEMORY else BLOCK_V
    layout: gl.constexpr = sums_layout(ROWS, WIDTH, TENSOR_MEMORY)
    of_rows: gl.constexpr = gl.SliceLayout(1, layout)
    j = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    # In the loop, logits are not yet divided by the temperature: this factor does that, and makes
    # exp(x) of 2^x.
    scale = LOG2_E / temperature
    steps = gl.cdiv(work.H, BLOCK_H)
    step = 0
    block = 0
    if WHICH == 1:
        mbarrier.wait(source.start, 0)
    for item in range(gl.program_id(0), work.row_blocks * work.splits, gl.num_programs(0)):
        row_block, split = place(item, work.row_blocks, work.splits, work.GROUP)
        i = row_block * BLOCK_N + WHICH * ROWS + gl.arange(0, ROWS, layout=of_rows)
        in_rows = i < N
        first = begin + split * work.TILES * BLOCK_V
        last = min(first + work.TILES * BLOCK_V, end)
        target = gl.load(target_ptr + i, mask=in_rows, other=-1)
        target = gl.where((target >= first) & (target < last), target - first, -1).to(gl.int32)
        hits = gl.reduce_or(gl.where(target >= 0, 1 << (target // WIDTH), 0), 0)
        rows = Rows(i, in_rows, target, hits)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, layout=of_rows)
        zero = gl.zeros([ROWS], gl.float32, layout=of_rows)
        folded = Sums(row_max, row_max, row_max, zero, zero)
        for column in range(first, last, BLOCK_V):
            if TENSOR_MEMORY:
                sums = source.sums.index(block % BLOCKS)
                mbarrier.wait(source.ready.index(block % BLOCKS), block // BLOCKS % 2)
                block_max = gl.full([ROWS], float("-inf"), gl.float32, layout=of_rows)
                for part in gl.static_range(4):
                    of_part = sums.slice(part * WIDTH, WIDTH).load(layout)
                    if part == 3:
                        mbarrier.arrive(source.free.index(block % BLOCKS))
                    folded, part_max = _fold(
                        of_part, j, column + part * WIDTH, (first, begin, end), rows, folded,
                        bias_ptr, softcap, scale, (cached_ptr, cached_end, stride_cn),
                        HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, WITH_CACHED,
                    )  # fmt: skip
                    block_max = gl.maximum(block_max, part_max)
                block += 1
            else:
                sums = gl.zeros([ROWS, BLOCK_V], gl.float32, layout=layout)
                sums = multiply(source, sums, step, steps, WHICH)
                step += steps
                folded, block_max = _fold(
                    sums, j, column, (first, begin, end), rows, folded,
                    bias_ptr, softcap, scale, (cached_ptr, cached_end, stride_cn),
                    HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, WITH_CACHED,
                )  # fmt: skip
            if WITH_BLOCK_MAX:
                to = block_max_ptr + i.to(gl.int64) * gl.cdiv(V, BLOCK_V) + column // BLOCK_V
                gl.store(to, block_max * (1.0 / temperature), mask=in_rows)

        # The sums, seen from row_max itself: what rounding has made of it is known exactly.
        known = gl.where(folded.row_max == float("-inf"), 0.0, folded.row_max)
        peak = gl.where(folded.peak == float("-inf"), 0.0, folded.peak)
        rounding = gl.fma(known, -scale, peak)
        growth = gl.exp2(rounding)
        to = parts_ptr + gl.cast(split, gl.int64) * N + i
        gl.store(to, folded.row_max * (1.0 / temperature), mask=in_rows)
        to += stride_part
        gl.store(to, folded.sum_exp * growth, mask=in_rows)
        to += stride_part
        gl.store(to, folded.target_logit * (1.0 / temperature), mask=in_rows)
        if WITH_ENTROPY:
            to += stride_part
            weighted_sum = growth * (folded.weighted_sum + rounding * folded.sum_exp)
            gl.store(to, weighted_sum * LN_2, mask=in_rows)


@gluon.jit
def _fold(
    sums,
    j,
    column,
    span,
    rows,
    folded,
    bias_ptr,
    softcap,
    scale,
    kept,
    HAS_BIAS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    WITH_ENTROPY: gl.constexpr,
    WITH_CACHED: gl.constexpr,
):
    """Return `folded` with sums of the columns from `column` on added, and their maximum.

    span: the first column of the item, and those where `kept` and the bias begin and end.
    """
    first, begin, end = span
    cached_ptr, cached_end, stride_cn = kept
    i, in_rows, target, hits = rows
    row_max, peak, target_logit, sum_exp, weighted_sum = folded
    WIDTH: gl.constexpr = sums.shape[1]
    in_range = j < end - column
    if WITH_CACHED:  # noqa: SIM102 (one is known when it is compiled, the other is not)
        if column < cached_end:
            to = cached_ptr + i.to(gl.int64) * stride_cn + (column - begin)
            in_block = in_rows[:, None] & in_range[None, :]
            gl.store(to[:, None] + j[None, :], sums, mask=in_block)
    capped = sums
    if HAS_BIAS:
        bias = gl.load(bias_ptr + (column - begin) + j, mask=in_range, other=0.0)
        capped += bias[None, :]
    if HAS_SOFTCAP:
        capped = softcap * tanh(capped * (1.0 / softcap))
    # The last block alone has columns beyond the end.
    if column + WIDTH > end:
        capped = gl.where(in_range[None, :], capped, float("-inf"))
    local = target - (column - first)
    if (hits >> ((column - first) // WIDTH)) & 1 != 0:
        of_target = gl.sum(gl.where(j[None, :] == local[:, None], capped, 0.0), 1)
        is_here = (local >= 0) & (local < WIDTH)
        target_logit = gl.where(is_here, of_target, target_logit)

    # Exponents are taken from `peak`, so that each is one multiply-add.
    largest = gl.max(capped, 1)
    row_max = gl.maximum(row_max, largest)
    new_peak = gl.maximum(peak, largest * scale)
    # A row that is -inf so far has no maximum to subtract.
    shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    # What was summed so far, seen from the new peak.
    drop = peak - shift
    shrink = gl.exp2(drop)
    below = gl.fma(capped, scale, -shift[:, None])
    e = gl.exp2(below)
    if WITH_ENTROPY:
        # 0 * -inf counts as 0: 2^-256 is 0 in fp32.
        moment = gl.sum(e * gl.maximum(below, -256.0), 1)
        weighted_sum = shrink * (weighted_sum + drop * sum_exp)
        weighted_sum = gl.where(shrink == 0.0, 0.0, weighted_sum) + moment
    sum_exp = sum_exp * shrink + gl.sum(e, 1)
    return Sums(row_max, new_peak, target_logit, sum_exp, weighted_sum), largest
