"""Log-probability of one token per row, from logits that exist.

With logits a [N, V], temperature T and softcap c,

    z = c·tanh(a / c) / T   (z = a / T without softcap)

and with p = softmax(z), t the row's target,

    logp = z_t − log Σ_j exp(z_j)

and the further statistics of `row_statistics`, which also has ∂/∂z. From there on

    ∂/∂a_j = ∂/∂z_j · (1 − tanh²(a_j / c)) / T

as in `linear_logprob`, for a model that hands out its logits. The forward reads them once and keeps
two numbers a row, max z and log Σ_j exp(z_j − max z), beside its results; the backward reads them
once more and writes ∂/∂a once, in the logits' dtype, over the logits themselves if it may. In the
target's column 1 − p_t is −expm1(logp): where p_t is close to 1 the subtraction would lose the
digits that are left. The online sum of exponentials is Milakov and Gimelshein's, "Online normalizer
calculation for softmax", arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from latro_kernels.checks import (
    as_int,
    check_batch,
    check_float_dtype,
    check_scales,
    check_target,
    check_target_values,
    check_type,
)
from latro_kernels.gather_logprob import ops
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
    logits: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
) -> RowStatistics:
    """Return all statistics [...] by plain PyTorch, in fp32 or fp64, without any checks."""
    if ignore_index is not None:
        ignored = target == ignore_index
        rows, columns = logits.masked_fill(ignored[..., None], 0), target.masked_fill(ignored, 0)
        return without_ignored(reference(rows, columns, temperature, softcap), ignored)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return of_logits(logits.to(dtype), target, temperature, softcap)


class _GatherLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        kept: Tensor | None,
        settings: tuple[float, float, str],
        asked: frozenset[str],
        in_place: bool,
    ) -> tuple[Tensor | None, ...]:
        further = bool(asked & OF_FURTHER_SUMS)
        logp, entropy, log_sum_p_squared, mean_logit, row_max, log_sum, target_logit = ops.forward(
            logits,
            target,
            kept,
            *settings,
            with_entropy="entropy" in asked or further,
            with_further_sums=further,
        )
        found = RowStatistics(
            logp=logp,
            entropy=entropy if "entropy" in asked else None,
            log_sum_exp=row_max + log_sum if "log_sum_exp" in asked else None,
            is_top1=target_logit >= row_max if "is_top1" in asked else None,
            log_sum_p_squared=log_sum_p_squared if "log_sum_p_squared" in asked else None,
            mean_logit=mean_logit if "mean_logit" in asked else None,
        )
        if found.is_top1 is not None and kept is not None:
            found = replace(found, is_top1=found.is_top1 & kept)
        differentiable = (logp, found.entropy, found.log_sum_p_squared)
        ctx.save_for_backward(logits, target, kept, *differentiable, row_max, log_sum)
        ctx.settings, ctx.in_place, ctx.overwritten = settings, in_place, False
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
                "gather_logprob has no double backward; use backend='reference' for create_graph"
            )
        if ctx.overwritten:
            raise RuntimeError(
                "gather_logprob: the first backward has overwritten the logits with their "
                "gradient; use inplace_backward=False to run it twice"
            )
        logits, target, kept, logp, entropy, log_sum_p_squared, *others = ctx.saved_tensors
        # The gradient of ignored rows is 0, and those are not read.
        of_rows = upstream(
            logp,
            kept,
            entropy=entropy,
            log_sum_p_squared=log_sum_p_squared,
            grad_logp=grad_logp,
            grad_entropy=grad_entropy,
            grad_log_sum_exp=grad_log_sum_exp,
            grad_log_sum_p_squared=grad_log_sum_p_squared,
        )
        arguments = (logits, *ctx.settings, target, logp, *others, *of_rows)
        if ctx.in_place:
            ops.backward_in_place(*arguments)
            ctx.overwritten = True
            return logits.detach(), None, None, None, None, None
        return ops.backward(*arguments), None, None, None, None, None


class _Settings(TypedDict, total=False):
    """The keyword arguments of `gather_logprob` on which the type of its result does not depend."""

    temperature: float
    softcap: float | None
    ignore_index: int | None
    inplace_backward: bool
    backend: str


@overload
def gather_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    return_entropy: Literal[False] = False,
    statistics: None = None,
    **settings: Unpack[_Settings],
) -> Tensor: ...


@overload
def gather_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    return_entropy: Literal[True],
    statistics: None = None,
    **settings: Unpack[_Settings],
) -> tuple[Tensor, Tensor]: ...


@overload
def gather_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    return_entropy: Literal[False] = False,
    statistics: Collection[str],
    **settings: Unpack[_Settings],
) -> RowStatistics: ...


@overload
def gather_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    return_entropy: bool,
    statistics: None = None,
    **settings: Unpack[_Settings],
) -> Tensor | tuple[Tensor, Tensor]: ...


def gather_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
    statistics: Collection[str] | None = None,
) -> Returned:
    """Return the log-probability of `target` under `logits`, differentiable.

    Without softcap, and up to rounding, this is

        log_p = torch.log_softmax(logits.float() / temperature, -1)
        logp = log_p.gather(-1, target[..., None]).squeeze(-1)

    with no memory beside the logits but a few numbers a row, and one gradient of their shape and
    dtype. Everything is computed in fp32. Rows whose upstream gradient is 0 are not read in the
    backward, those whose target is `ignore_index` not in the forward either; their gradient is
    exactly 0, whatever they hold. There is no double backward.

    Args:
        logits: [..., V], such as [N, V] or [B, T, V]; fp32, bf16 or fp16 (backend="reference": fp64
            too); rows may lie apart, as in a slice of a longer tensor. Where the last dimension has
            a stride, or several leading ones cannot be viewed as one, they are copied once: ignore
            the last position instead of slicing it off.
        target: int64 of the logits' leading dimensions, each in 0..V − 1 or `ignore_index`.
        temperature: divides the logits; above 0, and in fp32's normal range.
        softcap: c of c·tanh(logits / c), before the temperature; None for none. Likewise, and c /
            temperature too.
        ignore_index: rows of this target have log-prob 0, entropy 0 and no gradient; as in
            `torch.nn.functional.cross_entropy`, whose default is −100. None: there are none.
        return_entropy: whether to return the entropy of each row's distribution too.
        inplace_backward: whether the backward writes the gradient over the logits (over their copy,
            where they are copied), which spares its memory. Nobody may read the logits from then
            on: torch refuses a backward that needs them, but not a plain look at them.
        backend: "auto", "reference" (plain PyTorch, keeps all log-probs), "cpu", "triton" or
            "cuda".
        statistics: names of what to return of each row beside logp: "entropy", "log_sum_exp",
            "is_top1", "log_sum_p_squared" and "mean_logit", which `RowStatistics` describes. None:
            logp alone.

    Returns:
        logp of the shape of target, fp32, nats; with `return_entropy` the pair logp, entropy, both
        of that shape, fp32, nats; with `statistics` a `RowStatistics`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value, or an unknown backend;
            `inplace_backward` for rows that overlap, or with backend="reference". A target out of
            range raises on the CPU; on a GPU it stops the device, as no value is read back. Rows
            are numbered over all leading dimensions.
        BackendUnavailableError: the backend cannot run here.
        RuntimeError: in a second backward, where the first has overwritten the logits.
    """
    _check(logits, target, temperature, softcap, backend)
    ignore_index = None if ignore_index is None else as_int("ignore_index", ignore_index)
    asked = check_statistics(statistics, return_entropy)
    rows = logits.reshape(-1, logits.shape[-1])
    _check_in_place(inplace_backward, rows, backend)
    if backend == "reference":
        check_target_values(target, logits.shape[-1], ignore_index)
        found = reference(logits, target, temperature, softcap, ignore_index)
        return returned(found, statistics, return_entropy)
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    flat = target.flatten()
    kept = None if ignore_index is None else flat != ignore_index
    settings = (float(temperature), float(softcap or 0.0), backend)
    of_rows = _GatherLogprob.apply(rows, flat, kept, settings, asked, inplace_backward)
    found = changed(RowStatistics(*of_rows), lambda statistic: statistic.view(target.shape))
    return returned(found, statistics, return_entropy)


def _check(
    logits: Tensor, target: Tensor, temperature: object, softcap: object, backend: str
) -> None:
    check_batch("logits", logits)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape [..., V] with V > 0, got {tuple(logits.shape)}")
    check_target(target, "logits", logits)
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
