"""Updates that are not finite are skipped; too many in a row stop the run.

One bad batch, or one overflow, would make every weight NaN for good. So before the optimiser steps,
the update's statistics and the norm of its whole gradient are looked at, and if any is NaN or
infinite the gradients are dropped: optimisers pass over parameters without one, and their state
stays as it was. The count of updates goes on, and the learning-rate schedule with it; but under
fp16 the schedule waits, as the Trainer has it for every update that the loss scale skips.

What one process finds holds for all. The norm is taken of what this process holds of the gradient,
in a pass over it, and not from the Trainer's clipping: so it comes with the statistics, in the one
wait for the device that a step has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """What `FiniteUpdates` saw at an accumulation step."""

    sums: list[float] | None
    """The statistics on the host; None: one of them, or the loss, is not finite."""
    skipped: bool
    """Whether the update ended here, and was skipped."""


class FiniteUpdates:
    """Looks at every accumulation step, and at the gradient after the last one of an update.

    Args:
        names: the names of the statistics, for messages.
        limit: number of updates in a row that are skipped; at one more the run stops.
        accelerator: tells which step is an update's last, and knows the other processes.
    """

    def __init__(self, names: Sequence[str], limit: int, accelerator: Accelerator) -> None:
        self.names = ("loss", *names, "gradient")
        self.limit = limit
        self.accelerator = accelerator
        self._in_a_row = 0
        self._faults: Tensor | None = None

    def reset(self) -> None:
        """Forget earlier updates, and an update that an error ended half-way."""
        self._in_a_row = 0
        self._faults = None

    def __call__(self, model: nn.Module, loss: Tensor, sums: Tensor, update: int) -> Finding:
        """Wait for the device, and drop the gradients if the update is not finite.

        Args:
            model: whose gradients they are.
            loss: [], of this step.
            sums: [len(names)], fp64, of this step.
            update: its number, for messages.

        Raises:
            FloatingPointError: `limit` updates before this one were not finite either.
        """
        last = self.accelerator.sync_gradients
        seen = torch.cat([loss.detach().to(sums)[None], sums])
        norm = self._gradient_norm(model) if last else None
        faults = torch.cat([seen, seen.new_zeros(1) if norm is None else norm.to(seen)[None]])
        faults = (~faults.isfinite()).to(seen)
        if self._faults is not None:
            faults += self._faults
        self._faults = None if last else faults
        if last:
            faults = self.accelerator.reduce(faults, reduction="sum")
        values = torch.cat([seen, faults]).tolist()
        seen_here, found = values[: len(seen)], values[len(seen) :]
        finite = all(map(math.isfinite, seen_here))
        skipped = last and any(found)
        if skipped:
            self._skip(model, update, [n for n, f in zip(self.names, found, strict=True) if f])
        elif last:
            self._in_a_row = 0
        return Finding(seen_here[1:] if finite else None, skipped)

    def _gradient_norm(self, model: nn.Module) -> Tensor | None:
        """Return the norm of what this process holds; None without gradients, or with a loss scale.

        With a loss scale infinite gradients belong to the search for it, and the scaler skips them.
        """
        gradients = list(_gradients(model))
        if self.accelerator.scaler is not None or not gradients:
            return None
        return get_total_norm(gradients)

    def _skip(self, model: nn.Module, update: int, faults: list[str]) -> None:
        self._in_a_row += 1
        what = f"update {update} is not finite ({', '.join(faults)})"
        # DeepSpeed steps in the last backward: it is too late to skip, and the weights are lost.
        stepped = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if stepped or self._in_a_row > self.limit:
            raise FloatingPointError(
                f"{what}, number {self._in_a_row} in a row. Check the model and the data for what "
                "is NaN or overflows, lower the learning rate, or take bf16 or fp32 where it is "
                "fp16. The last checkpoint is untouched"
            )
        if self.accelerator.is_main_process:
            logger.warning(
                "%s and skipped, %d in a row; max_skipped_updates is %d",
                what,
                self._in_a_row,
                self.limit,
            )
        if self.accelerator.scaler is None:
            model.zero_grad(set_to_none=True)
        else:
            # The scaler wants to see gradients, and skips those that are not finite.
            next(_gradients(model)).fill_(float("nan"))


def _gradients(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            yield grad.to_local() if isinstance(grad, DTensor) else grad
