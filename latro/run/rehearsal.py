"""Try before the first update what could fail late in a run: the schedule and saving the model.

Otherwise a generation config that transformers refuses to save, or a learning rate that is divided
by zero in the last update, would cost the whole training.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.model.adapters import has_adapter
from latro.terminal import one_line

# Computing one learning rate takes about a microsecond.
_MOST_UPDATES = 1_000_000


def try_saving(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> set[str]:
    """Save all files but the weights into a temporary folder, and return the files' names.

    Raises:
        ValueError: something cannot be saved; the message says what and why.
    """
    parts: list[tuple[str, Callable[[str], object]]] = []
    if has_adapter(model):
        parts += [("adapter", config.save_pretrained) for config in model.peft_config.values()]
    elif isinstance(model, PreTrainedModel):
        parts.append(("config", model.config.save_pretrained))
        if model.can_generate():
            parts.append(("generation config", model.generation_config.save_pretrained))
    if tokenizer is not None:
        parts.append(("tokenizer", tokenizer.save_pretrained))
    with tempfile.TemporaryDirectory() as folder:
        for part, save in parts:
            try:
                save(folder)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise ValueError(
                    f"model: its {part} cannot be saved, and so the trained model could not be "
                    f"either: {one_line(str(error))}"
                ) from error
        return {path.name for path in Path(folder).iterdir()}


def try_schedule(scheduler: Any, num_updates: int, name: str) -> None:
    """Compute every learning rate of a schedule; one that follows a metric has none yet.

    Raises:
        ValueError: a rate is negative, NaN, or too large for fp32.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    stride = max(1, num_updates // _MOST_UPDATES)
    largest = torch.finfo(torch.float32).max
    for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        for update in itertools.chain(range(0, num_updates, stride), [num_updates]):
            try:
                rate = float(base * factor(update))
            except (ArithmeticError, ValueError, TypeError) as error:
                raise ValueError(
                    f"lr_scheduler_type: {name} has no learning rate after update {update}: "
                    f"{error!r}; see lr_scheduler_kwargs and warmup_steps"
                ) from error
            if not (math.isfinite(rate) and 0 <= rate <= largest):
                raise ValueError(
                    f"lr_scheduler_type: expected learning rates from 0 to {largest:.3g}, and "
                    f"{name} gives {rate} after update {update}; see lr_scheduler_kwargs"
                )
