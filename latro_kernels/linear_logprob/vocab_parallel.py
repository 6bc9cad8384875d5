"""`linear_logprob` with the vocabulary split over ranks: what they exchange.

Rank r folds its own columns into the max m_r, the sum of exponentials s_r, the target's logit, the
weighted sum q_r, the sum of squares u_r and the sum of logits of each row. With m = max_r m_r and
e_r = exp(m_r − m), of all columns

    s = Σ e_r·s_r        q = Σ e_r·(q_r + (m_r − m)·s_r)        u = Σ e_r²·u_r

sums of logits are added, and the target's logit is the one of the rank that has it, the others
having −inf.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def place(weight: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the number of this rank's first column, and of all columns, int64 [] on the device."""
    rank = dist.get_rank(group)
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=weight.device)
    sizes[rank] = len(weight)
    # A sum in which every other rank has 0 here gathers the sizes.
    sum_(sizes, group)
    return sizes[:rank].sum(), sizes.sum()


def merge(state: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Return the state of all ranks' columns, from that of this rank's, each tensor [N].

    It is row_max, sum_exp, target_logit, weighted_sum and, in `linear_logprob`, square_sum and
    logit_sum. From weighted_sum on they have length 0 where they are not asked for.
    """
    row_max, sum_exp, target_logit, weighted_sum, *further = state
    largest = torch.stack([row_max, target_logit])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    top, target_logit = largest.unbind()
    # Where a rank has nothing but -inf, its sum is NaN or 0 and counts for nothing.
    is_empty = row_max == -torch.inf
    drop = torch.where(is_empty, 0, row_max - top)
    parts = [torch.where(is_empty, 0, sum_exp * drop.exp())]
    if len(weighted_sum):
        moment = drop.exp() * (weighted_sum + drop * sum_exp)
        parts.append(torch.where(is_empty | (drop.exp() == 0), 0, moment))
    if further and len(further[0]):
        square_sum, logit_sum = further
        parts += [torch.where(is_empty, 0, square_sum * (2 * drop).exp()), logit_sum]
    sums = sum_(torch.stack(parts), group)
    return [top, sums[0], target_logit, *sums[1:], *state[2 + len(parts) :]]


def sum_(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Sum a tensor over ranks, in place."""
    dist.all_reduce(tensor, dist.ReduceOp.SUM, group=group)
    return tensor
