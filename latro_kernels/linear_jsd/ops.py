"""The raw ops of `linear_jsd`: tiles of both heads' logits by torch's products, on every device.

Over a slice of the vocabulary and a block of rows two tiles stand side by side. The forward makes
them twice: to fold each into its rows' maximum and sum of exponentials, and with those known to sum
the divergences. The backward makes them again and turns those of one head into the gradient with
respect to its products, of which `head_gradient` makes gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from latro_kernels.head import Head, absent
from latro_kernels.head_gradient import Gradient, sweep
from latro_kernels.linear_kl.two_heads import empty_backward
from latro_kernels.logit_tiles import (
    Tile,
    fold,
    logits,
    operand_dtype,
    shape_without_kernels,
    tiles,
)

_HEADS = (
    "Tensor hidden_p, Tensor weight_p, Tensor? bias_p, Tensor hidden_q, Tensor weight_q, "
    "Tensor? bias_q, float temperature_p, float softcap_p, float temperature_q, float softcap_q, "
    "float beta"
)
_ROWS = "Tensor max_p, Tensor sum_exp_p, Tensor max_q, Tensor sum_exp_q, Tensor kl_p, Tensor kl_q"
torch.library.define("latro_kernels::linear_jsd", f"({_HEADS}) -> (Tensor jsd, {_ROWS})")
torch.library.define(
    "latro_kernels::linear_jsd_backward",
    f"({_HEADS}, {_ROWS}, Tensor grad_jsd, bool of_q, bool[3] needs) -> "
    "(Tensor dx, Tensor dw, Tensor db)",
)


@torch.library.impl("latro_kernels::linear_jsd", ("cpu", "cuda"))
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    (p, q), beta = _heads(*arguments), arguments[-1]
    jsd, max_p, sum_exp_p, max_q, sum_exp_q, kl_p, kl_q = _empty(p.hidden)
    for row_max, sum_exp in ((max_p, sum_exp_p), (max_q, sum_exp_q)):
        row_max.fill_(-torch.inf)
        sum_exp.zero_()
    totals = torch.zeros(3, len(jsd), dtype=torch.float64, device=jsd.device)
    with torch.autocast(p.hidden.device.type, enabled=False):
        for rows, zp, zq in _tiles(p, q):
            fold(zp, max_p[rows], sum_exp_p[rows])
            fold(zq, max_q[rows], sum_exp_q[rows])
        shift = _shift(max_p, sum_exp_p, max_q, sum_exp_q)
        for rows, zp, zq in _tiles(p, q):
            upper, lower, is_p = _log_ratios(_difference(zp, zq, shift[rows]), beta)
            of_p = _terms(_softmax(zp, max_p[rows], sum_exp_p[rows]), upper.where(is_p, lower))
            of_q = _terms(_softmax(zq, max_q[rows], sum_exp_q[rows]), lower.where(is_p, upper))
            totals[1, rows] += of_p.sum(1)
            totals[2, rows] += of_q.sum(1)
            totals[0, rows] += of_p.mul_(beta).add_(of_q, alpha=1 - beta).sum(1)
    for result, total in zip((jsd, kl_p, kl_q), totals, strict=True):
        result.copy_(total)
    return jsd, max_p, sum_exp_p, max_q, sum_exp_q, kl_p, kl_q


@torch.library.register_fake("latro_kernels::linear_jsd")
def _(hidden_p: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _empty(hidden_p)


@torch.library.impl("latro_kernels::linear_jsd_backward", ("cpu", "cuda"))
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    heads, (max_p, sum_exp_p, max_q, sum_exp_q, kl_p, kl_q, grad_jsd, of_q, needs) = (
        arguments[:11],
        arguments[11:],
    )
    (own, other), part = _heads(*heads), arguments[10]
    row_max, sum_exp, kl = max_p, sum_exp_p, kl_p
    shift = _shift(max_p, sum_exp_p, max_q, sum_exp_q)
    if of_q:
        # The divergence is the same with p and q in each other's place, and 1 - beta for beta.
        own, other, part = other, own, 1 - part
        row_max, sum_exp, kl, shift = max_q, sum_exp_q, kl_q, -shift
    slope = grad_jsd * (part / own.temperature)
    chosen = None
    if grad_jsd.device.type == "cpu":
        # Rows without an upstream gradient are left out; a GPU would have to be waited for.
        chosen = grad_jsd.nonzero().flatten()

    def make(tile: Tile) -> Gradient:
        rows = tile.rows
        z, tanh = logits(own, tile)
        z_other, _ = logits(other, _beside(other, tile))
        upper, lower, is_own = _log_ratios(_difference(z, z_other, shift[rows]), part)
        ratio = upper.where(is_own, lower).sub_(kl[rows, None])
        dz = _terms(_softmax(z, row_max[rows], sum_exp[rows]), ratio).mul_(slope[rows, None])
        if tanh is not None:
            dz *= 1 - tanh.square_()
        return Gradient(dz.to(operand_dtype(own)))

    with torch.autocast(own.hidden.device.type, enabled=False):
        dx, dw, db = sweep(own, tuple(needs), shape_without_kernels(own), make, chosen)
    gradients = (None if dx is None else dx.to(own.hidden.dtype), dw, db)
    return tuple(absent(own.hidden) if g is None else g for g in gradients)


torch.library.register_fake("latro_kernels::linear_jsd_backward")(empty_backward)


def _heads(*arguments: Any) -> tuple[Head, Head]:
    """Return p and q of the arguments that `_HEADS` declares."""
    *tensors, temperature_p, softcap_p, temperature_q, softcap_q, _ = arguments[:11]
    of_p = {"temperature": temperature_p, "softcap": softcap_p, "backend": "torch"}
    of_q = {"temperature": temperature_q, "softcap": softcap_q, "backend": "torch"}
    return Head(*tensors[:3], **of_p), Head(*tensors[3:], **of_q)


def _empty(hidden: Tensor) -> tuple[Tensor, ...]:
    """Return room for the divergence, and for what `_ROWS` names."""
    return tuple(hidden.new_empty(hidden.shape[:1], dtype=torch.float32) for _ in range(7))


def _tiles(p: Head, q: Head) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield blocks of rows with the logits of p and of q over a slice of the vocabulary."""
    for rows, tile in tiles(p, shape_without_kernels(p)):
        yield rows, logits(p, tile)[0], logits(q, _beside(q, tile))[0]


def _beside(head: Head, tile: Tile) -> Tile:
    """Return the tile of another head in the same place."""
    dtype, bias = operand_dtype(head), head.bias
    return Tile(
        rows=tile.rows,
        columns=tile.columns,
        hidden=head.hidden[tile.rows].to(dtype),
        weight=head.weight[tile.columns].to(dtype),
        bias=None if bias is None else bias[tile.columns].float(),
    )


def _shift(max_p: Tensor, sum_exp_p: Tensor, max_q: Tensor, sum_exp_q: Tensor) -> Tensor:
    """Return by how much the log-sum-exp of p is above that of q, in fp64."""
    log_ratio = (sum_exp_p.double() / sum_exp_q.double()).log()
    return (max_p.double() - max_q.double()) + log_ratio


def _difference(zp: Tensor, zq: Tensor, shift: Tensor) -> Tensor:
    """Return log p − log q of logits: where these are far apart, fp32 would round the difference.

    Of logits at 10⁶ and at 3 it would have no digit below 0.06, and each of them still has its own.
    """
    return zp.double().sub_(zq).sub_(shift[:, None]).float()


def _softmax(z: Tensor, row_max: Tensor, sum_exp: Tensor) -> Tensor:
    """Turn logits into probabilities, in place."""
    return z.sub_(row_max[:, None]).exp_().div_(sum_exp[:, None])


def _log_ratios(d: Tensor, part: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return log of the larger probability over the mixture's, of the smaller one, and which it is.

    With d = log(own / other), `part` of the mixture is own; the last is whether own is the larger.
    """
    is_own = d > 0
    distance = d.abs_()
    # Of two numbers alone `where` would make a tensor of torch's default dtype.
    of_smaller = torch.full_like(d, part).masked_fill_(is_own, 1 - part)
    upper = torch.neg(distance).expm1_().mul_(of_smaller).log1p_().neg_()
    return upper, upper - distance, is_own


def _terms(probability: Tensor, ratio: Tensor) -> Tensor:
    """Return the products, 0 where the probability is 0 and the ratio no number."""
    return ratio.masked_fill_(probability == 0, 0).mul_(probability)


forward = torch.ops.latro_kernels.linear_jsd
backward = torch.ops.latro_kernels.linear_jsd_backward
