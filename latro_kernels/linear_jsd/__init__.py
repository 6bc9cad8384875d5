"""Generalised Jensen-Shannon divergence of two LM heads, exact and without their logits.

Head p has hidden x_n, weight W, bias b, temperature T and softcap c, head q its own, as in
`linear_kl`. With p and q their distributions, 0 < β < 1 and the mixture m = β·p + (1 − β)·q,

    JSD = β·KL(p‖m) + (1 − β)·KL(q‖m)
    ∂JSD/∂zᵖ_j = β·p_j·(log(p_j/m_j) − KL(p‖m))
    ∂JSD/∂z^q_j = (1 − β)·q_j·(log(q_j/m_j) − KL(q‖m))

which is equation 1 of Agarwal et al., "On-Policy Distillation of Language Models", arXiv
2306.13649, p being the teacher. From there on the chain to x, W and b is that of `linear_logprob`.

The mixture needs both normalisers before its first term, so the vocabulary is passed twice: for
both heads' maxima and sums of exponentials, and for the divergences. With d = log p_j − log q_j,

    log(p/m) = −log(1 + (1 − β)·(exp(−d) − 1))     log(q/m) = log(p/m) − d      where d > 0
    log(q/m) = −log(1 + β·(exp(d) − 1))            log(p/m) = log(q/m) + d      elsewhere

by expm1 and log1p, so that nothing overflows, and ratios near 1 keep their digits. d itself is the
difference of the logits less that of the normalisers, in fp64, not one of two log-probs. Each
token's term of the JSD is at least 0, and of second order in d: where the heads differ by little,
the error is relative to the JSD's square root. Equal logits give exactly 0, and so do their
gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from latro_kernels.checks import check_choice, check_number
from latro_kernels.linear_jsd import ops
from latro_kernels.linear_kl import two_heads
from latro_kernels.linear_kl.two_heads import (
    checked,
    reference_log_softmax,
    rows_of,
    settings_of_heads,
)

BACKENDS = ("auto", "reference")
Settings = tuple[float, float, float, float, float]
"""Temperature and softcap of p, those of q, and β."""


def reference(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    *,
    beta: float,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    temperature: float | tuple[float, float] = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
) -> Tensor:
    """Return JSD [...] by plain PyTorch, in fp32, or fp64 for fp64; nothing is checked."""
    log_p, log_q = reference_log_softmax(
        (hidden_p, weight_p, bias_p), (hidden_q, weight_q, bias_q), temperature, softcap
    )
    # Where both are 0 the mixture's logarithm has a gradient of NaN, which nothing multiplies away.
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    part = log_p.new_tensor(beta)
    parts = [
        log_p.masked_fill(neither, 0) + part.log(),
        log_q.masked_fill(neither, 0) + torch.log1p(-part),
    ]
    log_m = torch.stack(parts).logsumexp(0)

    def kl_terms(log_prob: Tensor) -> Tensor:
        # A probability of 0 counts for nothing, whatever the difference of logarithms.
        is_none = log_prob.exp() == 0
        terms = kl_div(log_m, log_prob.masked_fill(is_none, 0), reduction="none", log_target=True)
        return terms.masked_fill(is_none, 0)

    return (beta * kl_terms(log_p) + (1 - beta) * kl_terms(log_q)).sum(-1)


class _LinearJsd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, *heads: Tensor | None) -> Tensor:
        jsd, *rows = ops.forward(*heads, *settings)
        ctx.save_for_backward(*heads, *rows)
        ctx.settings = settings
        return jsd

    @staticmethod
    def backward(ctx: Any, grad_jsd: Tensor) -> tuple[Tensor | None, ...]:
        return two_heads.backward("linear_jsd", ops.backward, ctx, grad_jsd)


def linear_jsd(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    *,
    beta: float = 0.5,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    temperature: float | tuple[float, float] = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the generalised Jensen-Shannon divergence of two LM heads, row by row, without logits.

    With the teacher as p and the student as q it is the loss of generalised knowledge distillation,
    and of TRL's trainers for it. Without softcap, and up to rounding, this is

        log_p = (linear(hidden_p, weight_p, bias_p).float() / temperature).log_softmax(-1)
        log_q = (linear(hidden_q, weight_q, bias_q).float() / temperature).log_softmax(-1)
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        kl_div = partial(torch.nn.functional.kl_div, reduction="none", log_target=True)
        jsd = (beta * kl_div(log_m, log_p) + (1 - beta) * kl_div(log_m, log_q)).sum(-1)

    in memory that grows with N, not with N·V. It is differentiable in both heads, and at most the
    entropy of (β, 1 − β). JSD / β tends to KL(p‖q) as β goes to 0, and JSD / (1 − β) to KL(q‖p) as
    β goes to 1; for these take `linear_kl`, which passes the vocabulary once.

    It is made of torch's products on every device, without kernels; sums are fp32. Heads that give
    equal logits have a divergence, and gradients, of exactly 0. Under autocast hidden, weight and
    bias are cast as `linear` casts them. There is no double backward.

    Args:
        hidden_p: [..., Hp], such as [N, Hp] or [B, T, Hp]; fp32, bf16 or fp16
            (backend="reference": fp64 too); any strides.
        weight_p: [V, Hp], dtype and device of hidden_p; any strides.
        hidden_q: [..., Hq], leading dimensions, dtype and device of hidden_p; any strides.
        weight_q: [V, Hq] likewise.
        beta: β, the part of p in the mixture, above 0 and below 1.
        bias_p: [V], dtype and device of hidden_p; None for none.
        bias_q: [V] likewise.
        temperature: divides the logits of both heads, or as a pair those of p and those of q; above
            0, and in fp32's normal range.
        softcap: c of c·tanh(logits / c), before the temperature, of both heads or as a pair of p
            and q; None for none. Likewise, and c / temperature too.
        backend: "auto", or "reference" (makes all logits).

    Returns:
        jsd of hidden_p's leading dimensions, fp32, nats.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value, or an unknown backend.
    """
    tensors = checked(
        {"hidden_p": hidden_p, "weight_p": weight_p, "bias_p": bias_p},
        {"hidden_q": hidden_q, "weight_q": weight_q, "bias_q": bias_q},
        temperature,
        softcap,
        backend,
    )
    check_choice("backend", backend, BACKENDS)
    check_number("beta", beta)
    if not 0 < beta < 1:
        raise ValueError(f"beta: expected a number above 0 and below 1, got {beta}")
    if backend == "reference":
        return reference(**tensors, beta=beta, temperature=temperature, softcap=softcap)
    settings = (*settings_of_heads(temperature, softcap), float(beta))
    jsd = _LinearJsd.apply(settings, *rows_of(tensors).values())
    return jsd.view(hidden_p.shape[:-1])
