"""LongRoPE: a model with two sets of rotary frequencies uses one set for a whole batch."""

from __future__ import annotations

from transformers import PreTrainedModel


def long_rope_boundary(model: PreTrainedModel) -> int | None:
    """Return up to how many tokens a LongRoPE model uses its short frequencies; None: it has none.

    A longer sequence uses the long frequencies at all of its positions, and so does every sequence
    in the same batch.

    Raises:
        ValueError: the model's layers have different boundaries.
    """
    config = model.config.get_text_config()
    # One dict for all layers or one for each type of layer; a model may have no rotary embedding.
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
