"""The raw ops of `linear_topk`: tiles of logits by torch's products, on every device.

A tile holds the logits of a block of rows over a slice of the vocabulary. The forward takes the
tokens' logits out of it, puts −inf in their place, and adds the rest to each row's running maximum
and sum of exponentials. The backward makes the tile again and turns it into the gradient with
respect to its products, of which `head_gradient` makes gradients. The search for the k likeliest
tokens keeps the best of each row from tile to tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latro_kernels.checks import check_target_values
from latro_kernels.head import Head, absent
from latro_kernels.head_gradient import Gradient, empty_gradients, sweep
from latro_kernels.logit_tiles import (
    Tile,
    fold,
    logits,
    operand_dtype,
    shape_without_kernels,
    tiles,
)

NO_TOKEN = -1

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor token, float temperature, float softcap"
torch.library.define(
    "latro_kernels::linear_topk_search",
    "(Tensor hidden, Tensor weight, Tensor? bias, int k, float temperature, float softcap) "
    "-> (Tensor token, Tensor log_prob)",
)
_RESULTS = "(Tensor of_tokens, Tensor row_max, Tensor sum_exp)"
torch.library.define("latro_kernels::linear_topk", f"({_HEAD}) -> {_RESULTS}")
torch.library.define(
    "latro_kernels::linear_topk_backward",
    f"({_HEAD}, Tensor row_max, Tensor sum_exp, Tensor grad_of_tokens, Tensor grad_rest, "
    "bool[3] needs) -> (Tensor dx, Tensor dw, Tensor db)",
)


@torch.library.impl("latro_kernels::linear_topk_search", ("cpu", "cuda"))
def _search(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    head = Head(hidden, weight, bias, temperature, softcap, backend="torch")
    token, best = _found(hidden, k)
    token.fill_(NO_TOKEN)
    best.fill_(-torch.inf)
    row_max, sum_exp = best.new_full((len(hidden),), -torch.inf), best.new_zeros(len(hidden))
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, tile in tiles(head, shape_without_kernels(head)):
            z, _ = logits(head, tile)
            of_tile, column = z.topk(min(k, z.shape[1]), dim=1)
            # The best so far, and the tile's: the best of both are the best up to here.
            value = torch.cat([best[rows], of_tile], 1)
            candidate = torch.cat([token[rows], column + tile.columns.start], 1)
            best[rows], place = value.topk(k, dim=1)
            token[rows] = candidate.gather(1, place)
            fold(z, row_max[rows], sum_exp[rows])
    missing = best == -torch.inf
    # In a row without any logit above -inf the difference would be NaN.
    log_prob = (best - row_max[:, None]) - sum_exp.log()[:, None]
    return token.masked_fill_(missing, NO_TOKEN), log_prob.masked_fill_(missing, -torch.inf)


@torch.library.register_fake("latro_kernels::linear_topk_search")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, *_: float
) -> tuple[Tensor, Tensor]:
    return _found(hidden, k)


def check_token_values(token: Tensor, V: int) -> None:
    """Raise unless all tokens are in 0..V − 1 or −1."""
    check_target_values(token, V, NO_TOKEN, name="token", per_row=max(1, token.shape[-1]))


@torch.library.impl("latro_kernels::linear_topk", ("cpu", "cuda"))
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token: Tensor,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    check_token_values(token, len(weight))
    head = Head(hidden, weight, bias, temperature, softcap, backend="torch")
    of_tokens, row_max, sum_exp = _empty(hidden, token)
    of_tokens.fill_(-torch.inf)
    row_max.fill_(-torch.inf)
    sum_exp.zero_()
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, tile in tiles(head, shape_without_kernels(head)):
            z, _ = logits(head, tile)
            place, is_here = _places(token[rows], tile.columns)
            of_tokens[rows] = torch.where(is_here, z.gather(1, place), of_tokens[rows])
            _mask(z, place, is_here)
            fold(z, row_max[rows], sum_exp[rows])
    return of_tokens, row_max, sum_exp


@torch.library.register_fake("latro_kernels::linear_topk")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, *_: float
) -> tuple[Tensor, ...]:
    return _empty(hidden, token)


@torch.library.impl("latro_kernels::linear_topk_backward", ("cpu", "cuda"))
def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token: Tensor,
    temperature: float,
    softcap: float,
    row_max: Tensor,
    sum_exp: Tensor,
    grad_of_tokens: Tensor,
    grad_rest: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    head = Head(hidden, weight, bias, temperature, softcap, backend="torch")
    # Where all logits are -inf, each of their exponentials is 0.
    shift = row_max.masked_fill(row_max == -torch.inf, 0)
    scale = torch.where(sum_exp == 0, 0, grad_rest / sum_exp)
    rows = None
    if hidden.device.type == "cpu":
        # Rows without an upstream gradient are left out; a GPU would have to be waited for.
        has_gradient = (grad_rest != 0) | (grad_of_tokens != 0).any(1)
        rows = has_gradient.nonzero().flatten()

    def make(tile: Tile) -> Gradient:
        z, tanh = logits(head, tile)
        place, is_here = _places(token[tile.rows], tile.columns)
        dz = _mask(z, place, is_here).sub_(shift[tile.rows, None]).exp_()
        dz *= scale[tile.rows, None]
        # Tokens of other slices have a place, too, and add nothing there.
        dz.scatter_add_(1, place, torch.where(is_here, grad_of_tokens[tile.rows], 0))
        if tanh is not None:
            dz *= 1 - tanh.square_()
        dz /= temperature
        return Gradient(dz.to(operand_dtype(head)))

    with torch.autocast(hidden.device.type, enabled=False):
        dx, dw, db = sweep(head, tuple(needs), shape_without_kernels(head), make, rows)
    gradients = (None if dx is None else dx.to(hidden.dtype), dw, db)
    return tuple(absent(hidden) if g is None else g for g in gradients)


@torch.library.register_fake("latro_kernels::linear_topk_backward")
def _(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return empty_gradients(hidden, weight, others[-1])


def _found(hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return room for k tokens a row and their logits."""
    shape = (hidden.shape[0], k)
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=torch.float32)


def _empty(hidden: Tensor, token: Tensor) -> tuple[Tensor, ...]:
    """Return room for the logits of tokens, and the rest's maximum and sum of exponentials."""
    shapes = (token.shape, token.shape[:1], token.shape[:1])
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _places(token: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return columns of a tile, int64 [M, k], and whether the tokens are there; any if not."""
    is_here = (token >= columns.start) & (token < columns.stop)
    return torch.where(is_here, token - columns.start, 0), is_here


def _mask(z: Tensor, place: Tensor, is_here: Tensor) -> Tensor:
    """Put -inf where tokens are, and return the tile."""
    # By a minimum, since tokens that are not here have places, too, maybe of one that is.
    value = torch.where(is_here, -torch.inf, torch.inf).to(z.dtype)
    return z.scatter_reduce_(1, place, value, reduce="amin")


search = torch.ops.latro_kernels.linear_topk_search
forward = torch.ops.latro_kernels.linear_topk
backward = torch.ops.latro_kernels.linear_topk_backward
