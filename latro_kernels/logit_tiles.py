"""Tiles of logits by torch's products, for ops without kernels of their own, on every device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from latro_kernels.head import Head
from latro_kernels.head_gradient import (
    Tile,
    add_product,
    operand_dtype,
    row_blocks,
    slices,
    tile_shape,
)

# A tile of 1 MiB: a CPU's caches hold some of them.
CPU_ROWS, CPU_COLUMNS = 512, 512


def shape(head: Head) -> tuple[int, int]:
    """Return rows and columns of a tile."""
    if head.hidden.device.type == "cuda":
        return tile_shape(head, tiles=2)
    return max(1, min(CPU_ROWS, head.hidden.shape[0])), min(CPU_COLUMNS, head.weight.shape[0])


def tiles(head: Head) -> Iterator[Tile]:
    """Yield all tiles of a head: of every slice of the vocabulary its blocks of rows."""
    height, width = shape(head)
    for columns, weight, bias in slices(head, width):
        for rows in row_blocks(len(head.hidden), height):
            x = head.hidden[rows].to(operand_dtype(head))
            yield Tile(rows=rows, columns=columns, hidden=x, weight=weight, bias=bias)


def logits(head: Head, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """Return the logits of a tile, in fp32, and the tanh that a softcap makes of them, or None."""
    z = tile.hidden.new_empty(len(tile.hidden), len(tile.weight), dtype=torch.float32)
    add_product(z, tile.hidden, tile.weight.t(), first=True)
    if tile.bias is not None:
        z += tile.bias
    tanh = None
    if head.softcap:
        tanh = z.div_(head.softcap).tanh_()
        z = tanh * head.softcap
    return z.div_(head.temperature), tanh


def fold(z: Tensor, row_max: Tensor, sum_exp: Tensor) -> None:
    """Add logits to the state of their rows, in place; the tile is used up."""
    new_max = torch.maximum(row_max, z.amax(1))
    # A row that is -inf so far has no maximum to subtract.
    shift = new_max.masked_fill(new_max == -torch.inf, 0)
    sum_exp *= torch.exp(row_max - shift)
    sum_exp += z.sub_(shift[:, None]).exp_().sum(1)
    row_max.copy_(new_max)
