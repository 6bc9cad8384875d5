"""Check the ranges of numeric settings.

transformers does not check most of its own, so an infinite learning rate, or an ε of 0 where a
weight has no gradient, would show only in the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

_FP32 = torch.finfo(torch.float32)

_LEAST: dict[str, float] = {
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "num_train_epochs": 0,
    "max_grad_norm": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    # A weight without gradient moves by 0 / (0 + ε), which must not be 0 / 0.
    "adam_epsilon": _FP32.tiny,
    "eval_delay": 0,
    "seed": 0,
    "data_seed": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
}
_BELOW: dict[str, float] = {
    "adam_beta1": 1,
    "adam_beta2": 1,
    # The largest seed that numpy takes, plus one.
    "seed": 2**32,
    "data_seed": 2**32,
}


def check_numbers(args: TrainingArguments) -> None:
    """Raise ValueError for a number out of its range, and TypeError for another type."""
    for field in dataclasses.fields(TrainingArguments):
        for name, number in _floats(field.name, getattr(args, field.name)):
            if not abs(number) <= _FP32.max:
                raise ValueError(
                    f"{name}: expected a number that fp32 holds, up to {_FP32.max:.3g}, got "
                    f"{number}"
                )
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if value is None:
            continue
        at_least(name, value, least)
        if name in _BELOW and not value < _BELOW[name]:
            raise ValueError(f"{name}: expected less than {_BELOW[name]}, got {value}")
    for name, strategy, by_steps in (
        ("logging_steps", args.logging_strategy, IntervalStrategy.STEPS),
        ("eval_steps", args.eval_strategy, IntervalStrategy.STEPS),
        ("save_steps", args.save_strategy, SaveStrategy.STEPS),
    ):
        value = getattr(args, name)
        # Where eval_steps is missing or 0, transformers uses logging_steps.
        left_out = name == "eval_steps" and not value
        if strategy == by_steps and not left_out and not value > 0:
            raise ValueError(f"{name}: expected more than 0, got {value}")


def _floats(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield the floats of a setting with their names, including those in lists and mappings."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _floats(f"{name}: {key}", inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _floats(name, inner)


def at_least(name: str, value: float, least: float, why: str = "") -> None:
    """Raise for a setting that is not a number, or below `least`, NaN or infinite in fp32."""
    check_number(name, value)
    if not value >= least:
        raise ValueError(
            f"{name}: expected at least {least}{f' ({why})' if why else ''}, got {value}"
        )
    if value > _FP32.max:
        raise ValueError(f"{name}: expected at most {_FP32.max:.3g}, got {value}")


def above_zero(name: str, value: float) -> None:
    """Raise for a setting that is not a number above 0, or is outside fp32's normal numbers."""
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name}: expected more than 0, got {value}")
    if not _FP32.tiny <= value <= _FP32.max:
        raise ValueError(
            f"{name}: expected a number from {_FP32.tiny:.3g} to {_FP32.max:.3g}, as fp32 has "
            f"them, got {value}"
        )


def check_number(name: str, value: object) -> None:
    """Raise TypeError for a setting that is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
