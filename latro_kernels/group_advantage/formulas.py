"""The formulas in plain PyTorch: what every objective is made of, and the reference, made of it.

The building blocks are sums over segments, floors and leave-one-out advantages, in the dtype that
they are given. An objective that has no kernel of its own uses them as `reference` does. `offsets`
are those of a `GroupLayout`: rows offsets[i]:offsets[i + 1] are segment i, and the segments of a
sequence are its rationale and its answer. Rewards stand in their groups, [G, K].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from latro_kernels.checks import (
    as_count,
    check_device,
    check_dtype,
    check_float_dtype,
    check_same,
    check_tensor,
    check_vector,
    dense,
)
from latro_kernels.group_advantage.layout import GroupAdvantage, GroupLayout, check_offsets


def segment_of_rows(offsets: Tensor, num_rows: int) -> Tensor:
    """Return the segment that each of `num_rows` rows lies in, int64 [N].

    Args:
        offsets: int64 [segments + 1], ascending, from 0 to `num_rows`.
        num_rows: N.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: offsets of the wrong shape, and on the CPU those that do not ascend from 0 to N;
            elsewhere reading them would wait for the device.
    """
    num_rows = as_count("num_rows", num_rows, 0)
    _check_offsets(offsets, num_rows)
    segments = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(segments, offsets.diff(), output_size=num_rows)


def segment_sums(rows: Tensor, offsets: Tensor) -> Tensor:
    """Return Σ rows[offsets[i]:offsets[i + 1]] for each segment i.

    The sums are taken in the order of the rows, so that equal segments have equal sums, which a
    scatter's atomics on a GPU do not give.

    Args:
        rows: [N], any dtype of floats, which the sums have too.
        offsets: int64 [segments + 1], as in `segment_of_rows`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape or device, or offsets as in `segment_of_rows`.
    """
    check_tensor("rows", rows, 1)
    check_float_dtype("rows", rows, "reference")
    _check_offsets(offsets, rows.numel())
    check_device("offsets", offsets, "rows", rows)
    return torch.segment_reduce(rows, "sum", offsets=offsets, unsafe=True)


def floored(reward: Tensor, finished: Tensor) -> Tensor:
    """Return rewards in which an unfinished sequence has the lowest reward of its group.

    Args:
        reward: [G, K], any dtype of floats, which the result has too.
        finished: bool [G, K].

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape or device.
    """
    _check_groups(reward, "finished", finished)
    return torch.where(finished, reward, reward.amin(1, keepdim=True))


def leave_one_out(reward: Tensor, member: Tensor) -> Tensor:
    """Return each reward minus the mean of the other members' rewards, [G, K].

    Args:
        reward: [G, K], any dtype of floats, which the result has too.
        member: bool [G, K], the sequences that count. The others get 0, and so does a sequence that
            is the only member of its group.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape or device.
    """
    _check_groups(reward, "member", member)
    # Centred on the lowest, so that equal rewards give exactly 0 and large ones lose nothing.
    lowest = torch.where(member, reward, math.inf).amin(1, keepdim=True)
    excess = torch.where(member, reward - lowest, 0)
    m = member.sum(1, keepdim=True)
    advantage = (m * excess - excess.sum(1, keepdim=True)) / (m - 1)
    return torch.where(member & (m > 1), advantage, 0)


def reference(
    logp: Tensor,
    ref_logp: Tensor | None,
    layout: GroupLayout,
    *,
    beta: float = 0.05,
    answer_weight: float = 1.0,
    kl: str = "reward",
    unfinished: str = "floor",
    row_kl: Tensor | None = None,
) -> GroupAdvantage:
    """Return the results in the dtype of logp, fp32 or fp64; settings are not checked."""
    S, K = layout.num_sequences, layout.num_generations
    segment = segment_of_rows(layout.offsets, logp.numel())
    sequence, is_answer = segment // 2, segment % 2 == 1

    def sequence_sums(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums over every rationale and over every answer, [S] each."""
        rationale, answer = segment_sums(rows, layout.offsets).view(S, 2).unbind(1)
        return rationale, answer

    zero = torch.zeros_like(logp)
    d = zero if ref_logp is None else ref_logp - logp
    rationale_logp, answer_logp = sequence_sums(logp)
    row_terms = d.expm1() - d if kl == "k3" else -d
    kl_sum, _ = sequence_sums(row_terms if row_kl is None else row_kl)
    # Without weight an infinite KL counts for nothing, and 0 · inf would make NaN of it.
    reward = answer_logp - (beta * kl_sum if kl != "k3" and beta != 0 else 0)

    reward = reward.view(-1, K)
    member = torch.ones_like(reward, dtype=torch.bool)
    if layout.finished is not None:
        finished = layout.finished.view(-1, K)
        if unfinished == "floor":
            reward = floored(reward, finished)
        else:
            member = finished
    advantage = leave_one_out(reward, member).view(-1)

    rationale = advantage[sequence] + (beta * d.expm1() if kl == "k3" and beta != 0 else zero)
    weight = torch.where(is_answer, answer_weight, rationale)
    scale = 1 / layout.num_averaged
    is_member = member.reshape(-1)[sequence]
    coefficient = torch.where(is_member, -weight * scale, 0)
    kl_coefficient = None
    if row_kl is not None:
        kl_coefficient = torch.where(is_member & ~is_answer, beta * scale, zero)
    return GroupAdvantage(
        reward=reward.reshape(-1),
        answer_logp=answer_logp,
        rationale_logp=rationale_logp,
        kl=kl_sum,
        advantage=advantage,
        coefficient=coefficient,
        kl_coefficient=kl_coefficient,
    )


def _check_groups(reward: Tensor, name: str, mask: Tensor) -> None:
    """Raise unless the rewards are floats [G, K], and the mask of that name bools beside them."""
    check_tensor("reward", reward, 2)
    check_float_dtype("reward", reward, "reference")
    check_dtype(name, dense(name, mask), torch.bool)
    check_same(name, mask, reward.shape, reward.device)


def _check_offsets(offsets: Tensor, num_rows: int) -> None:
    """Raise unless the offsets are int64 [segments + 1]; on the CPU also for their values."""
    check_vector("offsets", offsets, torch.int64)
    if offsets.numel() == 0:
        raise ValueError("offsets: expected segments + 1 entries, got 0")
    no_values = isinstance(offsets, FakeTensor) or torch.compiler.is_compiling()
    if offsets.is_cpu and not no_values:
        # Free on this device, and a wrong offset would have memory outside of the rows read.
        check_offsets(offsets, num_rows)
