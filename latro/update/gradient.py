"""One update's gradient: micro-batches through policy and reference, coefficients, backward.

In one piece a micro-batch's policy forward serves the coefficients and the gradient. A group over
the token budget comes in several pieces: all are scored without gradient first, because an
advantage needs its whole group, and then each is run once more for its gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from latro.config.training import LatroConfig
from latro.model.head_rows import Reference
from latro.model.initial import AdapterOff, InitialAdapter
from latro.model.packing import Batch, Group, group_layout, plain_offsets
from latro.model.scoring import Scorer, Scores
from latro.objectives import OBJECTIVES, PLAIN_OBJECTIVES, ObjectiveSettings, Rows
from latro.run.stopwatch import Stopwatch
from latro.update.accumulation import Accumulation
from latro.update.importance import importance
from latro.update.metrics import NAMES, Outcome, micro_batch_sums
from latro_kernels import GroupAdvantage


class Update(Accumulation):
    """Accumulates the gradient of the objective's loss over rollouts.

    Args:
        scorer: of the policy.
        ref_scorer: of π_0; None where β is 0.
        args: the settings.
        accelerator: runs backwards and knows the engine.
        stopwatch: its laps are time_score and time_backward.

    Attributes:
        importance: of the last update's rationale tokens, the sum of their importance ratios and
            the largest, fp64 [2]; None where the engine tells no log-probs.
        outcomes: of the last call's sequences, one a micro-batch; each process has its own.
    """

    def __init__(
        self,
        scorer: Scorer,
        ref_scorer: Scorer | AdapterOff | InitialAdapter | None,
        args: LatroConfig,
        accelerator: Accelerator,
        stopwatch: Stopwatch,
    ) -> None:
        super().__init__(scorer, args.token_budget, accelerator, stopwatch)
        self.ref_scorer = ref_scorer
        self.args = args
        self.objective = OBJECTIVES[args.objective]
        self.settings = ObjectiveSettings(
            beta=args.beta,
            answer_weight=args.answer_weight,
            kl=args.kl,
            unfinished=args.unfinished,
            rlpr_min_std=args.rlpr_min_std,
            backend=args.backend,
        )
        self.importance: Tensor | None = None
        self.outcomes: list[Outcome] = []

    def __call__(self, groups: Sequence[Group], num_groups: int) -> tuple[Tensor, Tensor]:
        """Add the gradient of `groups` to the parameters'.

        Args:
            groups: K rollouts of each prompt, none where other processes have all prompts; one
                more, plain, where the objective is one of `PLAIN_OBJECTIVES`.
            num_groups: prompts of the whole update, over all processes; the loss is their mean.

        Returns:
            The loss, [], and the sums that `latro.update.metrics.NAMES` names, fp64.
        """
        planned = self.plan(groups)
        planned.sort(key=lambda micro: len(micro.pieces), reverse=True)
        counts = self._agree([len(micro.pieces) for micro in planned])
        loss = torch.zeros((), device=self.args.device)
        sums = torch.zeros(len(NAMES), dtype=torch.float64, device=self.args.device)
        self.trunk_tokens = 0
        self.importance = None
        self.outcomes = []
        for slot, count in enumerate(counts):
            pieces = planned[slot].pieces if slot < len(planned) else []
            batches = [self.scorer.collate(piece) for piece in pieces]
            self.trunk_tokens += sum(batch.input_ids.numel() for batch in batches)
            fill = [self._filler() for _ in range(count - len(pieces))]
            last = slot == len(counts) - 1
            micro_loss, micro_sums, advantage = self._micro_batch(batches, fill, num_groups, last)
            if advantage is not None:
                rollouts = [r for r in planned[slot].rollouts if not r.plain]
                self.outcomes.append(Outcome(rollouts, advantage.reward, advantage.advantage))
            loss += micro_loss
            sums += micro_sums
        return loss, sums

    def _micro_batch(
        self, batches: list[Batch], fill: list[Batch], num_groups: int, last: bool
    ) -> tuple[Tensor, Tensor, GroupAdvantage | None]:
        """Accumulate the gradient of whole groups; `fill` runs behind them and counts for nothing.

        `last`: gradients are exchanged with other processes at its last backward.
        """
        every = batches + fill
        advantage: GroupAdvantage | None = None
        whole = len(every) == 1
        loss = torch.zeros((), device=self.args.device)
        sums = torch.zeros(len(NAMES), dtype=torch.float64, device=self.args.device)
        with contextlib.ExitStack() as stack:
            if whole:
                stack.enter_context(self._exchange(last))
            with self.stopwatch.lap("time_score"), self.accelerator.autocast():
                # π_0 first, while the policy's graph does not take memory yet.
                references = [self._reference(batch) for batch in every]
                ref_logps = [self._ref_logp(batch) for batch in every]
                with torch.set_grad_enabled(whole):
                    scores = [
                        self.scorer(batch, reference)
                        for batch, reference in zip(every, references, strict=True)
                    ]
                coefficients = [_Coefficients(None, None)] * len(every)
                if batches:
                    own = slice(len(batches))
                    advantage, sums = self._advantage(
                        batches, scores[own], ref_logps[own], num_groups
                    )
                    coefficients[own] = _by_batch(advantage, batches)

            for index, batch in enumerate(every):
                with self.stopwatch.lap("time_backward"), contextlib.ExitStack() as inner:
                    score = scores[index]
                    if not whole:
                        inner.enter_context(self._exchange(last and index == len(every) - 1))
                        with self.accelerator.autocast():
                            score = self.scorer(batch, references[index])
                    loss += self._backward(coefficients[index].loss(score))
        return loss, sums, advantage

    def _advantage(
        self,
        batches: Sequence[Batch],
        scores: Sequence[Scores],
        ref_logps: Sequence[Tensor | None],
        num_groups: int,
    ) -> tuple[GroupAdvantage, Tensor]:
        """Coefficients of all rows of a micro-batch, and its statistics."""
        K = self.args.num_generations
        layout = group_layout(batches, K, num_groups)
        scored = list(zip(scores, batches, strict=True))
        rows = Rows(
            torch.cat([s.logp[: b.num_rows] for s, b in scored]),
            layout,
            ref_logp=_of_sequences(ref_logps, batches),
            row_kl=_of_sequences([s.row_kl for s in scores], batches),
        )
        if self.args.objective in PLAIN_OBJECTIVES:
            plain = torch.cat([s.logp[b.num_rows :] for s, b in scored])
            rows = replace(
                rows,
                own_answer=torch.cat([b.own_answer for b in batches]),
                plain_logp=plain,
                plain_offsets=plain_offsets(batches),
            )
        advantage = self.objective(rows, self.settings)
        engine_logp = _of_sequences([batch.engine_logp for batch in batches], batches)
        if engine_logp is not None:
            weight = self._importance_weight(rows.logp, engine_logp)
            advantage = replace(advantage, coefficient=advantage.coefficient * weight)
        entropy = torch.cat([s.entropy[: b.num_rows] for s, b in scored])
        return advantage, micro_batch_sums(advantage, entropy, layout.offsets, K)

    def _importance_weight(self, logp: Tensor, engine_logp: Tensor) -> Tensor:
        """Of each row's coefficient; its ratio is counted in `importance`."""
        ratio, weight = importance(logp, engine_logp, self.args.importance_cap)
        total = ratio.double().nansum()
        largest = ratio.double().nan_to_num(nan=0.0).max()
        if self.importance is not None:
            total, largest = total + self.importance[0], largest.maximum(self.importance[1])
        self.importance = torch.stack([total, largest])
        return weight

    def _reference(self, batch: Batch) -> Reference | None:
        """π_0 at the rows of a batch, where the KL is exact."""
        if self.ref_scorer is None or self.args.kl != "exact":
            return None
        return self.ref_scorer.reference(batch)

    @torch.no_grad()
    def _ref_logp(self, batch: Batch) -> Tensor | None:
        """log π_0 of the rows of a batch, where the KL is of sampled tokens."""
        if self.ref_scorer is None or self.args.kl == "exact":
            return None
        return self.ref_scorer(batch).logp


@dataclass(frozen=True)
class _Coefficients:
    """Of the rows of a batch's sequences, which come before those of plain answers.

    None and None: the batch fills up, and counts for nothing.
    """

    logp: Tensor | None
    row_kl: Tensor | None

    def loss(self, score: Scores) -> Tensor:
        if self.logp is None:
            loss = score.logp.sum() * 0
            return loss if score.row_kl is None else loss + score.row_kl.sum() * 0
        rows = slice(len(self.logp))
        loss = (self.logp * score.logp[rows]).sum()
        if score.row_kl is not None and self.row_kl is not None:
            loss = loss + (self.row_kl * score.row_kl[rows]).sum()
        return loss


def _by_batch(advantage: GroupAdvantage, batches: Sequence[Batch]) -> list[_Coefficients]:
    rows = [batch.num_rows for batch in batches]
    logp = advantage.coefficient.split(rows)
    if advantage.kl_coefficient is None:
        return [_Coefficients(c, None) for c in logp]
    row_kl = advantage.kl_coefficient.split(rows)
    return [_Coefficients(c, k) for c, k in zip(logp, row_kl, strict=True)]


def _of_sequences(rows: Sequence[Tensor | None], batches: Sequence[Batch]) -> Tensor | None:
    """Values of the rows of all batches' sequences; for all batches there are some, or for none."""
    there = [t[: b.num_rows] for t, b in zip(rows, batches, strict=True) if t is not None]
    return torch.cat(there) if there else None
