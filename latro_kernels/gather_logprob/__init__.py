"""Log-probability of one token per row, from logits that exist.

With logits a [N, V], temperature T and softcap c,

    z = c·tanh(a / c) / T   (z = a / T without softcap)

and with p = softmax(z), t the row's target,

    logp = z_t − log Σ_j exp(z_j)          entropy H = −Σ_j p_j·log p_j

For upstream gradients g of logp and h of the entropy

    ∂/∂z_j = g·(1[j = t] − p_j) − h·p_j·(log p_j + H)
    ∂/∂a_j = ∂/∂z_j · (1 − tanh²(a_j / c)) / T

as in `linear_logprob`, for a model that hands out its logits. The forward reads them once and keeps
two numbers a row, max z and log Σ_j exp(z_j − max z); the backward reads them once more and writes
∂/∂a once, in the logits' dtype, over the logits themselves if it may. In the target's column
1 − p_t is −expm1(logp): where p_t is close to 1 the subtraction would lose the digits that are
left. The online sum of exponentials is Milakov and Gimelshein's, "Online normalizer calculation for
softmax", arXiv 1805.02867.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latro_kernels.checks import (
    check_device,
    check_float_dtype,
    check_scales,
    check_target,
    check_target_values,
    check_tensor,
    check_type,
)
from latro_kernels.gather_logprob import ops


def reference(
    logits: Tensor, target: Tensor, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return logp [N] and entropy [N] by plain PyTorch, in fp32, or fp64 for fp64, unchecked."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    # Where p is 0, p·log p has the limit 0; 0 · −inf would make it and its gradient NaN.
    terms = log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)
    return log_p.gather(1, target[:, None]).squeeze(1), -terms.sum(-1)


class _GatherLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        settings: tuple[float, float, bool, str],
        in_place: bool,
    ) -> tuple[Tensor, Tensor]:
        logp, entropy, row_max, log_sum = ops.forward(logits, target, *settings)
        ctx.save_for_backward(logits, target, logp, entropy, row_max, log_sum)
        ctx.settings, ctx.in_place, ctx.overwritten = settings, in_place, False
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would let a gradient penalty go by with a gradient of zero.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gather_logprob has no double backward; use backend='reference' for create_graph"
            )
        if ctx.overwritten:
            raise RuntimeError(
                "gather_logprob: the first backward has overwritten the logits with their "
                "gradient; use inplace_backward=False to run it twice"
            )
        logits, target, *kept = ctx.saved_tensors
        arguments = (logits, target, *ctx.settings, *kept, grad_logp, grad_entropy)
        if ctx.in_place:
            ops.backward_in_place(*arguments)
            ctx.overwritten = True
            return logits.detach(), None, None, None
        return ops.backward(*arguments), None, None, None


def gather_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of `target` under `logits`, differentiable.

    Without softcap, and up to rounding, this is

        log_p = torch.log_softmax(logits.float() / temperature, -1)
        logp = log_p.gather(1, target[:, None]).squeeze(1)

    with no memory beside the logits but a few numbers a row, and one gradient of [N, V] in their
    dtype. Everything is computed in fp32. Rows whose upstream gradient is 0 are not read in the
    backward, and their gradient is exactly 0, whatever they hold. There is no double backward.

    Args:
        logits: [N, V] fp32, bf16 or fp16 (backend="reference": fp64 too); rows may lie apart, as in
            a slice of a longer tensor. Where the last dimension has a stride they are copied once.
        target: [N] int64, each in 0..V − 1.
        temperature: divides the logits; above 0, and in fp32's normal range.
        softcap: c of c·tanh(logits / c), before the temperature; None for none. Likewise, and c /
            temperature too.
        return_entropy: whether to return the entropy of each row's distribution too.
        inplace_backward: whether the backward writes the gradient over the logits (over their copy,
            where they are copied), which spares its [N, V]. Nobody may read the logits from then
            on: torch refuses a backward that needs them, but not a plain look at them.
        backend: "auto", "reference" (plain PyTorch, keeps log-probs of [N, V]), "cpu", "triton" or
            "cuda".

    Returns:
        logp [N], fp32, nats; with `return_entropy` the pair logp [N], entropy [N], fp32, nats.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value, or an unknown backend;
            `inplace_backward` for rows that overlap, or with backend="reference". A target out of
            range raises on the CPU; on a GPU it stops the device, as no value is read back.
        BackendUnavailableError: the backend cannot run here.
        RuntimeError: in a second backward, where the first has overwritten the logits.
    """
    _check(logits, target, temperature, softcap, backend)
    check_type("return_entropy", return_entropy, bool)
    _check_in_place(inplace_backward, logits, backend)
    if backend == "reference":
        check_target_values(target, logits.shape[1])
        logp, entropy = reference(logits, target, temperature, softcap)
    else:
        if logits.stride(1) != 1 and logits.shape[1] > 1:
            logits = logits.contiguous()
        settings = (float(temperature), float(softcap or 0.0), return_entropy, backend)
        logp, entropy = _GatherLogprob.apply(logits, target, settings, inplace_backward)
    return (logp, entropy) if return_entropy else logp


def _check(
    logits: Tensor, target: Tensor, temperature: object, softcap: object, backend: str
) -> None:
    check_tensor("logits", logits, 2)
    check_tensor("target", target, 1)
    check_device("target", target, "logits", logits)
    N, V = logits.shape
    if V == 0:
        raise ValueError(f"logits: expected shape [N, V] with V > 0, got {tuple(logits.shape)}")
    check_target(target, "logits", N)
    check_scales(temperature, softcap)
    check_type("backend", backend, str)
    check_float_dtype("logits", logits, backend)


def _check_in_place(inplace_backward: object, logits: Tensor, backend: str) -> None:
    check_type("inplace_backward", inplace_backward, bool)
    if not inplace_backward:
        return
    if backend == "reference":
        raise ValueError("inplace_backward: expected False with backend='reference', got True")
    N, V = logits.shape
    if N > 1 and logits.stride(1) == 1 and logits.stride(0) < V:
        raise ValueError(
            "logits: expected rows that do not overlap, as inplace_backward writes to them, "
            f"got strides {logits.stride()} for shape {tuple(logits.shape)}"
        )
