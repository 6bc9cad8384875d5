"""`linear_logprob` in tiles, for GPUs: torch makes the products, a kernel what becomes of them.

A tile is the products hidden[rows] · weight[columns]ᵀ of a block of rows and a slice of the
vocabulary. The forward folds each tile into a few numbers per row and drops it, or caches it where
the memory budget has room. The backward takes the cached tile, or makes it again, turns it into the
gradient dz with respect to the products, and `head_gradient` makes gradients of that. But for what
is cached no tensor of N × V exists, and none of V × H in another dtype than the weight's.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from latro_kernels.head import Head
from latro_kernels.head_gradient import Gradient, sweep
from latro_kernels.linear_logprob import cuda
from latro_kernels.linear_logprob.state import RowGrad, State, Wanted
from latro_kernels.logit_tiles import Tile, add_product, operand_dtype, tile_shape, tiles


def forward(head: Head, state: State) -> None:
    """Fold every tile into `state`."""
    state.clear()
    kernels = fold_kernels(head.backend)
    for block, tile, products in product_tiles(head, state.cached):
        rows = state.rows(block)
        old_max = rows.row_max.clone()
        kernels.fold(head, tile, products, rows)
        if rows.dx_sum is None:
            continue
        # Bring the sum of dx to the new maximum, and add this tile's part of it.
        e = _dz(head, tile, products, RowGrad.of_exponentials(rows))
        if tile.columns.start > 0:
            rows.dx_sum.mul_(rows.rescaling(old_max)[:, None])
        add_product(rows.dx_sum, e, tile.weight, first=tile.columns.start == 0)


def product_tiles(head: Head, cached: Tensor) -> Iterator[tuple[slice, Tile, Tensor]]:
    """Yield of each tile its rows, itself and its products, which the next may overwrite."""
    buffer = _buffer(head)
    for rows, tile in tiles(head, tile_shape(head)):
        products = _room(head, tile, cached, buffer)
        add_product(products, tile.hidden, tile.weight.t(), first=True)
        yield rows, tile, products


def empty_state(head: Head, target: Tensor, wanted: Wanted) -> State:
    """Return room for what `forward` makes."""
    return State.empty(head, target, wanted, cached_step=tile_shape(head)[1])


def backward(
    head: Head,
    grad: RowGrad,
    cached: Tensor,
    block_max: Tensor | None,
    grad_filter: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden, in fp32, weight and bias; None where none is needed."""
    buffer = _buffer(head)

    def make(tile: Tile) -> Gradient:
        products = _room(head, tile, cached, buffer)
        if _is_cached(head, tile, cached):
            # The gradient may take the tile's place, and a second backward wants it again.
            products = products.clone()
        else:
            add_product(products, tile.hidden, tile.weight.t(), first=True)
        return Gradient(_dz(head, tile, products, grad.rows(tile.rows)))

    return sweep(head, needs, tile_shape(head), make)


def _buffer(head: Head) -> Tensor:
    """Return room for a tile that is not cached."""
    rows, columns = tile_shape(head)
    return torch.empty(rows * columns, dtype=torch.float32, device=head.hidden.device)


def _room(head: Head, tile: Tile, cached: Tensor, buffer: Tensor) -> Tensor:
    """Return the place of a tile's products, in `cached` or in `buffer`."""
    assert isinstance(tile.rows, slice)  # all rows are swept, in their order
    shape = len(tile.hidden), len(tile.weight)
    offset = 0
    if _is_cached(head, tile, cached):
        buffer, offset = cached, len(head.hidden) * tile.columns.start + tile.rows.start * shape[1]
    return buffer[offset : offset + shape[0] * shape[1]].view(shape)


def _dz(head: Head, tile: Tile, products: Tensor, grad: RowGrad) -> Tensor:
    """Return dz in the dtype of the next product, in the place of this one if that is fp32."""
    dtype = operand_dtype(head)
    dz = products if dtype == torch.float32 else torch.empty_like(products, dtype=dtype)
    fold_kernels(head.backend).grad(head, tile, products, grad, dz)
    return dz


def _is_cached(head: Head, tile: Tile, cached: Tensor) -> bool:
    return tile.columns.stop * len(head.hidden) <= cached.numel()


def fold_kernels(backend: str) -> ModuleType:
    """Return the module whose `fold` and `grad` work on a tile."""
    if backend == "cuda":
        return cuda
    from latro_kernels.linear_logprob.triton import tiles as triton_tiles

    return triton_tiles
