"""The raw op of `decode_attention` on the CPU, and its shape."""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels import native

torch.library.define(
    "latro_kernels::decode_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor prompt_keys, Tensor prompt_values, "
    "Tensor(a!) own_keys, Tensor(b!) own_values, Tensor prompt, Tensor prompt_length, "
    "Tensor length, int window, float scaling, float softcap) -> Tensor",
)


@torch.library.impl("latro_kernels::decode_attention", "cpu")
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    prompt: Tensor,
    prompt_length: Tensor,
    length: Tensor,
    window: int,
    scaling: float,
    softcap: float,
) -> Tensor:
    R, heads, size = query.shape
    key_heads, value_size = value.shape[1:]
    out = query.new_empty(R, heads, value_size)
    native.call(
        "latro_cpu_decode_attention",
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        native.dtype_code(query.dtype),
        prompt_keys,
        prompt_values,
        len(prompt_keys),
        prompt_keys.shape[3],
        own_keys,
        own_values,
        own_keys.shape[3],
        prompt,
        prompt_length,
        length,
        out,
        R,
        heads,
        key_heads,
        size,
        value_size,
        window,
        scaling,
        softcap,
        torch.get_num_threads(),
    )
    return out


@torch.library.register_fake("latro_kernels::decode_attention")
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[2])


attend = torch.ops.latro_kernels.decode_attention.default
