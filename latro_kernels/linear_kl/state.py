"""What passes between `linear_kl` and its drivers: two heads, and a few numbers per row.

A driver has two functions. `forward(p, q)` returns the KL and what the backward needs of each row;
`backward(p, q, grad, of_q, needs)` returns the gradients of the hidden states, weight and bias of
one head, q if `of_q`. `cpu` is the driver on the CPU, `tiles` the one on GPUs. p and q share the
backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latro_kernels.head import Head

Heads = tuple[Head, Head]
"""p and q."""
Pair = tuple[Tensor, Tensor]
OptionalPair = tuple[Tensor | None, Tensor | None]
"""One tensor of p and one of q."""


@dataclass(frozen=True, eq=False)
class KlState:
    """What the forward carries from tile to tile, fp32 [N] each; logits are those so far.

    Args:
        max_p: max zᵖ.
        sum_exp_p: Σ exp(zᵖ − max_p).
        max_q: max z^q.
        sum_exp_q: Σ exp(z^q − max_q).
        anchor: z^q where zᵖ is max_p; any number where that is −inf.
        moment: Σ exp(zᵖ − max_p)·((zᵖ − z^q) − (max_p − anchor)).
        second: Σ exp(zᵖ − max_p)·(exp(−δ) − 1 + δ) with δ = (zᵖ − z^q) − (max_p − max_q).
    """

    max_p: Tensor
    sum_exp_p: Tensor
    max_q: Tensor
    sum_exp_q: Tensor
    anchor: Tensor
    moment: Tensor
    second: Tensor

    @classmethod
    def start(cls, hidden: Tensor) -> KlState:
        """Return the state of rows of which no logit was seen yet."""

        def filled(value: float) -> Tensor:
            return hidden.new_full((len(hidden),), value, dtype=torch.float32)

        return cls(
            max_p=filled(-torch.inf),
            sum_exp_p=filled(0),
            max_q=filled(-torch.inf),
            sum_exp_q=filled(0),
            anchor=filled(0),
            moment=filled(0),
            second=filled(0),
        )

    def rows(self, block: slice) -> KlState:
        """Return the state of some rows, to be changed in place."""
        return KlState(*(numbers[block] for numbers in vars(self).values()))

    def finish(self) -> tuple[Tensor, ...]:
        """Return the KL, and what `KlGrad` has of the forward."""
        in_fp64 = KlState(*(numbers.double() for numbers in vars(self).values()))
        sum_exp_p, sum_exp_q = in_fp64.sum_exp_p, in_fp64.sum_exp_q
        mean = in_fp64.moment / sum_exp_p
        first = mean + (in_fp64.max_q - in_fp64.anchor)
        excess = in_fp64.second / sum_exp_p - first
        # sum_exp_q / sum_exp_p, which is 1 + excess; the sum itself where that cancels.
        log_ratio = torch.where(excess > -0.5, excess.log1p(), sum_exp_q.log() - sum_exp_p.log())
        kl = (first + log_ratio).float()
        return kl, in_fp64.anchor, mean, in_fp64.max_p, sum_exp_p, in_fp64.max_q, sum_exp_q


@dataclass(frozen=True, eq=False)
class KlGrad:
    """What the backward needs of each row, [N] each and contiguous, all but grad_kl fp64.

    Args:
        grad_kl: upstream gradient, fp32.
        anchor: z^q where zᵖ is max_p.
        mean: E_p[zᵖ − z^q] − (max_p − anchor).
        max_p: max zᵖ.
        sum_exp_p: Σ exp(zᵖ − max_p).
        max_q: max z^q.
        sum_exp_q: Σ exp(z^q − max_q).
    """

    grad_kl: Tensor
    anchor: Tensor
    mean: Tensor
    max_p: Tensor
    sum_exp_p: Tensor
    max_q: Tensor
    sum_exp_q: Tensor

    def rows(self, block: slice | Tensor) -> KlGrad:
        """Return what the backward needs of some rows."""
        return KlGrad(*(numbers[block] for numbers in vars(self).values()))


def empty_results(hidden: Tensor) -> tuple[Tensor, ...]:
    """Return room for the KL, fp32, and for what `KlGrad` has of the forward, fp64."""
    dtypes = (torch.float32, *(torch.float64,) * 6)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for dtype in dtypes)


def share_weight(head: Head, other: Head) -> bool:
    """Return whether both heads have the same weight in memory."""
    one, two = ((w.data_ptr(), w.shape, w.stride()) for w in (head.weight, other.weight))
    return one == two
