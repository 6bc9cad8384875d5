"""`linear_sample` on the CPU: `csrc/cpu/linear_sample.cpp` does all of it."""

from __future__ import annotations

import torch

from latro_kernels import native
from latro_kernels.head import Head, native_operands
from latro_kernels.linear_sample.state import Draw, State


def sample(head: Head, draw: Draw) -> State:
    """Return what one sweep over the vocabulary finds out of each row."""
    state = State.empty(head.hidden)
    native.call(
        "latro_cpu_linear_sample",
        *native_operands(head),
        draw.seed,
        draw.position,
        0 if draw.first_column is None else int(draw.first_column),
        draw.greedy,
        state.token,
        state.score,
        state.token_logit,
        state.row_max,
        state.sum_exp,
        state.weighted_sum,
        *head.hidden.shape,
        len(head.weight),
        head.softcap,
        head.temperature,
        torch.get_num_threads(),
    )
    return state
