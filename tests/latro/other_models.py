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
_LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = _EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_OPTIONS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}
    | {"num_experts": 2, "mamba_d_state": 8},
    "bamba": {"attn_layer_indices": [1], **_SSM},
    "falcon_h1": {"mamba_d_ssm": 64, **_SSM},
    "mamba": {"state_size": 8, "time_step_rank": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "llama4_text": {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "minicpm3": _LATENT,
    "deepseek_v2": _LATENT | _ROUTED,
    "deepseek_v3": _LATENT | _ROUTED | {"first_k_dense_replace": 1},
    "deepseek_v32": _LATENT
    | _ROUTED
    | {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16, "first_k_dense_replace": 2},
    "bert": {"is_decoder": True},
    "opt": {"word_embed_proj_dim": 16},
    "rwkv": {"attention_hidden_size": 32},
    "gptj": {"rotary_dim": 4},
    "falcon": {"head_dim": None},
    "codegen": {"rotary_dim": 4},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_intermediate_size": 16},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"]}
    | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32}
    | {"num_local_experts": 4, "num_experts_per_tok": 2}
    | _SSM,
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]}
    | {"n_mamba_heads": 4, "mamba_d_state": 8, "num_key_value_heads": 4},
    "kimi_linear": _LATENT
    | _EXPERTS
    | {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4}
    | {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_experts": 4} | _EXPERTS,
    "gemma4_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "olmo_hybrid": _LINEAR,
    "qwen3_5_moe_text": _LINEAR
    | _EXPERTS
    | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen2_moe": _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "glm4_moe": _ROUTED,
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "afmoe": _EXPERTS | {"num_experts": 4},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _EXPERTS | {"num_experts": 4},
}


def other_model(
    architecture: str, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> PreTrainedModel:
    """Return two layers in fp32, with weights so large that every token counts."""
    options = {"head_dim": 8} | _OPTIONS.get(architecture, {}) | options
    if options["head_dim"] is None:
        del options["head_dim"]  # this architecture has no such setting
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
