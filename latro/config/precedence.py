"""Decide which settings hold where a file that ships, a user's file and a command line differ.

A later source wins over an earlier one, setting by setting. That is not enough, since some settings
overrule others: `max_steps` overrules `num_train_epochs`, so that a number of epochs on the command
line would have no effect beside `max_steps` in a file. So where a source gives a setting, earlier
settings are dropped too if they would overrule it or belong to the value that it replaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from latro.config.model import PeftArguments

# For each setting, those that would overrule it or mean the same.
_OVERRULED_BY: Mapping[str, tuple[str, ...]] = {
    "num_train_epochs": ("max_steps",),
    # Both are the length of the warm-up; newer transformers lack the first.
    "warmup_ratio": ("warmup_steps",),
    "warmup_steps": ("warmup_ratio",),
    # The old name; transformers reads it only where the new one is not given.
    "gradient_checkpointing": ("activation_checkpointing",),
    "gradient_checkpointing_kwargs": ("activation_checkpointing_kwargs",),
}
# At most one of each pair may be on.
_EXCLUSIVE = (("bf16", "fp16"), ("fsdp", "deepspeed"), ("load_in_4bit", "load_in_8bit"))
_OF_VLLM_MODE = ("vllm_gpu_memory_utilization", "vllm_max_model_length")
# For each setting, those that have no meaning or are an error with another value of it.
_BELONGS_TO: Mapping[str, tuple[str, ...]] = {
    "lr_scheduler_type": ("lr_scheduler_kwargs",),
    "optim": ("optim_args", "optim_target_modules"),
    "metric_for_best_model": ("greater_is_better",),
    "model_name_or_path": ("model_revision", "gguf_file"),
    "dataset_name": ("dataset_config", "dataset_path", "grader"),
    "fsdp": ("fsdp_config",),
    "load_in_4bit": ("bnb_4bit_quant_type", "use_bnb_nested_quant"),
    "load_in_8bit": ("bnb_4bit_quant_type", "use_bnb_nested_quant"),
    "rollout_engine": (
        *("importance_cap", "async_rollouts", "rollout_dtype", "rollout_compile"),
        *("vllm_mode", "vllm_sync", "vllm_url", "vllm_weights_dir", *_OF_VLLM_MODE),
    ),
    "vllm_mode": (
        *("vllm_sync", "async_rollouts", "vllm_url", "vllm_weights_dir"),
        *_OF_VLLM_MODE,
    ),
    "use_peft": tuple(f.name for f in dataclasses.fields(PeftArguments) if f.name != "use_peft"),
}
NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""The schedules of transformers that do not read `warmup_steps`."""
# An interval has an effect only where the strategy is "steps".
_STRATEGIES = {
    "eval_steps": "eval_strategy",
    "save_steps": "save_strategy",
    "logging_steps": "logging_strategy",
}


def by_precedence(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that hold, from `sources` in order, the weakest first."""
    settings: dict[str, Any] = {}
    # The number of the source that each is from.
    given_by: dict[str, int] = {}
    for number, source in enumerate(sources):
        for name in list(_giving_way(settings, given_by, source)):
            settings.pop(name, None)
        given = {**_strategies(source), **source}
        settings.update(given)
        given_by.update(dict.fromkeys(given, number))
    return settings


def _giving_way(
    settings: Mapping[str, Any], given_by: Mapping[str, int], source: Mapping[str, Any]
) -> Iterator[str]:
    def belonging_to(name: str) -> Iterator[str]:
        # What is given later than the setting that it belongs to is for the one that follows.
        for other in _BELONGS_TO.get(name, ()):
            if other in settings and given_by[other] <= given_by[name]:
                yield other

    for name, value in source.items():
        yield from _OVERRULED_BY.get(name, ())
        if name in settings and settings[name] != value:
            yield from belonging_to(name)
        if name == "lr_scheduler_type" and value in NO_WARMUP:
            yield "warmup_steps"
        for pair in _EXCLUSIVE:
            if name in pair and value:
                for other in pair:
                    if other != name and other in settings:
                        yield from (other, *belonging_to(other))


def _strategies(source: Mapping[str, Any]) -> dict[str, str]:
    """Return the strategies that a source implies by an interval without naming them."""
    return {
        strategy: "steps"
        for interval, strategy in _STRATEGIES.items()
        if source.get(interval) is not None and strategy not in source
    }
