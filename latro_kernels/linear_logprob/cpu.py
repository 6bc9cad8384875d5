"""`linear_logprob` on the CPU: `csrc/cpu/linear_logprob.cpp` does all of it.

Products are made in fp32, or in bf16 with sums in fp32 where the processor multiplies bf16 as it
is; logits are fp32 in any case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.head import Head, native_operands
from latro_kernels.linear_logprob.state import RowGrad, State, Wanted

# The gradient filter leaves out so many rows and columns together, or not at all.
FILTER_ROWS, FILTER_COLUMNS = 12, 96


def forward(head: Head, state: State) -> None:
    """Fill `state` with what one sweep over the vocabulary finds out of each row."""
    native.call(
        "latro_cpu_linear_logprob_forward",
        *native_operands(head),
        state.target,
        state.row_max,
        state.sum_exp,
        state.target_logit,
        state.weighted_sum,
        state.square_sum,
        state.logit_sum,
        state.dx_sum,
        state.cached,
        state.cached.numel() // max(1, len(head.hidden)),  # columns
        state.block_max,
        *head.hidden.shape,
        len(head.weight),
        head.softcap,
        head.temperature,
        torch.get_num_threads(),
    )


def backward(
    head: Head,
    grad: RowGrad,
    cached: Tensor,
    block_max: Tensor | None,
    grad_filter: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden, in fp32, weight and bias; None where none is needed."""
    (N, H), V = head.hidden.shape, len(head.weight)
    rows = grad.active_rows()
    if block_max is not None:
        rows = grad.filter_order(block_max, grad_filter, rows)
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
            *native_operands(head),
            grad.target,
            rows,
            grad.grad_logp,
            grad.grad_entropy,
            grad.logp,
            grad.offset,
            grad.grad_square,
            grad.row_max,
            grad.log_sum,
            cached,
            cached.numel() // N,
            block_max,
            grad_filter,
            dx,
            dw,
            db,
            M,
            H,
            V,
            head.softcap,
            head.temperature,
            torch.get_num_threads(),
        )
    return dx, dw, None if db is None else db.to(head.weight.dtype)


def empty_state(head: Head, target: Tensor, wanted: Wanted) -> State:
    """Return room for what `forward` makes."""
    return State.empty(
        head, target, wanted, cached_step=2 * FILTER_COLUMNS, block_columns=FILTER_COLUMNS
    )
