"""Predict how long `linear_logprob`'s forms take on a GPU, from sizes and compiled instructions.

    python benchmarks/gpu/model.py --chip h100    # a table of every shape and form
    python benchmarks/gpu/model.py --compile      # first compile the kernels anew and count

A kernel that multiplies takes the longer of its products, at a share of the chip's peak, and its
bytes, at a share of the bandwidth. What is made of a block's sums, the epilogue, comes on top where
a multiprocessor holds one block of threads: warps have to be issued the instructions that the
compiler has made, and each logit takes an exponential. In the warp-specialised form one half of the
block multiplies while the other is in its epilogue. Its instructions are counted in the compiled
kernels, as `compiled.Resources` says, and stand in `results/gpu/compiled.json`. Launches and waits
are left out, as are what little the kernels do per row.

Nothing here is measured. `suite.py` prints what it has measured beside these predictions, and
beside those that follow from the GEMM rate and the bandwidth of the GPU that it finds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

from benchmarks.common import report
from benchmarks.common.ops import SIZES
from benchmarks.common.problem import GPU_SHAPES, Shape
from benchmarks.common.providers import BUDGETS
from benchmarks.gpu.compiled import compile_kernel, resident_threads
from benchmarks.gpu.launches import EXPONENTIALS, FEATURES, launch
from latro_kernels.linear_logprob.state import DEFAULT_MEMORY_BUDGET, cached_columns
from latro_kernels.linear_logprob.triton import blocks, fused
from latro_kernels.linear_logprob.triton.fused_forward import forward_kernel
from latro_kernels.linear_logprob.triton.fused_gradient import grad_kernel
from latro_kernels.linear_logprob.triton.warp_specialized_forward import warp_specialized_kernel
from latro_kernels.linear_logprob.triton.warp_specialized_gradient import (
    warp_specialized_grad_kernel,
)
from latro_kernels.logit_tiles import blocks_of_rows

COUNTS = Path(__file__).resolve().parents[1] / "results" / "gpu" / "compiled.json"
BF16, FP32 = 2, 4
_SCHEDULERS = 4
_EXPONENTIALS = 16
"""Exponentials a clock of a multiprocessor, as of "Arithmetic Instructions" in NVIDIA's CUDA C++
Programming Guide, for compute capabilities 8.0 and 9.0; a scheduler issues one warp's instruction a
clock."""
DEFAULT, FROZEN = "full, 512 MiB", "full, frozen head"
FULL = {
    DEFAULT: DEFAULT_MEMORY_BUDGET["cuda"],
    "full, 3 GiB": BUDGETS["3gib"],
    "full, all products kept": BUDGETS["keep"],
    "full, none kept": BUDGETS["recompute"],
}
"""Bytes of products that the forward may keep for the backward."""
SPECIALIZED = ", warp-specialised"
"""Ends the name of a kernel or a form that is warp-specialised."""


@dataclass(frozen=True)
class Chip:
    """A GPU by its data sheet, and what share of that is reached.

    Args:
        name: for people.
        device: as its driver names it.
        capability: compute capability, ten times.
        flops: dense bf16 operations a second.
        bandwidth: bytes a second of its memory.
        multiprocessors: their number.
        clock: hertz, at which `flops` are counted.
        gemm: share of `flops` that the library's GEMM reaches.
        loop: what our loops of products reach, as a share of the library's.
        copy: share of `bandwidth` that is reached.
    """

    name: str
    device: str
    capability: int
    flops: float
    bandwidth: float
    multiprocessors: int
    clock: float
    gemm: float
    loop: float
    copy: float = 0.92


# `gemm`: "Maximum Achievable Matmul FLOPS" of stas00/ml-engineering, compute/accelerator, which has
# the H200 as the H100. `loop`: Triton multiplies without clusters of blocks, with which a block of
# the weight would be read once for two multiprocessors: an estimate, as is `copy`.
_H100 = Chip(
    name="H100 SXM",
    device="NVIDIA H100 80GB HBM3",
    capability=90,
    flops=989.4e12,
    bandwidth=3.35e12,
    multiprocessors=132,
    clock=1.83e9,
    gemm=794.5 / 989,
    loop=0.85,
)
CHIPS = {
    "h100": _H100,
    "h200": replace(_H100, name="H200 SXM", device="NVIDIA H200", bandwidth=4.8e12),
    "a100": Chip(
        name="A100 SXM, 80 GB",
        device="NVIDIA A100-SXM4-80GB",
        capability=80,
        flops=312e12,
        bandwidth=2.039e12,
        multiprocessors=108,
        clock=1.41e9,
        gemm=271.2 / 312,
        loop=0.95,
    ),
}


@dataclass(frozen=True)
class Count:
    """What is known of a compiled kernel.

    Attributes:
        epilogue: instructions of a warp for the sums of a block, see `compiled.Resources`.
        resident: how many blocks of threads a multiprocessor holds at a time.
        parts: of a block, each of which is in its epilogue while others multiply.
    """

    epilogue: int
    resident: int
    parts: int = 1


@dataclass(frozen=True)
class Time:
    """Seconds of one or more kernels; the last two are what products do not hide."""

    products: float = 0.0
    memory: float = 0.0
    epilogue: float = 0.0

    @property
    def whole(self) -> float:
        return self.products + self.memory + self.epilogue

    def __add__(self, other: Time) -> Time:
        return Time(
            self.products + other.products,
            self.memory + other.memory,
            self.epilogue + other.epilogue,
        )


Counts = Mapping[str, Count]
"""By kernel: "forward", "forward, kept" where products are kept, "forward, exponentials" where the
head is frozen, and "grad"; the first two and the last also as `SPECIALIZED`."""


def count(capability: int) -> dict[str, Count]:
    """Compile the kernels for a GPU that need not be there, and count."""
    kernels = [
        ("forward", forward_kernel, FEATURES["plain"]),
        ("forward, kept", forward_kernel, FEATURES["kept"]),
        ("forward, exponentials", forward_kernel, EXPONENTIALS),
        ("grad", grad_kernel, FEATURES["plain"]),
    ]
    if capability == 90:
        kernels += [
            (f"forward{SPECIALIZED}", warp_specialized_kernel, FEATURES["plain"]),
            (f"forward, kept{SPECIALIZED}", warp_specialized_kernel, FEATURES["kept"]),
            (f"grad{SPECIALIZED}", warp_specialized_grad_kernel, FEATURES["plain"]),
        ]
    found = {}
    for name, kernel, flags in kernels:
        types, constants, options = launch(
            kernel, flags, capability, by_descriptor=capability >= 90
        )
        resources = compile_kernel(kernel, types, constants, capability, **options)
        assert resources.threads is not None
        found[name] = Count(
            epilogue=resources.epilogue,
            resident=resident_threads(resources, capability) // resources.threads,
            parts=2 if name.endswith(SPECIALIZED) else 1,
        )
    return found


def counts(chip: Chip, result: Mapping[str, Any] | None = None) -> dict[str, Count]:
    """Return what was counted for a chip: of `result`, or else of the file."""
    found = json.loads(COUNTS.read_text(encoding="utf-8")) if result is None else result
    return {name: Count(**of) for name, of in found["kernels"][str(chip.capability)].items()}


def memory_bound(chip: Chip, moved: float) -> Time:
    """Return the time of a kernel that moves so many bytes."""
    return Time(memory=moved / (chip.bandwidth * chip.copy))


def library_gemm(chip: Chip, flop: float, moved: float) -> Time:
    """Return the time of a product that the library makes."""
    products = flop / (chip.flops * chip.gemm)
    return Time(products, max(0.0, memory_bound(chip, moved).memory - products))


def fused_kernel(
    chip: Chip, kernel: Count, shape: tuple[int, int, int], *, tiles: int, written: float
) -> Time:
    """Return the time of a kernel whose programs make `tiles` blocks of products each.

    Args:
        chip: the GPU.
        kernel: what was counted.
        shape: M rows, C columns and H.
        tiles: of a program.
        written: bytes of results; operands are added.
    """
    M, C, H = shape
    block = blocks.start(chip.capability // 10, torch.bfloat16)
    row_blocks, columns = -(-M // block.rows), -(-C // (tiles * block.columns))
    # Programs come in rounds; the last one leaves multiprocessors idle.
    rounds = -(-row_blocks * columns // (chip.multiprocessors * kernel.resident))
    made = rounds * kernel.resident * tiles

    rate = chip.flops * chip.gemm * chip.loop / chip.multiprocessors
    products = made * 2 * block.rows * block.columns * H / rate
    # A block of the weight is read by a group of row blocks together.
    groups = -(-row_blocks // fused.GROUP)
    moved = BF16 * H * (groups * C + M) + written
    busy = max(products, memory_bound(chip, moved).memory)

    issued = kernel.epilogue * block.warps / _SCHEDULERS
    exponentials = block.rows * block.columns / _EXPONENTIALS
    epilogue = made * max(issued, exponentials) / chip.clock
    # Of several blocks, or of a block's parts, one multiplies while another is in its epilogue.
    whole = max(busy, epilogue, (busy + epilogue) / (kernel.resident * kernel.parts))
    return Time(products, busy - products, whole - busy)


def predict(chip: Chip, shape: Shape, kernels: Counts) -> Iterator[tuple[str, Time]]:
    """Yield forms of `linear_logprob` in bf16 by the names that the table has, and their times."""
    specialized = {
        name.removesuffix(SPECIALIZED): count
        for name, count in kernels.items()
        if name.endswith(SPECIALIZED)
    }
    ends = {"": kernels} | ({SPECIALIZED: specialized} if specialized else {})
    for end, of in ends.items():
        yield f"forward{end}", forward(chip, shape, of, budget=0)
    for end, of in ends.items():
        yield f"dz, no products kept{end}", dz(chip, shape, of)
    for name, budget in FULL.items():
        for end, of in ends.items():
            whole = forward(chip, shape, of, budget=budget)
            yield f"{name}{end}", whole + backward(chip, shape, of, budget=budget)
    yield FROZEN, frozen(chip, shape, kernels)


def forward(chip: Chip, shape: Shape, kernels: Counts, *, budget: int) -> Time:
    """Return the time of the forward with a trained head."""
    kept = cached_columns(shape.n, shape.v, budget, fused.TILE_COLUMNS)
    return fused_kernel(
        chip,
        kernels["forward, kept" if kept else "forward"],
        (shape.n, shape.v, shape.h),
        tiles=fused.TILES,
        written=FP32 * shape.n * kept,
    )


def dz(chip: Chip, shape: Shape, kernels: Counts) -> Time:
    """Return the time of dz of products that are made again."""
    time = Time()
    for rows in blocks_of_rows(shape.n, fused.TILE_ROWS):
        for C, _ in _slices(shape.v):
            time += _dz_of_tile(chip, kernels, (rows.stop - rows.start, C, shape.h))
    return time


def _dz_of_tile(chip: Chip, kernels: Counts, shape: tuple[int, int, int]) -> Time:
    M, C, _ = shape
    return fused_kernel(chip, kernels["grad"], shape, tiles=1, written=BF16 * M * C)


def backward(chip: Chip, shape: Shape, kernels: Counts, *, budget: int) -> Time:
    """Return the time of dz, and of dx and dw, which the library makes of it."""
    H, time = shape.h, Time()
    kept = cached_columns(shape.n, shape.v, budget, fused.TILE_COLUMNS)
    parts = [rows.stop - rows.start for rows in blocks_of_rows(shape.n, fused.TILE_ROWS)]
    # Beside a single block of rows, a slice of dw is summed in fp32: read and written.
    dw_bytes = BF16 if len(parts) == 1 else 2 * FP32
    for M in parts:
        for C, end in _slices(shape.v):
            if end <= kept:
                time += memory_bound(chip, (FP32 + BF16) * M * C)
            else:
                time += _dz_of_tile(chip, kernels, (M, C, H))
            time += _dx(chip, M, C, H)
            time += library_gemm(chip, 2 * M * C * H, BF16 * M * (C + H) + dw_bytes * C * H)
    return time


def frozen(chip: Chip, shape: Shape, kernels: Counts) -> Time:
    """Return the time of forward and backward with a frozen head.

    No maximum is so far above its row's shift that exponentials are made again.
    """
    H = shape.h
    # The shift reads hidden states and the weight of their targets, the sum is brought to the
    # maximum, and the backward turns it into dx.
    time = memory_bound(chip, (2 * BF16 + 2 * FP32 + FP32 + BF16) * shape.n * H)
    for rows in blocks_of_rows(shape.n, fused.TILE_ROWS):
        M = rows.stop - rows.start
        for C, _ in _slices(shape.v):
            time += fused_kernel(
                chip,
                kernels["forward, exponentials"],
                (M, C, H),
                tiles=fused.TILES,
                written=BF16 * M * C,
            )
            time += _dx(chip, M, C, H)
    return time


def _slices(V: int) -> Iterator[tuple[int, int]]:
    """Yield the columns of each slice of the vocabulary, and where it ends."""
    for begin in range(0, V, fused.TILE_COLUMNS):
        end = min(begin + fused.TILE_COLUMNS, V)
        yield end - begin, end


def _dx(chip: Chip, M: int, C: int, H: int) -> Time:
    """Return the time of adding a slice's part to dx, in fp32."""
    return library_gemm(chip, 2 * M * C * H, BF16 * C * (M + H) + 2 * FP32 * M * H)


def predict_ops(chip: Chip) -> dict[tuple[str, str], Time]:
    """Return the times of the ops that wait for memory, by op and lap, at the sizes of `ops.py`."""
    sizes = SIZES["cuda"]
    logits = BF16 * sizes.N * sizes.V
    # Rows are read from policy and reference, and rationales, half of them, are written.
    rows = FP32 * sizes.rows * 2.5
    return {
        ("gather_logprob", "forward"): memory_bound(chip, logits),
        ("gather_logprob", "backward"): memory_bound(chip, 2 * logits),
        ("group_advantage", "forward"): memory_bound(chip, rows),
    }


def chip_of(device: str) -> Chip | None:
    """Return the chip that a driver names so, or None."""
    return next((chip for chip in CHIPS.values() if chip.device == device), None)


def at_rates(chip: Chip, gemm: float, copy: float) -> Chip:
    """Return the chip with what was measured of it: operations and bytes a second."""
    return replace(chip, gemm=gemm / chip.flops, copy=copy / chip.bandwidth)


def table(chip: Chip) -> Table:
    """Tabulate all that is predicted of a chip, and of what it is made up."""
    kernels, rows = counts(chip), []
    for shape in GPU_SHAPES:
        rows += [_row(shape.name, name, time) for name, time in predict(chip, shape, kernels)]
    rows += [_row(op, lap, time) for (op, lap), time in predict_ops(chip).items()]
    title = (
        f"Predicted, {chip.name}: bf16 GEMM {chip.flops * chip.gemm / 1e12:.0f} TFLOP/s, "
        f"copy {chip.bandwidth * chip.copy / 1e12:.2f} TB/s"
    )
    headings = ("where", "what", "ms", "products", "memory beyond", "epilogue beyond")
    return report.table(title, headings, rows, names=2)


def _row(where: str, what: str, time: Time) -> tuple[str, ...]:
    parts = (time.whole, time.products, time.memory, time.epilogue)
    return (where, what, *(f"{1e3 * part:.3g}" for part in parts))


def write_counts() -> None:
    """Compile for every chip, and write what was counted."""
    capabilities = sorted({chip.capability for chip in CHIPS.values()})
    kernels = {
        str(capability): {name: vars(of) for name, of in count(capability).items()}
        for capability in capabilities
    }
    report.write_json(COUNTS, {"triton": triton.__version__, "kernels": kernels})


def main(argv: Sequence[str] | None = None) -> None:
    """Print the predictions for a chip."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", choices=list(CHIPS), default="h100")
    parser.add_argument("--compile", action="store_true", help="count anew; takes a minute")
    args = parser.parse_args(argv)
    if args.compile:
        write_counts()
    report.console().print(table(CHIPS[args.chip]))


if __name__ == "__main__":
    main()
