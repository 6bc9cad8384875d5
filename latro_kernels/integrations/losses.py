"""Functions by the names and in the call forms of other libraries; none of these is imported.

    linear_cross_entropy                cut-cross-entropy
    liger_fused_linear_cross_entropy    Liger
    LigerFusedLinearCrossEntropyLoss    Liger
    selective_log_softmax               TRL, from logits
    entropy_from_logits                 TRL, from logits

Results are fp32. Arguments that these libraries have beside those here are refused by Python.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latro_kernels.gather_logprob import gather_logprob
from latro_kernels.linear_logprob import linear_logprob


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
) -> Tensor:
    """Return the cross-entropy of `targets`, as cut-cross-entropy's function of this name does.

    Without shift and softcap it is, up to rounding,

        F.cross_entropy(F.linear(e, c, bias).float().flatten(0, -2), targets.flatten(), ...)

    Args:
        e: [..., H], the hidden states.
        c: [V, H], the head's weight, dtype of e.
        targets: [...] int64.
        bias: [V] or None. From here on by name only, because cut-cross-entropy's release on PyPI
            has no bias and its repository has one here.
        ignore_index: rows of this target cost nothing and count for nothing.
        softcap: c of c·tanh(logits / c), or None.
        reduction: "mean" over the targets that are not ignored, "sum", or "none".
        shift: by how many places targets come after the hidden states that predict them.

    Returns:
        The loss, fp32, nats; for "none" of the shape of targets, with 0 at ignored ones and, with
        shift, at those that nothing predicts.

    Raises:
        ValueError: another reduction, or a shift that leaves no target.
    """
    shift = int(shift)
    num_targets = targets.shape[-1]
    # Where there are no targets any shift leaves as many.
    if shift < 0 or 0 < num_targets <= shift:
        raise ValueError(f"shift: expected 0..{max(0, num_targets - 1)}, got {shift}")
    _check_reduction(reduction)
    # Where each target is predicted; the last places predict none.
    following = nn.functional.pad(targets, (0, shift), value=ignore_index)[..., shift:]
    logp = linear_logprob(e, c, following, bias=bias, softcap=softcap, ignore_index=ignore_index)
    if reduction == "none":
        # The zeros of the last places become those of the first, which nothing predicts.
        return -logp.roll(shift, -1)
    return _reduced(-logp, following != ignore_index, reduction)


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
) -> Tensor:
    """Return the cross-entropy of `target`, as Liger's function of this name does.

    Arguments are those of `linear_cross_entropy`: input [N, H], weight [V, H], target [N]. A
    z-loss, `lse_square_scale` · (log Σ exp(logits))² of each row that is not ignored, is added
    before the reduction.
    """
    _check_reduction(reduction)
    found = linear_logprob(
        input,
        weight,
        target,
        bias=bias,
        softcap=softcap,
        ignore_index=ignore_index,
        statistics=("log_sum_exp",),
    )
    assert found.log_sum_exp is not None
    loss = -found.logp
    if lse_square_scale != 0:
        loss = loss + lse_square_scale * found.log_sum_exp.square()
    return _reduced(loss, target != ignore_index, reduction)


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Computes the cross-entropy as Liger's module of this name does."""

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index, self.lse_square_scale = ignore_index, lse_square_scale
        self.reduction, self.softcap = reduction, softcap

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Return the loss of _input [N, H], with lin_weight [V, H] and target [N]."""
        return liger_fused_linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            lse_square_scale=self.lse_square_scale,
            reduction=self.reduction,
            softcap=self.softcap,
        )


def _check_reduction(reduction: str) -> None:
    """Raise for a reduction that there is not."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected none, sum or mean, got {reduction!r}")


def _reduced(loss: Tensor, kept: Tensor, reduction: str) -> Tensor:
    """Return losses of rows reduced, the mean being over those that are kept; others have 0."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum()


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Return log-softmax of `logits` at `index`, as TRL's function of this name does.

    Args:
        logits: [..., V].
        index: [...] or [..., K], int32 or int64.
        temperature: divides the logits.
        row_mask: [...] or the shape of index, where 0 the result is 0 and index is not read; None
            for none.

    Returns:
        Log-probs of the shape of index, fp32 (fp64 for fp64), nats.

    Raises:
        ValueError: row_mask has another shape.
    """
    columns = index.long()
    if index.ndim < logits.ndim:
        columns = columns[..., None]
    scored, ignore_index = columns[..., 0], None
    if row_mask is not None:
        if row_mask.shape not in (index.shape, logits.shape[:-1]):
            raise ValueError(
                f"row_mask: expected shape {tuple(index.shape)}, as index has, or "
                f"{tuple(logits.shape[:-1])}, as logits have rows, got {tuple(row_mask.shape)}"
            )
        masked = row_mask == 0
        if row_mask.ndim < logits.ndim:
            masked = masked[..., None]
        mask, ignore_index = masked.all(-1), -100
        columns = columns.masked_fill(masked, 0)
    if columns.shape[-1] > 1:
        z = logits.gather(-1, columns)
        # The column with the largest logit, as the difference of −∞ from −∞ is no number.
        largest = z.argmax(-1, keepdim=True)
        scored = columns.gather(-1, largest)[..., 0]
    if ignore_index is not None:
        scored = scored.masked_fill(mask, ignore_index)
    found = gather_logprob(
        logits,
        scored,
        temperature=temperature,
        ignore_index=ignore_index,
        statistics=("log_sum_exp",),
        backend=_backend(logits),
    )
    logp = found.logp
    if columns.shape[-1] > 1:
        assert found.log_sum_exp is not None
        # log p_k − log p_j = z_k − z_j, in which the sum of exponentials is not needed again. Where
        # all K logits are −∞ it is, for their gradients.
        z = z.to(logp.dtype) / temperature
        of_largest = z.gather(-1, largest)
        logp = torch.where(
            of_largest == -torch.inf,
            z - found.log_sum_exp[..., None],
            logp[..., None] + (z - of_largest),
        )
        if row_mask is not None:
            logp = logp.masked_fill(masked, 0)
    return logp.view(index.shape)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Return the entropy of softmax(logits), as TRL's function of this name does.

    Args:
        logits: [..., V].
        chunk_size: taken because TRL's has it; nothing is made in chunks.

    Returns:
        Entropies [...], fp32 (fp64 for fp64), nats.
    """
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    found = gather_logprob(logits, target, statistics=("entropy",), backend=_backend(logits))
    assert found.entropy is not None
    return found.entropy


def _backend(logits: Tensor) -> str:
    """Return the backend that takes the dtype: for fp64 there is only the reference."""
    return "reference" if logits.dtype == torch.float64 else "auto"
