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
the digits that are left, and that is where answer tokens live. The online sum of exponentials is
Milakov and Gimelshein's, "Online normalizer calculation for softmax", arXiv 1805.02867.

In units of N·H·V floating-point operations a matrix product over the head is 2. The forward is 2;
the backward makes the logits again, 2, and two products with dz, 4. Less is done where

- products that the forward made fit the memory budget: they are cached, and the 2 are saved;
- the head is frozen, and nobody asks for the entropy's gradient: the forward then makes

      u = ∂logp/∂x = (1 − p_t)·s_t·w_t − Σ_{j≠t} p_j·s_j·w_j        s_j = ∂z_j/∂a_j

  as it goes, from sums that are rescaled as the maximum moves, and the backward is dx = g·u: 4 in
  all, and no logits again;
- rows have no upstream gradient, or, with `grad_filter`, blocks of the vocabulary have no
  probability for some rows: they are left out.

With each rank of a process group holding a slice of the vocabulary, ranks exchange three numbers a
row forward (four with the entropy), and sum dx backward. `ops` chooses the driver; `state` says
what a driver is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from latro_kernels.checks import (
    check_head,
    check_ignore_index,
    check_number,
    check_scales,
    check_target,
    check_target_values,
    check_type,
)
from latro_kernels.dispatch import default_backend
from latro_kernels.head import cast
from latro_kernels.linear_logprob import ops, vocab_parallel
from latro_kernels.linear_logprob.state import DEFAULT_MEMORY_BUDGET


def reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return logp [...] and entropy [...] by plain PyTorch, in fp32 or fp64, without any checks."""
    if ignore_index is not None:
        ignored = target == ignore_index
        logp, entropy = reference(
            hidden.masked_fill(ignored[..., None], 0),
            weight,
            target.masked_fill(ignored, 0),
            bias,
            temperature,
            softcap,
        )
        return logp.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        z = z + bias.to(dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    # Where p is 0, p·log p has the limit 0; 0 · −inf would make it and its gradient NaN.
    terms = log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)
    return log_p.gather(-1, target[..., None]).squeeze(-1), -terms.sum(-1)


@dataclass(frozen=True)
class _Options:
    """The arguments of `linear_logprob`, and what follows from which inputs have gradients."""

    temperature: float
    softcap: float
    backend: str
    with_entropy: bool
    memory_budget: int
    grad_filter: float
    frozen: bool
    group: ProcessGroup | None
    ignore_index: int | None


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        ctx.shape, batch = hidden.shape, target.shape
        hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.flatten()
        kept = None if options.ignore_index is None else target != options.ignore_index
        if kept is not None:
            # Any column: what comes of these rows is overwritten.
            target = target.masked_fill(~kept, 0)
        if options.group is not None:
            first, V = vocab_parallel.place(weight, options.group)
            check_target_values(target, V)
            target = target - first
        *state, dx_sum, cached, block_max = ops.forward(
            hidden=hidden,
            weight=weight,
            target=target,
            kept=kept,
            bias=bias,
            temperature=options.temperature,
            softcap=options.softcap,
            backend=options.backend,
            is_whole=options.group is None,
            weighted_sum=options.with_entropy,
            dx_sum=options.frozen,
            block_max=options.grad_filter > 0,
            memory_budget=options.memory_budget,
        )
        own_max = state[0]
        if options.group is not None:
            state = vocab_parallel.merge(state, options.group)
        row_max, sum_exp, target_logit, weighted_sum = state
        log_sum = sum_exp.log()
        logp = (target_logit - row_max) - log_sum
        entropy = log_sum - weighted_sum / sum_exp if options.with_entropy else None
        if kept is not None:
            logp = logp.masked_fill(~kept, 0)
            entropy = None if entropy is None else entropy.masked_fill(~kept, 0)
        # What makes probabilities of the exponentials in dx_sum, which are under this rank's max.
        scale = torch.exp(own_max - row_max) / sum_exp
        inputs = (hidden, weight, target, kept, bias)
        found = (logp, entropy, row_max, log_sum, target_logit, scale, dx_sum, cached, block_max)
        ctx.save_for_backward(*inputs, *found)
        ctx.options = options
        ctx.set_materialize_grads(False)
        is_largest = (target_logit >= row_max).view(batch)
        ctx.mark_non_differentiable(is_largest)
        return logp.view(batch), None if entropy is None else entropy.view(batch), is_largest

    @staticmethod
    def backward(
        ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        # once_differentiable would let a gradient penalty go by with a gradient of zero.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_logprob has no double backward; use backend='reference' for create_graph"
            )
        options: _Options = ctx.options
        hidden, weight, target, kept, bias, *found = ctx.saved_tensors
        logp, entropy, row_max, log_sum, target_logit, scale, dx_sum, cached, block_max = found
        needs = ctx.needs_input_grad[:3]
        grad_logp = torch.zeros_like(logp) if grad_logp is None else grad_logp.flatten()
        grad_entropy = None if grad_entropy is None else grad_entropy.flatten()
        if kept is not None:
            grad_logp = grad_logp.masked_fill(~kept, 0)
            if grad_entropy is not None:
                grad_entropy = grad_entropy.masked_fill(~kept, 0)
        dw = db = None
        if options.frozen and grad_entropy is None:
            # dx = g·u, of which the forward has left the sum over all columns but the target's.
            active = grad_logp != 0
            is_here = (target >= 0) & (target < len(weight))
            slope = _slope(target_logit, options) * -torch.expm1(logp)
            dx = ops.frozen_backward(
                weight=weight,
                target=target,
                dx_sum=dx_sum,
                of_sum=torch.where(active, -grad_logp * scale, 0),
                of_target=torch.where(active & is_here, grad_logp * slope, 0),
            )
        else:
            dx, dw, db = ops.backward(
                hidden=hidden,
                weight=weight,
                target=target,
                kept=kept,
                bias=bias,
                temperature=options.temperature,
                softcap=options.softcap,
                backend=options.backend,
                logp=logp,
                entropy=None if grad_entropy is None else entropy,
                row_max=row_max,
                log_sum=log_sum,
                grad_logp=grad_logp,
                grad_entropy=grad_entropy,
                cached=cached,
                block_max=block_max if options.grad_filter > 0 else None,
                grad_filter=options.grad_filter,
                needs=needs,
            )
        if needs[0]:
            if options.group is not None:
                vocab_parallel.sum_(dx, options.group)
            dx = dx.to(hidden.dtype).view(ctx.shape)
        wanted = (g if needed else None for g, needed in zip((dx, dw, db), needs, strict=True))
        return *wanted, None, None


def _slope(z: Tensor, options: _Options) -> Tensor:
    """Return ∂z/∂a where the logit is z."""
    tanh = z * (options.temperature / options.softcap) if options.softcap else torch.zeros_like(z)
    return (1 - tanh * tanh) / options.temperature


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    return_entropy: bool = False,
    backend: str = "auto",
    memory_budget: int | None = None,
    grad_filter: float = 0.0,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of `target` under the LM head, without a tensor of logits.

    Without softcap, and up to rounding, this is

        logits = torch.nn.functional.linear(hidden, weight, bias).float() / temperature
        logp = torch.log_softmax(logits, -1).gather(-1, target[..., None]).squeeze(-1)

    with no tensor of N·V, for N rows in all, but the products that `memory_budget` has room for.
    Products are made in the dtype of `hidden` and summed in fp32; everything after them is fp32.
    Under autocast, hidden, weight and bias are cast as `linear` casts them. There is no double
    backward.

    Where neither weight nor bias requires a gradient, the forward makes the gradient of hidden as
    well, in an fp32 tensor [N, H] in place of computing the products again; the entropy's
    gradient, should anyone ask for it, is then made from the logits again.

    Rows whose target is `ignore_index` are left out of the work, forward and backward, whatever
    they hold; the others are copied side by side. On a GPU their number is waited for.

    Rows whose upstream gradient is 0 cost nothing in a backward on the CPU, nor in Triton in bf16
    and fp16. On the CPU a row's log-prob, entropy and dx are the same bits whatever other rows
    stand beside it and on any number of threads (with `grad_filter`, dx within its bound); in
    Triton in bf16 and fp16 this holds for log-prob and entropy. Elsewhere it is up to torch's
    products.

    Memory beyond inputs, outputs and gradients is `memory_budget`, a few numbers per row, a tile
    whose size does not depend on N or V, and, where hidden is not fp32, an fp32 sum of its
    gradient.
    Where Triton folds products in registers, in bf16, fp16 and with `grad_filter`, the forward
    temporarily needs three fp32 numbers (four with the entropy) per row for every four blocks of
    columns.

    Args:
        hidden: [..., H], such as [N, H] or [B, T, H]; fp32, bf16 or fp16 (backend="reference": fp64
            too); any strides. Several leading dimensions that cannot be viewed as one are copied:
            ignore the last position instead of slicing it off.
        weight: [V, H], dtype and device of hidden; any strides.
        target: int64 of hidden's leading dimensions, each in 0..V − 1 or `ignore_index`.
        bias: [V], dtype and device of hidden; None for none.
        temperature: divides the logits; above 0, and in fp32's normal range.
        softcap: c of c·tanh(logits / c), before the temperature; None for none. c and
            c / temperature must also be above 0 and in fp32's normal range.
        ignore_index: rows of this target have log-prob 0, entropy 0 and no gradient; as in
            `torch.nn.functional.cross_entropy`, whose default is −100. None: there are none.
        return_entropy: whether to return the entropy of each row's distribution too.
        backend: "auto", "reference" (makes all logits), "cpu", "triton" or "cuda".
        memory_budget: bytes of products to keep for the backward, which makes the rest again; no
            bit of any result depends on it. None: 64 MiB on the CPU, 512 MiB on a GPU. Nothing is
            kept where it would not be used.
        grad_filter: ε. The backward leaves out blocks of rows and columns (12 × 96 on the CPU, a
            program's block in Triton) that hold no target and in which |∂loss/∂z| < ε everywhere by
            the maxima that the forward keeps, one fp32 per row and block of columns; rows that need
            few columns go together. "cuda" has no filter. With
            |∂z/∂a| ≤ 1/temperature, no entry of dX is off by more than ε/temperature · Σ_j |W_jh|,
            none of dW by more than ε/temperature · Σ_n |X_nh|. 0: exact. A frozen head has no use
            for it, and "reference" is always exact.
        group: the ranks that hold the vocabulary between them, `weight` and `bias` being this
            rank's slice, in the order of ranks; slices may differ in size. Every rank passes the
            same hidden and target (numbered over the whole vocabulary), gets the same result and
            the whole dx, and its own slice's dw and db.

    Returns:
        logp of the shape of target, fp32, nats; with `return_entropy` the pair logp, entropy, both
        of that shape, fp32, nats.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value, an unknown backend, or an
            option that the backend does not have. A target out of range raises on the CPU; on a GPU
            it stops the device, as no value is read back. Rows are numbered over all leading
            dimensions.
        BackendUnavailableError: the backend cannot run here.
    """
    _check(hidden, weight, target, bias, temperature, softcap, backend)
    check_ignore_index(ignore_index)
    _check_options(hidden.device, backend, memory_budget, grad_filter, group)
    hidden, weight, bias = cast(hidden, weight, bias, backend)
    if backend == "reference":
        check_target_values(target, len(weight), ignore_index)
        logp, entropy = reference(hidden, weight, target, bias, temperature, softcap, ignore_index)
        return (logp, entropy) if return_entropy else logp
    options = _options(
        (hidden, weight, bias),
        temperature=temperature,
        softcap=softcap,
        return_entropy=return_entropy,
        backend=backend,
        memory_budget=memory_budget,
        grad_filter=grad_filter,
        group=group,
        ignore_index=ignore_index,
    )
    logp, entropy, _ = _LinearLogprob.apply(hidden, weight, bias, target, options)
    return (logp, entropy) if return_entropy else logp


def linear_logprob_and_largest(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return what `linear_logprob` returns, and whether no logit is above the target's.

    Returns:
        logp [N], fp32, nats; entropy [N], fp32, nats, or None; is_largest [N], bool.
    """
    _check(hidden, weight, target, bias, temperature, softcap, "auto")
    hidden, weight, bias = cast(hidden, weight, bias, "auto")
    options = _options(
        (hidden, weight, bias),
        temperature=temperature,
        softcap=softcap,
        return_entropy=return_entropy,
    )
    logp, entropy, is_largest = _LinearLogprob.apply(hidden, weight, bias, target, options)
    return logp, entropy, is_largest


def _options(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    *,
    temperature: float,
    softcap: float | None,
    return_entropy: bool,
    backend: str = "auto",
    memory_budget: int | None = None,
    grad_filter: float = 0.0,
    group: ProcessGroup | None = None,
    ignore_index: int | None = None,
) -> _Options:
    """Return the options for hidden, weight and bias, some of which have gradients."""
    has_grad = [t is not None and t.requires_grad for t in inputs]
    if not torch.is_grad_enabled():
        has_grad = [False] * 3
    frozen = has_grad == [True, False, False]
    if memory_budget is None:
        memory_budget = DEFAULT_MEMORY_BUDGET[inputs[0].device.type]
    return _Options(
        temperature=float(temperature),
        softcap=float(softcap or 0.0),
        backend=backend,
        with_entropy=return_entropy,
        memory_budget=memory_budget if any(has_grad) and not frozen else 0,
        grad_filter=float(grad_filter) if any(has_grad) and not frozen else 0.0,
        frozen=frozen,
        group=group,
        ignore_index=ignore_index,
    )


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: object,
    softcap: object,
    backend: object,
) -> None:
    """Raise for a wrong type, shape, device or number."""
    check_head(hidden, weight, bias)
    check_target(target, "hidden", hidden)
    check_scales(temperature, softcap)
    check_type("backend", backend, str)


def _check_options(
    device: torch.device,
    backend: str,
    memory_budget: object,
    grad_filter: float,
    group: object,
) -> None:
    if memory_budget is not None:
        if not isinstance(memory_budget, int) or isinstance(memory_budget, bool):
            raise TypeError(
                f"memory_budget: expected bytes as an int, got {type(memory_budget).__name__}"
            )
        if memory_budget < 0:
            raise ValueError(f"memory_budget: expected 0 or more bytes, got {memory_budget}")
    check_number("grad_filter", grad_filter)
    if grad_filter < 0:
        raise ValueError(f"grad_filter: expected a finite number, 0 or more, got {grad_filter}")
    runs_on = default_backend(device) if backend == "auto" else backend
    if grad_filter > 0 and runs_on == "cuda":
        raise ValueError(
            f"grad_filter: expected 0 with backend {runs_on!r}, which has no filter, "
            f"got {grad_filter}"
        )
    if group is not None:
        check_type("group", group, ProcessGroup)
        if backend == "reference":
            raise ValueError(
                "group: expected None with backend 'reference', which takes the whole weight"
            )
