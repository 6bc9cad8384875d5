"""gather_logprob in C++ and CUDA C++, whose functions take the same but for the last argument."""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.linear_logprob.state import RowGrad


def forward(
    logits: Tensor, target: Tensor, rows: list[Tensor | None], temperature: float, softcap: float
) -> None:
    """Fill `rows`, which `ops` names; None: not asked for."""
    inputs = (logits, native.dtype_code(logits.dtype), logits.stride(0), target)
    _call("forward", logits.device, *inputs, *rows, *logits.shape, softcap, temperature)


def backward(
    logits: Tensor, grad: RowGrad, dlogits: Tensor, temperature: float, softcap: float
) -> None:
    """Fill `dlogits`, which may be the logits."""
    _call(
        "backward",
        logits.device,
        logits,
        dlogits,
        native.dtype_code(logits.dtype),
        logits.stride(0),
        dlogits.stride(0),
        grad.target,
        grad.grad_logp,
        grad.grad_entropy,
        grad.logp,
        grad.offset,
        grad.grad_square,
        grad.row_max,
        grad.log_sum,
        *logits.shape,
        softcap,
        temperature,
    )


def _call(step: str, device: torch.device, *arguments: Tensor | int | float | None) -> None:
    """Call a step with what its library takes last: the number of threads, or the stream."""
    symbol = f"latro_{device.type}_gather_logprob_{step}"
    if device.type == "cpu":
        native.call(symbol, *arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(device):
            native.call(symbol, *arguments, torch.cuda.current_stream().cuda_stream)
