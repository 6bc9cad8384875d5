"""An update that fits: where memory runs out, the token budget is halved and all of it run again.

An error in a backward leaves some parameters with the micro-batch's gradient and some without, and
nobody can tell which. To keep a copy of the gradient against that would cost the memory that is
short. So all gradients are dropped, those of the update's earlier accumulation steps too, and these
steps are run again from their rollouts, which are a few lists of token ids. Nothing random is drawn
after the rollouts: the numbers are those of a run with the smaller budget from the start.

With several processes the error is final. The others are in the middle of an exchange of gradients
or weights, which can be neither left nor finished without this one; to agree before every exchange
that all have got so far would cost each of them a wait for the device.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from latro.model.packing import Group, Size
from latro.update.accumulation import Accumulation

logger = logging.getLogger(__name__)


class FittingUpdate:
    """An update, with its token budget halved as often as memory runs out; it stays so."""

    def __init__(self, update: Accumulation) -> None:
        self.update = update
        self._steps: list[tuple[Sequence[Group], int]] = []

    def __call__(self, groups: Sequence[Group], count: int) -> tuple[Tensor, Tensor]:
        """As `Accumulation`: add the gradient of `groups` to that of the update's earlier steps.

        Raises:
            torch.OutOfMemoryError: a single sequence does not fit, or there are several processes.
        """
        self._steps.append((groups, count))
        result = None
        try:
            result = self._run(self._steps[-1:])
            while result is None:
                # Only here is the error gone, and with it the frames that held tensors.
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self._halve()
                self.update.scorer.caller.zero_grad(set_to_none=True)
                result = self._run(self._steps)
            return result
        finally:
            if result is None or self.update.accelerator.sync_gradients:
                self._steps.clear()

    def reset(self) -> None:
        """Forget the steps of an update that an error elsewhere ended."""
        self._steps.clear()

    def _run(self, steps: Sequence[tuple[Sequence[Group], int]]) -> tuple[Tensor, Tensor] | None:
        """The last step's loss and statistics; None: memory ran out in the middle of one."""
        try:
            results = [self.update(groups, count) for groups, count in steps]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.update.accelerator.num_processes > 1:
                raise torch.OutOfMemoryError(
                    f"{error}\nOut of memory with token_budget {self.update.token_budget}: with "
                    "several processes it cannot be halved under way; lower it"
                ) from error
            return None
        return results[-1]

    def _halve(self) -> None:
        pieces = [
            piece
            for groups, _ in self._steps
            for micro in self.update.plan(groups)
            for piece in micro.pieces
        ]
        if all(sum(map(len, piece)) == 1 for piece in pieces):
            raise torch.OutOfMemoryError(
                "out of memory with one sequence at a time: lower max_completion_length, shard or "
                "offload weights and optimiser, train an adapter, or turn on "
                "activation_checkpointing"
            )
        packed = self.update.scorer.packed
        largest = max(
            sum(map(Size.of, piece), start=Size()).tokens(packed=packed) for piece in pieces
        )
        # Where no piece used up the budget, half of it might change nothing.
        self.update.token_budget = max(1, min(self.update.token_budget, largest) // 2)
        logger.warning(
            "out of memory: token_budget is %d from here on, and the update runs again; pass it as "
            "--token_budget to start with it",
            self.update.token_budget,
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error tells that memory ran out: torch's, on CUDA and CPU, or the kernels'."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in message
        for sign in (
            "out of memory",
            "not enough memory",
            "DefaultCPUAllocator: can't allocate memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
            "LATRO_OUT_OF_MEMORY",
        )
    )
