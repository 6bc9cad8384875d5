"""The raw ops of `linear_kl`: schemas, the drivers behind them, and the shapes they return.

Ops take and return tensors and plain numbers only, so that torch.compile can put them into a graph.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from latro_kernels.dispatch import resolve
from latro_kernels.head import Head, absent
from latro_kernels.linear_kl import cpu, tiles
from latro_kernels.linear_kl.state import KlGrad, empty_results
from latro_kernels.linear_kl.two_heads import empty_backward

_HEADS = (
    "Tensor hidden_p, Tensor weight_p, Tensor? bias_p, Tensor hidden_q, Tensor weight_q, "
    "Tensor? bias_q, float temperature_p, float softcap_p, float temperature_q, float softcap_q, "
    "str backend"
)
_ROWS = "Tensor anchor, Tensor mean, Tensor max_p, Tensor sum_exp_p, Tensor max_q, Tensor sum_exp_q"
torch.library.define("latro_kernels::linear_kl", f"({_HEADS}) -> (Tensor kl, {_ROWS})")
torch.library.define(
    "latro_kernels::linear_kl_backward",
    f"({_HEADS}, {_ROWS}, Tensor grad_kl, bool of_q, bool[3] needs) -> "
    "(Tensor dx, Tensor dw, Tensor db)",
)


@torch.library.impl("latro_kernels::linear_kl", ("cpu", "cuda"))
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    p, q = _heads(*arguments)
    with torch.autocast(p.hidden.device.type, enabled=False):
        return _driver(p).forward(p, q)


@torch.library.register_fake("latro_kernels::linear_kl")
def _(hidden_p: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return empty_results(hidden_p)


@torch.library.impl("latro_kernels::linear_kl_backward", ("cpu", "cuda"))
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    heads, (*rows, grad_kl, of_q, needs) = arguments[:11], arguments[11:]
    p, q = _heads(*heads)
    grad = KlGrad(grad_kl.contiguous(), *rows)
    with torch.autocast(p.hidden.device.type, enabled=False):
        gradients = _driver(p).backward(p, q, grad, of_q=of_q, needs=tuple(needs))
    return tuple(absent(p.hidden) if g is None else g for g in gradients)


torch.library.register_fake("latro_kernels::linear_kl_backward")(empty_backward)


def _heads(*arguments: Any) -> tuple[Head, Head]:
    """Return p and q of the arguments that `_HEADS` declares."""
    *tensors, temperature_p, softcap_p, temperature_q, softcap_q, backend = arguments
    # Resolved inside of the op, for torch.compile cannot trace the search for a library.
    backend = resolve(backend, tensors[0].device)
    of_p = {"temperature": temperature_p, "softcap": softcap_p, "backend": backend}
    of_q = {"temperature": temperature_q, "softcap": softcap_q, "backend": backend}
    return Head(*tensors[:3], **of_p), Head(*tensors[3:], **of_q)


def _driver(head: Head) -> ModuleType:
    """Return the module whose `forward` and `backward` do the work."""
    return cpu if head.backend == "cpu" else tiles


forward = torch.ops.latro_kernels.linear_kl
backward = torch.ops.latro_kernels.linear_kl_backward
