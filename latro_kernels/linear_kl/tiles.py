"""Two LM heads in tiles, for `linear_kl`: products by torch, all between them by a fold kernel.

Over a slice of the vocabulary and a block of rows, the products of head p and those of head q stand
side by side in two tiles. The forward folds both into seven numbers per row and drops them. The
backward makes them again and turns those of one head into the gradient dz with respect to them, of
which `head_gradient` makes gradients. The vocabulary is the outer loop: where both heads have the
same weight, a slice of it is read for both.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from latro_kernels.head import Head
from latro_kernels.head_gradient import Gradient, sweep
from latro_kernels.linear_kl import cuda
from latro_kernels.linear_kl.state import KlGrad, KlState, share_weight
from latro_kernels.logit_tiles import (
    Tile,
    add_product,
    blocks_of_rows,
    operand_dtype,
    slices,
    tile_shape,
)


def forward(p: Head, q: Head) -> tuple[Tensor, ...]:
    """Return kl, and the numbers of each row that `KlGrad` describes."""
    N, state, kernels = len(p.hidden), KlState.start(p.hidden), _kernels(p.backend)
    height, width = tile_shape(p, count=2)
    for columns, weight, bias in slices(p, width):
        weight_q, bias_q = _slice_of_other(p, q, columns, weight)
        for rows in blocks_of_rows(N, height):
            tiles = _products(p, rows, weight), _products(q, rows, weight_q)
            kernels.fold((p, q), tiles, (bias, bias_q), state=state.rows(rows))
    return state.finish()


def backward(
    p: Head, q: Head, grad: KlGrad, *, of_q: bool, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of p's, or q's, hidden, weight and bias; None where none is needed."""
    own, other = (q, p) if of_q else (p, q)
    kernels = _kernels(own.backend)
    # GPUs compute in fp32, as in the forward.
    grad = KlGrad(*(numbers.float() for numbers in vars(grad).values()))

    def make(tile: Tile) -> Gradient:
        weight, bias = _slice_of_other(own, other, tile.columns, tile.weight)
        tiles = _products(own, tile.rows, tile.weight), _products(other, tile.rows, weight)
        # dz has the dtype of the next product's factors, and the tile as its place if that is fp32.
        dtype = operand_dtype(own)
        dz = tiles[0] if dtype == torch.float32 else torch.empty_like(tiles[0], dtype=dtype)
        biases = tile.bias, bias
        if of_q:
            tiles, biases = tiles[::-1], biases[::-1]
        kernels.grad((p, q), tiles, biases, rows=grad.rows(tile.rows), of_q=of_q, dz=dz)
        return Gradient(dz)

    dx, dw, db = sweep(own, needs, tile_shape(own, count=2), make)
    return None if dx is None else dx.to(own.hidden.dtype), dw, db


def _slice_of_other(
    head: Head, other: Head, columns: slice, weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the other head's weight, in the dtype of products, and its bias in fp32.

    `weight` is the same slice of the head's own.
    """
    if not share_weight(head, other):
        weight = other.weight[columns].to(weight.dtype)
    return weight, None if other.bias is None else other.bias[columns].float().contiguous()


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
