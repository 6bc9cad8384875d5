"""KL divergence between two LM heads, exact over the vocabulary, without their logits.

Head p has hidden x_n, weight W and bias b, head q its own; temperature T and softcap c are shared.
With logits z as in `linear_logprob`, p = softmax(zᵖ), q = softmax(z^q) and d_j = zᵖ_j − z^q_j,

    KL(p‖q) = Σ_j p_j·(log p_j − log q_j) = E_p[d] − log Σ exp(zᵖ) + log Σ exp(z^q)
    ∂KL/∂zᵖ_j = p_j·(d_j − E_p[d])

where p_j = 0 counts as 0. From there on the chain to x, W and b is that of `linear_logprob`; q is
held constant.

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

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from latro_kernels import kl_tiles, native
from latro_kernels.checks import (
    check_device,
    check_float_dtype,
    check_scales,
    check_tensor,
    check_type,
)
from latro_kernels.dispatch import resolve
from latro_kernels.head import absent, autocast_dtype, multiplies_bf16
from latro_kernels.kl_tiles import Head, Heads, RowGrad


def reference(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """KL [N] in plain PyTorch, in fp32, or fp64 for fp64; nothing is checked."""
    dtype = torch.promote_types(hidden_p.dtype, torch.float32)

    def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = hidden.to(dtype) @ weight.to(dtype).t()
        if bias is not None:
            z = z + bias.to(dtype)
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        return torch.log_softmax(z / temperature, dim=-1)

    log_p = log_softmax(hidden_p, weight_p, bias_p)
    log_q = log_softmax(hidden_q, weight_q, bias_q)
    p = log_p.exp()
    # Where p is 0 the difference may be -inf or NaN, and the limit of the product is 0.
    return (p * torch.where(p == 0, 0, log_p - log_q)).sum(-1)


torch.library.define(
    "latro_kernels::linear_kl",
    "(Tensor hidden_p, Tensor weight_p, Tensor? bias_p, Tensor hidden_q, Tensor weight_q, "
    "Tensor? bias_q, float temperature, float softcap, str backend) -> "
    "(Tensor kl, Tensor anchor, Tensor mean, Tensor peak, Tensor total)",
)
torch.library.define(
    "latro_kernels::linear_kl_backward",
    "(Tensor hidden_p, Tensor weight_p, Tensor? bias_p, Tensor hidden_q, Tensor weight_q, "
    "Tensor? bias_q, float temperature, float softcap, str backend, Tensor anchor, Tensor mean, "
    "Tensor peak, Tensor total, Tensor grad_kl, bool[3] needs) -> "
    "(Tensor dx, Tensor dw, Tensor db)",
)


@torch.library.impl("latro_kernels::linear_kl", ("cpu", "cuda"))
def _forward(
    hidden_p: Tensor,
    weight_p: Tensor,
    bias_p: Tensor | None,
    hidden_q: Tensor,
    weight_q: Tensor,
    bias_q: Tensor | None,
    temperature: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, ...]:
    p, q = Head(hidden_p, weight_p, bias_p), Head(hidden_q, weight_q, bias_q)
    # Resolved inside of the op, for torch.compile cannot trace the search for a library.
    heads = Heads(p, q, temperature, softcap, resolve(backend, hidden_p.device))
    with torch.autocast(hidden_p.device.type, enabled=False):
        return _cpu_forward(heads) if heads.backend == "cpu" else kl_tiles.forward(heads)


@torch.library.register_fake("latro_kernels::linear_kl")
def _(hidden_p: Tensor, *_: object) -> tuple[Tensor, ...]:
    return _row_numbers(hidden_p)


@torch.library.impl("latro_kernels::linear_kl_backward", ("cpu", "cuda"))
def _backward(
    hidden_p: Tensor,
    weight_p: Tensor,
    bias_p: Tensor | None,
    hidden_q: Tensor,
    weight_q: Tensor,
    bias_q: Tensor | None,
    temperature: float,
    softcap: float,
    backend: str,
    anchor: Tensor,
    mean: Tensor,
    peak: Tensor,
    total: Tensor,
    grad_kl: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    p, q = Head(hidden_p, weight_p, bias_p), Head(hidden_q, weight_q, bias_q)
    heads = Heads(p, q, temperature, softcap, resolve(backend, hidden_p.device))
    grad = RowGrad(grad_kl.contiguous(), anchor, mean, peak, total)
    with torch.autocast(hidden_p.device.type, enabled=False):
        backward = _cpu_backward if heads.backend == "cpu" else kl_tiles.backward
        gradients = backward(heads, grad, tuple(needs))
    return tuple(absent(hidden_p) if g is None else g for g in gradients)


@torch.library.register_fake("latro_kernels::linear_kl_backward")
def _(hidden_p: Tensor, weight_p: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    shapes = (hidden_p.shape, weight_p.shape, weight_p.shape[:1])
    return tuple(
        hidden_p.new_empty(shape) if needed else absent(hidden_p)
        for shape, needed in zip(shapes, arguments[-1], strict=True)
    )


def _row_numbers(hidden: Tensor) -> tuple[Tensor, ...]:
    """Room for the KL, fp32, and for anchor, mean, peak and total, fp64."""
    dtypes = (torch.float32, *(torch.float64,) * 4)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for dtype in dtypes)


def _cpu_forward(heads: Heads) -> tuple[Tensor, ...]:
    N, V = len(heads.p.hidden), len(heads.p.weight)
    outputs = _row_numbers(heads.p.hidden)
    native.call(
        "latro_cpu_linear_kl_forward",
        *(*_cpu_operands(heads), *outputs, N, V, heads.softcap, heads.temperature),
        torch.get_num_threads(),
    )
    return outputs


def _cpu_backward(
    heads: Heads, grad: RowGrad, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    (N, H), V, dtype = heads.p.hidden.shape, len(heads.p.weight), heads.p.weight.dtype
    # Rows without an upstream gradient are left out.
    rows = (grad.grad_kl != 0).nonzero().flatten()
    M = len(rows)
    dx = torch.zeros(N, H, dtype=torch.float32) if needs[0] else None
    dw = torch.zeros(V, H, dtype=dtype) if needs[1] else None
    db = torch.zeros(V, dtype=torch.float32) if needs[2] else None
    if M:
        native.call(
            "latro_cpu_linear_kl_backward",
            *(*_cpu_operands(heads), rows if M < N else None, *vars(grad).values(), dx, dw, db),
            *(M, V, heads.softcap, heads.temperature, torch.get_num_threads()),
        )
    return tuple(None if t is None else t.to(dtype) for t in (dx, dw, db))


def _cpu_operands(heads: Heads) -> tuple[Tensor | int | None, ...]:
    """The first arguments of both calls."""
    p, q = heads.p, heads.q
    weight_p = p.weight.contiguous()
    weight_q = None if heads.share_weight else q.weight.contiguous()

    def operands(head: Head, weight: Tensor | None) -> tuple[Tensor | int | None, ...]:
        bias = None if head.bias is None else head.bias.float().contiguous()
        return head.hidden.contiguous(), weight, bias, head.hidden.shape[1]

    return (
        *(*operands(p, weight_p), *operands(q, weight_q)),
        *(native.dtype_code(p.hidden.dtype), multiplies_bf16(p.hidden, q.hidden)),
    )


class _LinearKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_p: Tensor,
        weight_p: Tensor,
        bias_p: Tensor | None,
        hidden_q: Tensor,
        weight_q: Tensor,
        bias_q: Tensor | None,
        settings: tuple[float, float, str],
    ) -> Tensor:
        heads = (hidden_p, weight_p, bias_p, hidden_q, weight_q, bias_q)
        kl, *kept = torch.ops.latro_kernels.linear_kl(*heads, *settings)
        ctx.save_for_backward(*heads, *kept)
        ctx.settings = settings
        return kl

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would let a gradient penalty go by with a gradient of zero.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_kl has no double backward; use backend='reference' for create_graph"
            )
        heads, kept = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        needs = ctx.needs_input_grad[:3]
        gradients = torch.ops.latro_kernels.linear_kl_backward(
            *heads, *ctx.settings, *kept, grad_kl, needs
        )
        wanted = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
        return *wanted, None, None, None, None


def linear_kl(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    *,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(p‖q) of two LM heads, row by row and exact, differentiable in p, without logits.

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
        hidden_p: [N, Hp] fp32, bf16 or fp16 (backend="reference": fp64 too); any strides.
        weight_p: [V, Hp], dtype and device of hidden_p; any strides.
        hidden_q: [N, Hq], dtype and device of hidden_p; any strides.
        weight_q: [V, Hq] likewise. The same tensor as weight_p, or one detached from it: each slice
            of it is read, and on the CPU packed, once for both heads.
        bias_p: [V], dtype and device of hidden_p; None for none.
        bias_q: [V] likewise.
        temperature: divides the logits of both heads; above 0, and in fp32's normal range.
        softcap: c of c·tanh(logits / c), before the temperature; None for none. Likewise, and c /
            temperature too.
        backend: "auto", "reference" (makes all logits), "cpu", "triton" or "cuda".

    Returns:
        kl [N], fp32, nats.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value, an unknown backend, or an
            input of q that requires grad where gradients are recorded: detach it.
        BackendUnavailableError: the backend cannot run here.
    """
    p, q = Head(hidden_p, weight_p, bias_p), Head(hidden_q, weight_q, bias_q)
    _check_tensors(p, q)
    _check_shapes(p, q)
    check_scales(temperature, softcap)
    check_type("backend", backend, str)
    dtype = autocast_dtype(hidden_p.device)
    if dtype is not None:
        p, q = p.to(dtype), q.to(dtype)
    _check_dtypes(p, q, backend)
    if backend == "reference":
        heads = (p.hidden, p.weight, q.hidden, q.weight, p.bias, q.bias)
        return reference(*heads, temperature, softcap)
    settings = (float(temperature), float(softcap or 0.0), backend)
    return _LinearKl.apply(p.hidden, p.weight, p.bias, q.hidden, q.weight, q.bias, settings)


def _named(p: Head, q: Head) -> Iterator[tuple[str, Tensor]]:
    """The arguments that are there, with their names."""
    for suffix, head in (("p", p), ("q", q)):
        for name, value in vars(head).items():
            if value is not None or name != "bias":
                yield f"{name}_{suffix}", value


def _check_tensors(p: Head, q: Head) -> None:
    """Types, dimensions, devices, and that nobody asks for the gradient of q."""
    for name, value in _named(p, q):
        check_tensor(name, value, 1 if name.startswith("bias") else 2)
        check_device(name, value, "hidden_p", p.hidden)
        if name.endswith("_q") and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a tensor that does not require grad, as linear_kl holds q "
                f"constant, got one that does: pass {name}.detach()"
            )


def _check_shapes(p: Head, q: Head) -> None:
    N, V = len(p.hidden), len(p.weight)
    if len(q.hidden) != N:
        raise ValueError(f"hidden_q: expected {N} rows, as hidden_p has, got {len(q.hidden)}")
    for suffix, head, expected in (("p", p, "V > 0"), ("q", q, f"V = {V}, as in weight_p,")):
        H = head.hidden.shape[1]
        if V == 0 or H == 0 or head.weight.shape != (V, H):
            raise ValueError(
                f"weight_{suffix}: expected shape [V, H] with {expected} and H = {H} > 0, as in "
                f"hidden_{suffix}, got {tuple(head.weight.shape)}"
            )
        if head.bias is not None and len(head.bias) != V:
            raise ValueError(
                f"bias_{suffix}: expected shape ({V},), as weight_{suffix} has rows, "
                f"got {len(head.bias)}"
            )


def _check_dtypes(p: Head, q: Head, backend: str) -> None:
    check_float_dtype("hidden_p", p.hidden, backend)
    dtype = p.hidden.dtype
    for name, value in _named(p, q):
        if value.dtype != dtype:
            raise TypeError(f"{name}: expected the dtype of hidden_p, {dtype}, got {value.dtype}")
