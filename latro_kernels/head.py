"""What passes between `linear_logprob` and the backends that compute it.

A backend has two functions. `forward` sweeps over the vocabulary once and returns a `State`;
`backward` sweeps again, from a `RowGrad`, and returns gradients. `cpu` has them for the native
backend; for a GPU there are `tiles`, products by torch, and `triton.store_free`, products in
registers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Bytes of products that the forward keeps for the backward where the caller does not say.
DEFAULT_MEMORY_BUDGET = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}


@dataclass(frozen=True, eq=False)
class Head:
    """The problem: logits z = softcap · tanh((hidden · weightᵀ + bias) / softcap) / temperature.

    Args:
        hidden: [N, H].
        weight: [V, H], dtype and device of hidden.
        target: [N] int64, contiguous; outside of 0..V − 1 it is no column of this weight.
        bias: [V] or None.
        temperature: divides the logits.
        softcap: 0 where there is none.
        backend: "cpu", "triton" or "cuda".
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float
    backend: str


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

    def rows(self, block: slice) -> State:
        """The state of some rows, to be changed in place."""
        own = (self.peak, self.total, self.picked, self.weighted, self.pull)
        return State(*(None if t is None else t[block] for t in own), self.kept, self.block_peak)


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

    def rows(self, block: slice | Tensor) -> RowGrad:
        return RowGrad(**{k: None if t is None else t[block] for k, t in vars(self).items()})

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
