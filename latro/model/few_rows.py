"""Linear layers of few rows, for the duration of a rollout on a CPU.

A decoding step has a row per completion, and its time goes into reading weights. `few_rows_linear`
reads them nearer to the speed of memory than torch's product does, and a row's result has the same
bits whatever other rows there are: of other completions in a step, of other prompts in a prefill.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from latro_kernels import few_rows_linear

MOST_ROWS = 512
"""With more rows than this, a long prompt's, a product of torch's is as fast."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Let the linear layers of `model` take few rows quickly within, where they are on a CPU.

    That is for what is not trained within. Layers of another class, such as
    quantised ones, and those with a forward of their own are left as they are, and so are all under
    autocast, which has casts of the weights.
    """
    changed: list[Any] = []
    try:
        modules: Iterator[Any] = model.modules()
        for module in () if torch.is_autocast_enabled("cpu") else modules:
            if type(module) is not nn.Linear or "forward" in module.__dict__:
                continue
            layer: Any = module
            if layer.weight.is_cpu and layer.weight.dtype in _DTYPES:
                layer.forward = _forward(layer)
                changed.append(layer)
        yield
    finally:
        for module in changed:
            del module.forward


def _forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Return the forward of a linear layer."""

    def forward(x: Tensor) -> Tensor:
        # Read in each call: an adapter of a parameter changes the weight while the layer is called.
        weight, bias = layer.weight, layer.bias
        if x.numel() > MOST_ROWS * weight.shape[1]:
            return linear(x, weight, bias)
        return few_rows_linear(x, weight, bias)

    return forward
