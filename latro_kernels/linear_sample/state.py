"""What `linear_sample` and its drivers hand each other.

A driver has one function, `sample(head, draw) -> State`. It sweeps over the vocabulary once, folds
logits as the forward of `linear_logprob` does, and looks for the highest score as it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latro_kernels.head import Head
from latro_kernels.linear_logprob.state import State as Fold
from latro_kernels.linear_logprob.state import Wanted


@dataclass(frozen=True, eq=False)
class Draw:
    """By what tokens are drawn.

    Args:
        seed: [N] int64, contiguous.
        position: [N] int64, contiguous.
        greedy: whether the score of a column is its logit, without noise.
        first_column: the number, among the columns of the whole vocabulary, of the weight's first:
            int64 [], on the device of the weight; None for 0.
    """

    seed: Tensor
    position: Tensor
    greedy: bool
    first_column: Tensor | None


@dataclass(frozen=True, eq=False)
class State:
    """What a driver knows of each row, [N], fp32 but for the token; z is a row of logits.

    Where a row holds NaN or +∞, or nothing but −∞, its sum_exp is NaN or 0, and token, score and
    token_logit may be anything.

    Args:
        token: int64, the column of the highest score, the lowest such, numbered over the whole
            vocabulary.
        score: the highest z + noise.
        token_logit: z at the token.
        row_max: max z.
        sum_exp: Σ exp(z − row_max).
        weighted_sum: Σ exp(z − row_max)·(z − row_max).
    """

    token: Tensor
    score: Tensor
    token_logit: Tensor
    row_max: Tensor
    sum_exp: Tensor
    weighted_sum: Tensor

    @classmethod
    def empty(cls, hidden: Tensor) -> State:
        """Make room for the results of hidden's rows."""
        N = hidden.shape[0]
        rows = [hidden.new_empty(N, dtype=torch.float32) for _ in range(5)]
        return cls(hidden.new_empty(N, dtype=torch.int64), *rows)

    @classmethod
    def of_fold(cls, fold: Fold, score: Tensor, draw: Draw) -> State:
        """Return the results of a fold by `linear_logprob`, whose target is the token.

        The target is a column of the weight, with the number that it has there.
        """
        assert fold.weighted_sum is not None
        return cls(
            token=fold.target if draw.first_column is None else fold.target + draw.first_column,
            score=score,
            token_logit=fold.target_logit,
            row_max=fold.row_max,
            sum_exp=fold.sum_exp,
            weighted_sum=fold.weighted_sum,
        )


def first_fold(
    head: Head, empty_state: Callable[[Head, Tensor, Wanted], Fold]
) -> tuple[Fold, Tensor]:
    """Return a fold of `linear_logprob` before its first column, and the rows' highest scores.

    Its target is the token that is drawn, and its room that of the driver's `empty_state`.
    """
    N, device = len(head.hidden), head.hidden.device
    token = torch.zeros(N, dtype=torch.int64, device=device)
    score = torch.full((N,), -torch.inf, dtype=torch.float32, device=device)
    wanted = Wanted(weighted_sum=True, dx_sum=False, block_max=False, memory_budget=0)
    fold = empty_state(head, token, wanted)
    fold.clear()
    return fold, score
