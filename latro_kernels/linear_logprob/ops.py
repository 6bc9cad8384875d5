"""The raw ops of `linear_logprob`: schemas, what runs behind them, and their shapes.

A driver, `cpu`, `tiles` or `triton.fused`, does the work; `state` says what it is given and
gives. Ops take and return tensors and plain numbers only, so that torch.compile can put them into a
graph.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from latro_kernels.checks import check_target_values
from latro_kernels.dispatch import default_backend, resolve
from latro_kernels.head import Head, absent
from latro_kernels.linear_logprob import cpu, tiles
from latro_kernels.linear_logprob.state import RowGrad, State, Wanted

# Of a gather of weight rows: bounds its memory.
_ROWS_AT_ONCE = 1024


torch.library.define(
    "latro_kernels::linear_logprob",
    "(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float temperature, "
    "float softcap, str backend, bool is_whole, bool weighted, bool pull, bool block_peak, "
    "int memory_budget) -> "
    "(Tensor peak, Tensor total, Tensor picked, Tensor weighted, Tensor pull, Tensor kept, "
    "Tensor block_peak)",
)
torch.library.define(
    "latro_kernels::linear_logprob_backward",
    "(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float temperature, "
    "float softcap, str backend, Tensor logp, Tensor? entropy, Tensor peak, Tensor log_total, "
    "Tensor grad_logp, Tensor? grad_entropy, Tensor kept, Tensor? block_peak, float grad_filter, "
    "bool[3] needs) -> (Tensor dx, Tensor dw, Tensor db)",
)
torch.library.define(
    "latro_kernels::linear_logprob_frozen_backward",
    "(Tensor weight, Tensor target, Tensor pull, Tensor of_pull, Tensor of_target) -> Tensor dx",
)


@torch.library.impl("latro_kernels::linear_logprob", ("cpu", "cuda"))
def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    backend: str,
    is_whole: bool,
    *wanted: Any,
) -> tuple[Tensor, ...]:
    # Here, for torch.compile drops an op that only checks. Of a part of the vocabulary the caller
    # has checked the targets: those of the other parts are none here.
    if is_whole:
        check_target_values(target, weight.shape[0])
    # Resolved inside of the op, for torch.compile cannot trace the search for a library.
    backend = resolve(backend, hidden.device)
    head = Head(hidden, weight, target.contiguous(), bias, temperature, softcap, backend)
    with torch.autocast(hidden.device.type, enabled=False):
        asked = Wanted(*wanted)
        return _outputs(_driver(head, filtered=asked.block_peak).forward(head, asked))


@torch.library.register_fake("latro_kernels::linear_logprob")
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    backend: str,
    is_whole: bool,
    *wanted: Any,
) -> tuple[Tensor, ...]:
    backend = default_backend(hidden.device) if backend == "auto" else backend
    head = Head(hidden, weight, target, bias, temperature, softcap, backend)
    asked = Wanted(*wanted)
    return _outputs(_driver(head, filtered=asked.block_peak).empty_state(head, asked))


@torch.library.impl("latro_kernels::linear_logprob_backward", ("cpu", "cuda"))
def _backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    backend: str,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    backend = resolve(backend, hidden.device)
    head = Head(hidden, weight, target.contiguous(), bias, temperature, softcap, backend)
    *rows, kept, block_peak, grad_filter, needs = arguments
    contiguous: list[Any] = [None if t is None else t.contiguous() for t in rows]
    grad = RowGrad(*contiguous)
    with torch.autocast(hidden.device.type, enabled=False):
        driver = _driver(head, filtered=block_peak is not None)
        gradients = driver.backward(head, grad, kept, block_peak, grad_filter, tuple(needs))
    return tuple(absent(hidden) if g is None else g for g in gradients)


@torch.library.register_fake("latro_kernels::linear_logprob_backward")
def _(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (torch.float32, weight.dtype, weight.dtype)
    return tuple(
        hidden.new_empty(shape, dtype=dtype) if needed else absent(hidden)
        for shape, dtype, needed in zip(shapes, dtypes, arguments[-1], strict=True)
    )


@torch.library.impl("latro_kernels::linear_logprob_frozen_backward", ("cpu", "cuda"))
def _frozen_backward(
    weight: Tensor, target: Tensor, pull: Tensor, of_pull: Tensor, of_target: Tensor
) -> Tensor:
    """dx = of_pull·pull + of_target·w_target, a tile of rows at a time; 0 where both are 0."""
    dx = torch.empty_like(pull)
    for begin in range(0, len(pull), _ROWS_AT_ONCE):
        block = slice(begin, begin + _ROWS_AT_ONCE)
        # Elsewhere than in this weight, of_target is 0.
        of_rows = weight[target[block].clamp(0, len(weight) - 1)].float()
        dx[block] = of_rows.mul_(of_target[block, None]).addcmul_(pull[block], of_pull[block, None])
    # A row that counts for nothing may hold NaN.
    return dx.masked_fill_(((of_pull == 0) & (of_target == 0))[:, None], 0)


@torch.library.register_fake("latro_kernels::linear_logprob_frozen_backward")
def _(weight: Tensor, target: Tensor, pull: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(pull)


def _driver(head: Head, *, filtered: bool) -> ModuleType:
    """What runs: products that never leave registers where Triton makes them fast, or skips some.

    Products of fp32 in full precision take no matrix unit, and the library's are the faster ones;
    CUDA C++ here folds what the library has multiplied.
    """
    if head.backend == "cpu":
        return cpu
    if head.backend == "triton" and (filtered or head.hidden.dtype != torch.float32):
        from latro_kernels.linear_logprob.triton import fused

        return fused
    return tiles


def _outputs(state: State) -> tuple[Tensor, ...]:
    return tuple(absent(state.peak) if t is None else t for t in vars(state).values())


forward = torch.ops.latro_kernels.linear_logprob
backward = torch.ops.latro_kernels.linear_logprob_backward
frozen_backward = torch.ops.latro_kernels.linear_logprob_frozen_backward
