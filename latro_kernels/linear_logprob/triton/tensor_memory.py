"""How the warp-specialised kernels of `linear_logprob` multiply on sm_100, in Gluon.

There, one warp has the tensor cores multiply blocks of the ring, and sums stand in tensor memory,
which has room for two blocks of them: one is multiplied while four other warps read the other, a
quarter of its columns at a time. Two more kinds of barriers order that. ready[n]: the products of
block n are made. free[n]: it has been read, and may be written again. A stage of the ring is empty
when the products that read it are made; nobody reads it but the tensor cores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    tcgen05_commit,
    tcgen05_mma,
)
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from latro_kernels.linear_logprob.triton.warp_specialized import span

# Blocks of sums: as many as tensor memory holds of 128 x 256.
BLOCKS: gl.constexpr = gl.constexpr(2)
# Warps and registers of a thread, of the warp that has products made and of the producer: they
# have little to keep.
SINGLE_WARPS: gl.constexpr = gl.constexpr([1, 1])
SINGLE_REGISTERS: gl.constexpr = gl.constexpr([24, 24])


class Accumulators(NamedTuple):
    """Tensor memory of BLOCKS blocks of sums, and their barriers."""

    sums: Any
    ready: Any
    free: Any


@gluon.constexpr_function
def rows_layout(ROWS, COLUMNS):
    """Return how sums are read: a row, whose columns are as many as a thread has room for."""
    bits = [2**bit for bit in range(COLUMNS.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, bit] for bit in bits],
        lane_bases=[[2**bit, 0] for bit in range(5)],
        warp_bases=[[32, 0], [64, 0]],
        block_bases=[],
        shape=[ROWS, COLUMNS],
    )


@gluon.jit
def make_accumulators(ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Return BLOCKS blocks of sums, all free."""
    layout: gl.constexpr = TensorMemoryLayout([ROWS, COLUMNS], col_stride=1)
    sums = allocate_tensor_memory(gl.float32, [BLOCKS, ROWS, COLUMNS], layout)
    ready = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
    for block in gl.static_range(BLOCKS):
        mbarrier.init(ready.index(block), count=1)
        mbarrier.init(free.index(block), count=1)
    fence_async_shared()  # the tensor cores have to find the barriers as they are now
    return Accumulators(sums, ready, free)


@gluon.jit
def multiply_blocks(ring, accumulators, work):
    """Make block after block of sums, of the stages that the producer fills."""
    STAGES: gl.constexpr = ring.x.shape[0]
    BLOCK_V: gl.constexpr = ring.w.shape[1]
    BLOCK_H: gl.constexpr = ring.w.shape[2]
    step = 0
    block = 0
    for item in range(gl.program_id(0), work.row_blocks * work.splits, gl.num_programs(0)):
        _, first, last = span(work, item, BLOCK_V)
        for _ in range(first, last, BLOCK_V):
            sums = accumulators.sums.index(block % BLOCKS)
            # In the first round the phase before counts as over, and nothing is waited for.
            mbarrier.wait(accumulators.free.index(block % BLOCKS), (block // BLOCKS + 1) % 2)
            for h in range(0, work.H, BLOCK_H):
                stage = step % STAGES
                mbarrier.wait(ring.full.index(stage), step // STAGES % 2)
                tcgen05_mma(
                    ring.x.index(stage),
                    ring.w.index(stage).permute((1, 0)),
                    sums,
                    use_acc=h > 0,
                    mbarriers=[ring.empty.index(stage)],
                )
                step += 1
            # Products are made in their order: these were the block's last.
            tcgen05_commit(accumulators.ready.index(block % BLOCKS))
            block += 1
