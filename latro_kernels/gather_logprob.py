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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.checks import (
    check_device,
    check_float_dtype,
    check_scales,
    check_target,
    check_target_values,
    check_tensor,
    check_type,
)
from latro_kernels.dispatch import resolve
from latro_kernels.head import absent


def reference(
    logits: Tensor, target: Tensor, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """logp [N] and entropy [N] in plain PyTorch, in fp32, or fp64 for fp64; nothing is checked."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    # Where p is 0, p·log p has the limit 0; 0 · −inf would make it and its gradient NaN.
    terms = log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)
    return log_p.gather(1, target[:, None]).squeeze(1), -terms.sum(-1)


@dataclass(frozen=True, eq=False)
class Rows:
    """What both passes know of the problem.

    Args:
        logits: [N, V], any stride between rows, none within.
        target: [N] int64, contiguous.
        temperature: divides the logits.
        softcap: 0 where there is none.
    """

    logits: Tensor
    target: Tensor
    temperature: float
    softcap: float


@dataclass(frozen=True, eq=False)
class RowState:
    """What the forward finds out of each row, fp32 [N] each.

    Args:
        logp: the log-prob of the target.
        entropy: the entropy, or None where none is asked for.
        peak: max z.
        log_total: log Σ exp(z − peak).
    """

    logp: Tensor
    entropy: Tensor | None
    peak: Tensor
    log_total: Tensor


# The settings, and what the forward leaves to the backward, as both backward ops take them.
_SETTINGS = "Tensor target, float temperature, float softcap, bool with_entropy, str backend"
_UPSTREAM = (
    "Tensor logp, Tensor entropy, Tensor peak, Tensor log_total, "
    "Tensor grad_logp, Tensor grad_entropy"
)
torch.library.define(
    "latro_kernels::gather_logprob",
    f"(Tensor logits, {_SETTINGS}) -> (Tensor logp, Tensor entropy, Tensor peak, Tensor log_total)",
)
torch.library.define(
    "latro_kernels::gather_logprob_backward",
    f"(Tensor logits, {_SETTINGS}, {_UPSTREAM}) -> Tensor dlogits",
)
torch.library.define(
    "latro_kernels::gather_logprob_backward_",
    f"(Tensor(a!) logits, {_SETTINGS}, {_UPSTREAM}) -> ()",
)


@torch.library.impl("latro_kernels::gather_logprob", ("cpu", "cuda"))
def _forward(
    logits: Tensor,
    target: Tensor,
    temperature: float,
    softcap: float,
    with_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_target_values(target, logits.shape[1])
    logp, peak, log_total = (_row_numbers(logits) for _ in range(3))
    entropy = _row_numbers(logits) if with_entropy else None
    rows = Rows(logits, target.contiguous(), temperature, softcap)
    state = RowState(logp, entropy, peak, log_total)
    # Resolved inside of the op, for torch.compile cannot trace the search for a library.
    backend = resolve(backend, logits.device)
    if backend == "triton":
        from latro_kernels.triton import gather_logprob as kernels

        kernels.forward(rows, state)
    else:
        _call(
            f"latro_{backend}_gather_logprob_forward",
            *(logits, native.dtype_code(logits.dtype), logits.stride(0), rows.target),
            *(logp, entropy, peak, log_total, *logits.shape, softcap, temperature),
        )
    return logp, absent(logits) if entropy is None else entropy, peak, log_total


@torch.library.register_fake("latro_kernels::gather_logprob")
def _(
    logits: Tensor,
    target: Tensor,
    temperature: float,
    softcap: float,
    with_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logp, peak, log_total = (_row_numbers(logits) for _ in range(3))
    return logp, _row_numbers(logits) if with_entropy else absent(logits), peak, log_total


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
    pass


def _write_gradient(
    dlogits: Tensor,
    logits: Tensor,
    target: Tensor,
    temperature: float,
    softcap: float,
    with_entropy: bool,
    backend: str,
    logp: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_total: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor,
) -> None:
    rows = Rows(logits, target.contiguous(), temperature, softcap)
    state = RowState(logp, entropy if with_entropy else None, peak, log_total)
    upstream = grad_logp.contiguous(), grad_entropy.contiguous() if with_entropy else None
    backend = resolve(backend, logits.device)
    if backend == "triton":
        from latro_kernels.triton import gather_logprob as kernels

        kernels.backward(rows, state, upstream, dlogits)
    else:
        _call(
            f"latro_{backend}_gather_logprob_backward",
            *(logits, dlogits, native.dtype_code(logits.dtype)),
            *(logits.stride(0), dlogits.stride(0), rows.target, *upstream),
            *(logp, state.entropy, peak, log_total, *logits.shape, softcap, temperature),
        )


def _call(symbol: str, logits: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel with what its library takes last: the stream, or the number of threads."""
    if logits.device.type == "cuda":
        with torch.cuda.device(logits.device):
            stream = torch.cuda.current_stream().cuda_stream
            native.call(symbol, logits, *arguments, stream)
    else:
        native.call(symbol, logits, *arguments, torch.get_num_threads())


def _row_numbers(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


class _GatherLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        settings: tuple[float, float, bool, str],
        in_place: bool,
    ) -> tuple[Tensor, Tensor]:
        logp, entropy, peak, log_total = torch.ops.latro_kernels.gather_logprob(
            logits, target, *settings
        )
        ctx.save_for_backward(logits, target, logp, entropy, peak, log_total)
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
            torch.ops.latro_kernels.gather_logprob_backward_(*arguments)
            ctx.overwritten = True
            return logits.detach(), None, None, None
        return torch.ops.latro_kernels.gather_logprob_backward(*arguments), None, None, None


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
    """Log-probability of `target` under `logits`, differentiable.

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
