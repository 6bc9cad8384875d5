"""From dz, the gradient with respect to a head's products, to the gradients of its inputs.

For each block of rows and slice of the vocabulary a driver makes dz, and

    dx[rows]    += dz · weight[columns]
    dw[columns] += dzᵀ · hidden[rows]
    db[columns] += Σ_rows dz

The vocabulary is the outer loop, so that each slice of dw is finished, and rounded, once; dx is
carried in fp32 from slice to slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor


class Head(Protocol):
    """What is needed of a head: hidden [N, H], weight [V, H] and bias [V] or None, of one dtype."""

    @property
    def hidden(self) -> Tensor: ...

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


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
class ActiveBlocks:
    """Which blocks of a matrix, of so many rows and columns, are not 0 everywhere.

    Args:
        flags: int8, 0 for a block that is 0.
        rows: of a block.
        columns: of a block.
    """

    flags: Tensor
    rows: int
    columns: int

    def t(self) -> ActiveBlocks:
        """Those of the transposed matrix."""
        return ActiveBlocks(self.flags.t(), self.columns, self.rows)


@dataclass(frozen=True, eq=False)
class Gradient:
    """dz of a tile, [M, C], in the dtype of its hidden states; `active`: None where all may be."""

    dz: Tensor
    active: ActiveBlocks | None = None

    def t(self) -> Gradient:
        return Gradient(self.dz.t(), None if self.active is None else self.active.t())


def sweep(
    head: Head,
    needs: tuple[bool, ...],
    shape: tuple[int, int],
    make: Callable[[Tile], Gradient],
    rows: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, in fp32, weight and bias; None where `needs` says that nobody asks.

    Args:
        head: the problem.
        needs: for hidden, weight, bias.
        shape: the most rows and columns of a tile.
        make: gives a tile's dz.
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
        for begin in range(0, M, shape[0]):
            block: slice | Tensor = slice(begin, min(begin + shape[0], M))
            if rows is not None:
                block = rows[block]
            x = head.hidden[block].to(operand_dtype(head))
            gradient = make(Tile(block, columns, x, weight, bias))
            if dx is not None:
                part = dx[block]
                _add(part, gradient, weight, first=columns.start == 0)
                if rows is not None:
                    dx[block] = part
            if slice_dw is not None:
                _add(slice_dw, gradient.t(), x, first=begin == 0)
            if db is not None:
                slice_db += gradient.dz.sum(0, dtype=torch.float32)
        if M and dw is not None and slice_dw is not None and not in_place:
            dw[columns] = slice_dw
        if db is not None:
            db[columns] = slice_db
    return dx, dw, db


def slices(head: Head, width: int) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Slices of the vocabulary, with their weight and their bias in fp32."""
    V = len(head.weight)
    for begin in range(0, V, width):
        columns = slice(begin, min(begin + width, V))
        bias = None if head.bias is None else head.bias[columns].float().contiguous()
        yield columns, head.weight[columns].to(operand_dtype(head)), bias


def operand_dtype(head: Head) -> torch.dtype:
    """The dtype in which products are made."""
    # On the CPU, for the interpreter, torch would round a product of bf16.
    return head.hidden.dtype if head.hidden.device.type == "cuda" else torch.float32


def add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """out += a · b, or out = a · b for the first product of a sum; a sum in fp32 is not rounded."""
    if a.dtype == out.dtype:
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


@cache
def _adds_to_fp32(device: torch.device) -> bool:
    """Whether this torch adds a product of bf16 to a sum in fp32 as it goes; older ones refuse."""
    # Of empty matrices: torch looks at their dtypes and launches nothing, which is no wait for the
    # device, and nothing that a CUDA graph that is being captured would take up.
    out = torch.empty(0, 0, dtype=torch.float32, device=device)
    factor = torch.empty(0, 0, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(out, factor, factor, out_dtype=out.dtype, out=out)
    except RuntimeError:
        return False
    return True


def _add(out: Tensor, gradient: Gradient, other: Tensor, *, first: bool) -> None:
    """`add_product` of dz, without its blocks that are 0."""
    if gradient.active is None:
        add_product(out, gradient.dz, other, first=first)
    else:
        from latro_kernels.linear_logprob.triton.sparse_product import add_sparse_product

        add_sparse_product(out, gradient.dz, gradient.active, other, first=first)
