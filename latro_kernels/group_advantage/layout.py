"""What `group_advantage` is given and returns beside log-probs: the layout of rows, and results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latro_kernels.checks import as_count, check_same, check_vector


@dataclass(frozen=True, eq=False)
class GroupLayout:
    """Which row of a packed batch is what.

    The rows of a sequence are contiguous, its rationale first, then its answer; the K sequences of
    a prompt are consecutive. S = G·K sequences make N rows.

    Args:
        offsets: int64 [2·S + 1], ascending, from 0 to N. Rows offsets[2s]:offsets[2s + 1] are the
            rationale of sequence s, rows offsets[2s + 1]:offsets[2s + 2] its answer.
        num_generations: K, at least 2.
        finished: bool [S], on the device of `offsets`; False where the rationale hit the length
            limit. None: all are finished.
        num_groups: the prompts of the whole update, over which coefficients are averaged; more than
            G where an update goes through in several batches. None: G.

    Raises:
        TypeError: a field of the wrong type or dtype.
        ValueError: a field of the wrong shape, device or range. The values of `offsets` are not
            read, as that would wait for the device: `check` does.
    """

    offsets: Tensor
    num_generations: int
    finished: Tensor | None = None
    num_groups: int | None = None

    def __post_init__(self) -> None:
        check_vector("offsets", self.offsets, torch.int64)
        if self.offsets.numel() % 2 == 0:
            raise ValueError(
                f"offsets: expected two segments a sequence, 2·S + 1 entries, "
                f"got {self.offsets.numel()}"
            )
        K = as_count("num_generations", self.num_generations, 2)
        object.__setattr__(self, "num_generations", K)
        if self.num_sequences % K:
            raise ValueError(
                f"offsets: expected whole groups of num_generations={K} "
                f"sequences, got {self.num_sequences} sequences"
            )
        if self.finished is not None:
            check_vector("finished", self.finished, torch.bool)
            check_same("finished", self.finished, (self.num_sequences,), self.offsets.device)
        if self.num_groups is not None:
            num_groups = as_count("num_groups", self.num_groups, self.num_sequences // K)
            object.__setattr__(self, "num_groups", num_groups)

    @property
    def num_sequences(self) -> int:
        """S, the number of sequences in this batch."""
        return self.offsets.numel() // 2

    @property
    def num_averaged(self) -> int:
        """Number of sequences that the loss averages over: num_groups·K, or 1 if that is 0."""
        K = self.num_generations
        num_groups = self.num_sequences // K if self.num_groups is None else self.num_groups
        return max(1, num_groups * K)

    def check(self, num_rows: int) -> None:
        """Check the values of `offsets` against N = `num_rows`; waits for the device they are on.

        Raises:
            ValueError: `offsets` is not ascending from 0 to `num_rows`, or an answer has no rows.
        """
        check_offsets(self.offsets, num_rows)
        answers = self.offsets.diff()[1::2]
        if bool((answers == 0).any()):
            empty = int((answers == 0).nonzero()[0])
            raise ValueError(
                f"offsets: expected an answer of one row or more, got none for sequence {empty}"
            )


@dataclass(frozen=True, eq=False)
class GroupAdvantage:
    """What `group_advantage` returns: fp32, on the device of logp, without gradient.

    Args:
        reward: [S], nats; with unfinished="floor" that of an unfinished sequence is the floor.
        answer_logp: [S], nats: log π(y | x, z).
        rationale_logp: [S], nats: log π(z | x).
        kl: [S], nats: the estimate of KL(π ‖ π_0) that `kl` names; 0 without its input.
        advantage: [S], nats.
        coefficient: [N], of logp in the loss.
        kl_coefficient: [N], of row_kl in the loss; None where there is no row_kl.

    In expectation over the sequences the two coefficients together follow the gradient of the
    answers' log-likelihood less β times

        kl="reward", "exact"   KL(π ‖ π_0) of whole sequences
        kl="k3"                Σ_rows KL(π_0 ‖ π), with the tokens before each row held constant
    """

    reward: Tensor
    answer_logp: Tensor
    rationale_logp: Tensor
    kl: Tensor
    advantage: Tensor
    coefficient: Tensor
    kl_coefficient: Tensor | None


def check_offsets(offsets: Tensor, num_rows: int) -> None:
    """Raise a ValueError where `offsets` does not ascend from 0 to `num_rows`."""
    first, last = int(offsets[0]), int(offsets[-1])
    if (first, last) != (0, num_rows):
        raise ValueError(
            f"offsets: expected first 0 and last {num_rows}, the number of rows, "
            f"got {first} and {last}"
        )
    descents = (offsets.diff() < 0).nonzero()
    if len(descents):
        i = int(descents[0])
        raise ValueError(
            f"offsets: expected ascending values, got {int(offsets[i])} then "
            f"{int(offsets[i + 1])} at {i}"
        )
