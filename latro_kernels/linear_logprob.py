"""Log-probability of one token per row at the LM head, without the logits.

With hidden x_n, weight W, bias b, temperature T and softcap c, a row's logits are

    a = x·Wᵀ + b        z = c·tanh(a / c) / T   (z = a / T without softcap)

and with p = softmax(z), t the row's target,

    logp = z_t − log Σ_j exp(z_j)          entropy H = −Σ_j p_j·log p_j

For upstream gradients g of logp and h of the entropy

    ∂/∂z_j = g·(1[j = t] − p_j) − h·p_j·(log p_j + H)
    ∂/∂a_j = ∂/∂z_j · (1 − tanh²(a_j / c)) / T
    dx = ∂/∂a · W        dW = (∂/∂a)ᵀ · x        db = Σ_n ∂/∂a

In the target's column 1 − p_t is −expm1(logp): where p_t is close to 1 the subtraction would lose
the digits that are left, and that is where answer tokens live. The logits are made a tile at a
time, forward and again backward; `tiles` does that. The online sum of exponentials is Milakov and
Gimelshein's, "Online normalizer calculation for softmax", arXiv 1805.02867.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latro_kernels import tiles
from latro_kernels.dispatch import resolve


def reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """logp [N] and entropy [N] in plain PyTorch, in fp32, or fp64 for fp64; nothing is checked."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        z = z + bias.to(dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    # Where p is 0 the product is 0 · −inf, and its limit is 0.
    terms = torch.where(log_p == -math.inf, 0, log_p.exp() * log_p)
    return log_p.gather(1, target[:, None]).squeeze(1), -terms.sum(-1)


torch.library.define(
    "latro_kernels::linear_logprob",
    "(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float temperature, "
    "float softcap, bool with_entropy, str backend) -> "
    "(Tensor logp, Tensor entropy, Tensor peak, Tensor log_total)",
)
torch.library.define(
    "latro_kernels::linear_logprob_backward",
    "(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float temperature, "
    "float softcap, bool with_entropy, str backend, Tensor logp, Tensor entropy, Tensor peak, "
    "Tensor log_total, Tensor grad_logp, Tensor grad_entropy, bool[3] needs) -> "
    "(Tensor dx, Tensor dw, Tensor db)",
)


@torch.library.impl("latro_kernels::linear_logprob", ("cpu", "cuda"))
def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    with_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = _head(hidden, weight, target, bias, temperature, softcap, backend)
    _check_target_values(target, len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        state = tiles.forward(head, with_entropy)
    log_total = state.total.log()
    entropy = _absent(hidden)
    if state.weighted is not None:
        entropy = log_total - state.weighted / state.total
    return (state.picked - state.peak) - log_total, entropy, state.peak, log_total


@torch.library.register_fake("latro_kernels::linear_logprob")
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    with_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logp, peak, log_total = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
    return logp, torch.empty_like(logp) if with_entropy else _absent(hidden), peak, log_total


@torch.library.impl("latro_kernels::linear_logprob_backward", ("cpu", "cuda"))
def _backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
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
    needs: list[bool],
) -> tuple[Tensor, ...]:
    head = _head(hidden, weight, target, bias, temperature, softcap, backend)
    grad = tiles.RowGrad(
        logp=logp,
        entropy=entropy if with_entropy else None,
        peak=peak,
        log_total=log_total,
        grad_logp=grad_logp.contiguous(),
        grad_entropy=grad_entropy.contiguous() if with_entropy else None,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = tiles.backward(head, grad, tuple(needs))
    return tuple(_absent(hidden) if g is None else g for g in gradients)


@torch.library.register_fake("latro_kernels::linear_logprob_backward")
def _(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(shape) if needed else _absent(hidden)
        for shape, needed in zip(shapes, arguments[-1], strict=True)
    )


def _head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    backend: str,
) -> tiles.Head:
    # Resolved inside of the op, for torch.compile cannot trace the search for a library.
    backend = resolve(backend, hidden.device)
    return tiles.Head(hidden, weight, target.contiguous(), bias, temperature, softcap, backend)


def _absent(like: Tensor) -> Tensor:
    """Stands for an output that was not asked for: an op returns tensors, never None."""
    return like.new_empty(0, dtype=torch.float32)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        settings: tuple[float, float, bool, str],
    ) -> tuple[Tensor, Tensor]:
        logp, entropy, peak, log_total = torch.ops.latro_kernels.linear_logprob(
            hidden, weight, target, bias, *settings
        )
        ctx.save_for_backward(hidden, weight, target, bias, logp, entropy, peak, log_total)
        ctx.settings = settings
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would let a gradient penalty go by with a gradient of zero.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_logprob has no double backward; use backend='reference' for create_graph"
            )
        hidden, weight, target, bias, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = torch.ops.latro_kernels.linear_logprob_backward(
            hidden, weight, target, bias, *ctx.settings, *kept, grad_logp, grad_entropy, needs
        )
        wanted = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
        return *wanted, None, None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of `target` under the LM head, differentiable, without a tensor of logits.

    Without softcap, and up to rounding, this is

        logits = torch.nn.functional.linear(hidden, weight, bias).float() / temperature
        logp = torch.log_softmax(logits, -1).gather(1, target[:, None]).squeeze(1)

    in memory that grows with N, not with N·V. Products are made in the dtype of `hidden` and summed
    in fp32 (on the CPU torch rounds each bf16 product once); everything after them is fp32. Under
    autocast, hidden, weight and bias are cast as `linear` casts them. Rows whose upstream gradient
    is 0 cost nothing in a backward on the CPU. There is no double backward.

    Args:
        hidden: [N, H] fp32, bf16 or fp16 (backend="reference": fp64 too); any strides.
        weight: [V, H], dtype and device of hidden; any strides.
        target: [N] int64, each in 0..V − 1.
        bias: [V], dtype and device of hidden; None for none.
        temperature: divides the logits; above 0.
        softcap: c of c·tanh(logits / c), before the temperature; above 0, None for none.
        return_entropy: whether to return the entropy of each row's distribution too.
        backend: "auto", "reference" (makes all logits), "cpu", "triton" or "cuda".

    Returns:
        logp [N], fp32, nats; with `return_entropy` the pair logp [N], entropy [N], fp32, nats.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value, or an unknown backend. A target
            out of range raises on the CPU; on a GPU it stops the device, as no value is read back.
        BackendUnavailableError: the backend cannot run here.
    """
    _check(hidden, weight, target, bias, temperature, softcap, backend)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check_dtypes(hidden, weight, bias, backend)
    if backend == "reference":
        _check_target_values(target, len(weight))
        logp, entropy = reference(hidden, weight, target, bias, temperature, softcap)
    else:
        settings = (float(temperature), float(softcap or 0.0), return_entropy, backend)
        logp, entropy = _LinearLogprob.apply(hidden, weight, bias, target, settings)
    return (logp, entropy) if return_entropy else logp


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: object,
    softcap: object,
    backend: object,
) -> None:
    """Types, shapes, devices and numbers."""
    shaped: list[tuple[str, object, int]] = [
        ("hidden", hidden, 2),
        ("weight", weight, 2),
        ("target", target, 1),
    ]
    if bias is not None:
        shaped.append(("bias", bias, 1))
    for name, value, dimensions in shaped:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.dim() != dimensions:
            raise ValueError(
                f"{name}: expected {dimensions} dimension{'s'[: dimensions - 1]}, "
                f"got shape {tuple(value.shape)}"
            )
        if value.device != hidden.device:
            raise ValueError(
                f"{name}: expected the device of hidden, {hidden.device}, got {value.device}"
            )
    (N, H), V = hidden.shape, weight.shape[0]
    if V == 0 or H == 0 or weight.shape[1] != H:
        raise ValueError(
            f"weight: expected shape [V, H] with V > 0 and H = {H} > 0, as in hidden, "
            f"got {tuple(weight.shape)}"
        )
    if target.shape[0] != N:
        raise ValueError(
            f"target: expected shape ({N},), as hidden has rows, got {target.shape[0]}"
        )
    if bias is not None and bias.shape[0] != V:
        raise ValueError(f"bias: expected shape ({V},), as weight has rows, got {bias.shape[0]}")
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected dtype torch.int64, got {target.dtype}")
    _check_positive("temperature", temperature)
    if softcap is not None:
        _check_positive("softcap", softcap)
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a str, got {type(backend).__name__}")


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def _check_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> None:
    allowed = [torch.float32, torch.bfloat16, torch.float16]
    if backend == "reference":
        allowed.append(torch.float64)
    if hidden.dtype not in allowed:
        expected = " or ".join(map(str, allowed))
        raise TypeError(f"hidden: expected dtype {expected}, got {hidden.dtype}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: expected the dtype of hidden, {hidden.dtype}, got {value.dtype}"
            )


def _check_target_values(target: Tensor, V: int) -> None:
    bad = (target < 0) | (target >= V)
    if target.device.type != "cpu":
        torch._assert_async(~bad.any(), f"target: expected values in 0..{V - 1}")
    elif bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"target: expected values in 0..{V - 1}, got {int(target[row])} in row {row}"
        )
