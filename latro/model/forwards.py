"""Forwards of modules that others have made: ours around them, their mode, their rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def replace_forward(module: Any, forward: Callable[..., Any], own: str) -> bool:
    """Make `forward` that of a module, once; return whether it was not yet.

    Args:
        module: any module; its forward so far stays as its attribute of the name `own`.
        forward: a function whose first argument is the module.
        own: a name that belongs to this replacement alone.
    """
    if getattr(module, own, module.forward) != module.forward:
        # Another library may have put its own forward before ours since then, and hands keywords
        # on to it. A model that was pickled has the attribute, and the forward of its class.
        return False
    setattr(module, own, module.forward)
    # A bound method, as a class's own is: copies of the module have one that is bound to them.
    module.forward = MethodType(forward, module)
    return True


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode within, and in its own again."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def allowed_difference(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how far what a model computes may be from `values`, computed in another way.

    Half the digits of `dtype`: rounding takes fewer, another formula more. Norms and softmaxes are
    fp32 even in an fp64 model.
    """
    eps = max(torch.finfo(kind).eps for kind in (dtype, torch.float32))
    return eps**0.5 * values.abs().max()
