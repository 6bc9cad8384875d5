"""What `linear_logprob` and `gather_logprob` know of a row beside its target's log-prob.

With a row's logits z, after softcap and temperature, p = softmax(z) and t the target

    logp = z_t − L        log_sum_exp L = log Σ_j exp(z_j)        entropy H = −Σ_j p_j·log p_j
    log_sum_p_squared S = log Σ_j p_j² = log Σ_j exp(2·z_j) − 2·L        mean_logit = Σ_j z_j / V

All come from one pass: with m the largest logit so far, Σ exp(z_j − m)² is a sum beside that of
exp(z_j − m), and takes no exponential more.

For upstream gradients g of logp, h of the entropy, e of log_sum_exp and q of log_sum_p_squared

    ∂/∂z_j = g·(1[j = t] − p_j) − h·p_j·(log p_j + H) + e·p_j + 2·q·(p_j²·exp(−S) − p_j)
           = g·(1[j = t] − p_j) − p_j·(h·log p_j + c − r·p_j)

    c = h·H − e + 2·q        r = 2·q·exp(−S)

so that a backward that knows the entropy's gradient has that of log_sum_exp for nothing, and that
of log_sum_p_squared for one multiplication and addition more: it takes g, h, c and r of each row,
which `upstream` makes; of these it takes no r where log_sum_p_squared has no upstream gradient, and
g alone where logp alone has one. As Σ_j p_j² is at least 1/V, exp(−S) is at most V, and does not
overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """Holds what `linear_logprob` and `gather_logprob` return where `statistics` are given.

    Each is of the shape of target; None where it was not asked for, and 0 or False where the target
    is ignored.

    Args:
        logp: the target's log-probability, fp32, nats, differentiable.
        entropy: of the row's distribution, fp32, nats, differentiable.
        log_sum_exp: log Σ_j exp(z_j) of the logits z after softcap and temperature, as
            `torch.logsumexp(z, -1)`, fp32, nats, differentiable: what a z-loss squares.
        is_top1: whether no logit of the row is above the target's, bool.
        log_sum_p_squared: log Σ_j p_j² of the row's distribution p, as
            `torch.logsumexp(2 * torch.log_softmax(z, -1), -1)`, fp32, nats, differentiable: minus
            the Rényi entropy of order 2. It is −log V where p is uniform, and 0 where one token
            has probability 1.
        mean_logit: the mean of z over the vocabulary, fp32, without a gradient; −∞ where one of
            the logits is.
    """

    logp: Tensor
    entropy: Tensor | None = None
    log_sum_exp: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_p_squared: Tensor | None = None
    mean_logit: Tensor | None = None


NAMES = tuple(field.name for field in fields(RowStatistics) if field.name != "logp")
# What needs Σ exp(z − m)² or Σ z. Where one is needed both are made, and the entropy's sum too.
OF_FURTHER_SUMS = frozenset({"log_sum_p_squared", "mean_logit"})
Returned = Tensor | tuple[Tensor, Tensor] | RowStatistics


class Upstream(NamedTuple):
    """The upstream gradients of rows, fp32 [N] each.

    Args:
        grad_logp: g.
        grad_entropy: h, None where logp alone has a gradient.
        offset: c, likewise.
        grad_square: r, None where log_sum_p_squared has no gradient.
    """

    grad_logp: Tensor
    grad_entropy: Tensor | None
    offset: Tensor | None
    grad_square: Tensor | None


def check_statistics(statistics: object, return_entropy: object) -> frozenset[str]:
    """Return the names that are asked for in either way; raise for what is none."""
    if not isinstance(return_entropy, bool):
        raise TypeError(f"return_entropy: expected a bool, got {type(return_entropy).__name__}")
    if statistics is None:
        return frozenset({"entropy"} if return_entropy else ())
    if isinstance(statistics, str) or not isinstance(statistics, Collection):
        raise TypeError(
            f"statistics: expected a collection of names, such as {NAMES[:1]}, got {statistics!r}"
        )
    for name in statistics:
        if name not in NAMES:
            raise ValueError(
                f"statistics: expected names among {', '.join(map(repr, NAMES))}, got {name!r}"
            )
    if return_entropy:
        raise ValueError(
            "return_entropy: expected False with statistics, among which 'entropy' is, got True"
        )
    return frozenset(statistics)


def returned(
    found: RowStatistics, statistics: Collection[str] | None, return_entropy: bool
) -> Returned:
    """Return what a caller gets that has asked for these statistics."""
    if return_entropy:
        assert found.entropy is not None
        return found.logp, found.entropy
    if statistics is None:
        return found.logp
    unasked: dict[str, Any] = {name: None for name in NAMES if name not in statistics}
    return replace(found, **unasked)


def of_logits(
    logits: Tensor, target: Tensor, temperature: float, softcap: float | None
) -> RowStatistics:
    """Return all statistics [...] of logits [..., V] by plain PyTorch, in the logits' dtype."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z = z / temperature
    log_p = torch.log_softmax(z, dim=-1)
    # Where p is 0, p·log p has the limit 0; 0 · −inf would make it and its gradient NaN.
    terms = log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)
    column = target[..., None]
    return RowStatistics(
        logp=log_p.gather(-1, column).squeeze(-1),
        entropy=-terms.sum(-1),
        log_sum_exp=torch.logsumexp(z, dim=-1),
        is_top1=(z.gather(-1, column) >= z.amax(-1, keepdim=True)).squeeze(-1),
        log_sum_p_squared=torch.logsumexp(2 * log_p, dim=-1),
        mean_logit=z.detach().mean(-1),
    )


def changed(found: RowStatistics, change: Callable[[Tensor], Tensor]) -> RowStatistics:
    """Return the statistics with a change made of each that there is."""
    made: dict[str, Any] = {k: None if s is None else change(s) for k, s in vars(found).items()}
    return RowStatistics(**made)


def as_outputs(ctx: Any, found: RowStatistics) -> tuple[Tensor | None, ...]:
    """Return the statistics in the order of their fields, as an autograd function does.

    They are copies, which a caller may change in place: the backward reads what it has saved.
    """
    found = changed(found, torch.clone)
    ctx.mark_non_differentiable(*(s for s in (found.is_top1, found.mean_logit) if s is not None))
    return tuple(vars(found).values())


def without_ignored(found: RowStatistics, ignored: Tensor) -> RowStatistics:
    """Return the statistics with 0, or False, in rows that are ignored."""
    return changed(found, lambda statistic: statistic.masked_fill(ignored, 0))


def upstream(
    logp: Tensor,
    kept: Tensor | None,
    *,
    entropy: Tensor | None,
    log_sum_p_squared: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_log_sum_exp: Tensor | None,
    grad_log_sum_p_squared: Tensor | None,
) -> Upstream:
    """Return what the backward takes, from gradients of any shape or None.

    Args:
        logp: fp32 [N], from the forward.
        kept: bool [N], or None for all; the other rows' gradients are 0.
        entropy: as logp; None where it was not asked for.
        log_sum_p_squared: likewise.
        grad_logp: g, None for 0.
        grad_entropy: h, likewise.
        grad_log_sum_exp: e, likewise.
        grad_log_sum_p_squared: q, likewise.
    """

    def of_kept(gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return torch.zeros_like(logp)
        # By reshape, for which torch has a rule where several gradients are taken at once.
        flat = gradient.reshape(-1)
        return flat if kept is None else flat.masked_fill(~kept, 0)

    g = of_kept(grad_logp)
    if grad_entropy is None and grad_log_sum_exp is None and grad_log_sum_p_squared is None:
        return Upstream(g, None, None, None)
    h, offset, r = of_kept(grad_entropy), -of_kept(grad_log_sum_exp), None
    if grad_entropy is not None:
        assert entropy is not None
        # The entropy of a row that nobody asks about may be NaN.
        offset = offset + torch.where(h == 0, 0, h * entropy)
    if grad_log_sum_p_squared is not None:
        assert log_sum_p_squared is not None
        twice_q = 2 * of_kept(grad_log_sum_p_squared)
        offset = offset + twice_q
        r = torch.where(twice_q == 0, 0, twice_q * torch.exp(-log_sum_p_squared))
    return Upstream(g, h, offset, r)
