"""Log-probability of one token per row at the LM head, without the logits.

With hidden x_n, weight W, bias b, temperature T and softcap c, a row's logits are

    a = x·Wᵀ + b        z = c·tanh(a / c) / T   (z = a / T without softcap)

and with p = softmax(z), t the row's target,

    logp = z_t − log Σ_j exp(z_j)

and the further statistics of `row_statistics`, which also has ∂/∂z. From there on

    ∂/∂a_j = ∂/∂z_j · (1 − tanh²(a_j / c)) / T
    dx = ∂/∂a · W        dW = (∂/∂a)ᵀ · x        db = Σ_n ∂/∂a

In the target's column 1 − p_t is −expm1(logp): where p_t is close to 1 the subtraction would lose
the digits that are left, and that is where answer tokens live. The online sum of exponentials is
Milakov and Gimelshein's, "Online normalizer calculation for softmax", arXiv 1805.02867.

In units of N·H·V floating-point operations a matrix product over the head is 2. The forward is 2;
the backward makes the logits again, 2, and two products with dz, 4. Less is done where

- products that the forward made fit the memory budget: they are cached, and the 2 are saved;
- the head is frozen, and nobody asks for the gradient of the entropy or of log Σ p²: the forward
  then makes

      u = ∂logp/∂x = (1 − p_t)·s_t·w_t − Σ_{j≠t} p_j·s_j·w_j        s_j = ∂z_j/∂a_j

  as it goes, from sums that are rescaled as the maximum moves, and the backward is dx = g·u: 4 in
  all, and no logits again; log Σ_j exp(z_j) has its gradient of the same two terms;
- rows have no upstream gradient, or, with `grad_filter`, blocks of the vocabulary have no
  probability for some rows: they are left out.

With each rank of a process group holding a slice of the vocabulary, ranks exchange three numbers a
row forward (four with the entropy, six with log Σ p² or the mean logit), and sum dx backward. `ops`
chooses the driver; `state` says what a driver is given.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from latro_kernels.checks import as_count, as_int, check_target_values
from latro_kernels.head import cast, reference_logits
from latro_kernels.linear_logprob import ops, vocab_parallel
from latro_kernels.linear_logprob.options import Options, check, check_options, options_for
from latro_kernels.row_statistics import (
    OF_FURTHER_SUMS,
    Returned,
    RowStatistics,
    as_outputs,
    changed,
    check_statistics,
    of_logits,
    returned,
    upstream,
    without_ignored,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in `typing` from Python 3.11 on


def reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
) -> RowStatistics:
    """Return all statistics [...] by plain PyTorch, in fp32 or fp64, without any checks."""
    if ignore_index is not None:
        ignored = target == ignore_index
        found = reference(
            hidden.masked_fill(ignored[..., None], 0),
            weight,
            target.masked_fill(ignored, 0),
            bias,
            temperature,
            softcap,
        )
        return without_ignored(found, ignored)
    return of_logits(reference_logits(hidden, weight, bias), target, temperature, softcap)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        options: Options,
    ) -> tuple[Tensor | None, ...]:
        kept = None if options.ignore_index is None else target != options.ignore_index
        if kept is not None:
            # Any column: what comes of these rows is overwritten.
            target = target.masked_fill(~kept, 0)
        V: int | Tensor = weight.shape[0]
        if options.group is not None:
            first, V = vocab_parallel.place(weight, options.group)
            check_target_values(target, V)
            target = target - first
        further_sums = bool(options.asked & OF_FURTHER_SUMS)
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
            weighted_sum="entropy" in options.asked or further_sums,
            dx_sum=options.frozen,
            block_max=options.grad_filter > 0,
            memory_budget=options.memory_budget,
            further_sums=further_sums,
        )
        own_max = state[0]
        if options.group is not None:
            state = vocab_parallel.merge(state, options.group)
        row_max, sum_exp, target_logit, weighted_sum, square_sum, logit_sum = state
        log_sum = sum_exp.log()
        logp = (target_logit - row_max) - log_sum
        found = RowStatistics(
            logp=logp,
            entropy=log_sum - weighted_sum / sum_exp if "entropy" in options.asked else None,
            log_sum_exp=row_max + log_sum if "log_sum_exp" in options.asked else None,
            is_top1=target_logit >= row_max if "is_top1" in options.asked else None,
            log_sum_p_squared=square_sum.log() - 2 * log_sum
            if "log_sum_p_squared" in options.asked
            else None,
            mean_logit=logit_sum / V if "mean_logit" in options.asked else None,
        )
        if kept is not None:
            found = without_ignored(found, ~kept)
        # What makes probabilities of the exponentials in dx_sum, which are under this rank's max.
        scale = torch.exp(own_max - row_max) / sum_exp
        inputs = (hidden, weight, target, kept, bias)
        differentiable = (found.logp, found.entropy, found.log_sum_p_squared)
        of_rows = (*differentiable, row_max, log_sum, target_logit, scale)
        ctx.save_for_backward(*inputs, *of_rows, dx_sum, cached, block_max)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return as_outputs(ctx, found)

    @staticmethod
    def backward(
        ctx: Any,
        grad_logp: Tensor | None,
        grad_entropy: Tensor | None,
        grad_log_sum_exp: Tensor | None,
        _of_is_top1: None,
        grad_log_sum_p_squared: Tensor | None,
        _of_mean_logit: None,
    ) -> tuple[Tensor | None, ...]:
        # once_differentiable would let a gradient penalty go by with a gradient of zero.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_logprob has no double backward; use backend='reference' for create_graph"
            )
        options: Options = ctx.options
        hidden, weight, target, kept, bias, *found = ctx.saved_tensors
        logp, entropy, log_sum_p_squared, row_max, log_sum, target_logit, *others = found
        scale, dx_sum, cached, block_max = others
        needs = ctx.needs_input_grad[:3]
        g, h, offset, r = upstream(
            logp,
            kept,
            entropy=entropy,
            log_sum_p_squared=log_sum_p_squared,
            grad_logp=grad_logp,
            grad_entropy=grad_entropy,
            grad_log_sum_exp=grad_log_sum_exp,
            grad_log_sum_p_squared=grad_log_sum_p_squared,
        )
        dw = db = None
        if options.frozen and grad_entropy is None and r is None:
            # dx = Σ_j dz_j·s_j·w_j, of which the forward has left the sum of p_j·s_j·w_j over all
            # columns but the target's.
            e = torch.zeros_like(g) if offset is None else -offset
            active = (g != 0) | (e != 0)
            is_here = (target >= 0) & (target < len(weight))
            dz_target = e * logp.exp() - g * torch.expm1(logp)
            dx = ops.frozen_backward(
                weight=weight,
                target=target,
                dx_sum=dx_sum,
                of_sum=torch.where(active, (e - g) * scale, 0),
                of_target=torch.where(active & is_here, dz_target * options.slope(target_logit), 0),
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
                row_max=row_max,
                log_sum=log_sum,
                grad_logp=g,
                grad_entropy=h,
                offset=offset,
                grad_square=r,
                cached=cached,
                block_max=block_max if options.grad_filter > 0 else None,
                grad_filter=options.grad_filter,
                needs=needs,
            )
        if needs[0]:
            if options.group is not None:
                vocab_parallel.sum_(dx, options.group)
            dx = dx.to(hidden.dtype)
        wanted = (g if needed else None for g, needed in zip((dx, dw, db), needs, strict=True))
        return *wanted, None, None


class _Settings(TypedDict, total=False):
    """The keyword arguments of `linear_logprob` on which the type of its result does not depend."""

    bias: Tensor | None
    temperature: float
    softcap: float | None
    ignore_index: int | None
    backend: str
    memory_budget: int | None
    grad_filter: float
    group: ProcessGroup | None


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_entropy: Literal[False] = False,
    statistics: None = None,
    **settings: Unpack[_Settings],
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_entropy: Literal[True],
    statistics: None = None,
    **settings: Unpack[_Settings],
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_entropy: Literal[False] = False,
    statistics: Collection[str],
    **settings: Unpack[_Settings],
) -> RowStatistics: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_entropy: bool,
    statistics: None = None,
    **settings: Unpack[_Settings],
) -> Tensor | tuple[Tensor, Tensor]: ...


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
    statistics: Collection[str] | None = None,
) -> Returned:
    """Return the log-probability of `target` under the LM head, without a tensor of logits.

    Without softcap, and up to rounding, this is

        logits = torch.nn.functional.linear(hidden, weight, bias).float() / temperature
        logp = torch.log_softmax(logits, -1).gather(-1, target[..., None]).squeeze(-1)

    with no tensor of N·V, for N rows in all, but the products that `memory_budget` has room for.
    Products are made in the dtype of `hidden` and summed in fp32; everything after them is fp32.
    Under autocast, hidden, weight and bias are cast as `linear` casts them. There is no double
    backward.

    Where neither weight nor bias requires a gradient, the forward makes the gradient of hidden as
    well, in an fp32 tensor [N, H] in place of computing the products again; the gradients of the
    entropy and of log Σ p², should anyone ask for them, are then made from the logits again.

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
    temporarily needs three fp32 numbers (four with the entropy, six with log Σ p² or the mean
    logit) per row for every four blocks of columns.

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
        statistics: names of what to return of each row beside logp: "entropy", "log_sum_exp",
            "is_top1", "log_sum_p_squared" and "mean_logit", which `RowStatistics` describes. None:
            logp alone.

    Returns:
        logp of the shape of target, fp32, nats; with `return_entropy` the pair logp, entropy, both
        of that shape, fp32, nats; with `statistics` a `RowStatistics`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value, an unknown backend, or an
            option that the backend does not have. A target out of range raises on the CPU; on a GPU
            it stops the device, as no value is read back. Rows are numbered over all leading
            dimensions.
        BackendUnavailableError: the backend cannot run here.
    """
    check(hidden, weight, target, bias, temperature, softcap, backend)
    ignore_index = None if ignore_index is None else as_int("ignore_index", ignore_index)
    memory_budget = None if memory_budget is None else as_count("memory_budget", memory_budget, 0)
    check_options(hidden.device, backend, grad_filter, group)
    asked = check_statistics(statistics, return_entropy)
    hidden, weight, bias = cast(hidden, weight, bias, backend)
    if backend == "reference":
        check_target_values(target, len(weight), ignore_index)
        found = reference(hidden, weight, target, bias, temperature, softcap, ignore_index)
        return returned(found, statistics, return_entropy)
    options = options_for(
        (hidden, weight, bias),
        temperature=temperature,
        softcap=softcap,
        asked=asked,
        backend=backend,
        memory_budget=memory_budget,
        grad_filter=grad_filter,
        group=group,
        ignore_index=ignore_index,
    )
    rows = hidden.reshape(-1, hidden.shape[-1])
    of_rows = _LinearLogprob.apply(rows, weight, bias, target.flatten(), options)
    found = changed(RowStatistics(*of_rows), lambda statistic: statistic.view(target.shape))
    return returned(found, statistics, return_entropy)
