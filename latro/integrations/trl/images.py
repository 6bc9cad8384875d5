"""Answers after prompts with images, scored by TRL's own forward.

Images are not packed: each completion goes through with its own copy of the prompt and its images,
as TRL scores it, with the answer behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from trl.data_utils import apply_chat_template

from latro.rollout.sequences import Rollout

_TYPES = ("token_type_ids", "mm_token_type_ids")
"""What processors return for each token; what else they return is of images."""
_OF_IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "image_sizes",
    "image_position_ids",
    "num_images",
)


def image_inputs(
    trainer: Any, prompts: Sequence[Any], images: Sequence[Any], prompt_ids: Sequence[list[int]]
) -> dict[str, Any]:
    """Return what the trainer's processor makes of prompts and their images.

    Raises:
        NotImplementedError: the processor makes other tokens of them than `prompt_ids`, as it does
            without tools; or it cuts images into tiles, which TRL counts in ways of its own for
            each model.
    """
    texts = [
        apply_chat_template(
            {"prompt": prompt}, trainer.processing_class, **trainer.chat_template_kwargs
        )["prompt"]
        for prompt in prompts
    ]
    made = trainer.processing_class(
        images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"
    ).to(trainer.accelerator.device)
    read = [
        ids[seen].tolist()
        for ids, seen in zip(made["input_ids"], made["attention_mask"].bool(), strict=True)
    ]
    if read != [list(ids) for ids in prompt_ids]:
        raise NotImplementedError(
            "prompts: expected images in prompts without tools for AnswerLikelihood, got prompts "
            "whose tokens are others where the processor is not told of the tools"
        )
    counts = [len(of_prompt or ()) for of_prompt in images]
    pixels = made["pixel_values"]
    if "spatial_shapes" in made or (pixels.ndim == 4 and len(pixels) != sum(counts)):
        raise NotImplementedError(
            "prompts: expected images that AnswerLikelihood need not count the tiles of, got "
            f"{len(pixels)} pixel_values of {sum(counts)} images"
        )
    known = {name: value for name, value in made.items() if name in (*_TYPES, *_OF_IMAGES)}
    return known | {"num_images": counts}


def image_inputs_of(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the same from what TRL hands to its loss; None where there are no images."""
    if "pixel_values" not in batch:
        return None
    found = {name: batch[name] for name in _OF_IMAGES if name in batch}
    width = batch["prompt_ids"].shape[1]
    return found | {name: batch[name][:, :width] for name in _TYPES if name in batch}


def image_rows(
    trainer: Any, model: nn.Module, rollouts: Sequence[Rollout], inputs: Mapping[str, Any]
) -> list[Tensor]:
    """Return log-probs, fp32 [tokens] each, at the rows that `answer_rows` leaves of rollouts.

    Args:
        trainer: scores by `_get_per_token_logps_and_entropies`.
        model: what it scores with.
        rollouts: a sequence for each prompt of `inputs`.
        inputs: of `image_inputs`.
    """
    branches = [rollout.rationale_ids + rollout.answer_ids for rollout in rollouts]
    before = max(len(rollout.prompt_ids) for rollout in rollouts)
    behind = max(map(len, branches))
    device = trainer.accelerator.device
    ids = torch.full((len(rollouts), before + behind), trainer._tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, (rollout, branch) in enumerate(zip(rollouts, branches, strict=True)):
        whole = rollout.prompt_ids + branch
        place = slice(before - len(rollout.prompt_ids), before + len(branch))
        ids[row, place], mask[row, place] = torch.tensor(whole), 1
    given = {name: value for name, value in inputs.items() if name not in _TYPES}
    for name in _TYPES:
        if name in inputs:
            types = inputs[name].new_zeros(ids.shape)
            known = inputs[name][:, -before:]
            types[:, before - known.shape[1] : before] = known
            given[name] = types
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        model, ids.to(device), mask.to(device), behind, **given
    )
    return [
        logp[len(rollout.rationale_ids) :][rollout.own_rows.start : rollout.own_rows.stop]
        for logp, rollout in zip(logps, rollouts, strict=True)
    ]
