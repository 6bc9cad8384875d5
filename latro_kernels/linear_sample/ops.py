"""The raw op of `linear_sample`: its schema, what runs behind it, and its shapes.

The op takes and returns tensors and plain numbers only, so that torch.compile can put it into a
graph. `state` says what a driver is given and returns.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from latro_kernels.dispatch import resolve
from latro_kernels.head import Head
from latro_kernels.linear_sample import cpu, tiles
from latro_kernels.linear_sample.state import Draw, State

torch.library.define(
    "latro_kernels::linear_sample",
    "(Tensor hidden, Tensor weight, Tensor seed, Tensor position, Tensor? bias, float temperature, "
    "float softcap, str backend, bool greedy, Tensor? first_column) -> (Tensor token, "
    "Tensor score, Tensor token_logit, Tensor row_max, Tensor sum_exp, Tensor weighted_sum)",
)


@torch.library.impl("latro_kernels::linear_sample", ("cpu", "cuda"))
def _sample(
    hidden: Tensor,
    weight: Tensor,
    seed: Tensor,
    position: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    backend: str,
    greedy: bool,
    first_column: Tensor | None,
) -> tuple[Tensor, ...]:
    # Resolved inside of the op, for torch.compile cannot trace the search for a library.
    backend = resolve(backend, hidden.device)
    head = Head(hidden, weight, bias, temperature, softcap, backend=backend)
    draw = Draw(
        seed=seed.contiguous(),
        position=position.contiguous(),
        greedy=greedy,
        first_column=first_column,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        return _outputs(_driver(head).sample(head, draw))


@torch.library.register_fake("latro_kernels::linear_sample")
def _(hidden: Tensor, *_: object) -> tuple[Tensor, ...]:
    return _outputs(State.empty(hidden))


def _driver(head: Head) -> ModuleType:
    """Return the module whose `sample` does the work: it folds as `linear_logprob` does."""
    if head.backend == "cpu":
        return cpu
    if head.backend == "triton" and head.hidden.dtype != torch.float32:
        from latro_kernels.linear_sample.triton import fused

        return fused
    return tiles


def _outputs(state: State) -> tuple[Tensor, ...]:
    return tuple(vars(state).values())


sample = torch.ops.latro_kernels.linear_sample
