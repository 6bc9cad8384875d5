"""The LM head, as `linear_logprob` and `linear_kl` know it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.checks import check_float_dtype, check_same_dtype

# The least H for which the time that products in bf16 save is worth the digits that dz loses.
_MIN_BF16_H = 128


@dataclass(frozen=True, eq=False)
class Head:
    """The last linear layer of a language model, and the hidden states that it is applied to.

    Its products are hidden · weightᵀ; with a = products + bias, its logits are z =
    softcap·tanh(a / softcap) / temperature.

    Args:
        hidden: [N, H].
        weight: [V, H], dtype and device of hidden.
        bias: [V], dtype and device of hidden, or None.
        temperature: divides the logits.
        softcap: 0 where there is none.
        backend: "cpu", "triton" or "cuda".
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float
    backend: str


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return what autocast casts to on a device, or None where it is off.

    On the meta device it is always off.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast(tensor: Tensor) -> Tensor:
    """Return what `linear` makes of a tensor: under autocast it leaves fp64 and integers alone."""
    dtype = autocast_dtype(tensor.device)
    if dtype is None or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def cast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast under autocast as `linear` does, and raise for dtypes that differ."""
    hidden, weight = autocast(hidden), autocast(weight)
    bias = None if bias is None else autocast(bias)
    check_float_dtype("hidden", hidden, backend)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_same_dtype(name, value, "hidden", hidden)
    return hidden, weight, bias


def reference_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None = None
) -> Tensor:
    """Return logits [..., V], not yet divided by a temperature, in fp32, or fp64 for fp64."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        z = z + bias.to(dtype)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def absent(like: Tensor) -> Tensor:
    """Return what stands for an output that was not asked for: an op returns no None."""
    return like.new_empty(0, dtype=torch.float32)


def bf16_products(*hidden: Tensor) -> int:
    """Return how the CPU kernels multiply these hidden states, a constant of `latro.h`."""
    if all(x.dtype == torch.bfloat16 and x.shape[1] >= _MIN_BF16_H for x in hidden):
        return native.library("cpu").latro_cpu_bf16_products()
    return native.constants()["LATRO_BF16_WIDENED"]


def native_operands(head: Head) -> tuple[Tensor | int | None, ...]:
    """Return what calls of `_cpu.so` take first: hidden, weight and bias, with their strides."""
    hidden, weight = head.hidden, head.weight
    return (
        hidden,
        *hidden.stride(),
        weight,
        *weight.stride(),
        native.dtype_code(hidden.dtype),
        bf16_products(hidden),
        None if head.bias is None else head.bias.float().contiguous(),
    )
