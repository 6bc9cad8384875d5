"""verl's two fused heads, by the same names, arguments and shapes, on `linear_logprob`.

`linear_cross_entropy` stands for that of `verl.utils.kernel.linear_cross_entropy`, and
`FusedLinearForPPO` for that of `verl.utils.experimental.torch_functional`. verl is not imported.
Both return fp32, where verl's second one returns an entropy in the dtype of hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from latro_kernels.linear_logprob import linear_logprob

_REDUCTIONS = ("none", "sum", "mean")


class _Share(torch.autograd.Function):
    """Give each of `count` ranks an equal share of a gradient that each of them has whole."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, count: int) -> Tensor:
        ctx.count = count
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.count, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of `labels` and the entropies, as verl's function of this name does.

    Args:
        hidden: [..., H] fp32, bf16 or fp16.
        weight: [V, H], dtype of hidden; with a group this rank's slice of the vocabulary.
        labels: [...] int64, not shifted here.
        temperature: divides the logits; None for 1.
        reduction: "none", "sum" or "mean", of the log-probs only; None for "none".
        dist_process_group: the ranks that hold the vocabulary between them. As in verl the gradient
            of hidden is summed over them by the caller: each rank gets an equal share of it.

    Returns:
        log-probs [N], or their sum or mean, and entropies [N], fp32, nats; N is the number of
        labels.

    Raises:
        ValueError: another reduction; and what `linear_logprob` raises.
    """
    name = (reduction or "none").lower()
    if name not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if dist_process_group is not None:
        hidden = _Share.apply(hidden, dist_process_group.size())
    logp, entropy = linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=1.0 if temperature is None else float(temperature),
        return_entropy=True,
        group=dist_process_group,
    )
    return logp if name == "none" else getattr(logp, name)(), entropy


class FusedLinearForPPO(nn.Module):
    """Computes log-probs and entropies as verl's module of this name does.

    Args:
        chunk_size: taken because verl's has it; nothing depends on it.
    """

    def __init__(self, chunk_size: int = 512) -> None:
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies, fp32, of the shape of `input_ids`, in nats.

        Args:
            hidden_states: [N, H] or [B, T, H].
            vocab_weights: [V, H], dtype of hidden_states.
            input_ids: [N] or [B, T] of any integers: the tokens to score, not shifted here.
            temperature: divides the logits: a number, or a tensor of one or of one per token, by
                which the hidden states are then divided.
        """
        if isinstance(temperature, Tensor):
            # Of a batch without tokens there may be none.
            if temperature.numel() != 1:
                scaled = hidden_states.float() / temperature.view(*input_ids.shape, 1)
                hidden_states, temperature = scaled.to(hidden_states.dtype), 1.0
            else:
                temperature = temperature.item()
        logp, entropy = linear_cross_entropy(
            hidden_states, vocab_weights, input_ids.to(torch.int64), temperature
        )
        return logp.view(input_ids.shape), entropy.view(input_ids.shape)
