"""LongRoPE: a model with two sets of rotary frequencies takes one set for all that it is handed."""

from __future__ import annotations

from transformers import PreTrainedModel


def long_rope_boundary(model: PreTrainedModel) -> int | None:
    """Tokens up to which a LongRoPE model takes its short rotary frequencies; None of any other.

    A sequence of more tokens takes the long ones at each of its positions, and so does every
    sequence that the model is handed beside it.

    Raises:
        ValueError: its layers have boundaries that differ.
    """
    config = model.config.get_text_config()
    # Of all layers, or a dict for each type of layer; a model may have no rotary embedding at all.
    parameters = getattr(config, "rope_parameters", None) or {}
    boundaries = {
        rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        for rope in (parameters, *parameters.values())
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope"
    }
    if len(boundaries) > 1:
        raise ValueError(
            "model: expected LongRoPE with one original_max_position_embeddings, got "
            f"{sorted(boundaries)}"
        )
    return boundaries.pop() if boundaries else None
