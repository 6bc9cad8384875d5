"""`linear_logprob` with the vocabulary split over ranks: what they exchange.

Rank r folds its own columns into peak_r, total_r, picked_r and weighted_r of each row. With
m = max_r peak_r and e_r = exp(peak_r − m),

    total = Σ e_r·total_r        weighted = Σ e_r·(weighted_r + (peak_r − m)·total_r)

and the target's logit is the one of the rank that has it, the others having −inf.
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


def merge(
    peak: Tensor, total: Tensor, picked: Tensor, weighted: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four of the whole vocabulary from this rank's; `weighted` may have length 0."""
    largest = torch.stack([peak, picked])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    top, picked = largest.unbind()
    # Where a rank has nothing but -inf, its total is NaN or 0 and counts for nothing.
    is_empty = peak == -torch.inf
    drop = torch.where(is_empty, 0, peak - top)
    parts = [torch.where(is_empty, 0, total * drop.exp())]
    if len(weighted):
        moment = drop.exp() * (weighted + drop * total)
        parts.append(torch.where(is_empty | (drop.exp() == 0), 0, moment))
    sums = sum_(torch.stack(parts), group)
    return top, sums[0], picked, sums[1] if len(weighted) else weighted


def sum_(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Sum a tensor over ranks, in place."""
    dist.all_reduce(tensor, dist.ReduceOp.SUM, group=group)
    return tensor
