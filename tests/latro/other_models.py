"""Tiny models whose layers are not all attention, or whose attention is not transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scripts.make_tiny_model import two_layers

_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    **{"linear_num_value_heads": 2, "linear_num_key_heads": 2},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
_SSM = {
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    **{"mamba_expand": 2, "mamba_chunk_size": 8, "mamba_d_conv": 4},
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}
    | {"num_experts": 2, "mamba_d_state": 8},
    "bamba": {"attn_layer_indices": [1], **_SSM},
    "falcon_h1": {"mamba_d_ssm": 64, **_SSM},
    "mamba": {"state_size": 8, "time_step_rank": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "llama": {},
    "llama4_text": {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64},
    "stablelm": {},
    "bloom": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "hyperclovax": {},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "minicpm3": {"q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4}
    | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    "deepseek_v32": {"q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4}
    | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    | {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16, "first_k_dense_replace": 2}
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "inkling_text": {},
    "nanochat": {},
    "dory": {},
    "bert": {"is_decoder": True},
    "opt": {"word_embed_proj_dim": 16},
    "nemotron": {},
    "rwkv": {"attention_hidden_size": 32},
}


def other_model(
    architecture: str, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> PreTrainedModel:
    """Return two layers in fp32, with weights so large that every token counts."""
    options = {"head_dim": 8} | _OPTIONS[architecture] | options
    model = two_layers(architecture, tokenizer, **options).eval()
    if model._can_set_experts_implementation():
        # The grouped product of experts takes no fp64.
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        for name, sinks in model.named_parameters():
            if name.endswith(".sinks"):
                sinks.normal_(std=2)
    return model
