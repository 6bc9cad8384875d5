"""A linear layer for few rows, as a decoding step has them: y = x·Wᵀ + b.

With few rows the time goes into reading W. The C++ kernel reads it once, as it lies and near the
speed of memory, where torch's products in fp32 reach a part of that; and a row's result does not
depend on the rows beside it. There is no gradient: it is for decoding under `torch.no_grad`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as reference

from latro_kernels.checks import (
    check_choice,
    check_device,
    check_float_dtype,
    check_same_dtype,
    check_tensor,
    check_type,
    dense,
)
from latro_kernels.few_rows_linear import ops

BACKENDS = ("auto", "reference", "cpu")


def few_rows_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Return `torch.nn.functional.linear(x, weight, bias)`, quickly for 1 to 64 rows on a CPU.

    On the CPU, sums are made in fp32 and in one order, so that a row of the result has the same
    bits whatever other rows there are and on any number of threads. More than 64 rows are taken 64
    at a time, and read the weight as often. Autocast has no effect on the C++ kernel.

    Args:
        x: [..., H] fp32, bf16 or fp16 (backend="reference": fp64 too); any strides.
        weight: [V, H], dtype and device of x; any strides, but rows without gaps are read fastest.
        bias: [V], dtype and device of x; None for none.
        backend: "auto" ("cpu" for tensors of the CPU, elsewhere "reference"), "reference" (torch's
            `linear`) or "cpu".

    Returns:
        [..., V], dtype of x.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape or device, an unknown backend, or an argument
            that requires a gradient while gradients are on.
        BackendUnavailableError: the backend cannot run here.
    """
    _check(x, weight, bias, backend)
    if backend == "auto":
        backend = "cpu" if x.is_cpu else "reference"
    return ops.linear(x, weight, bias) if backend == "cpu" else reference(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> None:
    check_tensor("weight", weight, 2)
    dense("x", x)
    V, H = weight.shape
    if x.dim() == 0 or x.shape[-1] != H or H == 0:
        raise ValueError(
            f"x: expected shape [..., H], as weight is [V, H] with H = {H} > 0, "
            f"got {tuple(x.shape)}"
        )
    check_type("backend", backend, str)
    check_choice("backend", backend, BACKENDS)
    if backend == "cpu" and x.device.type not in ("cpu", "meta"):
        raise ValueError(f"x: expected the device cpu for backend 'cpu', got {x.device}")
    check_float_dtype("x", x, backend)
    check_device("weight", weight, "x", x)
    check_same_dtype("weight", weight, "x", x)
    if bias is not None:
        check_tensor("bias", bias, 1)
        if len(bias) != V:
            raise ValueError(f"bias: expected shape ({V},), got {tuple(bias.shape)}")
        check_device("bias", bias, "x", x)
        check_same_dtype("bias", bias, "x", x)
    if torch.is_grad_enabled():
        for name, value in (("x", x), ("weight", weight), ("bias", bias)):
            if value is not None and value.requires_grad:
                raise ValueError(
                    f"{name}: expected no gradient, as few_rows_linear has none: call it under "
                    "torch.no_grad(), got a tensor that requires one"
                )
