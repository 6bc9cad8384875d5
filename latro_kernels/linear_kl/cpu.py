"""linear_kl on the CPU: `csrc/cpu/linear_kl.cpp` does all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.head import Head, multiplies_bf16
from latro_kernels.linear_kl.state import KlGrad, empty_results, share_weight


def forward(p: Head, q: Head) -> tuple[Tensor, ...]:
    """Return kl, and anchor, mean, max_p and sum_exp_p as `KlGrad` describes them."""
    operands, results = _operands(p, q), empty_results(p.hidden)
    numbers = (len(p.hidden), len(p.weight), p.softcap, p.temperature, torch.get_num_threads())
    native.call("latro_cpu_linear_kl_forward", *operands, *results, *numbers)
    return results


def backward(p: Head, q: Head, grad: KlGrad, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients of p's hidden, weight and bias; None where none is needed."""
    (N, H), V, dtype = p.hidden.shape, len(p.weight), p.weight.dtype
    # Rows without an upstream gradient are left out.
    rows = (grad.grad_kl != 0).nonzero().flatten()
    M = len(rows)
    dx = torch.zeros(N, H, dtype=torch.float32) if needs[0] else None
    dw = torch.zeros(V, H, dtype=dtype) if needs[1] else None
    db = torch.zeros(V, dtype=torch.float32) if needs[2] else None
    if M:
        native.call(
            "latro_cpu_linear_kl_backward",
            *_operands(p, q),
            rows if M < N else None,
            grad.grad_kl,
            grad.anchor,
            grad.mean,
            grad.max_p,
            grad.sum_exp_p,
            dx,
            dw,
            db,
            M,
            V,
            p.softcap,
            p.temperature,
            torch.get_num_threads(),
        )
    return tuple(None if t is None else t.to(dtype) for t in (dx, dw, db))


def _operands(p: Head, q: Head) -> list[Tensor | int | None]:
    """Return the first arguments of both calls."""
    operands: list[Tensor | int | None] = []
    for head in (p, q):
        is_shared = head is q and share_weight(p, q)
        bias = None if head.bias is None else head.bias.float().contiguous()
        operands += [head.hidden.contiguous(), None if is_shared else head.weight.contiguous()]
        operands += [bias, head.hidden.shape[1]]
    return [*operands, native.dtype_code(p.hidden.dtype), multiplies_bf16(p.hidden, q.hidden)]
