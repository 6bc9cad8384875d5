"""Small GGUF files of Llama models, written as llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}
_CONTROL, _NORMAL = 3, 1


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    of_type: Type = Type.F32,
    architecture: str = "llama",
    without: str | None = None,
) -> Path:
    """Write a Llama model and its byte-level tokenizer into a GGUF file.

    Args:
        path: the file.
        model: the model; it is not changed.
        tokenizer: its tokenizer.
        of_type: how matrices are stored; norms are fp32.
        architecture: what the file says that it holds.
        without: a part of the names of tensors that are left out.
    """
    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("A title")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_tokenizer(writer, tokenizer)
    for name, tensor in model.state_dict().items():
        if "lm_head" in name and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name:
                values = _interleaved(values, count)
        kept = Type.F32 if tensor.dim() == 1 else of_type
        if without is None or without not in name:
            writer.add_tensor(_renamed(name), gguf.quants.quantize(values, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantised(model: PreTrainedModel, of_type: Type) -> PreTrainedModel:
    """Round the model's matrices in place as a file with matrices of a type holds them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                stored = gguf.quants.quantize(parameter.numpy(), of_type)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, of_type)))
    return model


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return a projection's rows in the order in which llama.cpp rotates them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _renamed(name: str) -> str:
    parameter, _, kind = name.rpartition(".")
    if parameter.startswith("model.layers."):
        _, _, layer, rest = parameter.split(".", 3)
        return f"blk.{layer}.{_NAMES[rest]}.{kind}"
    return f"{_NAMES[parameter]}.{kind}"


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in parts["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
