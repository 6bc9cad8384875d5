"""The raw ops of `gather_logprob`: schemas, the backends behind them, and the shapes they return.

Ops take and return tensors and plain numbers only, so that torch.compile can put them into a graph.
A statistic that was not asked for is a tensor of no entries.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from latro_kernels.checks import check_target_values
from latro_kernels.dispatch import resolve
from latro_kernels.gather_logprob import compiled
from latro_kernels.head import absent
from latro_kernels.linear_logprob.state import RowGrad

_SETTINGS = "float temperature, float softcap, str backend"
_ROWS = (
    "Tensor target, Tensor logp, Tensor row_max, Tensor log_sum, Tensor grad_logp, "
    "Tensor? grad_entropy, Tensor? offset, Tensor? grad_square"
)
torch.library.define(
    "latro_kernels::gather_logprob",
    f"(Tensor logits, Tensor target, Tensor? kept, {_SETTINGS}, bool with_entropy, "
    "bool with_further_sums) -> (Tensor logp, Tensor entropy, Tensor log_sum_p_squared, "
    "Tensor mean_logit, Tensor row_max, Tensor log_sum, Tensor target_logit)",
)
torch.library.define(
    "latro_kernels::gather_logprob_backward",
    f"(Tensor logits, {_SETTINGS}, {_ROWS}) -> Tensor dlogits",
)
torch.library.define(
    "latro_kernels::gather_logprob_backward_",
    f"(Tensor(a!) logits, {_SETTINGS}, {_ROWS}) -> ()",
)


@torch.library.impl("latro_kernels::gather_logprob", ("cpu", "cuda"))
def _forward(
    logits: Tensor,
    target: Tensor,
    kept: Tensor | None,
    temperature: float,
    softcap: float,
    backend: str,
    with_entropy: bool,
    with_further_sums: bool,
) -> tuple[Tensor, ...]:
    if kept is None:
        check_target_values(target, logits.shape[1])
    else:
        check_target_values(target.masked_fill(~kept, 0), logits.shape[1])
        # The kernels read no row whose target is below 0, and write zeros for it.
        target = target.masked_fill(~kept, -1)
    rows = _empty_rows(logits, with_entropy, with_further_sums)
    driver = _driver(backend, logits.device)
    driver.forward(logits, target.contiguous(), rows, temperature=temperature, softcap=softcap)
    return tuple(absent(logits) if t is None else t for t in rows)


@torch.library.register_fake("latro_kernels::gather_logprob")
def _(
    logits: Tensor,
    target: Tensor,
    kept: Tensor | None,
    temperature: float,
    softcap: float,
    backend: str,
    with_entropy: bool,
    with_further_sums: bool,
) -> tuple[Tensor, ...]:
    rows = _empty_rows(logits, with_entropy, with_further_sums)
    return tuple(absent(logits) if t is None else t for t in rows)


@torch.library.impl("latro_kernels::gather_logprob_backward", ("cpu", "cuda"))
def _backward(logits: Tensor, *arguments: Any) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    _write_gradient(dlogits, logits, *arguments)
    return dlogits


@torch.library.register_fake("latro_kernels::gather_logprob_backward")
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.impl("latro_kernels::gather_logprob_backward_", ("cpu", "cuda"))
def _backward_in_place(logits: Tensor, *arguments: Any) -> None:
    _write_gradient(logits, logits, *arguments)
    # torch cannot see the write; told of it, it refuses every later backward that saved the logits.
    torch.autograd.graph.increment_version(logits)


@torch.library.register_fake("latro_kernels::gather_logprob_backward_")
def _(logits: Tensor, *_: Any) -> None:
    """Return nothing, as the gradient takes the place of the logits."""


def _write_gradient(dlogits: Tensor, logits: Tensor, *arguments: Any) -> None:
    """Fill `dlogits` from the arguments that both backward ops take after the logits."""
    temperature, softcap, backend, *rows = arguments
    contiguous: list[Any] = [None if t is None else t.contiguous() for t in rows]
    grad = RowGrad(*contiguous)
    _driver(backend, logits.device).backward(
        logits, grad, dlogits, temperature=temperature, softcap=softcap
    )


def _empty_rows(logits: Tensor, with_entropy: bool, with_further_sums: bool) -> list[Tensor | None]:
    """Return room for what a forward makes of each row, fp32 [N] each, None where it does not.

    That is logp, entropy, log_sum_p_squared, mean_logit, row_max, log_sum and target_logit.
    """
    made = (True, with_entropy, with_further_sums, with_further_sums, True, True, True)
    return [logits.new_empty(logits.shape[0], dtype=torch.float32) if m else None for m in made]


def _driver(backend: str, device: torch.device) -> ModuleType:
    """Return the module whose `forward` and `backward` do the work.

    It is looked for inside of the op, as torch.compile cannot trace the search for a library.
    """
    if resolve(backend, device, cuda_first=True) != "triton":
        return compiled
    from latro_kernels.gather_logprob import triton

    return triton


forward = torch.ops.latro_kernels.gather_logprob
backward = torch.ops.latro_kernels.gather_logprob_backward
backward_in_place = torch.ops.latro_kernels.gather_logprob_backward_
