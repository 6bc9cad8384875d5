"""linear_kl on the CPU: `csrc/cpu/linear_kl.cpp` does all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.head import Head, bf16_products
from latro_kernels.linear_kl.state import KlGrad, empty_results, share_weight


def forward(p: Head, q: Head) -> tuple[Tensor, ...]:
    """Return kl, and the numbers of each row that `KlGrad` describes."""
    operands, results = _operands(p, q), empty_results(p.hidden)
    sizes = len(p.hidden), len(p.weight), torch.get_num_threads()
    native.call("latro_cpu_linear_kl_forward", *operands, *results, *sizes)
    return results


def backward(
    p: Head, q: Head, grad: KlGrad, *, of_q: bool, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of p's, or q's, hidden, weight and bias; None where none is needed."""
    own, other = (q, p) if of_q else (p, q)
    (N, H), V, dtype = own.hidden.shape, len(own.weight), own.weight.dtype
    # Rows without an upstream gradient are left out.
    rows = (grad.grad_kl != 0).nonzero().flatten()
    M = len(rows)
    dx = torch.zeros(N, H, dtype=torch.float32) if needs[0] else None
    dw = torch.zeros(V, H, dtype=dtype) if needs[1] else None
    db = torch.zeros(V, dtype=torch.float32) if needs[2] else None
    if M:
        native.call(
            "latro_cpu_linear_kl_backward",
            *_operands(own, other),
            of_q,
            rows if M < N else None,
            *vars(grad).values(),
            dx,
            dw,
            db,
            M,
            V,
            torch.get_num_threads(),
        )
    return tuple(None if t is None else t.to(dtype) for t in (dx, dw, db))


def _operands(head: Head, other: Head) -> list[Tensor | float | None]:
    """Return the first arguments of both calls."""
    operands: list[Tensor | float | None] = []
    for one in (head, other):
        is_shared = one is other and share_weight(head, other)
        bias = None if one.bias is None else one.bias.float().contiguous()
        operands += [one.hidden.contiguous(), None if is_shared else one.weight.contiguous()]
        operands += [bias, one.hidden.shape[1], one.softcap, one.temperature]
    codes = native.dtype_code(head.hidden.dtype), bf16_products(head.hidden, other.hidden)
    return [*operands, *codes]
