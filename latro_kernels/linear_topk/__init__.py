"""The k likeliest tokens at the LM head, log-probs of k tokens, and KL from a teacher of that many.

A row has k tokens t_1 … t_k; every other token is among the rest. With logits z as in
`linear_logprob`, a row of k + 1 logits stands for the whole vocabulary,

    z_{t_1}, …, z_{t_k}, r        r = log Σ_{j ∉ t} exp(z_j)

and its softmax is the probability of each of the tokens, and of the rest together. Only this row is
made of the vocabulary; with its upstream gradients g_1 … g_k and g_r,

    ∂/∂z_{t_i} = g_i        ∂/∂z_j = g_r·exp(z_j − r) for j ∉ t

and the chain to x, W and b is that of `linear_logprob`. The rest is a sum of its own, and not 1
less the others' probabilities: it keeps its digits where they leave next to nothing of 1.

With p the teacher's probabilities of its tokens, and as that of its rest 1 − Σ p,

    KL = Σ_i p_i·(log p_i − log q_i)        over all k + 1

which is computed as Σ p·(exp(−d) − 1 + d) with d = log p − log q, in fp64: the two are equal since
p and q both sum to 1, and in the second no term is below 0. It is the KL of the two distributions
after all but the k tokens were made one, and hence at most the KL over the vocabulary (the log sum
inequality: Cover and Thomas, "Elements of Information Theory", 2.7).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from latro_kernels.checks import (
    as_int,
    check_choice,
    check_device,
    check_dtype,
    check_head,
    check_scales,
    check_type,
    dense,
)
from latro_kernels.head import cast, reference_logits
from latro_kernels.linear_topk import ops
from latro_kernels.linear_topk.ops import NO_TOKEN, check_token_values

BACKENDS = ("auto", "reference")


class TopK(NamedTuple):
    """The k likeliest tokens of each row, the likeliest first.

    Args:
        token: int64 [..., k]; −1 where the row has no further token of any probability.
        log_prob: fp32 [..., k], nats, over the whole vocabulary; −inf where there is no token.
    """

    token: Tensor
    log_prob: Tensor


def reference_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TopK:
    """Return the k likeliest tokens by plain PyTorch, in fp32 or fp64, without any checks."""
    z = reference_logits(hidden, weight, bias, softcap) / temperature
    best, token = z.topk(k, dim=-1)
    missing = best == -torch.inf
    log_prob = (best - z.logsumexp(-1, keepdim=True)).masked_fill(missing, -torch.inf)
    return TopK(token.masked_fill(missing, NO_TOKEN), log_prob)


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> TopK:
    """Return the k likeliest tokens of each row with their log-probs, without a tensor of logits.

    Without softcap, and up to rounding, this is

        logits = torch.nn.functional.linear(hidden, weight, bias).float() / temperature
        log_prob, token = torch.log_softmax(logits, -1).topk(k)

    in memory of a few tiles of logits and of N·k numbers: what a teacher has for `linear_topk_kl`.
    It has no gradient; `linear_topk_logprob` of its tokens has. It is made of torch's operations on
    every device. Under autocast, hidden, weight and bias are cast as `linear` casts them.

    Args:
        hidden: [..., H], such as [N, H] or [B, T, H]; fp32, bf16 or fp16 (backend="reference": fp64
            too); any strides.
        weight: [V, H], dtype and device of hidden; any strides.
        k: how many, in 1..V. Of equally likely tokens any may be taken.
        bias: [V], dtype and device of hidden; None for none.
        temperature: divides the logits; above 0, and in fp32's normal range.
        softcap: c of c·tanh(logits / c), before the temperature; None for none. Likewise, and c /
            temperature too.
        backend: "auto", or "reference" (makes all logits).

    Returns:
        `TopK`, its log-probs in fp32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value.
    """
    check_head(hidden, weight, bias)
    k = as_int("k", k)
    if not 1 <= k <= len(weight):
        raise ValueError(f"k: expected an int in 1..{len(weight)}, got {k}")
    hidden, weight, bias = _in_products_dtype(hidden, weight, bias, temperature, softcap, backend)
    with torch.no_grad():
        if backend == "reference":
            return reference_topk(hidden, weight, k, bias, temperature, softcap)
        rows, batch = hidden.reshape(-1, hidden.shape[-1]), hidden.shape[:-1]
        token, log_prob = ops.search(
            rows, weight, bias, k, float(temperature), float(softcap or 0.0)
        )
        return TopK(token.view(*batch, k), log_prob.view(*batch, k))


def reference(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return log-probs [..., k + 1] by plain PyTorch, in fp32 or fp64, without any checks."""
    z = reference_logits(hidden, weight, bias, softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    absent = token == NO_TOKEN
    # One more column takes what is scattered for no token.
    column = token.masked_fill(absent, log_p.shape[-1])
    columns = (*log_p.shape[:-1], log_p.shape[-1] + 1)
    is_token = torch.zeros(columns, dtype=torch.bool, device=token.device)
    is_token = is_token.scatter(-1, column, True)[..., :-1]
    of_tokens = log_p.gather(-1, token.masked_fill(absent, 0)).masked_fill(absent, -torch.inf)
    of_rest = log_p.masked_fill(is_token, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([of_tokens, of_rest], -1)


class _TopKLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: tuple[float, float], hidden: Tensor, *others: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        of_tokens, row_max, sum_exp = ops.forward(hidden, *others, *settings)
        ctx.save_for_backward(hidden, *others, row_max, sum_exp)
        ctx.settings = settings
        return of_tokens.double(), row_max.double() + sum_exp.double().log()

    @staticmethod
    def backward(ctx: Any, grad_of_tokens: Tensor, grad_rest: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would let a gradient penalty go by with a gradient of zero.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_topk has no double backward; use backend='reference' for create_graph"
            )
        *inputs, row_max, sum_exp = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        upstream = grad_of_tokens.float(), grad_rest.float()
        gradients = ops.backward(*inputs, *ctx.settings, row_max, sum_exp, *upstream, needs)
        wanted = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
        return None, *wanted, None


def linear_topk_logprob(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return log-probs of k tokens a row, and of all others together, without a tensor of logits.

    Without softcap, and up to rounding, this is

        logits = torch.nn.functional.linear(hidden, weight, bias).float() / temperature
        log_p = torch.log_softmax(logits, -1)
        of_rest = log_p.scatter(-1, token, -torch.inf).logsumexp(-1, keepdim=True)
        torch.cat([log_p.gather(-1, token), of_rest], -1)

    in memory of a few tiles of logits and of N·(k + 1) numbers. It is made of torch's products on
    every device, without kernels. Sums over the vocabulary are fp32, the softmax over k + 1 logits
    is fp64. Under autocast, hidden, weight and bias are cast as `linear` casts them. There is no
    double backward.

    Args:
        hidden: [..., H], such as [N, H] or [B, T, H]; fp32, bf16 or fp16 (backend="reference": fp64
            too); any strides.
        weight: [V, H], dtype and device of hidden; any strides.
        token: int64 [..., k], k < V: each row's tokens, all different, in 0..V − 1; or −1 for none,
            whose log-prob is −inf. Whether they differ is not checked.
        bias: [V], dtype and device of hidden; None for none.
        temperature: divides the logits; above 0, and in fp32's normal range.
        softcap: c of c·tanh(logits / c), before the temperature; None for none. Likewise, and c /
            temperature too.
        backend: "auto", or "reference" (makes all logits).

    Returns:
        log-probs [..., k + 1], fp32, nats; the last of each row is that of the rest.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value. A token out of range raises on
            the CPU; on a GPU it stops the device, as no value is read back.
    """
    hidden, weight, bias = _checked(hidden, weight, token, bias, temperature, softcap, backend)
    if backend == "reference":
        check_token_values(token, len(weight))
        return reference(hidden, weight, token, bias, temperature, softcap)
    return _log_softmax(hidden, weight, token, bias, temperature, softcap).float()


def reference_kl(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    log_prob: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return KL [...] by plain PyTorch, in fp32 or fp64, without any checks."""
    token = token.masked_fill(log_prob == -torch.inf, NO_TOKEN)
    log_q = reference(hidden, weight, token, bias, temperature, softcap)
    log_p = _with_rest(log_prob.to(log_q.dtype))
    p = log_p.exp()
    # Where p is 0 the difference may be infinite or NaN, and the limit of the product is 0.
    terms = p * torch.where(p == 0, 0, log_p - log_q)
    return terms.sum(-1)


def linear_topk_kl(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    log_prob: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return KL(p‖q) of a teacher p, known by its top k, and an LM head q, without the logits of q.

    It is the forward KL of distillation, differentiable in hidden, weight and bias. What p leaves
    of 1 counts as one more token, the rest, and so does what q has outside of p's tokens:

        log_q = linear_topk_logprob(hidden, weight, token)
        p = log_prob.exp()
        p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
        torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)

    up to rounding. So it is 0 only where q gives each token, and the rest as a whole, what p gives
    them, and at most the KL over the whole vocabulary. Where the rest is to count for nothing, or
    both are to be distributed over the k tokens alone, take `linear_topk_logprob`.

    Args:
        hidden: [..., H], as in `linear_topk_logprob`.
        weight: [V, H] likewise.
        token: int64 [..., k], p's tokens, likewise.
        log_prob: [..., k], fp32 or fp64, their log-probs under p in nats, p being at its own
            temperature; −inf for none: such an entry counts for nothing, whatever its token. It has
            no gradient. Probabilities that sum to more than 1, by rounding, have a rest of 0.
        bias: [V] likewise.
        temperature: divides the logits of q.
        softcap: of the logits of q.
        backend: "auto", or "reference" (makes all logits).

    Returns:
        kl [...], fp32, nats.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: as in `linear_topk_logprob`; or log_prob has another shape than token.
    """
    hidden, weight, bias = _checked(hidden, weight, token, bias, temperature, softcap, backend)
    _check_log_prob(log_prob, token)
    log_prob = log_prob.detach()
    token = token.masked_fill(log_prob == -torch.inf, NO_TOKEN)
    if backend == "reference":
        check_token_values(token, len(weight))
        return reference_kl(hidden, weight, token, log_prob, bias, temperature, softcap)
    log_q = _log_softmax(hidden, weight, token, bias, temperature, softcap)
    log_p = _with_rest(log_prob.double())
    p = log_p.exp()
    # Where p is 0 the difference may be infinite or NaN, and of the term q alone is left. Next to
    # 0, in fp64's subnormal numbers, q / p may overflow.
    is_none = p < torch.finfo(p.dtype).tiny
    difference = torch.where(is_none, 0, log_p - log_q)
    terms = torch.where(is_none, log_q.exp(), p * (torch.expm1(-difference) + difference))
    return terms.sum(-1).float()


def _with_rest(log_prob: Tensor) -> Tensor:
    """Return log-probs of tokens with that of what they leave of 1 behind them."""
    rest = (1 - log_prob.exp().sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([log_prob, rest.log()], -1)


def _log_softmax(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """Return log-probs [..., k + 1] in fp64."""
    settings = (float(temperature), float(softcap or 0.0))
    rows = hidden.reshape(-1, hidden.shape[-1])
    tokens = token.reshape(rows.shape[0], token.shape[-1])
    of_tokens, rest = _TopKLogits.apply(settings, rows, weight, bias, tokens)
    logits = torch.cat([of_tokens, rest[:, None]], -1)
    # What is no token, or a rest of none, has no gradient, whatever comes from above. A token whose
    # logit is -inf has one, as in `linear_logprob`.
    is_none = torch.cat([tokens == NO_TOKEN, rest[:, None] == -torch.inf], -1)
    log_q = logits.log_softmax(-1).masked_fill(is_none, -torch.inf)
    return log_q.view(*token.shape[:-1], token.shape[-1] + 1)


def _checked(
    hidden: Tensor,
    weight: Tensor,
    token: Tensor,
    bias: Tensor | None,
    temperature: object,
    softcap: object,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden, weight and bias in the dtype of products; raise for what is wrong."""
    check_head(hidden, weight, bias)
    _check_token(token, hidden, len(weight))
    return _in_products_dtype(hidden, weight, bias, temperature, softcap, backend)


def _in_products_dtype(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: object,
    softcap: object,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden, weight and bias cast; raise for bad scales or a bad backend."""
    check_scales(temperature, softcap)
    check_type("backend", backend, str)
    check_choice("backend", backend, BACKENDS)
    return cast(hidden, weight, bias, backend)


def _check_token(token: object, hidden: Tensor, V: int) -> None:
    token = dense("token", token)
    check_device("token", token, "hidden", hidden)
    if token.dim() != hidden.dim() or token.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"token: expected shape {(*hidden.shape[:-1], 'k')}, as hidden has rows, "
            f"got {tuple(token.shape)}"
        )
    check_dtype("token", token, torch.int64)
    if token.shape[-1] >= V:
        raise ValueError(
            f"token: expected fewer tokens a row than V = {V}, which leave a rest, "
            f"got {token.shape[-1]}"
        )


def _check_log_prob(log_prob: object, token: Tensor) -> None:
    log_prob = dense("log_prob", log_prob)
    check_device("log_prob", log_prob, "token", token)
    if log_prob.shape != token.shape:
        raise ValueError(
            f"log_prob: expected shape {tuple(token.shape)}, as token, got {tuple(log_prob.shape)}"
        )
    check_dtype("log_prob", log_prob, torch.float32, torch.float64)
