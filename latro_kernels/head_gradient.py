"""From dz, the gradient with respect to a head's products, to the gradients of its inputs.

For each block of rows and slice of the vocabulary a driver makes dz, and

    dx[rows]    += dz · weight[columns]
    dw[columns] += dzᵀ · hidden[rows]
    db[columns] += Σ_rows dz

The vocabulary is the outer loop, so that each slice of dw is finished, and rounded, once; dx is
carried in fp32 from slice to slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import RLock

import torch
from torch import Tensor

from latro_kernels.head import Head

# More rows make fewer sums of dw, and narrower slices of the vocabulary, which make more of dx.
MAX_TILE_ROWS = 4096
# Blocks of rows begin at multiples of it: a program's rows, at most, and all addresses are aligned.
_ROW_GROUP = 128
# Where there is no GPU to ask: Triton's interpreter, whose kernels meet CPU tensors.
_INTERPRETED_TILE_BYTES = 2**20
# Whether cuBLAS may round what it adds up, by the dtype of the sum: attributes of
# `torch.backends.cuda.matmul`.
_MAY_ROUND = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}
# Autograd has a thread for each GPU, and the setting is one for all of them.
_SETTING_LOCK = RLock()


@dataclass(frozen=True, eq=False)
class Tile:
    """A block of M rows and a slice of C columns, in the dtype in which products are made.

    Args:
        rows: numbers of the rows, a slice or int64 [M].
        columns: of the vocabulary.
        hidden: [M, H].
        weight: [C, H].
        bias: fp32 [C], or None.
    """

    rows: slice | Tensor
    columns: slice
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Gradient:
    """The gradient dz of a tile, [M, C], in the dtype of its hidden states."""

    dz: Tensor

    def t(self) -> Gradient:
        """Return the transposed gradient."""
        return Gradient(self.dz.t())

    def add_product(self, out: Tensor, other: Tensor, *, first: bool) -> None:
        """Add dz · other to `out`, or write it there for the first product of a sum."""
        add_product(out, self.dz, other, first=first)


def sweep(
    head: Head,
    needs: tuple[bool, ...],
    shape: tuple[int, int],
    make: Callable[[Tile], Gradient],
    rows: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden, in fp32, weight and bias; None where none is needed.

    Args:
        head: the problem.
        needs: whether hidden, weight and bias need a gradient.
        shape: the most rows and columns of a tile.
        make: returns a tile's gradient.
        rows: int64, the numbers of those that have a gradient, in any order; None: all.
    """
    device, dtype = head.hidden.device, head.hidden.dtype
    M = len(head.hidden) if rows is None else len(rows)
    # What no row contributes to is 0; the rest is written whole.
    make_dx = torch.empty if rows is None else torch.zeros
    make_rest = torch.empty if M else torch.zeros
    dx = make_dx(head.hidden.shape, dtype=torch.float32, device=device) if needs[0] else None
    dw = make_rest(head.weight.shape, dtype=dtype, device=device) if needs[1] else None
    db = make_rest(len(head.weight), dtype=dtype, device=device) if needs[2] else None
    # A slice of dw is summed over the blocks of rows in fp32; one block has nothing to sum.
    in_place = dtype == torch.float32 or shape[0] >= M
    for columns, weight, bias in slices(head, shape[1] if M else len(head.weight)):
        slice_dw = None
        if dw is not None:
            slice_dw = dw[columns]
            if not in_place:
                slice_dw = torch.empty(weight.shape, dtype=torch.float32, device=device)
        slice_db = torch.zeros(len(weight), dtype=torch.float32, device=device)
        for number in row_blocks(M, shape[0]):
            block: slice | Tensor = number if rows is None else rows[number]
            x = head.hidden[block].to(operand_dtype(head))
            gradient = make(Tile(rows=block, columns=columns, hidden=x, weight=weight, bias=bias))
            if dx is not None:
                part = dx[block]
                gradient.add_product(part, weight, first=columns.start == 0)
                # Rows by number are a copy, a slice of rows is dx itself.
                if rows is not None:
                    dx[block] = part
            if slice_dw is not None:
                gradient.t().add_product(slice_dw, x, first=number.start == 0)
            if db is not None:
                slice_db += gradient.dz.sum(0, dtype=torch.float32)
        if M and dw is not None and slice_dw is not None and not in_place:
            dw[columns] = slice_dw
        if db is not None:
            db[columns] = slice_db
    return dx, dw, db


def tile_shape(head: Head, *, tiles: int = 1) -> tuple[int, int]:
    """Return rows and columns of an fp32 tile of products, of which `tiles` stand side by side.

    Together they fill a GPU's second-level cache: the bound depends on neither N nor V.
    """
    device = head.hidden.device
    tile_bytes = _INTERPRETED_TILE_BYTES
    if device.type == "cuda":
        tile_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    # A `len` would fix the number of rows in torch.compile.
    rows = max(1, min(head.hidden.shape[0], MAX_TILE_ROWS))
    columns = tile_bytes // (tiles * rows * torch.float32.itemsize)
    # Whole groups of 64 columns keep a tile's rows, and the kernels' loads, aligned.
    return rows, min(head.weight.shape[0], max(64, columns // 64 * 64))


def row_blocks(N: int, most: int) -> Iterator[slice]:
    """Yield as few blocks of rows as there can be of at most `most`, of even sizes.

    Sizes differ by a group of rows at most: a block of a few rows would leave most of a GPU idle.
    """
    group = math.gcd(most, _ROW_GROUP)
    groups, blocks = -(-N // group), -(-N // most)
    for block in range(blocks):
        begin, end = (group * (groups * of // blocks) for of in (block, block + 1))
        yield slice(begin, min(end, N))


def slices(head: Head, width: int) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield slices of the vocabulary, with their weight as operand and their bias in fp32."""
    V = len(head.weight)
    for begin in range(0, V, width):
        columns = slice(begin, min(begin + width, V))
        bias = None if head.bias is None else head.bias[columns].float().contiguous()
        yield columns, head.weight[columns].to(operand_dtype(head)), bias


def operand_dtype(head: Head) -> torch.dtype:
    """Return the dtype of the factors of products."""
    # On the CPU, for the interpreter, torch would round a product of bf16.
    return head.hidden.dtype if head.hidden.device.type == "cuda" else torch.float32


def add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add a · b to `out`, or write it there for the first product of a sum.

    A product that is added to an fp32 sum is not rounded before; one that is written in bf16 or
    fp16 is summed in fp32, and rounded once.
    """
    if a.dtype == out.dtype:
        with _summed_in_fp32(out.dtype):
            if first:
                torch.mm(a, b, out=out)
            else:
                out.addmm_(a, b)
    elif first and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif first:
        out.copy_(torch.mm(a, b))
    elif _adds_to_fp32(out.device):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


@contextmanager
def _summed_in_fp32(dtype: torch.dtype) -> Iterator[None]:
    """Have cuBLAS sum products of `dtype` in fp32 where it cuts their rows and columns into parts.

    torch lets it round the parts to `dtype` before it adds them (split-K), unless told otherwise;
    what the caller has told it is restored.
    """
    settings, name = torch.backends.cuda.matmul, _MAY_ROUND.get(dtype)
    if name is None:
        yield
        return
    with _SETTING_LOCK:
        before = getattr(settings, name)
        # Where it is off, more may be: setting it again would allow splits that the caller forbade.
        if before:
            setattr(settings, name, False)
        try:
            yield
        finally:
            if before:
                setattr(settings, name, True)


@cache
def _adds_to_fp32(device: torch.device) -> bool:
    """Return whether this torch adds products of bf16 to an fp32 sum; older ones refuse."""
    # Of empty matrices: torch looks at their dtypes and launches nothing, which is no wait for the
    # device, and nothing that a CUDA graph that is being captured would take up.
    out = torch.empty(0, 0, dtype=torch.float32, device=device)
    factor = torch.empty(0, 0, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(out, factor, factor, out_dtype=out.dtype, out=out)
    except RuntimeError:
        return False
    return True
