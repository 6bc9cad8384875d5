"""From dz, the gradient with respect to a head's products, to the gradients of its inputs.

For each block of rows and slice of the vocabulary a driver makes dz, and

    dx[rows]    += dz · weight[columns]
    dw[columns] += dzᵀ · hidden[rows]
    db[columns] += Σ_rows dz

The vocabulary is the outer loop, so that each slice of dw is finished, and rounded, once; dx is
carried in fp32 from slice to slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latro_kernels.head import Head, absent
from latro_kernels.logit_tiles import Tile, add_product, blocks_of_rows, slices


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


def empty_gradients(
    hidden: Tensor, weight: Tensor, needs: Sequence[bool], dx_dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Return room for the gradients of hidden, weight and bias, as a raw op returns them.

    Each is of its tensor's dtype, dx of `dx_dtype` if there is one.
    """
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dx_dtype = hidden.dtype if dx_dtype is None else dx_dtype
    dtypes = (dx_dtype, weight.dtype, weight.dtype)
    return tuple(
        hidden.new_empty(shape, dtype=dtype) if needed else absent(hidden)
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
    )


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
        rows: int64, the indices of those that have a gradient, in any order; None: all.
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
        for block in blocks_of_rows(M, shape[0]):
            index: slice | Tensor = block if rows is None else rows[block]
            x = head.hidden[index].to(weight.dtype)
            gradient = make(Tile(rows=index, columns=columns, hidden=x, weight=weight, bias=bias))
            if dx is not None:
                part = dx[index]
                gradient.add_product(part, weight, first=columns.start == 0)
                # Rows by index are a copy, a slice of rows is dx itself.
                if rows is not None:
                    dx[index] = part
            if slice_dw is not None:
                gradient.t().add_product(slice_dw, x, first=block.start == 0)
            if db is not None:
                slice_db += gradient.dz.sum(0, dtype=torch.float32)
        if M and dw is not None and slice_dw is not None and not in_place:
            dw[columns] = slice_dw
        if db is not None:
            db[columns] = slice_db
    return dx, dw, db
