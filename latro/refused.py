"""Which of `transformers.TrainingArguments` mean nothing to a trainer of this package.

A trainer has a training step and an evaluation of its own, so that what the Trainer does in its own
would not be done; or it would change what the method is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import TrainingArguments

_COMPILED = "what would be compiled is the model's forward, and scoring has another in its place"
_LOSS = "the loss is the method's own"
_NOISE = "a rationale is scored by the policy that sampled it, and noise would be in scoring alone"
_MEMORY = "a step is the method's own; token_budget bounds its memory"
_TOKENS = "a row's tokens are not known before rationales are sampled"
_IN_BACKWARD = "it changes weights inside of a backward, of which an update has several"
_PRECISION = "evaluation runs in the precision of the training"
_PREDICTIONS = "evaluation samples completions and grades them; it has no batches of predictions"

# The reason, and the values that are refused where that is not every one but the default.
_REFUSED: dict[str, tuple[str, Sequence[str] | None]] = {
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
}


def check_refused(args: TrainingArguments) -> None:
    """Raises ValueError for an argument that would do nothing here, or harm."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name, (reason, values) in _REFUSED.items():
        # Some came with later versions of transformers, and went with others.
        value = getattr(args, name, None)
        if value and value != defaults[name] and (values is None or value in values):
            raise ValueError(f"{name}: expected it left out ({reason}), got {value!r}")
