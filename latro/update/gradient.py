"""One update's gradient: micro-batches through policy and reference, coefficients, backward.

This is one path for all trainers. Where rollouts come from, sampled or written, is the trainer's
choice; what their rows count for is that of the `Coefficients`.

In one piece a micro-batch's policy forward serves the coefficients and the gradient. A group over
the token budget comes in several pieces: all are scored without gradient first, because an
advantage needs its whole group, and then each is run once more for its gradient.

Where memory runs out, the token budget is halved and all of the update runs again
(`latro.update.out_of_memory`). An error in a backward leaves some parameters with the micro-batch's
gradient and some without, and nobody can tell which. To keep a copy of the gradient against that
would cost the memory that is short. So all gradients are dropped, those of the update's earlier
accumulation steps too, and these steps are run again from their rollouts, which are a few lists of
token ids. Nothing random is drawn after the rollouts: the numbers are those of a run with the
smaller budget from the start.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from latro.model.head_rows import Reference
from latro.model.initial import AdapterOff, InitialAdapter
from latro.model.packing import Batch, Group, MicroBatch, plan
from latro.model.scoring import Scorer, Scores
from latro.rollout.sequences import Rollout
from latro.run.stopwatch import Stopwatch
from latro.update.coefficients import NO_COEFFICIENTS, Coefficients, RowCoefficients, rows_loss
from latro.update.metrics import Outcome
from latro.update.out_of_memory import is_out_of_memory, smaller_budget
from latro.update.processes import agreed_pieces, backward, exchange


class Update:
    """Accumulates the gradient of a loss over groups of rollouts.

    Args:
        scorer: scores rows with the policy.
        coefficients: what the rows count for in the loss.
        accelerator: runs backwards and knows the engine.
        token_budget: positions of one micro-batch.

    Attributes:
        ref_scorer: of the reference model π_0; None where there is none.
        token_budget: at first as it was given; halved as often as memory runs out, and stays so.
        trunk_tokens: positions that the last call took through the policy's trunk with gradient,
            padding included.
        stopwatch: its laps are time_score and time_backward.
        outcomes: what became of the last call's sequences, by micro-batch, in this process.
    """

    def __init__(
        self,
        scorer: Scorer,
        coefficients: Coefficients,
        accelerator: Accelerator,
        token_budget: int,
    ) -> None:
        self.scorer = scorer
        self.coefficients = coefficients
        self.ref_scorer: Scorer | AdapterOff | InitialAdapter | None = None
        self.token_budget = token_budget
        self.accelerator = accelerator
        self.stopwatch = Stopwatch(accelerator.device)
        self.trunk_tokens = 0
        self.outcomes: list[Outcome] = []
        self._steps: list[tuple[Sequence[Group], int]] = []

    def __call__(self, groups: Sequence[Group], num_items: int) -> tuple[Tensor, Tensor]:
        """Add the gradient of `groups` to that of the update's earlier accumulation steps.

        Args:
            groups: rollouts of each prompt; empty if this process has no prompts. Objectives in
                `PLAIN_OBJECTIVES` need one more, plain rollout in each group.
            num_items: number of prompts, or for SFT of target tokens, that the loss of the whole
                update averages over, those of all processes.

        Returns:
            The loss, [], and the sums that `coefficients.names` names, fp64, both on the device.

        Raises:
            torch.OutOfMemoryError: a single sequence does not fit, or there are several processes.
        """
        self._steps.append((groups, num_items))
        result = None
        try:
            result = self._run(self._steps[-1:])
            while result is None:
                # Outside of the except block the traceback is freed, and with it its tensors.
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                planned = [micro for groups, _ in self._steps for micro in self.plan(groups)]
                pieces = [piece for micro in planned for piece in micro]
                packed = self.scorer.packed
                self.token_budget = smaller_budget(pieces, self.token_budget, packed=packed)
                self.scorer.caller.zero_grad(set_to_none=True)
                result = self._run(self._steps)
            return result
        finally:
            if result is None or self.accelerator.sync_gradients:
                self._steps.clear()

    def reset(self) -> None:
        """Forget the accumulation steps of an update that an error elsewhere ended."""
        self._steps.clear()

    def plan(self, groups: Sequence[Group]) -> list[MicroBatch]:
        """Return the micro-batches of `groups` within the token budget."""
        scorer = self.scorer
        return plan(groups, self.token_budget, packed=scorer.packed, boundary=scorer.boundary)

    def _run(self, steps: Sequence[tuple[Sequence[Group], int]]) -> tuple[Tensor, Tensor] | None:
        """Return the last step's loss and sums; None where memory ran out in one of the steps."""
        try:
            results = [self._accumulate(groups, num_items) for groups, num_items in steps]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.accelerator.num_processes > 1:
                raise torch.OutOfMemoryError(
                    f"{error}\nOut of memory with token_budget {self.token_budget}: with several "
                    "processes it cannot be halved under way; lower it"
                ) from error
            return None
        return results[-1]

    def _accumulate(self, groups: Sequence[Group], num_items: int) -> tuple[Tensor, Tensor]:
        """Run the micro-batches of one accumulation step, as often as every other process does."""
        planned = self.plan(groups)
        # Every process has its micro-batches of many pieces first, so that few fill up.
        planned.sort(key=len, reverse=True)
        agreed = agreed_pieces(list(map(len, planned)), self.accelerator)
        device = self.accelerator.device
        loss = torch.zeros((), device=device)
        sums = torch.zeros(len(self.coefficients.names), dtype=torch.float64, device=device)
        self.trunk_tokens = 0
        self.outcomes = []
        for slot, num_pieces in enumerate(agreed):
            pieces = planned[slot] if slot < len(planned) else []
            batches = [self.scorer.collate(piece) for piece in pieces]
            self.trunk_tokens += sum(batch.input_ids.numel() for batch in batches)
            fill = [self._filler() for _ in range(num_pieces - len(pieces))]
            backpropagate = self._in_one_piece if num_pieces == 1 else self._in_pieces
            last = slot == len(agreed) - 1
            micro_loss, micro_sums = backpropagate(batches, fill, num_items, last=last)
            loss += micro_loss
            sums += micro_sums
        return loss, sums

    def _in_one_piece(
        self, batches: list[Batch], fill: list[Batch], num_items: int, *, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Accumulate the gradient of a micro-batch of one batch, which runs forward once.

        Args:
            batches: the batch, where it holds whole groups.
            fill: the batch, where it fills up and counts for nothing.
            num_items: as in `__call__`.
            last: whether its backward exchanges gradients with other processes.

        Returns:
            The loss and the sums.
        """
        (batch,) = batches + fill
        with exchange(self.scorer.caller, self.accelerator, last=last):
            with self.stopwatch.lap("time_score"), self.accelerator.autocast():
                # π_0 first, while the policy's graph does not take memory yet.
                reference, ref_logp = self._reference(batch)
                score = self.scorer(batch, reference)
                (rows,), sums = self._row_coefficients(
                    batches, fill, num_items=num_items, scores=[score], ref_logps=[ref_logp]
                )
            with self.stopwatch.lap("time_backward"):
                return backward(rows_loss(score, rows), self.accelerator), sums

    def _in_pieces(
        self, batches: list[Batch], fill: list[Batch], num_items: int, *, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Accumulate the gradient of a micro-batch of several batches, which run forward twice.

        The arguments and results are those of `_in_one_piece`; `fill` runs behind `batches`.
        """
        every = batches + fill
        with self.stopwatch.lap("time_score"), self.accelerator.autocast():
            known = [self._reference(batch) for batch in every]
            references, ref_logps = [r for r, _ in known], [logp for _, logp in known]
            with torch.no_grad():
                scores = list(map(self.scorer, every, references))
            rows, sums = self._row_coefficients(
                batches, fill, num_items=num_items, scores=scores, ref_logps=ref_logps
            )
        loss = torch.zeros((), device=self.accelerator.device)
        for index, batch in enumerate(every):
            now = exchange(self.scorer.caller, self.accelerator, last=last and batch is every[-1])
            with self.stopwatch.lap("time_backward"), now:
                with self.accelerator.autocast():
                    score = self.scorer(batch, references[index])
                loss += backward(rows_loss(score, rows[index]), self.accelerator)
        return loss, sums

    @torch.no_grad()
    def _reference(self, batch: Batch) -> tuple[Reference | None, Tensor | None]:
        """Return π_0 at a batch's rows where the KL is exact; else log π_0 of them; or neither."""
        if self.ref_scorer is None:
            return None, None
        if self.coefficients.exact_kl:
            return self.ref_scorer.reference(batch), None
        return None, self.ref_scorer(batch).logp

    def _row_coefficients(
        self,
        batches: list[Batch],
        fill: list[Batch],
        *,
        num_items: int,
        scores: list[Scores],
        ref_logps: list[Tensor | None],
    ) -> tuple[list[RowCoefficients], Tensor]:
        """Return the coefficients of `batches`, then those of `fill`, and the sums."""
        rows: list[RowCoefficients] = []
        names = self.coefficients.names
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.accelerator.device)
        if batches:
            own = slice(len(batches))
            rows, sums, outcome = self.coefficients(
                batches, scores=scores[own], ref_logps=ref_logps[own], num_items=num_items
            )
            if outcome is not None:
                self.outcomes.append(outcome)
        return rows + [NO_COEFFICIENTS] * len(fill), sums

    def _filler(self) -> Batch:
        """Return the shortest batch there can be: one token is read, and two are predicted.

        Which token it is does not matter; every vocabulary has a first one.
        """
        return self.scorer.collate([[Rollout([0], [0], [0], answer_start=0, finished=True)]])
