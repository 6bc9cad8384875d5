"""Two LM heads in tiles, for `linear_kl`: products by torch, all between them by a fold kernel.

Over a slice of the vocabulary and a block of rows, the products of head p and those of head q stand
side by side in two tiles. The forward folds both into seven numbers per row and drops them. The
backward makes them again and turns p's into the gradient dz with respect to it, of which
`head_gradient` makes gradients. The vocabulary is the outer loop: where both heads have the same
weight, a slice of it is read for both.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from latro_kernels.head import Head
from latro_kernels.head_gradient import (
    Gradient,
    Tile,
    add_product,
    operand_dtype,
    row_blocks,
    slices,
    sweep,
    tile_shape,
)
from latro_kernels.linear_kl import cuda
from latro_kernels.linear_kl.state import KlGrad, KlState, share_weight


def forward(p: Head, q: Head) -> tuple[Tensor, ...]:
    """Return kl, and anchor, mean, max_p and sum_exp_p as `KlGrad` describes them."""
    N, state, kernels = len(p.hidden), KlState.start(p.hidden), _kernels(p.backend)
    height, width = tile_shape(p, tiles=2)
    for columns, weight, bias in slices(p, width):
        weight_q, bias_q = _slice_of_q(p, q, columns, weight)
        for rows in row_blocks(N, height):
            tiles = _products(p, rows, weight), _products(q, rows, weight_q)
            kernels.fold(p, tiles, (bias, bias_q), state=state.rows(rows))
    return state.finish()


def backward(p: Head, q: Head, grad: KlGrad, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients of p's hidden, weight and bias; None where none is needed."""
    kernels = _kernels(p.backend)
    # GPUs compute in fp32, as in the forward.
    grad = KlGrad(*(numbers.float() for numbers in vars(grad).values()))

    def make(tile: Tile) -> Gradient:
        weight_q, bias_q = _slice_of_q(p, q, tile.columns, tile.weight)
        tiles = _products(p, tile.rows, tile.weight), _products(q, tile.rows, weight_q)
        # dz has the dtype of the next product's factors, and p's tile as its place if that is fp32.
        dtype = operand_dtype(p)
        dz = tiles[0] if dtype == torch.float32 else torch.empty_like(tiles[0], dtype=dtype)
        kernels.grad(p, tiles, (tile.bias, bias_q), rows=grad.rows(tile.rows), dz=dz)
        return Gradient(dz)

    dx, dw, db = sweep(p, needs, tile_shape(p, tiles=2), make)
    return None if dx is None else dx.to(p.hidden.dtype), dw, db


def _slice_of_q(p: Head, q: Head, columns: slice, weight_p: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return q's weight, in the dtype of products, and its bias in fp32."""
    weight = weight_p if share_weight(p, q) else q.weight[columns].to(weight_p.dtype)
    return weight, None if q.bias is None else q.bias[columns].float().contiguous()


def _products(head: Head, rows: slice | Tensor, weight: Tensor) -> Tensor:
    """Return the products of a block of rows and a slice of the weight, in fp32.

    p's and q's are separate products even if their weight is one: equal rows of p and q then have
    equal places in equal products, and their logits equal bits.
    """
    hidden = head.hidden[rows].to(weight.dtype)
    products = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
    add_product(products, hidden, weight.t(), first=True)
    return products


def _kernels(backend: str) -> ModuleType:
    """Return the module whose `fold` and `grad` work on tiles."""
    if backend == "cuda":
        return cuda
    from latro_kernels.linear_kl import triton

    return triton
