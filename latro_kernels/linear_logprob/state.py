"""What `linear_logprob` and its drivers hand each other.

A driver has three functions. `empty_state` makes room for a `State`; `forward` sweeps over the
vocabulary once and fills it; `backward` sweeps again, from a `RowGrad`, and returns gradients.
`cpu` is the driver of the native backend. GPUs have `tiles`, whose products are made by torch, and
`triton.fused`, whose products stay in registers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latro_kernels.head import Head

# Bytes of products that the forward caches for the backward where the caller does not say. The meta
# device, whose tensors are shapes, has none to cache.
DEFAULT_MEMORY_BUDGET = {"cpu": 64 * 2**20, "cuda": 512 * 2**20, "meta": 0}


@dataclass(frozen=True)
class Wanted:
    """What the forward makes beside the log-probs.

    Args:
        weighted_sum: what the entropy needs.
        dx_sum: what the gradient of hidden needs where the head is frozen.
        block_max: what the gradient filter needs.
        memory_budget: bytes of products that may be cached for the backward.
        further_sums: what log Σ p² and the mean logit need; never without `weighted_sum`.
    """

    weighted_sum: bool
    dx_sum: bool
    block_max: bool
    memory_budget: int
    further_sums: bool = False


@dataclass(frozen=True, eq=False)
class State:
    """What the forward knows of each row, in fp32; z is a row of logits, a of products + bias.

    Args:
        target: [N] int64, contiguous, an input; outside of 0..V − 1 it is no column of the weight.
        row_max: [N], max z.
        sum_exp: [N], Σ exp(z − row_max).
        target_logit: [N], z at the target; −inf where the target is no column of the weight.
        weighted_sum: [N], Σ exp(z − row_max)·(z − row_max), or None.
        square_sum: [N], Σ exp(z − row_max)², or None with `logit_sum`.
        logit_sum: [N], Σ z, or None.
        dx_sum: [N, H], Σ over columns j but the target's of exp(z_j − row_max)·(∂z_j/∂a_j)·w_j, or
            None.
        cached: one-dimensional, the products of the first columns; its form is the driver's own.
        block_max: [N, blocks], max z over each block of columns, or None.
    """

    target: Tensor
    row_max: Tensor
    sum_exp: Tensor
    target_logit: Tensor
    weighted_sum: Tensor | None
    square_sum: Tensor | None
    logit_sum: Tensor | None
    dx_sum: Tensor | None
    cached: Tensor
    block_max: Tensor | None

    @classmethod
    def empty(
        cls,
        head: Head,
        target: Tensor,
        wanted: Wanted,
        *,
        cached_step: int,
        block_columns: int | None = None,
    ) -> State:
        """Make room for a forward's results.

        Products are cached of a multiple of `cached_step` columns; a block of `block_max` has
        `block_columns`, None where the driver has no such maxima.
        """
        (N, H), V = head.hidden.shape, head.weight.shape[0]

        def room(*shape: int) -> Tensor:
            return head.hidden.new_empty(shape, dtype=torch.float32)

        return cls(
            target=target,
            row_max=room(N),
            sum_exp=room(N),
            target_logit=room(N),
            weighted_sum=room(N) if wanted.weighted_sum else None,
            square_sum=room(N) if wanted.further_sums else None,
            logit_sum=room(N) if wanted.further_sums else None,
            dx_sum=room(N, H) if wanted.dx_sum else None,
            cached=room(N * cached_columns(N, V, wanted.memory_budget, cached_step)),
            block_max=room(N, -(-V // block_columns))
            if wanted.block_max and block_columns
            else None,
        )

    def clear(self) -> None:
        """Set the sums and maxima to those of rows of which nothing was seen yet."""
        self.row_max.fill_(-torch.inf)
        self.target_logit.fill_(-torch.inf)
        for sums in (self.sum_exp, self.weighted_sum, self.square_sum, self.logit_sum):
            if sums is not None:
                sums.zero_()

    def rows(self, block: slice) -> State:
        """Return the state of some rows, to be changed in place; what is cached stays whole."""
        own = {k: t[block] for k, t in vars(self).items() if t is not None and k != "cached"}
        return replace(self, **own)

    def cached_of(self, M: int) -> Tensor:
        """Return room for the products of M rows, for the columns that are cached of all rows."""
        return cached_of(self.cached, len(self.row_max), M)

    def put(self, rows: Tensor, state: State) -> None:
        """Write the state of these rows, and zeros elsewhere; theirs is cached in place already."""
        self.cached[state.cached.numel() :].zero_()
        for name, values in vars(state).items():
            if name not in ("target", "cached") and values is not None:
                getattr(self, name).zero_().index_copy_(0, rows, values)

    def rescaling(self, old_max: Tensor) -> Tensor:
        """Return the factors [N] that turn sums under the maximum `old_max` into those of now."""
        return torch.where(self.row_max == old_max, 1, torch.exp(old_max - self.row_max))


@dataclass(frozen=True, eq=False)
class RowGrad:
    """What the backward needs of each row, [N] each, fp32 but for the target, and contiguous.

    Args:
        target: int64, as in `State`.
        logp: the forward's log-prob of the target.
        row_max: max z.
        log_sum: log Σ exp(z − row_max).
        grad_logp: upstream gradient.
        grad_entropy: upstream gradient, or None with `offset`.
        offset: c of `row_statistics`, or None where logp alone has an upstream gradient.
        grad_square: r of `row_statistics`, or None where log Σ p² has no upstream gradient; never
            without `offset`.
    """

    target: Tensor
    logp: Tensor
    row_max: Tensor
    log_sum: Tensor
    grad_logp: Tensor
    grad_entropy: Tensor | None
    offset: Tensor | None
    grad_square: Tensor | None = None

    @classmethod
    def of_exponentials(cls, state: State) -> RowGrad:
        """Return a gradient whose dz is exp(z − row_max)·∂z/∂a, and 0 at the target."""
        zeros = torch.zeros_like(state.row_max)
        return cls(
            target=state.target,
            logp=zeros,
            # A row that is -inf so far has no maximum to subtract.
            row_max=torch.where(state.row_max == -torch.inf, 0, state.row_max),
            log_sum=zeros,
            grad_logp=zeros - 1,
            grad_entropy=None,
            offset=None,
        )

    def rows(self, block: slice | Tensor) -> RowGrad:
        """Return what the backward needs of some rows."""
        own: dict[str, Any] = {k: None if t is None else t[block] for k, t in vars(self).items()}
        return RowGrad(**own)

    def pointers(self) -> dict[str, Tensor | None]:
        """Return the fields as arguments of a Triton kernel."""
        return {f"{name}_ptr": rows for name, rows in vars(self).items()}

    def active_rows(self) -> Tensor | None:
        """Return the indices of the rows that have an upstream gradient, or None for all.

        Their number has to be waited for, which a CUDA graph cannot: it takes all.
        """
        active = self.grad_logp != 0
        for others in (self.grad_entropy, self.offset, self.grad_square):
            if others is not None:
                active = active | (others != 0)
        if active.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        return None if bool(active.all()) else active.nonzero().flatten()

    def filter_order(
        self, block_max: Tensor, grad_filter: float, rows: Tensor | None = None
    ) -> Tensor:
        """Return `rows` (indices; None: all), those with fewest blocks to keep first.

        A block is left out where all of its rows allow it, so rows that are alike should share
        blocks.
        """
        size = self.grad_logp.abs()
        if self.grad_entropy is not None and self.offset is not None:
            size = (self.grad_logp + self.offset).abs() + self.grad_entropy.abs()
        p = (block_max - (self.row_max + self.log_sum)[:, None]).exp_()
        size = size[:, None]
        if self.grad_square is not None:
            size = size + self.grad_square.abs()[:, None] * p
        count = (p.mul_(size) >= grad_filter).sum(1)
        if rows is None:
            return count.argsort(stable=True)
        return rows[count[rows].argsort(stable=True)]


def cached_of(cached: Tensor, N: int, M: int) -> Tensor:
    """Return the part of what is cached of N rows that M rows need for the same columns."""
    return cached[: cached.numel() // N * M if N else 0]


def cached_columns(N: int, V: int, memory_budget: int, step: int) -> int:
    """Return of how many columns the products fit the budget: a multiple of `step`, or all V."""
    if memory_budget >= 4 * N * V:
        return V
    return memory_budget // (4 * N) // step * step
