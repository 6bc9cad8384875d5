"""Micro-batches within a token budget, their backwards, and what several processes agree on.

Over several processes each has groups of its own, whole ones, and the engine averages the
gradients. An epoch's last batch may have none for some. Every backward exchanges gradients, and
where weights are sharded every forward gathers them, so all processes must call these equally
often: they agree on the number of pieces, and who has fewer fills up with tiny ones that count for
nothing.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from latro.model.packing import Batch, Group, MicroBatch, plan
from latro.model.scoring import Scorer
from latro.rollout.sequences import Rollout
from latro.run.stopwatch import Stopwatch


class Accumulation(ABC):
    """Accumulates the gradient of a loss over groups of sequences.

    Args:
        scorer: of the policy.
        token_budget: positions of one micro-batch.
        accelerator: runs backwards and knows the engine.
        stopwatch: its laps are time_score and time_backward.

    Attributes:
        token_budget: at first as it was given.
        trunk_tokens: positions that the last call took through the policy's trunk with gradient,
            padding included.
    """

    def __init__(
        self, scorer: Scorer, token_budget: int, accelerator: Accelerator, stopwatch: Stopwatch
    ) -> None:
        self.scorer = scorer
        self.token_budget = token_budget
        self.accelerator = accelerator
        self.stopwatch = stopwatch
        self.trunk_tokens = 0

    @abstractmethod
    def __call__(self, groups: Sequence[Group], count: int) -> tuple[Tensor, Tensor]:
        """Add the gradient of `groups` to the parameters'.

        Args:
            groups: sequences of each prompt; none where other processes have all of them.
            count: what the loss of the whole update is divided by, over all processes.

        Returns:
            The loss, [], and sums for the log, fp64 [number of them], both on the device.
        """

    def plan(self, groups: Sequence[Group]) -> list[MicroBatch]:
        """The micro-batches of `groups` within the token budget."""
        return plan(
            groups,
            self.token_budget,
            packed=self.scorer.packed,
            boundary=self.scorer.boundary,
        )

    def _filler(self) -> Batch:
        """Return the shortest there can be: one token that is read and two that are predicted.

        Which token it is does not matter; every vocabulary has a first one.
        """
        return self.scorer.collate([[Rollout([0], [0], [0], answer_start=0, finished=True)]])

    def _agree(self, pieces: list[int]) -> list[int]:
        """How many pieces each micro-batch has in every process, those that fill up included."""
        if self.accelerator.num_processes == 1:
            return pieces
        return [max(slot) for slot in zip_longest(*gather_object([pieces]), fillvalue=0)]

    @contextlib.contextmanager
    def _exchange(self, last: bool) -> Iterator[None]:
        """Around a forward and its backward: gradients are exchanged by the last one alone.

        FSDP exchanges at each, since a gradient that waits for the last is not sharded.
        """
        kind = self.accelerator.distributed_type
        if last or kind == DistributedType.FSDP:
            yield
        elif kind == DistributedType.DEEPSPEED:
            # accelerate steps DeepSpeed's optimiser in the backward that exchanges gradients.
            given = self.accelerator.sync_gradients
            self.accelerator.sync_gradients = False
            try:
                yield
            finally:
                self.accelerator.sync_gradients = given
        else:
            with self.accelerator.no_sync(self.scorer.caller):
                yield

    def _backward(self, loss: Tensor) -> Tensor:
        # Processes average their gradients, and the Trainer their losses. These are shares of one
        # loss, of which both have to be the sum.
        loss = loss * self.accelerator.num_processes
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        # The loss is averaged over accumulation steps already.
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))
        return loss.detach()
