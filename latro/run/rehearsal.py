"""Try before the first update what could fail late in a run: schedule, saving, disks of processes.

Otherwise a generation config that transformers refuses to save, or a learning rate that is divided
by zero in the last update, would cost the whole training.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from latro.errors import told
from latro.model.adapters import has_adapter
from latro.run.checkpoints import of_all_processes
from latro.run.folder import LOCK_FILE
from latro.terminal import one_line

# Computing one learning rate takes about a microsecond.
_MOST_UPDATES = 1_000_000

_logger = logging.getLogger(__name__)


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


def check_optimizer_settings(
    args: TrainingArguments, model: Any, settings_of: Callable[..., tuple[Any, dict[str, Any]]]
) -> None:
    """Refuse arguments of an optimiser that it does not read, which the Trainer passes over.

    An argument is read where another value of it makes other settings, or an error.

    Args:
        args: the run's settings.
        model: whose weights are trained.
        settings_of: returns the optimiser's class and settings, of `args` and `model`.

    Raises:
        ValueError: it does not read one of `optim_args`, or `optim_target_modules`.
        ImportError, TypeError, ValueError: it cannot be made with these settings.
    """

    def made(**changed: Any) -> Any:
        tried = copy.copy(args)
        for name, value in changed.items():
            setattr(tried, name, value)
        kind, settings = settings_of(tried, model)
        groups = settings.pop("params", [])
        # Weights are the same in all groups, whatever the arguments.
        return kind, settings, [{k: v for k, v in g.items() if k != "params"} for g in groups]

    def read(**changed: Any) -> bool:
        try:
            return made(**changed) != given
        except Exception:
            # What reads the value may raise any error at it.
            return True

    given = made()
    if args.optim_target_modules is not None and not read(optim_target_modules=None):
        raise ValueError(f"it has no target modules, got {args.optim_target_modules!r}")
    pairs = [pair.split("=") for pair in (args.optim_args or "").replace(" ", "").split(",")]
    for name, value in (pair for pair in pairs if len(pair) == 2):
        others = [f"{n}={v}" for n, v in pairs if n != name]
        values = [f"{name}={other}" for other in (f"{value}1", "true", "false", "1")]
        if not any(read(optim_args=",".join([*others, v])) for v in values):
            raise ValueError(f"it has no argument {name}")


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


def try_disks(args: TrainingArguments) -> None:
    """Let every process of several write into the output folder, where process 0 holds the lock.

    Each has a file of its own in a checkpoint.

    Raises:
        ValueError: one cannot; raised in all processes.
    """
    if args.world_size == 1:
        return
    folder = Path(str(args.output_dir))
    # Who sees no lock looks at another disk.
    apart = not (folder / LOCK_FILE).exists()
    refused = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        refused = f"output_dir: process {args.process_index} cannot write there: {told(error)}"
    errors = [error for error in of_all_processes(refused) if error is not None]
    if errors:
        raise ValueError("; ".join(errors))
    if apart and not args.should_save and args.local_process_index == 0:
        _logger.warning(
            "output_dir: %s of process %d is on another disk than that of process 0, and its "
            "checkpoints will lack what process 0 saves; name a folder that all nodes see, or pass "
            "--save_on_each_node true",
            folder,
            args.process_index,
        )
