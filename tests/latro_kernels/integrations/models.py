"""Small models of five families, and the batch that they score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from scripts.make_tiny_model import two_layers

# Not imported from latro: GPU machines collect these tests without its data sets' library.
SMALL_MODEL = Path(__file__).parents[3] / "latro" / "assets" / "small"
TOKENIZER = AutoTokenizer.from_pretrained(SMALL_MODEL, padding_side="left")
TOKENIZER.pad_token = TOKENIZER.eos_token
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": False},
    "granite": {"logits_scaling": 3.0},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 32, "router_aux_loss_coef": 0.1},
}


def model_of(architecture: str) -> PreTrainedModel:
    model = two_layers(architecture, TOKENIZER, **MODELS[architecture]).eval()
    if architecture == "qwen3_moe":
        model.set_experts_implementation("eager")  # the others have no fp64
    # Logits of a new model are all but equal, and a softcap would do nothing to them.
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Return ids and labels, some of which are ignored."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 397, (3, 12), generator=generator)
    return ids, ids.masked_fill(torch.rand(3, 12, generator=generator) < 0.3, -100)
