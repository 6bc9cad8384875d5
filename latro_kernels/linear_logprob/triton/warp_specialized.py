"""What the warp-specialised kernels of `linear_logprob`, for sm_90 and sm_100, share, in Gluon.

`fused_forward.forward_kernel` and `fused_gradient.grad_kernel` have all their warps multiply, and
then make something of the sums: meanwhile the tensor cores wait. Here a block of threads has three
parts, which run at once. On sm_90:

- a producer, one warp, has blocks of hidden and weight copied (TMA) into a ring of STAGES stages;
- two consumers, four warps each, multiply half the rows of every stage each, and fold the products
  (`warp_specialized_forward`) or turn them into dz (`warp_specialized_gradient`).

The second consumer starts LEAD steps behind the first. So the one still has products to make when
the other has made its block's, and the ring is deep enough for the lead to pass from one to the
other and back. On sm_100 a warp of its own multiplies, as `tensor_memory` says, and there is one
consumer.

Three kinds of barriers order them. full[stage]: the copies into a stage have landed. empty[stage]:
all have read it, and it may be overwritten. start: the first consumer has its lead. A barrier is
waited for by the parity of the phase that has to be over: the ring's round, odd or even.

Exponents are taken from a rounded maximum, and what rounding has added is made good by its exp2. So
results may be NaN, unlike those of the usual form, where |z| is 2^32 or more, as of a logit of 5 at
a temperature of 1e-9.

Compiled for both with Triton 3.6 and 3.9, and simulated on a CPU by the tests; it has never run on
a GPU. It is taken only where `tuning` has found it right and faster on the GPU at hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
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

from latro_kernels.linear_logprob.triton.products import place

# Triton 3.6 has it by the longer name.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

LEAD: gl.constexpr = gl.constexpr(2)
# Of a block in shared memory, as products of bf16 and fp16 read it.
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
# Of a launch on sm_90: warps of the first consumer, and the most registers that threads of three
# times as many warps can have, by the eight. The producer gives most of its own up, and the
# consumers take them.
_OPTIONS = {"num_warps": 4, "maxnreg": 168}
# Warps and registers of a thread, of the second consumer and of the producer; the first consumer
# has the warps of the launch, and the registers that are left: 240 as well.
WORKER_WARPS: gl.constexpr = gl.constexpr([4, 1])
WORKER_REGISTERS: gl.constexpr = gl.constexpr([240, 24])
# On sm_100: of the consumer. The two other warps, with two idle ones, are as many.
_OPTIONS_WITH_TENSOR_MEMORY = {"num_warps": 4, "maxnreg": 144}


class Ring(NamedTuple):
    """Shared memory of STAGES stages: blocks of hidden and of weight, and barriers."""

    x: Any
    w: Any
    full: Any
    empty: Any
    start: Any


class Work(NamedTuple):
    """What there is to multiply: items of TILES blocks of columns, of `columns` in all.

    Programs take items in turns, in the order of `place`.
    """

    row_blocks: Any
    splits: Any
    columns: Any
    H: Any
    TILES: Any
    GROUP: Any


@gluon.jit
def span(work, item, BLOCK_V: gl.constexpr):
    """Return an item's block of rows, its first column, and where its columns end."""
    row_block, split = place(item, work.row_blocks, work.splits, work.GROUP)
    first = split * work.TILES * BLOCK_V
    return row_block, first, min(first + work.TILES * BLOCK_V, work.columns)


@gluon.jit
def make_ring(hidden, weight, STAGES: gl.constexpr, READERS: gl.constexpr):
    """Return an empty ring for blocks of the descriptors' shapes."""
    gl.static_assert(LEAD <= STAGES, "the producer cannot fill more than the ring")
    BLOCK_N: gl.constexpr = hidden.block_shape[0]
    BLOCK_V: gl.constexpr = weight.block_shape[0]
    BLOCK_H: gl.constexpr = weight.block_shape[1]
    x = gl.allocate_shared_memory(hidden.dtype, [STAGES, BLOCK_N, BLOCK_H], hidden.layout)
    w = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_V, BLOCK_H], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    start = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)
    mbarrier.init(start, count=1)
    fence_async_shared()  # copies have to find the barriers as they are now
    return Ring(x, w, full, empty, start)


@gluon.jit
def produce(hidden, weight, ring, work):
    """Fill stage after stage, in the order in which the consumers empty them."""
    STAGES: gl.constexpr = ring.x.shape[0]
    BLOCK_N: gl.constexpr = ring.x.shape[1]
    BLOCK_V: gl.constexpr = ring.w.shape[1]
    BLOCK_H: gl.constexpr = ring.w.shape[2]
    step = 0
    for item in range(gl.program_id(0), work.row_blocks * work.splits, gl.num_programs(0)):
        row_block, first, last = span(work, item, BLOCK_V)
        for column in range(first, last, BLOCK_V):
            for h in range(0, work.H, BLOCK_H):
                stage = step % STAGES
                # In the first round the phase before counts as over, and nothing is waited for.
                mbarrier.wait(ring.empty.index(stage), (step // STAGES + 1) % 2)
                # Copies are zeros beyond a tensor's end, and count as whole blocks.
                size: gl.constexpr = hidden.block_type.nbytes + weight.block_type.nbytes
                full = ring.full.index(stage)
                mbarrier.expect(full, size)
                async_load(hidden, [row_block * BLOCK_N, h], full, ring.x.index(stage))
                async_load(weight, [column, h], full, ring.w.index(stage))
                step += 1


@gluon.jit
def multiply(ring, sums, step, steps, WHICH: gl.constexpr):
    """Return sums plus the products of the next stages, as many as `steps`.

    Of a stage's rows, they are of the upper half or, as WHICH = 1, of the lower.
    """
    STAGES: gl.constexpr = ring.x.shape[0]
    ROWS: gl.constexpr = ring.x.shape[1] // 2
    for k in range(steps):
        stage = (step + k) % STAGES
        mbarrier.wait(ring.full.index(stage), (step + k) // STAGES % 2)
        rows = ring.x.index(stage).slice(WHICH * ROWS, ROWS)
        sums = warpgroup_mma(rows, ring.w.index(stage).permute((1, 0)), sums, is_async=True)
        # One step's products may be under way, those of the step before are done: only now may its
        # stage be overwritten.
        sums = warpgroup_mma_wait(1, deps=[sums])
        mbarrier.arrive(ring.empty.index((step + k + STAGES - 1) % STAGES), pred=k > 0)
        # Few hidden dimensions leave fewer steps than the lead in a block.
        if WHICH == 0:  # noqa: SIM102 (one is known when it is compiled, the other is not)
            if step + k == min(LEAD, steps) - 1:
                mbarrier.arrive(ring.start)
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(ring.empty.index((step + steps + STAGES - 1) % STAGES))
    return sums


def options(*, tensor_memory: bool) -> dict[str, int]:
    """Return the compiler's options for a chip."""
    return _OPTIONS_WITH_TENSOR_MEMORY if tensor_memory else _OPTIONS


def launch(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    """Launch a kernel with the arguments of its usual form, whose operands have descriptors.

    programs: how many that form has; a program here does the work of several, one after the other.
    """
    operands = {
        name: TensorDescriptor.from_tensor(of.base, of.block_shape, LAYOUT)
        for name, of in arguments.items()
        if name in ("hidden", "weight")
    }
    device = torch.cuda.get_device_properties(operands["hidden"].base.device)
    tensor_memory = device.major == 10
    taken = {p.name for p in kernel.fn.params}
    kernel[(min(programs, device.multi_processor_count),)](
        **{name: value for name, value in arguments.items() if name in taken} | operands,
        STAGES=arguments["num_stages"],
        TENSOR_MEMORY=tensor_memory,
        **options(tensor_memory=tensor_memory),
    )
