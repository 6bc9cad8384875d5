"""What passes between `linear_logprob` and the backends that compute it.

A backend has two functions. `forward` sweeps over the vocabulary once and returns a `State`;
`backward` sweeps again, from a `RowGrad`, and returns gradients. `cpu` has them for the native
backend; for a GPU there are `tiles`, products by torch, and `triton.fused`, products in
registers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latro_kernels.head import Head

# Bytes of products that the forward keeps for the backward where the caller does not say. The meta
# device, whose tensors are shapes, has none to keep.
DEFAULT_MEMORY_BUDGET = {"cpu": 64 * 2**20, "cuda": 512 * 2**20, "meta": 0}


@dataclass(frozen=True)
class Wanted:
    """What the forward makes beside the log-probs.

    Args:
        weighted: what the entropy needs.
        pull: what the gradient of hidden needs where the head is frozen.
        block_peak: what the gradient filter needs.
        memory_budget: bytes of products that may be kept for the backward.
    """

    weighted: bool
    pull: bool
    block_peak: bool
    memory_budget: int


@dataclass(frozen=True, eq=False)
class State:
    """What the forward knows of each row, fp32; z are a row's logits, a its products.

    Args:
        peak: [N], max z.
        total: [N], Σ exp(z − peak).
        picked: [N], z at the target; −inf where the target is no column of the weight.
        weighted: [N], Σ exp(z − peak)·(z − peak), or None.
        pull: [N, H], Σ over columns j but the target's of exp(z_j − peak)·(∂z_j/∂a_j)·w_j, or None.
        kept: one-dimensional, the products of the first columns; its form is the backend's own.
        block_peak: [N, blocks], max z over each block of columns, or None.
    """

    peak: Tensor
    total: Tensor
    picked: Tensor
    weighted: Tensor | None
    pull: Tensor | None
    kept: Tensor
    block_peak: Tensor | None

    def clear(self) -> None:
        """Make it that of rows of which nothing was seen yet."""
        self.peak.fill_(-torch.inf)
        self.picked.fill_(-torch.inf)
        self.total.zero_()
        if self.weighted is not None:
            self.weighted.zero_()

    def rows(self, block: slice) -> State:
        """The state of some rows, to be changed in place."""
        return replace(
            self,
            peak=self.peak[block],
            total=self.total[block],
            picked=self.picked[block],
            weighted=None if self.weighted is None else self.weighted[block],
            pull=None if self.pull is None else self.pull[block],
        )


@dataclass(frozen=True, eq=False)
class RowGrad:
    """What the backward needs of each row, fp32 [N] each and contiguous.

    Args:
        logp: the forward's log-prob of the target.
        entropy: the forward's entropy, or None with `grad_entropy`.
        peak: max z.
        log_total: log Σ exp(z − peak).
        grad_logp: upstream gradient.
        grad_entropy: upstream gradient, or None where the entropy has none.
    """

    logp: Tensor
    entropy: Tensor | None
    peak: Tensor
    log_total: Tensor
    grad_logp: Tensor
    grad_entropy: Tensor | None

    @classmethod
    def of_exponentials(cls, peak: Tensor) -> RowGrad:
        """With these the gradient's formula gives exp(z − peak)·∂z/∂a, and 0 at the target."""
        nothing = torch.zeros_like(peak)
        # A row that is -inf so far has no peak to subtract.
        peak = torch.where(peak == -torch.inf, 0, peak)
        return cls(nothing, None, peak, nothing, nothing - 1, None)

    def rows(self, block: slice | Tensor) -> RowGrad:
        own: dict[str, Any] = {k: None if t is None else t[block] for k, t in vars(self).items()}
        return RowGrad(**own)

    def active(self) -> Tensor:
        """bool [N]: the rows that have an upstream gradient."""
        active = self.grad_logp != 0
        return active if self.grad_entropy is None else active | (self.grad_entropy != 0)


def kept_columns(N: int, V: int, memory_budget: int, grain: int) -> int:
    """How many columns' products fit the budget in fp32: a multiple of `grain`, or all V."""
    if memory_budget >= 4 * N * V:
        return V
    return memory_budget // (4 * N) // grain * grain


def filter_order(
    grad: RowGrad, block_peak: Tensor, grad_filter: float, rows: Tensor | None = None
) -> Tensor:
    """Numbers of the rows (None: of all), those with fewest columns above the filter first.

    A block is left out where all of its rows allow it, so rows that are alike should share blocks.
    """
    size = grad.grad_logp.abs()
    if grad.grad_entropy is not None:
        size = size + grad.grad_entropy.abs()
    reach = (block_peak - (grad.peak + grad.log_total)[:, None]).exp_().mul_(size[:, None])
    count = (reach >= grad_filter).sum(1)
    if rows is None:
        return count.argsort(stable=True)
    return rows[count[rows].argsort(stable=True)]


def make_state(
    head: Head, wanted: Wanted, *, kept_grain: int, peak_columns: int | None = None
) -> State:
    """Room for what a forward makes: products of whole `kept_grain` columns, as `kept_columns` has
    it, and peaks of blocks of `peak_columns`; None where the backend has no such peaks."""
    (N, H), V = head.hidden.shape, head.weight.shape[0]

    def empty(*shape: int) -> Tensor:
        return head.hidden.new_empty(shape, dtype=torch.float32)

    return State(
        peak=empty(N),
        total=empty(N),
        picked=empty(N),
        weighted=empty(N) if wanted.weighted else None,
        pull=empty(N, H) if wanted.pull else None,
        kept=empty(N * kept_columns(N, V, wanted.memory_budget, kept_grain)),
        block_peak=empty(N, -(-V // peak_columns)) if wanted.block_peak and peak_columns else None,
    )
