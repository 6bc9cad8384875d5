"""linear_logprob's forward for sm_90, warp-specialised, in Gluon: folds run beside products.

`fused_forward.forward_kernel` has all its warps multiply, then fold: while they fold, the tensor
cores wait. Here a block of threads has three parts, which run at once:

- a producer, one warp, has blocks of hidden and weight copied (TMA) into a ring of STAGES stages;
- two consumers, four warps each, multiply half the rows of every stage each, and fold.

The second consumer starts LEAD steps behind the first. So the one still has products to make when
the other has made its block's and folds them, and the ring is deep enough for the lead to pass from
one to the other and back.

Three kinds of barriers order them. full[stage]: the copies into a stage have landed. empty[stage]:
both consumers have read it, and it may be overwritten. start: the first consumer has its lead. A
barrier is waited for by the parity of the phase that has to be over: the ring's round, odd or even.

Compiled for sm_90 with Triton 3.6 and 3.9, and simulated on a CPU by the tests; it has never run on
a GPU. It is taken only where `tuning` has found it right and faster on the GPU at hand, and not for
a frozen head, whose exponentials `forward_kernel` stores.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from latro_kernels.linear_logprob.triton.products import LN_2, LOG2_E, place
from latro_kernels.triton.softmax import flags, tanh

# Triton 3.6 has it by the longer name.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

LEAD = 2
# Of a block in shared memory, as products of bf16 and fp16 read it.
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
# Warps of the first consumer, and the most registers that threads of three times as many warps can
# have, by the eight. The producer gives most of its own up, and the consumers take them.
OPTIONS = {"num_warps": 4, "maxnreg": 168}


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
    LEAD: gl.constexpr,
):
    """Do what `forward_kernel` does without exponentials; a program does the work of several.

    There have to be no more programs than row_blocks · splits: each needs some work.
    """
    gl.static_assert(LEAD <= STAGES, "the producer cannot fill more than the ring")
    x = gl.allocate_shared_memory(hidden.dtype, [STAGES, BLOCK_N, BLOCK_H], hidden.layout)
    w = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_V, BLOCK_H], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    start = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.init(start, count=1)
    fence_async_shared()  # copies have to find the barriers as they are now

    operands, barriers = (x, w), (full, empty, start)
    work, sizes, scales = (row_blocks, splits, begin, end), (N, H, V), (softcap, temperature)
    inputs = (bias_ptr, target_ptr)
    outputs = (parts_ptr, stride_part, cached_ptr, cached_end, stride_cn, block_max_ptr)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                operands, barriers, work, sizes, scales, inputs, outputs,
                HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, WITH_CACHED, WITH_BLOCK_MAX,
                BLOCK_N, BLOCK_V, BLOCK_H, TILES, GROUP, STAGES, LEAD, 0,
            )),
            (_consume, (
                operands, barriers, work, sizes, scales, inputs, outputs,
                HAS_BIAS, HAS_SOFTCAP, WITH_ENTROPY, WITH_CACHED, WITH_BLOCK_MAX,
                BLOCK_N, BLOCK_V, BLOCK_H, TILES, GROUP, STAGES, LEAD, 1,
            )),
            (_produce, (
                hidden, weight, operands, barriers, work, H,
                BLOCK_N, BLOCK_V, BLOCK_H, TILES, GROUP, STAGES,
            )),
        ],
        # Warps and registers of a thread, of the second consumer and of the producer; the first
        # consumer has the warps of the launch, and the registers that are left: 240 as well.
        [4, 1],
        [240, 24],
    )
    # fmt: on


@gluon.jit
def _produce(
    hidden,
    weight,
    operands,
    barriers,
    work,
    H,
    BLOCK_N: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
    TILES: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill stage after stage, in the order in which the consumers empty them."""
    x, w = operands
    full, empty, _ = barriers
    row_blocks, splits, begin, end = work
    step = 0
    for item in range(gl.program_id(0), row_blocks * splits, gl.num_programs(0)):
        row_block, split = place(item, row_blocks, splits, GROUP)
        first = split * TILES * BLOCK_V
        last = min(first + TILES * BLOCK_V, end - begin)
        for column in range(first, last, BLOCK_V):
            for h in range(0, H, BLOCK_H):
                stage = step % STAGES
                # In the first round the phase before counts as over, and nothing is waited for.
                mbarrier.wait(empty.index(stage), (step // STAGES + 1) % 2)
                # Copies are zeros beyond a tensor's end, and count as whole blocks.
                size: gl.constexpr = hidden.block_type.nbytes + weight.block_type.nbytes
                mbarrier.expect(full.index(stage), size)
                async_load(hidden, [row_block * BLOCK_N, h], full.index(stage), x.index(stage))
                async_load(weight, [column, h], full.index(stage), w.index(stage))
                step += 1


@gluon.jit
def _consume(
    operands,
    barriers,
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
    TILES: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    LEAD: gl.constexpr,
    WHICH: gl.constexpr,
):
    """Multiply and fold half the rows of each block, the upper ones or, as WHICH = 1, the lower."""
    row_blocks, splits, begin, end = work
    N, H, V = sizes
    softcap, temperature = scales
    bias_ptr, target_ptr = inputs
    parts_ptr, stride_part, cached_ptr, cached_end, stride_cn, block_max_ptr = outputs
    ROWS: gl.constexpr = BLOCK_N // 2
    # As the instruction leaves sums: a row stands in four threads, so that rows are folded apart.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    of_rows: gl.constexpr = gl.SliceLayout(1, layout)
    j = gl.arange(0, BLOCK_V, layout=gl.SliceLayout(0, layout))
    # In the loop, logits are not yet divided by the temperature: this factor does that, and makes
    # exp(x) of 2^x.
    scale = LOG2_E / temperature
    steps = gl.cdiv(H, BLOCK_H)
    step = 0
    if WHICH == 1:
        mbarrier.wait(barriers[2], 0)
    for item in range(gl.program_id(0), row_blocks * splits, gl.num_programs(0)):
        row_block, split = place(item, row_blocks, splits, GROUP)
        i = row_block * BLOCK_N + WHICH * ROWS + gl.arange(0, ROWS, layout=of_rows)
        in_rows = i < N
        first = begin + split * TILES * BLOCK_V
        last = min(first + TILES * BLOCK_V, end)
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
            sums = _multiply(operands, barriers, sums, step, steps, ROWS, STAGES, LEAD, WHICH)
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


@gluon.jit
def _multiply(
    operands,
    barriers,
    sums,
    step,
    steps,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    LEAD: gl.constexpr,
    WHICH: gl.constexpr,
):
    """Return sums plus the products of the next stages, as many as `steps`, from the ring."""
    x, w = operands
    full, empty, start = barriers
    for k in range(steps):
        stage = (step + k) % STAGES
        mbarrier.wait(full.index(stage), (step + k) // STAGES % 2)
        rows = x.index(stage).slice(WHICH * ROWS, ROWS)
        sums = warpgroup_mma(rows, w.index(stage).permute((1, 0)), sums, is_async=True)
        # One step's products may be under way, those of the step before are done: only now may its
        # stage be overwritten.
        sums = warpgroup_mma_wait(1, deps=[sums])
        mbarrier.arrive(empty.index((step + k + STAGES - 1) % STAGES), pred=k > 0)
        # Few hidden dimensions leave fewer steps than the lead in a block.
        if WHICH == 0:  # noqa: SIM102
            if step + k == min(LEAD, steps) - 1:
                mbarrier.arrive(start)
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(empty.index((step + steps + STAGES - 1) % STAGES))
    return sums


def launch(programs: int, arguments: dict[str, Any]) -> None:
    """Launch the kernel with the arguments of `forward_kernel`, whose operands have descriptors.

    programs: of that one, of which a program here does several, one after the other.
    """
    operands = {
        name: TensorDescriptor.from_tensor(of.base, of.block_shape, LAYOUT)
        for name, of in arguments.items()
        if name in ("hidden", "weight")
    }
    device = torch.cuda.get_device_properties(operands["hidden"].base.device)
    taken = {p.name for p in warp_specialized_kernel.fn.params}
    warp_specialized_kernel[(min(programs, device.multi_processor_count),)](
        **{name: value for name, value in arguments.items() if name in taken} | operands,
        STAGES=arguments["num_stages"],
        LEAD=LEAD,
        **OPTIONS,
    )
