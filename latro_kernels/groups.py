"""The building blocks of every objective: sums over segments, floors, leave-one-out advantages.

They are plain PyTorch, in the dtype that they are given. `group_advantage.reference` is made of
these functions, and so is every objective that has no kernel of its own. `offsets` are those of a
`GroupLayout`: rows offsets[i]:offsets[i + 1] are segment i, and the segments of a sequence are its
rationale and its answer. Rewards stand in their groups, [G, K].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def segment_of_rows(offsets: Tensor, num_rows: int) -> Tensor:
    """Return the segment that each row lies in, int64 [N]."""
    segments = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(segments, offsets.diff(), output_size=num_rows)


def segment_sums(rows: Tensor, offsets: Tensor) -> Tensor:
    """Return Σ rows[offsets[i]:offsets[i + 1]] for each segment i.

    The sums are taken in the order of the rows, so that equal segments have equal sums, which a
    scatter's atomics on a GPU do not give. The offsets are not checked, as reading them would wait
    for the device.
    """
    return torch.segment_reduce(rows, "sum", offsets=offsets, unsafe=True)


def floored(reward: Tensor, finished: Tensor) -> Tensor:
    """Return rewards [G, K] in which an unfinished sequence has the lowest reward of its group."""
    return torch.where(finished, reward, reward.amin(1, keepdim=True))


def leave_one_out(reward: Tensor, member: Tensor) -> Tensor:
    """Return each reward minus the mean of the other members' rewards, [G, K].

    Args:
        reward: [G, K].
        member: bool [G, K], the sequences that count. The others get 0, and so does a sequence that
            is the only member of its group.
    """
    # Centred on the lowest, so that equal rewards give exactly 0 and large ones lose nothing.
    lowest = torch.where(member, reward, math.inf).amin(1, keepdim=True)
    excess = torch.where(member, reward - lowest, 0)
    m = member.sum(1, keepdim=True)
    advantage = (m * excess - excess.sum(1, keepdim=True)) / (m - 1)
    return torch.where(member & (m > 1), advantage, 0)
