"""What is called and overridden of TRL's trainers, checked by name and arguments.

These methods are private to TRL, so another version may have others.
"""

from __future__ import annotations

import inspect
from typing import Any

import trl
from trl import GRPOTrainer, RLOOTrainer

SCORES = (
    "model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss "
    "pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles "
    "image_sizes token_type_ids mm_token_type_ids image_position_ids"
)
"""Arguments of `_get_per_token_logps_and_entropies`."""


def check_seam(name: str, trainer: Any, **methods: str) -> None:
    """Raise unless a trainer is TRL's, with methods of the arguments that we know.

    Args:
        name: who asks, for the message.
        trainer: the trainer.
        methods: names of methods, and their arguments but self, in one string.

    Raises:
        TypeError: the trainer is neither an RLOOTrainer nor a GRPOTrainer.
        RuntimeError: this version of TRL has other methods.
    """
    kind = next((c for c in type(trainer).__mro__ if c in (RLOOTrainer, GRPOTrainer)), None)
    if kind is None:
        raise TypeError(
            f"{name}: expected an RLOOTrainer or a GRPOTrainer of TRL's, or one that inherits of "
            f"them, got {type(trainer).__name__}"
        )
    for method, known in methods.items():
        function = getattr(kind, method, None)
        found = "" if function is None else " ".join(list(inspect.signature(function).parameters))
        if found != f"self {known}":
            raise RuntimeError(
                f"{name}: TRL {trl.__version__} has another {kind.__name__} than that of TRL 1.16, "
                f"which this version of latro knows: expected {method}({known}), got "
                f"{f'({found})' if found else 'none'}"
            )


def trainer_of(log_metric: Any) -> Any:
    """Return whose method `log_metric` is; None where it is nobody's.

    TRL hands reward functions texts and tokens, and this method of the trainer's. There is no other
    way from them to the trainer, which has the prompts' tokens, the precision and the processes.
    """
    return getattr(log_metric, "__self__", None)
