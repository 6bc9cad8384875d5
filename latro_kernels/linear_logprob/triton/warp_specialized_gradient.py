"""linear_logprob's dz, warp-specialised, in Gluon: sums become dz beside products.

It does what `fused_gradient.grad_kernel` does where products are made again and no block is left
out. With upstream gradients g of logp and h of the entropy, and `offset`,

    dz = exp(z - row_max - log_sum) * (h * log_sum - offset - g - h * (z - row_max)) / temperature

before the slope of the softcap, and for the target by expm1. What of it belongs to the row is
multiplied together first. So a logit takes a multiply-add for the exponent, the exponential, and
one product, with h another multiply-add.

log2(e) / temperature is one factor here, so that z is not rounded as the forward has rounded
row_max. The exponent is off by about |z|·2^-22 at most: less than dz loses in bf16 up to
|z| = 16,000, in fp16 up to 2,000.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from latro_kernels.linear_logprob.triton.products import LN_2, LOG2_E, place, quarters
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
from latro_kernels.triton.softmax import expm1, flags, tanh


class Rows(NamedTuple):
    """What dz of a row takes, and where it goes.

    local: the target, counted from the block's first column on, and -1 where it has none there.
    Exponents are taken from `peak`, which is row_max · LOG2_E as fp32 rounds it, so that each is
    one multiply-add; dz of a probability e is e · (at_max - exponent · slope).
    """

    i: Any
    in_rows: Any
    local: Any
    has_target: Any
    peak: Any
    at_max: Any
    slope: Any
    to: Any


@gluon.constexpr_function
def cut_layout(ROWS, EIGHTS, TENSOR_MEMORY):
    """Return how four warps have sums in their registers, as [ROWS, EIGHTS, 8].

    A thread has two of each eight columns of two rows, or, of tensor memory, a row.
    """
    of_eights = [[0, 2**bit, 0] for bit in range(EIGHTS.bit_length() - 1)]
    if TENSOR_MEMORY:
        reg_bases = [[0, 0, 1], [0, 0, 2], [0, 0, 4], *of_eights]
        lane_bases = [[2**bit, 0, 0] for bit in range(5)]
        warp_bases = [[32, 0, 0], [64, 0, 0]]
    else:
        reg_bases = [[0, 0, 1], [8, 0, 0], *of_eights]
        lane_bases = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
        warp_bases = [[16, 0, 0], [32, 0, 0]]
    return gl.DistributedLinearLayout(
        reg_bases=reg_bases,
        lane_bases=lane_bases,
        warp_bases=warp_bases,
        block_bases=[],
        shape=[ROWS, EIGHTS, 8],
    )


@triton.heuristics(flags(HAS_BIAS="bias_ptr", WITH_OFFSET="offset_ptr"))
@gluon.jit(do_not_specialize=["M", "row_blocks", "column_blocks"])
def warp_specialized_grad_kernel(
    hidden,
    weight,
    bias_ptr,
    target_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    offset_ptr,
    logp_ptr,
    row_max_ptr,
    log_sum_ptr,
    dz_ptr,
    M,
    H,
    begin,
    end,
    row_blocks,
    column_blocks,
    softcap,
    temperature,
    HAS_BIAS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    WITH_OFFSET: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    TENSOR_MEMORY: gl.constexpr,
):
    """Do what `grad_kernel` does for products made again; a program does the work of several.

    There have to be no more programs than row_blocks · column_blocks: each needs some work.
    """
    ring = make_ring(hidden, weight, STAGES, 1 if TENSOR_MEMORY else 2)
    work = Work(row_blocks, column_blocks, end - begin, H, 1, GROUP)
    sizes, scales, inputs = (M, begin, end), (softcap, temperature), (bias_ptr, target_ptr)
    upstream, forward = (
        (grad_logp_ptr, grad_entropy_ptr, offset_ptr),
        (logp_ptr, row_max_ptr, log_sum_ptr),
    )
    # fmt: off
    if TENSOR_MEMORY:
        sums = make_accumulators(BLOCK_N, BLOCK_V)
        gl.warp_specialize(
            [
                (_consume, (
                    sums, work, sizes, scales, inputs, upstream, forward, dz_ptr,
                    HAS_BIAS, HAS_SOFTCAP, WITH_OFFSET, BLOCK_N, BLOCK_V, BLOCK_H, True, 0,
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
                    ring, work, sizes, scales, inputs, upstream, forward, dz_ptr,
                    HAS_BIAS, HAS_SOFTCAP, WITH_OFFSET, BLOCK_N, BLOCK_V, BLOCK_H, False, 0,
                )),
                (_consume, (
                    ring, work, sizes, scales, inputs, upstream, forward, dz_ptr,
                    HAS_BIAS, HAS_SOFTCAP, WITH_OFFSET, BLOCK_N, BLOCK_V, BLOCK_H, False, 1,
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
    upstream,
    forward,
    dz_ptr,
    HAS_BIAS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    WITH_OFFSET: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
    TENSOR_MEMORY: gl.constexpr,
    WHICH: gl.constexpr,
):
    """Write dz of blocks of sums, which are read from `source`, the accumulators.

    Without tensor memory it is the ring: multiply half the rows of each block, the upper ones or,
    as WHICH = 1, the lower, and write their dz.
    """
    ROWS: gl.constexpr = BLOCK_N if TENSOR_MEMORY else BLOCK_N // 2
    WIDTH: gl.constexpr = BLOCK_V // 4
    EIGHTS: gl.constexpr = WIDTH // 8
    # Columns are counted by eights, and within one: the addresses that a thread stores to differ by
    # constants.
    cut: gl.constexpr = cut_layout(ROWS, EIGHTS, TENSOR_MEMORY)
    of_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, cut))
    eight = 8 * gl.arange(0, EIGHTS, layout=gl.SliceLayout(0, gl.SliceLayout(2, cut)))
    eight = eight[None, :, None]
    within = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, cut)))[None, None, :]
    steps = gl.cdiv(work.H, BLOCK_H)
    step = 0
    block = 0
    if WHICH == 1:
        mbarrier.wait(source.start, 0)
    for item in range(gl.program_id(0), work.row_blocks * work.splits, gl.num_programs(0)):
        row_block, column_block = place(item, work.row_blocks, work.splits, work.GROUP)
        i = row_block * BLOCK_N + WHICH * ROWS + gl.arange(0, ROWS, layout=of_rows)
        column = column_block * BLOCK_V
        if TENSOR_MEMORY:
            sums = source.sums.index(block % BLOCKS)
            mbarrier.wait(source.ready.index(block % BLOCKS), block // BLOCKS % 2)
        else:
            layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
            sums = gl.zeros([ROWS, BLOCK_V], gl.float32, layout=layout)
            sums = multiply(source, sums, step, steps, WHICH)
            step += steps
            parts = quarters(sums, ROWS, BLOCK_V)
        # Loaded only now, what is known of the rows takes no register of the loop's.
        rows = _rows(
            i, column, sizes, scales, inputs, upstream, forward, dz_ptr, WITH_OFFSET, BLOCK_V
        )
        for part in gl.static_range(4):
            if TENSOR_MEMORY:
                of_part = sums.slice(part * WIDTH, WIDTH).load(rows_layout(ROWS, WIDTH))
                if part == 3:
                    mbarrier.arrive(source.free.index(block % BLOCKS))
                    block += 1
                of_part = gl.convert_layout(gl.reshape(of_part, [ROWS, EIGHTS, 8]), cut)
            else:
                of_part = gl.reshape(parts[part], [ROWS, EIGHTS, 8])
            _write(
                of_part, (eight, within), column, part * WIDTH, rows, sizes, scales, inputs,
                upstream, forward, HAS_BIAS, HAS_SOFTCAP, WITH_OFFSET, BLOCK_V,
            )  # fmt: skip


@gluon.jit
def _rows(
    i,
    column,
    sizes,
    scales,
    inputs,
    upstream,
    forward,
    dz_ptr,
    WITH_OFFSET: gl.constexpr,
    BLOCK_V: gl.constexpr,
):
    """Return what is known of the rows i beside the block of columns from `column` on."""
    M, begin, end = sizes
    _, temperature = scales
    _, target_ptr = inputs
    grad_logp_ptr, grad_entropy_ptr, offset_ptr = upstream
    _, row_max_ptr, log_sum_ptr = forward
    in_rows = i < M
    grad_logp = gl.load(grad_logp_ptr + i, mask=in_rows, other=0.0)
    row_max = gl.load(row_max_ptr + i, mask=in_rows, other=0.0)
    log_sum = gl.load(log_sum_ptr + i, mask=in_rows, other=0.0)
    peak = row_max * LOG2_E
    # What rounding has added is known exactly, and goes into `factor`.
    rounding = gl.fma(row_max, LOG2_E, -peak)
    factor = gl.exp2(-rounding) * gl.exp(-log_sum) * (1.0 / temperature)
    at_max = -grad_logp
    slope = at_max
    if WITH_OFFSET:
        grad_entropy = gl.load(grad_entropy_ptr + i, mask=in_rows, other=0.0)
        offset = gl.load(offset_ptr + i, mask=in_rows, other=0.0)
        at_max = grad_entropy * (log_sum + rounding * LN_2) - offset - grad_logp
        slope = grad_entropy * LN_2 * factor
    target = gl.load(target_ptr + i, mask=in_rows, other=-1)
    first = begin + column
    is_here = (target >= first) & (target < first + BLOCK_V)
    local = gl.where(is_here, target - first, -1).to(gl.int32)
    to = dz_ptr + i.to(gl.int64) * (end - begin) + column
    return Rows(i, in_rows, local, gl.max(local, 0) >= 0, peak, at_max * factor, slope, to)


@gluon.jit
def _write(
    sums,
    columns,
    column,
    left,
    rows,
    sizes,
    scales,
    inputs,
    upstream,
    forward,
    HAS_BIAS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    WITH_OFFSET: gl.constexpr,
    BLOCK_V: gl.constexpr,
):
    """Write dz of the part of a block that begins `left` columns right of `column`, its first."""
    _, begin, end = sizes
    softcap, temperature = scales
    bias_ptr, _ = inputs
    grad_logp_ptr, grad_entropy_ptr, offset_ptr = upstream
    logp_ptr, _, _ = forward
    i, in_rows, local, has_target, peak, at_max, slope, to = rows
    eight, within = columns
    in_range = eight < end - begin - column - left - within
    capped = sums
    if HAS_BIAS:
        from_ptr = bias_ptr + column + within + eight
        capped += gl.load(from_ptr + left, mask=in_range, other=0.0)
    if HAS_SOFTCAP:
        capped = softcap * tanh(capped * (1.0 / softcap))
    below = gl.fma(capped, LOG2_E / temperature, -peak[:, None, None])
    dz = gl.exp2(below)
    if WITH_OFFSET:
        # 0 * -inf counts as 0: 2^-256 is 0 in fp32.
        dz *= at_max[:, None, None] - gl.maximum(below, -256.0) * slope[:, None, None]
    else:
        dz *= at_max[:, None, None]
    if has_target:
        # 1 - p by expm1: exact where p is close to 1.
        logp = gl.load(logp_ptr + i, mask=in_rows, other=0.0)
        grad_logp = gl.load(grad_logp_ptr + i, mask=in_rows, other=0.0)
        of_target = -grad_logp * expm1(logp)
        if WITH_OFFSET:
            grad_entropy = gl.load(grad_entropy_ptr + i, mask=in_rows, other=0.0)
            offset = gl.load(offset_ptr + i, mask=in_rows, other=0.0)
            target_p = gl.exp(logp)
            of_offset = target_p * (grad_entropy * logp + offset)
            of_target -= gl.where(target_p == 0.0, 0.0, of_offset)
        is_target = eight == local[:, None, None] - left - within
        dz = gl.where(is_target, (of_target * (1.0 / temperature))[:, None, None], dz)
    if HAS_SOFTCAP:
        of_tanh = capped * (1.0 / softcap)
        dz *= 1.0 - of_tanh * of_tanh
    dz = dz.to(to.dtype.element_ty)
    to = to[:, None, None] + within + eight + left
    # The last block alone has columns beyond the end.
    if column + BLOCK_V <= end - begin:
        gl.store(to, dz, mask=in_rows[:, None, None])
    else:
        gl.store(to, dz, mask=in_rows[:, None, None] & in_range)
