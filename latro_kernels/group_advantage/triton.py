"""group_advantage in Triton: one launch sums, the next makes coefficients; a program per sequence.

The formulas stand in `latro_kernels.group_advantage`. Between the launches the rewards are fp64:
they may be large and close together. In the second, each program makes the baseline of its group
anew, which is a few reads, so that no program waits for another. Numbers of a caller are fp64 too:
without the annotation Triton would pass them as fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latro_kernels.group_advantage.layout import GroupLayout

BLOCK_N = 512


@triton.jit
def _sequence_bounds(offsets_ptr, sequence):
    begin = tl.load(offsets_ptr + 2 * sequence)
    middle = tl.load(offsets_ptr + 2 * sequence + 1)
    end = tl.load(offsets_ptr + 2 * sequence + 2)
    return begin, middle, end


@triton.jit
def _load_rows(ptr, rows, mask):
    return tl.load(ptr + rows, mask=mask, other=0.0).to(tl.float64)


@triton.heuristics(
    {
        "HAS_REF": lambda args: args["ref_logp_ptr"] is not None,
        "HAS_ROW_KL": lambda args: args["row_kl_ptr"] is not None,
        "HAS_BETA": lambda args: args["beta"] != 0,
    }
)
@triton.jit
def sums_kernel(
    logp_ptr,
    ref_logp_ptr,
    row_kl_ptr,
    offsets_ptr,
    rewards_ptr,
    answer_logp_ptr,
    rationale_logp_ptr,
    kl_ptr,
    beta: tl.float64,
    HAS_REF: tl.constexpr,
    HAS_ROW_KL: tl.constexpr,
    HAS_BETA: tl.constexpr,
    K3: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum over the rows of a sequence, and make its reward, fp64."""
    sequence = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_N).to(tl.int64)
    begin, middle, end = _sequence_bounds(offsets_ptr, sequence)
    rationale = tl.zeros((BLOCK_N,), tl.float64)
    divergence = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(begin, middle, BLOCK_N):
        rows = start + lane
        mask = rows < middle
        logp = _load_rows(logp_ptr, rows, mask)
        rationale += logp
        if HAS_REF:
            d = _load_rows(ref_logp_ptr, rows, mask) - logp
            # In fp64, exp(d) - 1 is as good as a fp32 expm1 at every d that matters.
            divergence += tl.exp(d) - 1.0 - d if K3 else -d
        elif HAS_ROW_KL:
            divergence += _load_rows(row_kl_ptr, rows, mask)
    answer = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(middle, end, BLOCK_N):
        rows = start + lane
        answer += _load_rows(logp_ptr, rows, rows < end)
    answer_sum = tl.sum(answer, 0)
    divergence_sum = tl.sum(divergence, 0)
    tl.store(rationale_logp_ptr + sequence, tl.sum(rationale, 0).to(tl.float32))
    tl.store(kl_ptr + sequence, divergence_sum.to(tl.float32))
    tl.store(answer_logp_ptr + sequence, answer_sum.to(tl.float32))
    # Without weight an infinite KL counts for nothing, and is no NaN.
    penalty = beta * divergence_sum if HAS_BETA and not K3 else 0.0
    tl.store(rewards_ptr + sequence, answer_sum - penalty)


@triton.heuristics(
    {
        "HAS_REF": lambda args: args["ref_logp_ptr"] is not None,
        "HAS_FINISHED": lambda args: args["finished_ptr"] is not None,
        "HAS_BETA": lambda args: args["beta"] != 0,
        "BLOCK_K": lambda args: triton.next_power_of_2(args["K"]),
    }
)
@triton.jit
def coefficient_kernel(
    logp_ptr,
    ref_logp_ptr,
    offsets_ptr,
    finished_ptr,
    rewards_ptr,
    reward_ptr,
    advantage_ptr,
    coefficient_ptr,
    K,
    scale: tl.float64,
    beta: tl.float64,
    answer_weight: tl.float64,
    HAS_REF: tl.constexpr,
    HAS_FINISHED: tl.constexpr,
    HAS_BETA: tl.constexpr,
    K3: tl.constexpr,
    EXCLUDE_UNFINISHED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Make the leave-one-out advantage of a sequence, and the coefficient of each of its rows."""
    sequence = tl.program_id(0).to(tl.int64)
    first = sequence // K * K
    k_index = tl.arange(0, BLOCK_K)
    in_group = k_index < K
    own = first + k_index == sequence

    rewards = tl.load(rewards_ptr + first + k_index, mask=in_group, other=0.0)
    finished = in_group
    if HAS_FINISHED:
        finished = tl.load(finished_ptr + first + k_index, mask=in_group, other=0) != 0
    member = finished if EXCLUDE_UNFINISHED else in_group
    # A minimum may drop NaN, and with it the sign that a log-probability went wrong.
    any_nan = tl.max((member & (rewards != rewards)).to(tl.int32), 0) > 0  # noqa: PLR0124
    lowest = tl.min(tl.where(member, rewards, float("inf")), 0)
    lowest = tl.where(any_nan, float("nan"), lowest)
    if not EXCLUDE_UNFINISHED:
        rewards = tl.where(finished, rewards, lowest)
    # Centred on the lowest, so that equal rewards give exactly 0.
    excess = tl.where(member, rewards - lowest, 0.0)
    m = tl.sum(member.to(tl.float64), 0)
    advantages = (m * excess - tl.sum(excess, 0)) / tl.maximum(m - 1.0, 1.0)
    advantages = tl.where(m > 1.0, tl.where(member, advantages, 0.0), 0.0)
    advantage = tl.sum(tl.where(own, advantages, 0.0), 0)
    included = tl.max((own & member).to(tl.int32), 0) > 0
    tl.store(reward_ptr + sequence, tl.sum(tl.where(own, rewards, 0.0), 0).to(tl.float32))
    tl.store(advantage_ptr + sequence, advantage.to(tl.float32))

    lane = tl.arange(0, BLOCK_N).to(tl.int64)
    begin, middle, end = _sequence_bounds(offsets_ptr, sequence)
    for start in range(begin, middle, BLOCK_N):
        rows = start + lane
        mask = rows < middle
        weight = tl.zeros((BLOCK_N,), tl.float64) + advantage
        if HAS_REF and HAS_BETA and K3:
            d = _load_rows(ref_logp_ptr, rows, mask) - _load_rows(logp_ptr, rows, mask)
            weight += beta * (tl.exp(d) - 1.0)
        weight = tl.where(included, -scale * weight, 0.0)
        tl.store(coefficient_ptr + rows, weight.to(tl.float32), mask=mask)
    answer_coefficient = tl.where(included, -scale * answer_weight, 0.0).to(tl.float32)
    for start in range(middle, end, BLOCK_N):
        rows = start + lane
        weight = tl.zeros((BLOCK_N,), tl.float32) + answer_coefficient
        tl.store(coefficient_ptr + rows, weight, mask=rows < end)


def forward(
    outputs: tuple[Tensor, ...],
    rows: tuple[Tensor, Tensor | None, Tensor | None],
    layout: GroupLayout,
    *,
    beta: float,
    answer_weight: float,
    kl: str,
    unfinished: str,
) -> None:
    """Fill `outputs`, of the arguments that `compiled.forward` describes."""
    reward, answer_logp, rationale_logp, kl_sum, advantage, coefficient = outputs
    (logp, ref_logp, row_kl), finished, S = rows, layout.finished, layout.num_sequences
    if S == 0:
        return
    rewards = torch.empty(S, dtype=torch.float64, device=logp.device)
    with torch.cuda.device_of(logp):
        sums_kernel[(S,)](
            logp_ptr=logp,
            ref_logp_ptr=ref_logp,
            row_kl_ptr=row_kl,
            offsets_ptr=layout.offsets,
            rewards_ptr=rewards,
            answer_logp_ptr=answer_logp,
            rationale_logp_ptr=rationale_logp,
            kl_ptr=kl_sum,
            beta=beta,
            K3=kl == "k3",
            BLOCK_N=BLOCK_N,
        )
        coefficient_kernel[(S,)](
            logp_ptr=logp,
            ref_logp_ptr=ref_logp,
            offsets_ptr=layout.offsets,
            finished_ptr=None if finished is None else finished.view(torch.uint8),
            rewards_ptr=rewards,
            reward_ptr=reward,
            advantage_ptr=advantage,
            coefficient_ptr=coefficient,
            K=layout.num_generations,
            scale=1 / layout.num_averaged,
            beta=beta,
            answer_weight=answer_weight,
            K3=kl == "k3",
            EXCLUDE_UNFINISHED=unfinished == "exclude",
            BLOCK_N=BLOCK_N,
        )
