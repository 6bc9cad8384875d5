"""The LM head as the ops over it know it: `linear_logprob` and `linear_kl`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latro_kernels import native

# The least H at which products in bf16 save more time than their dz loses digits.
_MIN_BF16_H = 128


@dataclass(frozen=True, eq=False)
class Head:
    """The problem: logits z = softcap · tanh((hidden · weightᵀ + bias) / softcap) / temperature.

    Args:
        hidden: [N, H].
        weight: [V, H], dtype and device of hidden.
        target: [N] int64, contiguous; outside of 0..V − 1 it is no column of this weight.
        bias: [V] or None.
        temperature: divides the logits.
        softcap: 0 where there is none.
        backend: "cpu", "triton" or "cuda".
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float
    backend: str


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on a device; None where it is off, as always on the meta device."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def absent(like: Tensor) -> Tensor:
    """Stands for an output that was not asked for: an op returns tensors, never None."""
    return like.new_empty(0, dtype=torch.float32)


def multiplies_bf16(*hidden: Tensor) -> bool:
    """Whether products of these hidden states are made in bf16 as it is."""
    return (
        all(x.dtype == torch.bfloat16 and x.shape[1] >= _MIN_BF16_H for x in hidden)
        and native.library("cpu").latro_cpu_bf16_products_supported() != 0
    )
