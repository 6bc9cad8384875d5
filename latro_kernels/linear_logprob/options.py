"""The arguments of `linear_logprob`: what is wrong with them, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from latro_kernels.checks import (
    check_group,
    check_head,
    check_number,
    check_scales,
    check_target,
    check_type,
)
from latro_kernels.dispatch import default_backend
from latro_kernels.linear_logprob.state import DEFAULT_MEMORY_BUDGET


@dataclass(frozen=True)
class Options:
    """The arguments of `linear_logprob`, and what follows from which inputs have gradients.

    Args:
        temperature: of the logits.
        softcap: of the logits; 0 for none.
        backend: its name.
        asked: names of statistics.
        memory_budget: bytes of products to cache.
        grad_filter: ε, 0 for none.
        frozen: whether hidden alone has a gradient.
        group: the ranks that share the vocabulary, or None.
        ignore_index: the target of rows to leave out, or None.
    """

    temperature: float
    softcap: float
    backend: str
    asked: frozenset[str]
    memory_budget: int
    grad_filter: float
    frozen: bool
    group: ProcessGroup | None
    ignore_index: int | None

    def slope(self, z: Tensor) -> Tensor:
        """Return ∂z/∂a where the logit is z."""
        tanh = z * (self.temperature / self.softcap) if self.softcap else torch.zeros_like(z)
        return (1 - tanh * tanh) / self.temperature


def options_for(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    *,
    temperature: float,
    softcap: float | None,
    asked: frozenset[str],
    backend: str,
    memory_budget: int | None,
    grad_filter: float,
    group: ProcessGroup | None,
    ignore_index: int | None,
) -> Options:
    """Return the options for hidden, weight and bias, some of which have gradients."""
    has_grad = [t is not None and t.requires_grad for t in inputs]
    if not torch.is_grad_enabled():
        has_grad = [False] * 3
    frozen = has_grad == [True, False, False]
    if memory_budget is None:
        memory_budget = DEFAULT_MEMORY_BUDGET[inputs[0].device.type]
    return Options(
        temperature=float(temperature),
        softcap=float(softcap or 0.0),
        backend=backend,
        asked=asked,
        memory_budget=memory_budget if any(has_grad) and not frozen else 0,
        grad_filter=float(grad_filter) if any(has_grad) and not frozen else 0.0,
        frozen=frozen,
        group=group,
        ignore_index=ignore_index,
    )


def check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: object,
    softcap: object,
    backend: object,
) -> None:
    """Raise for a wrong type, shape, device or number."""
    check_head(hidden, weight, bias)
    check_target(target, "hidden", hidden)
    check_scales(temperature, softcap)
    check_type("backend", backend, str)


def check_options(
    device: torch.device,
    backend: str,
    grad_filter: float,
    group: object,
) -> None:
    """Raise for an option that is wrong, or that the backend does not have."""
    check_number("grad_filter", grad_filter)
    if grad_filter < 0:
        raise ValueError(f"grad_filter: expected a finite number, 0 or more, got {grad_filter}")
    runs_on = default_backend(device) if backend == "auto" else backend
    if grad_filter > 0 and runs_on == "cuda":
        raise ValueError(
            f"grad_filter: expected 0 with backend {runs_on!r}, which has no filter, "
            f"got {grad_filter}"
        )
    check_group(group, backend)
