"""linear_logprob's forward for sm_90, warp-specialised, in Gluon: folds run beside products.

It does what `fused_forward.forward_kernel` does, but for exponentials, which a frozen head stores.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from latro_kernels.linear_logprob.triton.products import LN_2, LOG2_E, place
from latro_kernels.linear_logprob.triton.warp_specialized import (
    WORKER_REGISTERS,
    WORKER_WARPS,
    Work,
    make_ring,
    multiply,
    produce,
)
from latro_kernels.triton.softmax import flags, tanh


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
):
    """Do what `forward_kernel` does without exponentials; a program does the work of several.

    There have to be no more programs than row_blocks · splits: each needs some work.
    """
    ring = make_ring(hidden, weight, STAGES)
    work = Work(row_blocks, splits, end - begin, H, TILES, GROUP)
    sizes, scales, inputs = (N, V, begin, end), (softcap, temperature), (bias_ptr, target_ptr)
    outputs = (parts_ptr, stride_part, cached_ptr, cached_end, stride_cn, block_max_ptr)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                ring, work, sizes, scales, inputs, outputs,
                HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, WITH_CACHED, WITH_BLOCK_MAX, 0,
            )),
            (_consume, (
                ring, work, sizes, scales, inputs, outputs,
                HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, WITH_CACHED, WITH_BLOCK_MAX, 1,
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
    outputs,
    HAS_BIAS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    WITH_ENTROPY: gl.constexpr,
    WITH_CACHED: gl.constexpr,
    WITH_BLOCK_MAX: gl.constexpr,
    WHICH: gl.constexpr,
):
    """Multiply and fold half the rows of each block, the upper ones or, as WHICH = 1, the lower."""
    N, V, begin, end = sizes
    softcap, temperature = scales
    bias_ptr, target_ptr = inputs
    parts_ptr, stride_part, cached_ptr, cached_end, stride_cn, block_max_ptr = outputs
    ROWS: gl.constexpr = ring.x.shape[1] // 2
    BLOCK_V: gl.constexpr = ring.w.shape[1]
    # As the instruction leaves sums: a row stands in four threads, so that rows are folded apart.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    of_rows: gl.constexpr = gl.SliceLayout(1, layout)
    j = gl.arange(0, BLOCK_V, layout=gl.SliceLayout(0, layout))
    # In the loop, logits are not yet divided by the temperature: this factor does that, and makes
    # exp(x) of 2^x.
    scale = LOG2_E / temperature
    steps = gl.cdiv(work.H, ring.x.shape[2])
    step = 0
    if WHICH == 1:
        mbarrier.wait(ring.start, 0)
    for item in range(gl.program_id(0), work.row_blocks * work.splits, gl.num_programs(0)):
        row_block, split = place(item, work.row_blocks, work.splits, work.GROUP)
        i = (2 * row_block + WHICH) * ROWS + gl.arange(0, ROWS, layout=of_rows)
        in_rows = i < N
        first = begin + split * work.TILES * BLOCK_V
        last = min(first + work.TILES * BLOCK_V, end)
        target = gl.load(target_ptr + i, mask=in_rows, other=-1)
        target = gl.where((target >= first) & (target < last), target - first, -1).to(gl.int32)
        # A bit for each block of columns that holds a target: few do, and are searched.
        hits = gl.reduce_or(gl.where(target >= 0, 1 << (target // BLOCK_V), 0), 0)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, layout=of_rows)
        peak = row_max
        target_logit = row_max
        sum_exp = gl.zeros([ROWS], gl.float32, layout=of_rows)
        weighted_sum = sum_exp
        for column in range(first, last, BLOCK_V):
            sums = gl.zeros([ROWS, BLOCK_V], gl.float32, layout=layout)
            sums = multiply(ring, sums, step, steps, WHICH)
            step += steps
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
            if column + BLOCK_V > end:
                capped = gl.where(in_range[None, :], capped, float("-inf"))
            local = target - (column - first)
            if (hits >> ((column - first) // BLOCK_V)) & 1 != 0:
                of_target = gl.sum(gl.where(j[None, :] == local[:, None], capped, 0.0), 1)
                is_here = (local >= 0) & (local < BLOCK_V)
                target_logit = gl.where(is_here, of_target, target_logit)

            # Exponents are taken from `peak`, which is row_max · scale as fp32 rounds it, so that
            # each is one multiply-add.
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
            peak = new_peak
            if WITH_BLOCK_MAX:
                to = block_max_ptr + i.to(gl.int64) * gl.cdiv(V, BLOCK_V) + column // BLOCK_V
                gl.store(to, largest * (1.0 / temperature), mask=in_rows)

        # The sums, seen from row_max itself: what rounding has made of it is known exactly.
        known = gl.where(row_max == float("-inf"), 0.0, row_max)
        rounding = gl.fma(known, -scale, gl.where(peak == float("-inf"), 0.0, peak))
        growth = gl.exp2(rounding)
        to = parts_ptr + gl.cast(split, gl.int64) * N + i
        gl.store(to, row_max * (1.0 / temperature), mask=in_rows)
        to += stride_part
        gl.store(to, sum_exp * growth, mask=in_rows)
        to += stride_part
        gl.store(to, target_logit * (1.0 / temperature), mask=in_rows)
        if WITH_ENTROPY:
            to += stride_part
            weighted_sum = growth * (weighted_sum + rounding * sum_exp)
            gl.store(to, weighted_sum * LN_2, mask=in_rows)
