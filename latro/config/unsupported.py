"""Refuse those of `transformers.TrainingArguments` that this package's trainers do not support.

The trainers have a training step and an evaluation of their own, so settings of the Trainer's step
and evaluation would have no effect; others would change the method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

_COMPILED = "packed rows have segments of their own in every batch, and would compile for each"
_LOSS = "the loss is the method's own"
_NOISE = "a rationale is scored by the policy that sampled it, and noise would be in scoring alone"
_MEMORY = "a step is the method's own; token_budget bounds its memory"
_TOKENS = "a row's tokens are not known before rationales are sampled"
_IN_BACKWARD = "it changes weights inside of a backward, of which an update has several"
_PRECISION = "evaluation runs in the precision of the training"
_PREDICTIONS = "evaluation samples completions and grades them; it has no batches of predictions"
_LIGER = "it changes the model's layers after scoring was compared with the model's own logits"
_SIGNALS = "SIGTERM, SIGINT and SIGHUP are answered already, by a whole checkpoint after the update"
_CACHE = "every forward of the trainer says itself whether it keeps a cache"
_MEAN = "an update is the mean over the prompts of all processes"

# The reason, and the values that are refused; None: every value but the default.
_REFUSED: dict[str, tuple[str, Sequence[str | bool] | None]] = {
    "torch_compile": (_COMPILED, None),
    "torch_compile_backend": (_COMPILED, None),
    "torch_compile_mode": (_COMPILED, None),
    "label_smoothing_factor": (_LOSS, None),
    "neftune_noise_alpha": (_NOISE, None),
    "torch_empty_cache_steps": (_MEMORY, None),
    "include_num_input_tokens_seen": (_TOKENS, None),
    "train_sampling_strategy": (_TOKENS, ("group_by_length", "batch_rebalance")),
    "optim": (
        _IN_BACKWARD,
        (
            *("lomo", "adalomo", "apollo_adamw_layerwise", "galore_adamw_layerwise"),
            *("galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
        ),
    ),
    "bf16_full_eval": (_PRECISION, None),
    "fp16_full_eval": (_PRECISION, None),
    "prediction_loss_only": (_PREDICTIONS, None),
    "eval_use_gather_object": (_PREDICTIONS, None),
    "eval_accumulation_steps": (_PREDICTIONS, None),
    "include_for_metrics": (_PREDICTIONS, None),
    "batch_eval_metrics": (_PREDICTIONS, None),
    "label_names": (_PREDICTIONS, None),
    "do_predict": (_PREDICTIONS, None),
    "eval_do_concat_batches": (_PREDICTIONS, (False,)),
    "length_column_name": (_TOKENS, None),
    "use_liger_kernel": (_LIGER, None),
    "liger_kernel_config": (_LIGER, None),
    "enable_jit_checkpoint": (_SIGNALS, None),
    "use_cache": (_CACHE, None),
    "average_tokens_across_devices": (_MEAN, (False,)),
}


# Fields of the Trainer's `accelerator_config`: the only supported value, and why.
_LOADER: dict[str, tuple[bool, str]] = {
    "split_batches": (False, "per_device_train_batch_size is of each device"),
    "dispatch_batches": (
        False,
        "what is sent from process to process is tensors, and rows are text",
    ),
    "use_seedable_sampler": (
        True,
        "the order of prompts would depend on the number of processes, and be lost on resume",
    ),
}


def check_loader(config: AcceleratorConfig) -> None:
    """Raise ValueError for settings of data loading that this package does not support."""
    for name, (expected, reason) in _LOADER.items():
        value = getattr(config, name)
        if bool(value) != expected and value is not None:
            raise ValueError(
                f"accelerator_config: expected {name} left out ({reason}), got {value!r}"
            )


def check_refused(args: TrainingArguments) -> None:
    """Raise ValueError for an argument that would have no effect here, or do harm."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name, (reason, values) in _REFUSED.items():
        # Some arguments exist only in some versions of transformers.
        if name not in defaults:
            continue
        value = getattr(args, name)
        if value in values if values is not None else value and value != defaults[name]:
            raise ValueError(f"{name}: expected it left out ({reason}), got {value!r}")
    split = args.parallelism_config
    if split is not None and split.non_data_parallel_size > 1:
        raise ValueError(
            "parallelism_config: expected processes that share the data alone, since each takes "
            f"whole sequences through whole layers, got {split}"
        )
