"""`linear_logprob` on the CPU: `csrc/cpu/linear_logprob.cpp` does all of it.

Products are made in fp32, or in bf16 with sums in fp32 where the processor multiplies bf16 as it
is; logits are fp32 in any case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.head import Head, multiplies_bf16
from latro_kernels.linear_logprob.state import RowGrad, State, Wanted, filter_order, make_state

# The grain of the gradient filter: so many rows and columns are left out together, or not.
FILTER_ROWS, FILTER_COLUMNS = 12, 96
# Columns of which all products are kept, or none.
_KEPT_GRAIN = 2 * FILTER_COLUMNS


def forward(head: Head, wanted: Wanted) -> State:
    """The sweep that makes log-probs."""
    state = empty_state(head, wanted)
    native.call(
        "latro_cpu_linear_logprob_forward",
        *_operands(head),
        *(head.target, state.peak, state.total, state.picked, state.weighted, state.pull),
        *(state.kept, _columns_of(state.kept, len(head.hidden)), state.block_peak),
        *(*head.hidden.shape, len(head.weight), head.softcap, head.temperature),
        torch.get_num_threads(),
    )
    return state


def backward(
    head: Head,
    grad: RowGrad,
    kept: Tensor,
    block_peak: Tensor | None,
    grad_filter: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, in fp32, weight and bias; None where `needs` says that nobody asks."""
    (N, H), V = head.hidden.shape, len(head.weight)
    active = grad.active()
    rows = None if bool(active.all()) else active.nonzero().flatten()
    if block_peak is not None:
        rows = filter_order(grad, block_peak, grad_filter, rows)
    M = N if rows is None else len(rows)
    # What no row contributes to is 0; the rest is written whole.
    make = torch.empty if M else torch.zeros
    make_dx = make if M == N else torch.zeros
    dx = make_dx(N, H, dtype=torch.float32) if needs[0] else None
    dw = make(V, H, dtype=head.weight.dtype) if needs[1] else None
    db = make(V, dtype=torch.float32) if needs[2] else None
    if M:
        native.call(
            "latro_cpu_linear_logprob_backward",
            *_operands(head),
            *(head.target, rows, grad.grad_logp, grad.grad_entropy, grad.logp, grad.entropy),
            *(grad.peak, grad.log_total, kept, _columns_of(kept, N), block_peak, grad_filter),
            *(dx, dw, db, M, H, V, head.softcap, head.temperature, torch.get_num_threads()),
        )
    return dx, dw, None if db is None else db.to(head.weight.dtype)


def empty_state(head: Head, wanted: Wanted) -> State:
    """Room for what `forward` makes."""
    return make_state(head, wanted, kept_grain=_KEPT_GRAIN, peak_columns=FILTER_COLUMNS)


def _columns_of(kept: Tensor, N: int) -> int:
    return kept.numel() // N if N else 0


def _operands(head: Head) -> tuple[Tensor | int | None, ...]:
    """The first arguments of both calls, up to the bias."""
    hidden, weight = head.hidden, head.weight
    return (
        hidden,
        *hidden.stride(),
        weight,
        *weight.stride(),
        native.dtype_code(hidden.dtype),
        multiplies_bf16(hidden),
        None if head.bias is None else head.bias.float().contiguous(),
    )
