"""Layers whose weights are kept in 8 bits, and taken back to the activations' dtype for a product.

bitsandbytes' own layer (LLM.int8, arXiv 2208.07339) takes the activations to 8 bits too, except for
columns with outliers, and which these are depends on all rows of a batch; in training on a CPU it
does neither. So a token's log-prob would depend on the rows beside it and on the mode, and a
rationale would not be scored by the policy that sampled it. Here, for a weight row w_i with the
largest magnitude s_i,

    y = x · Wᵀ + b,    W_ij = s_i / 127 · c_ij,    c_ij = round(127 · w_ij / s_i) in int8

and dx = dy · W, db = Σ dy over rows. W is made again for the backward, so that only its 8 bits are
kept.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor


class WeightsIn8Bits(Linear8bitLt):
    """bitsandbytes' layer, with a product that quantises no activations."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x · Wᵀ + b in the dtype of `x`, or of autocast."""
        weight: Any = self.weight
        return _Product.apply(x, weight.data, weight.SCB, self.bias)


def dequantized(codes: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W [out, in] in `dtype`, from its codes (int8) and its rows' largest magnitudes."""
    return (codes * (largest / 127)[:, None]).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, largest: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, largest)
        ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        return torch.nn.functional.linear(x, dequantized(codes, largest, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        codes, largest = ctx.saved_tensors
        dx = (dy @ dequantized(codes, largest, dy.dtype)).to(ctx.dtype)
        # Adapters may train biases.
        trained = ctx.needs_input_grad[3]
        return dx, None, None, dy.flatten(0, -2).sum(0, dtype=ctx.bias_dtype) if trained else None
