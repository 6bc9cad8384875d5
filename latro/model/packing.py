"""From rollouts to what the model and the kernels read: inputs, head rows, micro-batches.

A head row is a pair of a position, whose hidden state predicts, and the token predicted there.
Sequence s has its rationale rows first and its answer rows after them:

    rationale row i   position P − 1 + i                 target sampled_ids[i]
    answer row j      position P − 1 + answer_start + j  target answer_ids[j]

with P the prompt's length. The two may share a position: the hidden state after the last word of a
rationale predicts the token that ended it and, in another row, the first token of the answer.
Plain answers (`Rollout.plain`) go through the trunk with their group. They have head rows for the
answer's own tokens alone, which stand after the rows of all sequences.

A batch is packed, every prompt once with its K branches after it (`latro.model.attention`), which
is P + Σ (branch lengths) positions a group; or, for models that cannot, padded, each sequence a row
of its own with its own copy of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from latro.model.shared_prefix import SharedPrefix
from latro.rollout.sequences import Rollout
from latro_kernels import GroupLayout

Group = Sequence[Rollout]
"""Rollouts of one prompt."""
MicroBatch = list[list[Group]]
"""Whole groups that go through together, in one piece where the token budget allows; each piece
holds groups, or parts of them."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What goes through the trunk at once: N head rows of S sequences, M of Q plain answers."""

    input_ids: Tensor
    """int64 [B, T]: packed, B = 1; padded, a sequence a row, padded at the right, where under a
    causal mask no real position sees the padding."""
    shared_prefix: SharedPrefix | None
    """The packed row's segments; None where padded."""
    positions: Tensor
    """int64 [N + M], into the flattened [B·T] positions."""
    target: Tensor
    """int64 [N + M], the token that each row predicts."""
    offsets: Tensor
    """int64 [2·S + 1], as in `GroupLayout`."""
    own_answer: Tensor
    """bool [N], the rows of the answers' own tokens: without those of template and end."""
    answer_end: Tensor
    """bool [N], the rows of what stands behind the answers' own tokens: the token that ends y."""
    finished: Tensor
    """bool [S]."""
    engine_logp: Tensor | None
    """fp32 [N], log-prob of each rationale token as the engine that drew it tells, NaN at answers;
    None where it does not tell."""
    plain_offsets: Tensor
    """int64 [Q + 1], from 0 to M: where among these rows each plain answer begins and ends."""
    num_rows: int
    """N."""
    sequences: list[Rollout]
    """The S sequences, in the order of their rows."""


def collate(groups: Sequence[Group], device: torch.device, *, packed: bool) -> Batch:
    """Return a `Batch` on `device` of the rollouts of `groups`, in their order."""
    make = _pack if packed else _pad
    input_ids, shared_prefix, row_positions = make(groups, device)
    placed = list(zip((r for group in groups for r in group), row_positions, strict=True))
    placed.sort(key=lambda pair: pair[0].plain)
    sequences = [r for r, _ in placed if not r.plain]
    plain = [r for r, _ in placed if r.plain]
    counts = [n for r in sequences for n in (len(r.sampled_ids), len(r.answer_ids))]
    offsets = list(accumulate(counts, initial=0))
    plain_counts = [len(r.own_rows) for r in plain]
    own_answer, answer_end = _answer_rows(sequences, offsets)
    return Batch(
        input_ids=_tensor(input_ids, device),
        shared_prefix=shared_prefix,
        positions=_tensor(_joined([rows for _, rows in placed]), device),
        target=_tensor(_joined([_targets(r) for r, _ in placed]), device),
        offsets=torch.tensor(offsets, device=device),
        own_answer=_tensor(own_answer, device),
        answer_end=_tensor(answer_end, device),
        finished=torch.tensor([r.finished for r in sequences], dtype=torch.bool, device=device),
        plain_offsets=torch.tensor(list(accumulate(plain_counts, initial=0)), device=device),
        num_rows=offsets[-1],
        engine_logp=_engine_logp(sequences, offsets, device),
        sequences=sequences,
    )


# Arrays of numpy, since torch takes several times as long to make a tensor of a list, and an update
# may have millions of rows.


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *parts])


def _targets(rollout: Rollout) -> np.ndarray:
    """Return the token that each head row of a rollout predicts."""
    answer = np.array(rollout.answer_ids, np.int64)
    if rollout.plain:
        return answer[rollout.own_rows.start : rollout.own_rows.stop]
    return np.concatenate([np.array(rollout.sampled_ids, np.int64), answer])


def _answer_rows(
    sequences: Sequence[Rollout], offsets: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return which head rows are of the answers' own tokens, and which stand behind these."""
    own, end = np.zeros(offsets[-1], bool), np.zeros(offsets[-1], bool)
    for rollout, first, last in zip(sequences, offsets[1::2], offsets[2::2], strict=True):
        rows = rollout.own_rows
        own[first + rows.start : first + rows.stop] = True
        end[first + rows.stop : last] = True
    return own, end


def _engine_logp(
    sequences: Sequence[Rollout], offsets: Sequence[int], device: torch.device
) -> Tensor | None:
    rows = np.full(offsets[-1], math.nan, np.float32)
    for rollout, first, last in zip(sequences, offsets[::2], offsets[1::2], strict=False):
        if rollout.sampled_logp is None:
            return None
        rows[first:last] = rollout.sampled_logp
    return _tensor(rows, device) if len(rows) else None


def _pad(groups: Sequence[Group], device: torch.device) -> tuple[np.ndarray, None, list]:
    rollouts = [rollout for group in groups for rollout in group]
    width = max(len(r.prompt_ids) + len(r.branch_ids) for r in rollouts)
    ids = np.zeros((len(rollouts), width), np.int64)
    positions: list[np.ndarray] = []
    for index, rollout in enumerate(rollouts):
        read = rollout.input_ids
        ids[index, : len(read)] = read
        first = index * width + len(rollout.prompt_ids) - 1
        positions.append(_row_positions(rollout, first, first + 1))
    return ids, None, positions


def _pack(
    groups: Sequence[Group], device: torch.device
) -> tuple[np.ndarray, SharedPrefix, list[np.ndarray]]:
    ids: list[int] = []
    positions: list[np.ndarray] = []
    lengths: list[int] = []
    prefixes: list[int] = []
    for group in groups:
        prompt_ids = group[0].prompt_ids
        prompt = len(lengths)
        ids += prompt_ids
        lengths.append(len(prompt_ids))
        prefixes.append(-1)
        end = len(ids) - 1
        for rollout in group:
            positions.append(_row_positions(rollout, end, len(ids)))
            branch = rollout.branch_ids
            if branch:
                ids += branch
                lengths.append(len(branch))
                prefixes.append(prompt)
    shared_prefix = SharedPrefix(tuple(lengths), tuple(prefixes), device)
    return np.array([ids], np.int64), shared_prefix, positions


def _row_positions(rollout: Rollout, prompt_end: int, branch_start: int) -> np.ndarray:
    """Return where a sequence's head rows stand, by its prompt's last and its branch's first."""
    rows = rollout.own_rows if rollout.plain else range(len(rollout.answer_ids))
    places = rollout.answer_start + np.arange(rows.start, rows.stop)
    if not rollout.plain:
        places = np.concatenate([np.arange(len(rollout.sampled_ids)), places])
    # What stands so many tokens into the branch predicts from the token before it.
    return np.where(places > 0, branch_start + places - 1, prompt_end)


def answer_sums(logp: Tensor, batch: Batch) -> Tensor:
    """Return log π(y|x⊕z) of each sequence, in nats, fp64 [S], from the batch's rows' [N + M]."""
    until = torch.cat([logp.new_zeros(1, dtype=torch.float64), logp.double().cumsum(0)])
    return until[batch.offsets[2::2]] - until[batch.offsets[1::2]]


def group_layout(batches: Sequence[Batch], num_generations: int, num_groups: int) -> GroupLayout:
    """Return the layout of the rows of `batches` in a line, averaged over `num_groups`."""
    return GroupLayout(
        offsets=_join_offsets([b.offsets for b in batches], [b.num_rows for b in batches]),
        num_generations=num_generations,
        finished=torch.cat([b.finished for b in batches]),
        num_groups=num_groups,
    )


def plain_offsets(batches: Sequence[Batch]) -> Tensor:
    """Return the `Batch.plain_offsets` of the plain rows of `batches` in a line."""
    counts = [b.target.shape[0] - b.num_rows for b in batches]
    return _join_offsets([b.plain_offsets for b in batches], counts)


def _join_offsets(offsets: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Return the offsets of rows in a line; `counts`: how many rows each of the tensors divides."""
    starts = list(accumulate(counts, initial=0))
    joined = [o[:-1] + start for o, start in zip(offsets, starts, strict=False)]
    return torch.cat([*joined, offsets[-1][-1:] + starts[-2]])


@dataclass(frozen=True)
class Size:
    """Positions that groups take in one batch; the sum of two sizes is that of both together."""

    packed: int = 0
    width: int = 0
    count: int = 0

    @classmethod
    def of(cls, group: Group) -> Size:
        branches = [len(r.branch_ids) for r in group]
        prompt = len(group[0].prompt_ids)
        return cls(prompt + sum(branches), prompt + max(branches), len(branches))

    def __add__(self, other: Size) -> Size:
        return Size(
            self.packed + other.packed, max(self.width, other.width), self.count + other.count
        )

    def tokens(self, *, packed: bool) -> int:
        return self.packed if packed else self.width * self.count


def plan(
    groups: Sequence[Group], token_budget: int, *, packed: bool, boundary: int | None = None
) -> list[MicroBatch]:
    """Put whole groups into micro-batches of at most `token_budget` positions each.

    The largest come first, each into the first micro-batch that has room. A group over the budget
    is a micro-batch of its own in several pieces, each within the budget; a single sequence over it
    is a piece of its own.

    Args:
        groups: of at least one rollout each.
        token_budget: positions of one batch, padding included.
        packed: whether batches will be packed or padded.
        boundary: sequences of more tokens than this never share a piece with others, since a model
            takes one set of rotary frequencies for all that it is handed (`long_rope_boundary`).
    """
    planned: list[MicroBatch] = []
    bins: list[list[Group]] = []
    sizes: list[Size] = []
    sized = [(Size.of(group), group) for group in groups]
    for size, group in sorted(sized, key=lambda s: s[0].tokens(packed=packed), reverse=True):
        sides = _sides(group, boundary)
        if len(sides) > 1 or size.tokens(packed=packed) > token_budget:
            parts = [p for side in sides for p in _split(side, token_budget, packed=packed)]
            planned.append([[part] for part in parts])
            continue
        long = _is_long(group[0], boundary)
        for index, bin in enumerate(bins):
            together = sizes[index] + size
            fits = together.tokens(packed=packed) <= token_budget
            if fits and _is_long(bin[0][0], boundary) == long:
                sizes[index] = together
                bin.append(group)
                break
        else:
            bins.append([group])
            sizes.append(size)
    return planned + [[bin] for bin in bins]


def _sides(group: Group, boundary: int | None) -> list[Group]:
    short = [r for r in group if not _is_long(r, boundary)]
    long = [r for r in group if _is_long(r, boundary)]
    # A piece keeps the order of its group, but a group in pieces need not: its rows are summed.
    return [side for side in (short, long) if side]


def _is_long(rollout: Rollout, boundary: int | None) -> bool:
    return boundary is not None and len(rollout.input_ids) > boundary


def _split(group: Group, token_budget: int, *, packed: bool) -> Sequence[Group]:
    """Return parts of a group, each within the budget or a single sequence."""
    parts: list[list[Rollout]] = []
    for rollout in group:
        if parts and Size.of([*parts[-1], rollout]).tokens(packed=packed) <= token_budget:
            parts[-1].append(rollout)
        else:
            parts.append([rollout])
    return parts
