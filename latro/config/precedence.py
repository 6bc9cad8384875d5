"""Which settings hold where several sources give some: a file that ships, a file, a command line.

A later source beats an earlier one, setting by setting. That is not all, since some settings
overrule others: `max_steps` overrules `num_train_epochs`, so that epochs asked for on the command
line would do nothing beside a file's updates. So where a source gives a setting, what earlier
sources gave gives way as well if it would overrule that setting, or belongs to what it replaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from latro.config.training import PeftArguments

# By a setting, those that would overrule it or say the same in another way.
_OVERRULED_BY: Mapping[str, tuple[str, ...]] = {
    "num_train_epochs": ("max_steps",),
    # Both are the warm-up's length; the first is gone from newer transformers.
    "warmup_ratio": ("warmup_steps",),
    "warmup_steps": ("warmup_ratio",),
    # The name of before, which transformers reads only where the new one is not given.
    "gradient_checkpointing": ("activation_checkpointing",),
    "gradient_checkpointing_kwargs": ("activation_checkpointing_kwargs",),
}
# Of these one at most may be on.
_EXCLUSIVE = (("bf16", "fp16"), ("fsdp", "deepspeed"))
# By a setting, those that mean nothing, or are an error, with another value of it.
_BELONGS_TO: Mapping[str, tuple[str, ...]] = {
    "lr_scheduler_type": ("lr_scheduler_kwargs",),
    "optim": ("optim_args", "optim_target_modules"),
    "fsdp": ("fsdp_config",),
    "rollout_engine": ("importance_cap",),
    "use_peft": tuple(f.name for f in dataclasses.fields(PeftArguments) if f.name != "use_peft"),
}
# An interval does nothing unless the strategy is to count steps.
_STRATEGIES = {
    "eval_steps": "eval_strategy",
    "save_steps": "save_strategy",
    "logging_steps": "logging_strategy",
}


def by_precedence(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that hold of `sources`, the weakest first."""
    settings: dict[str, Any] = {}
    for source in sources:
        for name in _giving_way(settings, source):
            settings.pop(name, None)
        settings.update(_strategies(source))
        settings.update(source)
    return settings


def _giving_way(settings: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[str]:
    for name, value in source.items():
        yield from _OVERRULED_BY.get(name, ())
        if name not in settings or settings[name] != value:
            yield from _BELONGS_TO.get(name, ())
        for pair in _EXCLUSIVE:
            if name in pair and value:
                yield from (other for other in pair if other != name)


def _strategies(source: Mapping[str, Any]) -> dict[str, str]:
    """Strategies that a source asks for by an interval, and does not name."""
    return {
        strategy: "steps"
        for interval, strategy in _STRATEGIES.items()
        if source.get(interval) is not None and strategy not in source
    }
