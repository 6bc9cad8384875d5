"""The raw ops of `linear_logprob`: schemas, what runs behind them, and their shapes.

A driver, `cpu`, `tiles` or `triton.fused`, does the work; `state` says what it is given and
returns. Ops take and return tensors and plain numbers only, so that torch.compile can put them into
a graph.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from latro_kernels.checks import check_target_values
from latro_kernels.dispatch import default_backend, resolve
from latro_kernels.head import Head, absent
from latro_kernels.head_gradient import empty_gradients
from latro_kernels.linear_logprob import cpu, tiles
from latro_kernels.linear_logprob.state import RowGrad, State, Wanted, cached_of

# Weight rows gathered at a time, which bounds the memory that they take.
_ROWS_AT_ONCE = 1024
_HEAD = (
    "Tensor hidden, Tensor weight, Tensor target, Tensor? kept, Tensor? bias, float temperature, "
    "float softcap, str backend"
)
torch.library.define(
    "latro_kernels::linear_logprob",
    f"({_HEAD}, bool is_whole, bool weighted_sum, bool dx_sum, bool block_max, int memory_budget, "
    "bool further_sums) -> (Tensor row_max, Tensor sum_exp, Tensor target_logit, "
    "Tensor weighted_sum, Tensor square_sum, Tensor logit_sum, Tensor dx_sum, Tensor cached, "
    "Tensor block_max)",
)
torch.library.define(
    "latro_kernels::linear_logprob_backward",
    f"({_HEAD}, Tensor logp, Tensor row_max, Tensor log_sum, Tensor grad_logp, "
    "Tensor? grad_entropy, Tensor? offset, Tensor? grad_square, Tensor cached, Tensor? block_max, "
    "float grad_filter, bool[3] needs) -> (Tensor dx, Tensor dw, Tensor db)",
)
torch.library.define(
    "latro_kernels::linear_logprob_frozen_backward",
    "(Tensor weight, Tensor target, Tensor dx_sum, Tensor of_sum, Tensor of_target) -> Tensor dx",
)


@torch.library.impl("latro_kernels::linear_logprob", ("cpu", "cuda"))
def _forward(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    kept, bias, temperature, softcap, backend, is_whole, *wanted = rest
    # Here, for torch.compile drops an op that only checks. Of a part of the vocabulary the caller
    # has checked the targets: those of the other parts are none here.
    if is_whole:
        check_target_values(target, len(weight))
    # Resolved inside of the op, for torch.compile cannot trace the search for a library.
    backend = resolve(backend, hidden.device)
    head = Head(hidden, weight, bias, temperature, softcap, backend=backend)
    asked = Wanted(*wanted)
    driver, rows = _driver(head, filtered=asked.block_max), _kept_rows(kept)
    state = driver.empty_state(head, target.contiguous(), asked)
    with torch.autocast(hidden.device.type, enabled=False):
        if rows is None:
            driver.forward(head, state)
        else:
            head = replace(head, hidden=hidden[rows])
            of_kept = driver.empty_state(head, target[rows], replace(asked, memory_budget=0))
            of_kept = replace(of_kept, cached=state.cached_of(len(rows)))
            driver.forward(head, of_kept)
            state.put(rows, of_kept)
    return _outputs(state)


@torch.library.register_fake("latro_kernels::linear_logprob")
def _(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, bias, temperature, softcap, backend, _, *wanted = rest
    backend = default_backend(hidden.device) if backend == "auto" else backend
    asked = Wanted(*wanted)
    head = Head(hidden, weight, bias, temperature, softcap, backend=backend)
    return _outputs(_driver(head, filtered=asked.block_max).empty_state(head, target, asked))


@torch.library.impl("latro_kernels::linear_logprob_backward", ("cpu", "cuda"))
def _backward(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    kept, bias, temperature, softcap, backend, *of_rows, cached, block_max, grad_filter, needs = (
        rest
    )
    backend = resolve(backend, hidden.device)
    head = Head(hidden, weight, bias, temperature, softcap, backend=backend)
    contiguous: list[Any] = [None if t is None else t.contiguous() for t in (target, *of_rows)]
    grad, rows = RowGrad(*contiguous), _kept_rows(kept)
    if rows is not None:
        head, grad = replace(head, hidden=hidden[rows]), grad.rows(rows)
        cached = cached_of(cached, len(hidden), len(rows))
        block_max = None if block_max is None else block_max[rows]
    with torch.autocast(hidden.device.type, enabled=False):
        driver = _driver(head, filtered=block_max is not None)
        dx, *rest = driver.backward(head, grad, cached, block_max, grad_filter, tuple(needs))
    if rows is not None and dx is not None:
        dx = dx.new_zeros(hidden.shape).index_copy_(0, rows, dx)
    return tuple(absent(hidden) if g is None else g for g in (dx, *rest))


@torch.library.register_fake("latro_kernels::linear_logprob_backward")
def _(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return empty_gradients(hidden, weight, arguments[-1], dx_dtype=torch.float32)


@torch.library.impl("latro_kernels::linear_logprob_frozen_backward", ("cpu", "cuda"))
def _frozen_backward(
    weight: Tensor, target: Tensor, dx_sum: Tensor, of_sum: Tensor, of_target: Tensor
) -> Tensor:
    """Return dx = of_sum·dx_sum + of_target·w_target, and 0 where both factors are 0."""
    dx = torch.empty_like(dx_sum)
    for begin in range(0, len(dx_sum), _ROWS_AT_ONCE):
        block = slice(begin, begin + _ROWS_AT_ONCE)
        # Elsewhere than in this weight, of_target is 0.
        of_rows = weight[target[block].clamp(0, len(weight) - 1)].float()
        dx[block] = of_rows.mul_(of_target[block, None]).addcmul_(
            dx_sum[block], of_sum[block, None]
        )
    # A row that counts for nothing may hold NaN.
    return dx.masked_fill_(((of_sum == 0) & (of_target == 0))[:, None], 0)


@torch.library.register_fake("latro_kernels::linear_logprob_frozen_backward")
def _(weight: Tensor, target: Tensor, dx_sum: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(dx_sum)


def _kept_rows(kept: Tensor | None) -> Tensor | None:
    """Return the indices of the rows that are kept, or None for all.

    Their number has to be waited for, which a CUDA graph cannot: it takes all, and what the ignored
    ones give is overwritten with 0.
    """
    if kept is None or (kept.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    rows = kept.nonzero().flatten()
    return None if len(rows) == len(kept) else rows


def _driver(head: Head, *, filtered: bool) -> ModuleType:
    """Return the module that does the work.

    Triton's fused kernels, which keep products in registers, serve bf16, fp16 and any filter. In
    fp32, which takes no matrix unit, torch's products are faster: they are folded tile by tile, as
    they always are with backend "cuda".
    """
    if head.backend == "cpu":
        return cpu
    if head.backend == "triton" and (filtered or head.hidden.dtype != torch.float32):
        from latro_kernels.linear_logprob.triton import fused

        return fused
    return tiles


def _outputs(state: State) -> tuple[Tensor, ...]:
    """Return what the op does of a state: all but the target, and no None."""
    made = (value for name, value in vars(state).items() if name != "target")
    return tuple(absent(state.row_max) if t is None else t for t in made)


forward = torch.ops.latro_kernels.linear_logprob
backward = torch.ops.latro_kernels.linear_logprob_backward
frozen_backward = torch.ops.latro_kernels.linear_logprob_frozen_backward
