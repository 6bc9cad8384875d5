"""From rollouts to what the model and the kernels read: padded inputs, head rows, micro-batches.

A head row is a pair of a position, whose hidden state predicts, and the token predicted there.
Sequence s has its rationale rows first and its answer rows after them:

    rationale row i   position P − 1 + i                 target sampled_ids[i]
    answer row j      position P − 1 + answer_start + j  target answer_ids[j]

with P the prompt's length. The two may share a position: the hidden state after the last word of a
rationale predicts the token that ended it and, in another row, the first token of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from latro.rollout import Rollout
from latro_kernels import GroupLayout


@dataclass(frozen=True)
class Batch:
    """A padded batch of B sequences of T positions with N head rows."""

    input_ids: Tensor
    """int64 [B, T], padded at the right: under a causal mask no real position sees the padding."""
    positions: Tensor
    """int64 [N], into the flattened [B·T] positions."""
    target: Tensor
    """int64 [N], the token that each row predicts."""
    offsets: Tensor
    """int64 [2B + 1], as in `GroupLayout`."""
    finished: Tensor
    """bool [B]."""

    @property
    def num_rows(self) -> int:
        return self.target.shape[0]


@dataclass(frozen=True)
class MicroBatch:
    """Whole groups that go through together, in one piece where the token budget allows."""

    pieces: list[list[Rollout]]

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for piece in self.pieces for rollout in piece]


def collate(rollouts: Sequence[Rollout], device: torch.device) -> Batch:
    """Pad sequences into a `Batch` on `device`, in their order."""
    inputs = [r.input_ids for r in rollouts]
    width = max(map(len, inputs))
    positions: list[int] = []
    target: list[int] = []
    counts: list[int] = []
    for index, rollout in enumerate(rollouts):
        first = index * width + len(rollout.prompt_ids) - 1
        positions += range(first, first + len(rollout.sampled_ids))
        first += rollout.answer_start
        positions += range(first, first + len(rollout.answer_ids))
        target += rollout.sampled_ids + rollout.answer_ids
        counts += [len(rollout.sampled_ids), len(rollout.answer_ids)]
    return Batch(
        input_ids=torch.tensor([ids + [0] * (width - len(ids)) for ids in inputs], device=device),
        positions=torch.tensor(positions, device=device),
        target=torch.tensor(target, device=device),
        offsets=torch.tensor(list(accumulate(counts, initial=0)), device=device),
        finished=torch.tensor([r.finished for r in rollouts], device=device),
    )


def group_layout(batches: Sequence[Batch], num_generations: int, num_groups: int) -> GroupLayout:
    """The layout of the rows of `batches` one after the other, averaged over `num_groups`."""
    starts = accumulate((b.num_rows for b in batches), initial=0)
    offsets = [b.offsets[:-1] + start for b, start in zip(batches, starts, strict=False)]
    end = batches[-1].offsets[-1:] + sum(b.num_rows for b in batches[:-1])
    return GroupLayout(
        offsets=torch.cat([*offsets, end]),
        num_generations=num_generations,
        finished=torch.cat([b.finished for b in batches]),
        num_groups=num_groups,
    )


def plan(groups: Sequence[Sequence[Rollout]], token_budget: int) -> list[MicroBatch]:
    """Pack whole groups into micro-batches of at most `token_budget` padded tokens.

    Groups of like length go together, which keeps the padding small. A group over the budget is a
    micro-batch of its own in several pieces, each within the budget; a single sequence over it is a
    piece of its own.
    """
    planned: list[MicroBatch] = []
    together: list[Rollout] = []
    width = 0
    for group in sorted(groups, key=_width, reverse=True):
        # The first group is the widest, so `width` holds for all that join it.
        if together and width * (len(together) + len(group)) <= token_budget:
            together += group
            continue
        if together:
            planned.append(MicroBatch([together]))
        together, width = [], _width(group)
        if width * len(group) <= token_budget:
            together = list(group)
        else:
            per_piece = max(1, token_budget // width)
            planned.append(
                MicroBatch(
                    [list(group[i : i + per_piece]) for i in range(0, len(group), per_piece)]
                )
            )
    if together:
        planned.append(MicroBatch([together]))
    return planned


def _width(rollouts: Sequence[Rollout]) -> int:
    return max(len(r.input_ids) for r in rollouts)
