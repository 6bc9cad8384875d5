"""linear_logprob's dz for sm_90, warp-specialised, in Gluon: sums become dz beside products.

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

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from latro_kernels.linear_logprob.triton.products import LN_2, LOG2_E, place, quarters
from latro_kernels.linear_logprob.triton.warp_specialized import (
    WORKER_REGISTERS,
    WORKER_WARPS,
    Work,
    make_ring,
    multiply,
    produce,
)
from latro_kernels.triton.softmax import expm1, flags, tanh


@gluon.constexpr_function
def cut_layout(EIGHTS):
    """Return how sums lie in the registers of four warps, as [64, EIGHTS, 8]."""
    of_eights = [[0, 2**bit, 0] for bit in range(EIGHTS.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [8, 0, 0], *of_eights],
        lane_bases=[[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, EIGHTS, 8],
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
):
    """Do what `grad_kernel` does for products made again; a program does the work of several.

    There have to be no more programs than row_blocks · column_blocks: each needs some work.
    """
    ring = make_ring(hidden, weight, STAGES)
    work = Work(row_blocks, column_blocks, end - begin, H, 1, GROUP)
    sizes, scales, inputs = (M, begin, end), (softcap, temperature), (bias_ptr, target_ptr)
    upstream, forward = (
        (grad_logp_ptr, grad_entropy_ptr, offset_ptr),
        (logp_ptr, row_max_ptr, log_sum_ptr),
    )
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                ring, work, sizes, scales, inputs, upstream, forward, dz_ptr,
                HAS_BIAS, HAS_SOFTCAP, WITH_OFFSET, 0,
            )),
            (_consume, (
                ring, work, sizes, scales, inputs, upstream, forward, dz_ptr,
                HAS_BIAS, HAS_SOFTCAP, WITH_OFFSET, 1,
            )),
            (produce, (hidden, weight, ring, work)),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )
    # fmt: on


@gluon.jit
def _consume(
    ring,
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
    WHICH: gl.constexpr,
):
    """Write dz of half the rows of each block, the upper ones or, as WHICH = 1, the lower."""
    M, begin, end = sizes
    softcap, temperature = scales
    bias_ptr, target_ptr = inputs
    grad_logp_ptr, grad_entropy_ptr, offset_ptr = upstream
    logp_ptr, row_max_ptr, log_sum_ptr = forward
    ROWS: gl.constexpr = ring.x.shape[1] // 2
    BLOCK_V: gl.constexpr = ring.w.shape[1]
    PART: gl.constexpr = BLOCK_V // 4
    EIGHTS: gl.constexpr = PART // 8
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    # Columns are counted by eights, and within one: every thread has two of each eight, and so the
    # addresses that it stores to differ by constants.
    cut: gl.constexpr = cut_layout(EIGHTS)
    of_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, cut))
    eight = 8 * gl.arange(0, EIGHTS, layout=gl.SliceLayout(0, gl.SliceLayout(2, cut)))
    eight = eight[None, :, None]
    within = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, cut)))[None, None, :]
    inverse = 1.0 / temperature
    scale = LOG2_E / temperature
    steps = gl.cdiv(work.H, ring.x.shape[2])
    step = 0
    if WHICH == 1:
        mbarrier.wait(ring.start, 0)
    for item in range(gl.program_id(0), work.row_blocks * work.splits, gl.num_programs(0)):
        row_block, column_block = place(item, work.row_blocks, work.splits, work.GROUP)
        sums = gl.zeros([ROWS, BLOCK_V], gl.float32, layout=layout)
        sums = multiply(ring, sums, step, steps, WHICH)
        step += steps

        # What is known of the rows: loaded only now, it takes no register of the loop's.
        i = (2 * row_block + WHICH) * ROWS + gl.arange(0, ROWS, layout=of_rows)
        in_rows = i < M
        grad_logp = gl.load(grad_logp_ptr + i, mask=in_rows, other=0.0)
        row_max = gl.load(row_max_ptr + i, mask=in_rows, other=0.0)
        log_sum = gl.load(log_sum_ptr + i, mask=in_rows, other=0.0)
        # Exponents are taken from `peak`, which is row_max · LOG2_E as fp32 rounds it, so that each
        # is one multiply-add. What rounding has added is known exactly, and goes into `factor`.
        peak = row_max * LOG2_E
        rounding = gl.fma(row_max, LOG2_E, -peak)
        factor = gl.exp2(-rounding) * gl.exp(-log_sum) * inverse
        at_max = -grad_logp
        if WITH_OFFSET:
            grad_entropy = gl.load(grad_entropy_ptr + i, mask=in_rows, other=0.0)
            offset = gl.load(offset_ptr + i, mask=in_rows, other=0.0)
            at_max = grad_entropy * (log_sum + rounding * LN_2) - offset - grad_logp
            slope = grad_entropy * LN_2 * factor
        at_max *= factor

        column = begin + column_block * BLOCK_V
        target = gl.load(target_ptr + i, mask=in_rows, other=-1)
        is_here = (target >= column) & (target < column + BLOCK_V)
        local = gl.where(is_here, target - column, -1).to(gl.int32)
        has_target = gl.max(local, 0) >= 0
        to = dz_ptr + i.to(gl.int64) * (end - begin) + (column - begin)
        to = to[:, None, None] + within
        parts = quarters(sums, ROWS, BLOCK_V)
        for quarter in gl.static_range(4):
            left = quarter * PART
            in_range = eight < end - column - left - within
            capped = gl.reshape(parts[quarter], [ROWS, EIGHTS, 8])
            if HAS_BIAS:
                from_ptr = bias_ptr + (column - begin) + within + eight
                capped += gl.load(from_ptr + left, mask=in_range, other=0.0)
            if HAS_SOFTCAP:
                capped = softcap * tanh(capped * (1.0 / softcap))
            below = gl.fma(capped, scale, -peak[:, None, None])
            dz = gl.exp2(below)
            if WITH_OFFSET:
                # 0 * -inf counts as 0: 2^-256 is 0 in fp32.
                dz *= at_max[:, None, None] - gl.maximum(below, -256.0) * slope[:, None, None]
            else:
                dz *= at_max[:, None, None]
            if has_target:
                # 1 - p by expm1: exact where p is close to 1.
                logp = gl.load(logp_ptr + i, mask=in_rows, other=0.0)
                of_target = -grad_logp * expm1(logp)
                if WITH_OFFSET:
                    target_p = gl.exp(logp)
                    of_offset = target_p * (grad_entropy * logp + offset)
                    of_target -= gl.where(target_p == 0.0, 0.0, of_offset)
                is_target = eight == local[:, None, None] - left - within
                dz = gl.where(is_target, (of_target * inverse)[:, None, None], dz)
            if HAS_SOFTCAP:
                of_tanh = capped * (1.0 / softcap)
                dz *= 1.0 - of_tanh * of_tanh
            dz = dz.to(dz_ptr.dtype.element_ty)
            # The last block alone has columns beyond the end.
            if column + BLOCK_V <= end:
                gl.store(to + eight + left, dz, mask=in_rows[:, None, None])
            else:
                gl.store(to + eight + left, dz, mask=in_rows[:, None, None] & in_range)
