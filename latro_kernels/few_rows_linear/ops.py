"""The raw op of `few_rows_linear` on the CPU, and its shape."""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.head import bf16_products

torch.library.define(
    "latro_kernels::few_rows_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)


@torch.library.impl("latro_kernels::few_rows_linear", "cpu")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    V, H = weight.shape
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], V))
    native.call(
        "latro_cpu_few_rows_linear",
        x,
        weight,
        *weight.stride(),
        None if bias is None else bias.contiguous(),
        out,
        native.dtype_code(x.dtype),
        bf16_products(weight),
        x.numel() // H,
        H,
        V,
        torch.get_num_threads(),
    )
    return out


@torch.library.register_fake("latro_kernels::few_rows_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


linear = torch.ops.latro_kernels.few_rows_linear.default
