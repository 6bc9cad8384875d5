"""The segments of a packed row, and what of the row each of them reads.

A prompt is followed by the branches that continue it; `latro.model.attention` has a picture.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """The segments of one packed row of T tokens, in order.

    Args:
        lengths: tokens of each segment, each at least 1; they add up to T.
        prefixes: for each segment the index of the prompt that it continues, -1 for a prompt.
        device: where the packed row is.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    device: torch.device

    @functools.cached_property
    def key_lengths(self) -> list[int]:
        """The number of keys that the queries of each segment see: its prefix's and its own."""
        return [
            length + (self.lengths[prefix] if prefix >= 0 else 0)
            for length, prefix in zip(self.lengths, self.prefixes, strict=True)
        ]

    @functools.cached_property
    def position_ids(self) -> Tensor:
        """int64 [1, T], the position of each token in its own sequence."""
        ends = zip(self.lengths, self.key_lengths, strict=True)
        spans = [range(keys - length, keys) for length, keys in ends]
        return torch.tensor([[i for span in spans for i in span]], device=self.device)

    @functools.cached_property
    def key_index(self) -> Tensor:
        """int64 [Σ key_lengths]: where in the row each segment's keys lie, prefix first."""
        spans = map(self._span, range(len(self.lengths)))
        return torch.tensor([i for span in spans for i in span], device=self.device)

    @functools.cached_property
    def whole_sequences(self) -> Tensor:
        """int64 [S, W]: where in the row the tokens of each sequence lie, its prefix's first.

        A sequence is a branch behind its prompt, or a prompt without branches. Sequences shorter
        than W, the longest, are filled up at the right with their last token.
        """
        width = max(self.key_lengths)
        spans = [self._span(i) for i in self._ends_of_sequences]
        rows = [span + span[-1:] * (width - len(span)) for span in spans]
        return torch.tensor(rows, device=self.device)

    @functools.cached_property
    def place_in_sequence(self) -> Tensor:
        """int64 [T]: where in the flattened [S·W] of `whole_sequences` each token of the row lies.

        A prompt lies in the sequences of all its branches, and is read in the first.
        """
        width = self.whole_sequences.shape[1]
        first: dict[int, int] = {}
        for row, segment in enumerate(self._ends_of_sequences):
            for i in (self.prefixes[segment], segment):
                first.setdefault(i, row)
        ends = zip(self.lengths, self.key_lengths, strict=True)
        places: list[int] = []
        for segment, (length, keys) in enumerate(ends):
            end = first[segment] * width + keys
            places += range(end - length, end)
        return torch.tensor(places, device=self.device)

    @functools.cached_property
    def _starts(self) -> list[int]:
        """Where in the row each segment begins, and T."""
        return list(accumulate(self.lengths, initial=0))

    @functools.cached_property
    def _ends_of_sequences(self) -> list[int]:
        """The segments that no other continues: branches, and prompts without any."""
        continued = set(self.prefixes)
        return [i for i in range(len(self.lengths)) if i not in continued]

    def _span(self, segment: int) -> list[int]:
        """Return where in the row the keys of a segment lie, its prefix's first."""
        starts, prefix = self._starts, self.prefixes[segment]
        parts = (prefix, segment) if prefix >= 0 else (segment,)
        return [i for part in parts for i in range(starts[part], starts[part + 1])]

    @functools.cached_property
    def query_starts(self) -> Tensor:
        """int32 [segments + 1], ascending from 0 to T."""
        return torch.tensor(self._starts, dtype=torch.int32, device=self.device)

    @functools.cached_property
    def key_starts(self) -> Tensor:
        """int32 [segments + 1], ascending from 0 to Σ key_lengths."""
        return torch.tensor(
            list(accumulate(self.key_lengths, initial=0)), dtype=torch.int32, device=self.device
        )


def gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return `x.index_select(dim, index)`, whose backward sums in fp32 at least.

    A prefix has a gradient of every branch.
    """
    return _Gather.apply(x, dim, index)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim, ctx.shape = dim, x.shape
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        working = torch.promote_types(grad.dtype, torch.float32)
        summed = grad.new_zeros(ctx.shape, dtype=working)
        return summed.index_add_(ctx.dim, index, grad.to(working)).to(grad.dtype), None, None
