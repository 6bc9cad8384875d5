"""The choice of what each row's log-prob is multiplied by in the loss.

An update is one path (`latro.update.gradient`) with this choice in it: the coefficients of an
objective, LaTRO's or a relative's, or those of the negative log-likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from latro.config.training import LatroConfig
from latro.model.packing import Batch, answer_sums, group_layout, plain_offsets
from latro.model.scoring import Scores
from latro.objectives import OBJECTIVES, PLAIN_OBJECTIVES, ObjectiveSettings, Rows
from latro.update import metrics
from latro.update.importance import importance
from latro.update.metrics import Outcome
from latro_kernels import segment_of_rows

RowCoefficients = tuple[Tensor | float, Tensor | None]
"""Coefficients of the rows of a batch's sequences: of their log-probs, [N] or the same float for
all, and of their exact KL, [N] or none."""
NO_COEFFICIENTS: RowCoefficients = (0.0, None)
"""The coefficients of a batch that counts for nothing."""


class ObjectiveCoefficients:
    """Gives rows the coefficients of an objective: LaTRO's, or those of a relative of it.

    Args:
        args: the settings.

    Attributes:
        names: the names of the statistics, which are sums.
        averages: makes the metrics that are logged, from sums over several updates.
        exact_kl: whether the objective reads the exact KL, and not sampled tokens' log π_0.
        objective: what makes coefficients of log-probs.
    """

    names = metrics.NAMES
    averages = staticmethod(metrics.averages)

    def __init__(self, args: LatroConfig) -> None:
        self.objective = OBJECTIVES[args.objective]
        self.reads_plain = args.objective in PLAIN_OBJECTIVES
        self.exact_kl = args.kl == "exact"
        self.num_generations = args.num_generations
        self.importance_cap = args.importance_cap
        self.reward_tokens = args.reward_tokens
        self.answer_weight_at = args.answer_weight_at if args.answer_weight_warmup_steps else None
        self.settings = ObjectiveSettings(
            beta=args.beta,
            answer_weight=args.answer_weight,
            kl=args.kl,
            unfinished=args.unfinished,
            rlpr_min_std=args.rlpr_min_std,
            backend=args.backend,
        )

    def at_step(self, step: int) -> None:
        """Take the λ of the update that follows `step` updates, where it has a warm-up."""
        if self.answer_weight_at is not None:
            self.settings = replace(self.settings, answer_weight=self.answer_weight_at(step))

    def __call__(
        self,
        batches: Sequence[Batch],
        scores: Sequence[Scores],
        ref_logps: Sequence[Tensor | None],
        num_items: int,
    ) -> tuple[list[RowCoefficients], Tensor, Outcome]:
        """Return the coefficients by batch, the statistics, and what became of the sequences.

        Args:
            batches: pieces of one micro-batch, which hold whole groups together.
            scores: the policy's, of each batch.
            ref_logps: log π_0 of each batch's rows, where the KL is of sampled tokens.
            num_items: number of prompts that the loss of the whole update averages over, or for SFT
                of target tokens.

        Returns:
            Coefficients; sums by `names`, fp64 [len(names)]; the outcome, where there are rewards.
        """
        layout = group_layout(batches, self.num_generations, num_items)
        scored = list(zip(scores, batches, strict=True))
        rows = Rows(
            torch.cat([s.logp[: b.num_rows] for s, b in scored]),
            layout,
            ref_logp=_of_sequences(ref_logps, batches),
            row_kl=_of_sequences([s.row_kl for s in scores], batches),
            unrewarded=_unrewarded(batches, layout.offsets, self.reward_tokens),
        )
        own_answer = torch.cat([b.own_answer for b in batches])
        if self.reads_plain:
            rows = replace(
                rows,
                own_answer=own_answer,
                plain_logp=torch.cat([s.logp[b.num_rows :] for s, b in scored]),
                plain_offsets=plain_offsets(batches),
            )
        advantage = self.objective(rows, self.settings)
        coefficient, ratios = advantage.coefficient, None
        engine_logp = _of_sequences([batch.engine_logp for batch in batches], batches)
        if engine_logp is not None:
            ratio, weight = importance(rows.logp, engine_logp, self.importance_cap)
            coefficient = coefficient * weight
            ratio = ratio.double()
            ratios = torch.stack([ratio.nansum(), ratio.nan_to_num(nan=0.0).max()])
        entropy = torch.cat([s.entropy[: b.num_rows] for s, b in scored])
        sums = metrics.micro_batch_sums(
            advantage,
            own_logp=torch.where(own_answer, rows.logp.detach(), 0),
            entropy=entropy,
            offsets=layout.offsets,
            num_generations=self.num_generations,
        )
        outcome = Outcome(
            rollouts=[rollout for batch in batches for rollout in batch.sequences],
            reward=advantage.reward,
            advantage=advantage.advantage,
            importance=ratios,
        )
        counts = [batch.num_rows for batch in batches]
        kl_coefficients: Sequence[Tensor | None] = [None] * len(batches)
        if advantage.kl_coefficient is not None:
            kl_coefficients = advantage.kl_coefficient.split(counts)
        return list(zip(coefficient.split(counts), kl_coefficients, strict=True)), sums, outcome


class LikelihoodCoefficients:
    """Gives every row −1/num_items: the loss is the mean negative log-likelihood of all targets."""

    names = ("answer_logp", "sequences", "target_tokens")
    averages = staticmethod(metrics.likelihood_averages)
    exact_kl = False

    def __call__(
        self,
        batches: Sequence[Batch],
        scores: Sequence[Scores],
        ref_logps: Sequence[Tensor | None],
        num_items: int,
    ) -> tuple[list[RowCoefficients], Tensor, None]:
        """Return what `ObjectiveCoefficients` returns; there is no outcome."""
        sums = torch.zeros(len(self.names), dtype=torch.float64, device=scores[0].logp.device)
        for batch, score in zip(batches, scores, strict=True):
            answers = answer_sums(score.logp.detach(), batch)
            numbers = answers.new_tensor([len(answers), batch.num_rows])
            sums += torch.cat([answers.sum()[None], numbers])
        return [(-1 / num_items, None)] * len(batches), sums, None


Coefficients = ObjectiveCoefficients | LikelihoodCoefficients


def rows_loss(score: Scores, coefficients: RowCoefficients) -> Tensor:
    """Return Σ coefficient·logp, and Σ coefficient·row_kl where there is one, over a batch's rows.

    Rows of plain answers stand after those of the sequences, and have no coefficient.
    """
    coefficient, kl_coefficient = coefficients
    if isinstance(coefficient, float):
        loss = score.logp.sum() * coefficient
        # Every output takes part in the backward, in every process alike.
        return loss if score.row_kl is None else loss + score.row_kl.sum() * 0
    rows = slice(len(coefficient))
    loss = (coefficient * score.logp[rows]).sum()
    if score.row_kl is not None and kl_coefficient is not None:
        loss = loss + (kl_coefficient * score.row_kl[rows]).sum()
    return loss


def _unrewarded(batches: Sequence[Batch], offsets: Tensor, reward_tokens: str) -> Tensor | None:
    """Return which rows of answers the reward leaves out, bool [N]; None: it takes all."""
    if reward_tokens == "all":
        return None
    if reward_tokens == "template+answer":
        return torch.cat([batch.answer_end for batch in batches])
    own_answer = torch.cat([batch.own_answer for batch in batches])
    # A row is an answer's where it stands in an odd segment.
    is_answer = segment_of_rows(offsets, len(own_answer)) % 2 == 1
    return is_answer & ~own_answer


def _of_sequences(rows: Sequence[Tensor | None], batches: Sequence[Batch]) -> Tensor | None:
    """Return values of the rows of all batches' sequences; all batches have some, or none has."""
    there = [t[: b.num_rows] for t, b in zip(rows, batches, strict=True) if t is not None]
    return torch.cat(there) if there else None
