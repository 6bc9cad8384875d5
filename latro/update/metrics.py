"""The metrics of an update: sums over its rows and sequences, and the averages logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latro.rollout.sequences import Rollout
from latro_kernels import GroupAdvantage, segment_of_rows


@dataclass(frozen=True, eq=False)
class Outcome:
    """The sequences of one micro-batch, whole groups, and what the objective made of them."""

    rollouts: list[Rollout]
    reward: Tensor
    """[S] fp32, nats in LaTRO, on the device."""
    advantage: Tensor
    """[S] fp32, on the device."""
    importance: Tensor | None = None
    """fp64 [2], on the device: the sum of the rationale tokens' importance ratios and the largest;
    None where the engine tells no log-probs."""


NAMES = (
    "answer_logp",
    "own_logp",
    "kl",
    "advantage_squared",
    "flat_groups",
    "entropy",
    "rationale_rows",
)


def micro_batch_sums(
    advantage: GroupAdvantage,
    own_logp: Tensor,
    entropy: Tensor,
    offsets: Tensor,
    num_generations: int,
) -> Tensor:
    """Return the sums over a micro-batch that `NAMES` names, fp64 [7], left on the device.

    Args:
        advantage: what the objective made of the micro-batch.
        own_logp: [N], log-probs of the answers' own tokens; 0 elsewhere, at template and end too.
        entropy: [N], of each row, in nats.
        offsets: [2·S + 1], of the segments of rows: rationale and answer in turn.
        num_generations: K.
    """
    flat = (advantage.advantage.view(-1, num_generations) == 0).all(dim=1)
    # A row is a rationale's where it stands in an even segment.
    rationale = segment_of_rows(offsets, len(entropy)) % 2 == 0
    return torch.stack(
        [
            advantage.answer_logp.double().sum(),
            own_logp.double().sum(),
            advantage.kl.double().sum(),
            advantage.advantage.double().square().sum(),
            flat.double().sum(),
            (entropy.double() * rationale).sum(),
            rationale.double().sum(),
        ]
    )


def rollout_sums(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Return what the rollouts of an accumulation step add to the sums."""
    rollouts = [rollout for group in groups for rollout in group]
    return {
        "sequences": len(rollouts),
        "groups": len(groups),
        "rationale_tokens": sum(len(r.rationale_ids) for r in rollouts),
        "unfinished": sum(not r.finished for r in rollouts),
        "rows": sum(len(r.sampled_ids) + len(r.answer_ids) for r in rollouts),
    }


def over_processes(sums: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the sums over all processes, and the largest of what is no sum.

    Updates and seconds, which pass for all at once, are averaged. A process without a finite
    step contributes none.
    """
    total: dict[str, float] = {}
    for name in {name for s in sums for name in s}:
        values = [s.get(name, 0.0) for s in sums]
        largest = name in ("importance_ratio_max", "peak_memory_gib")
        total[name] = max(values) if largest else sum(values)
        if name.endswith("updates") or name.startswith("time_"):
            total[name] /= len(sums)
    return total


def averages(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of LaTRO's updates since the last log, from the sums over all of them.

    Where none of them was finite there is nothing to tell but that, and the times.
    """
    metrics = _skipped_and_times(sums, "time_rollout", "time_score", "time_backward", "time_step")
    if not sums.get("sequences"):
        return metrics
    sequences, groups = sums["sequences"], sums["groups"]
    metrics |= {
        "reward": sums["answer_logp"] / sequences,
        "reward_own_tokens": sums["own_logp"] / sequences,
        "kl": sums["kl"] / sequences,
        "entropy": sums["entropy"] / max(1.0, sums["rationale_rows"]),
        # The root mean square: leave-one-out advantages have mean 0.
        "advantage_std": (sums["advantage_squared"] / sequences) ** 0.5,
        "groups_without_advantage": sums["flat_groups"] / groups,
        "rationale_length": sums["rationale_tokens"] / sequences,
        "unfinished": sums["unfinished"] / sequences,
        "rows_per_second": sums["rows"] / sums["time_step"],
        "trunk_tokens": sums["trunk_tokens"] / max(1.0, sums["updates"]),
    }
    if "importance_ratio" in sums:
        metrics["importance_ratio"] = sums["importance_ratio"] / max(1.0, sums["rationale_rows"])
        metrics["importance_ratio_max"] = sums["importance_ratio_max"]
    return metrics


def likelihood_averages(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of supervised updates, as `averages` does those of LaTRO's."""
    metrics = _skipped_and_times(sums, "time_score", "time_backward", "time_step")
    if not sums.get("sequences"):
        return metrics
    updates = max(1.0, sums["updates"])
    return metrics | {
        "answer_logp": sums["answer_logp"] / sums["sequences"],
        "target_tokens": sums["target_tokens"] / updates,
        "trunk_tokens": sums["trunk_tokens"] / updates,
        "tokens_per_second": sums["trunk_tokens"] / sums["time_step"],
    }


def _skipped_and_times(sums: Mapping[str, float], *times: str) -> dict[str, float]:
    """Return the number of skipped updates, and seconds of each update by their names."""
    updates = max(1.0, sums["updates"])
    return {"skipped_updates": sums["skipped_updates"]} | {t: sums[t] / updates for t in times}


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory of the device since the start; on a CPU, resident, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
