"""KL divergence between two LM heads, exact over the vocabulary, without their logits.

Head p has hidden x_n, weight W, bias b, temperature T and softcap c, head q its own. With logits z
as in `linear_logprob`, p = softmax(zᵖ), q = softmax(z^q) and d_j = zᵖ_j − z^q_j,

    KL(p‖q) = Σ_j p_j·(log p_j − log q_j) = E_p[d] − log Σ exp(zᵖ) + log Σ exp(z^q)
    ∂KL/∂zᵖ_j = p_j·(d_j − E_p[d])        ∂KL/∂z^q_j = q_j − p_j

where p_j = 0 counts as 0. From there on the chain to x, W and b is that of `linear_logprob`. An
input that is in both heads has the sum of both gradients.

One pass over both logits finds it, in sums that are rescaled as the maxima mᵖ and m^q move. Sums of
d are taken from its value at p's likeliest token a: where p is nearly one-hot, d_a may be 100 nats
and d_a − E_p[d] next to nothing, and a difference of the two would be a rounding error of d_a. So a
row keeps the anchor z^q_a, and with d_a = mᵖ − z^q_a

    s = Σ exp(zᵖ_j − mᵖ)       mean = Σ exp(zᵖ_j − mᵖ)·(d_j − d_a) / s
    ∂KL/∂zᵖ_j = exp(zᵖ_j − mᵖ) / s · ((d_j − d_a) − mean)

For the KL itself, subtracting the sums of exponentials in fp32 would leave nothing of a small one
but their rounding. On the CPU they are fp64, and

    KL = mean + (m^q − z^q_a) + log(Σ exp(z^q_j − m^q) / s)

On GPUs they are fp32. There δ_j = d_j − (mᵖ − m^q) is d measured from the maxima's difference, and
a row carries

    second = Σ exp(zᵖ_j − mᵖ)·(exp(−δ_j) − 1 + δ_j)

which has no term below 0 and is summed from the series where δ is small. Then

    KL = u + log(1 + v)      u = E_p[δ] = mean + (m^q − z^q_a),  v = second / s − u

in fp64: where the heads differ by little, u and −v are small and equal to first order, so that the
error is relative to the KL and not to the logits. The identity is E_p[exp(−δ)] = 1 + v. In both
forms equal logits give exactly 0, and so do their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latro_kernels.linear_kl import ops, two_heads
from latro_kernels.linear_kl.two_heads import (
    checked,
    reference_log_softmax,
    rows_of,
    settings_of_heads,
)


def reference(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    temperature: float | tuple[float, float] = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
) -> Tensor:
    """Return KL [...] by plain PyTorch, in fp32, or fp64 for fp64; nothing is checked."""
    log_p, log_q = reference_log_softmax(
        (hidden_p, weight_p, bias_p), (hidden_q, weight_q, bias_q), temperature, softcap
    )
    p = log_p.exp()
    # Where p is 0 the difference may be -inf or NaN, and the limit of the product is 0.
    return (p * torch.where(p == 0, 0, log_p - log_q)).sum(-1)


Settings = tuple[float, float, float, float, str]
"""Temperature and softcap of p, those of q, and the backend."""


class _LinearKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, *heads: Tensor | None) -> Tensor:
        kl, *rows = ops.forward(*heads, *settings)
        ctx.save_for_backward(*heads, *rows)
        ctx.settings = settings
        return kl

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        return two_heads.backward("linear_kl", ops.backward, ctx, grad_kl)


def linear_kl(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    *,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    temperature: float | tuple[float, float] = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return KL(p‖q) of two LM heads, row by row and exact, differentiable in both, without logits.

    With the policy as p and its reference as q it is a penalty; in distillation, with the student
    as p, the reverse KL, and with the student as q the forward KL.

    Without softcap, and up to rounding, this is

        log_p = (linear(hidden_p, weight_p, bias_p).float() / temperature).log_softmax(-1)
        log_q = (linear(hidden_q, weight_q, bias_q).float() / temperature).log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    in memory that grows with N, not with N·V. Products, sums, autocast and rows without upstream
    gradient are as in `linear_logprob`; there is no double backward. A small KL keeps its digits:
    in fp32, for logits of a few units, its error is about 2⁻²⁰·√KL nats, where the lines above have
    2⁻²² however small the KL is. Heads that give equal logits have a KL, and gradients, of exactly
    0. Where q is 0 and p is not the KL is infinite.

    Args:
        hidden_p: [..., Hp], such as [N, Hp] or [B, T, Hp]; fp32, bf16 or fp16
            (backend="reference": fp64 too); any strides.
        weight_p: [V, Hp], dtype and device of hidden_p; any strides.
        hidden_q: [..., Hq], leading dimensions, dtype and device of hidden_p; any strides.
        weight_q: [V, Hq] likewise. The same tensor as weight_p, or one detached from it: each slice
            of it is read, and on the CPU packed, once for both heads.
        bias_p: [V], dtype and device of hidden_p; None for none.
        bias_q: [V] likewise.
        temperature: divides the logits of both heads, or as a pair those of p and those of q; above
            0, and in fp32's normal range.
        softcap: c of c·tanh(logits / c), before the temperature, of both heads or as a pair of p
            and q; None for none. Likewise, and c / temperature too.
        backend: "auto", "reference" (makes all logits), "cpu", "triton" or "cuda".

    Returns:
        kl of hidden_p's leading dimensions, fp32, nats.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value, or an unknown backend.
        BackendUnavailableError: the backend cannot run here.
    """
    tensors = checked(
        {"hidden_p": hidden_p, "weight_p": weight_p, "bias_p": bias_p},
        {"hidden_q": hidden_q, "weight_q": weight_q, "bias_q": bias_q},
        temperature,
        softcap,
        backend,
    )
    if backend == "reference":
        return reference(**tensors, temperature=temperature, softcap=softcap)
    settings = (*settings_of_heads(temperature, softcap), backend)
    kl = _LinearKl.apply(settings, *rows_of(tensors).values())
    return kl.view(hidden_p.shape[:-1])
