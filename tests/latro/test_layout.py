from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latro.layout import collate, group_layout, plan
from latro.rollout import Rollout

CPU = torch.device("cpu")


def made(prompt: int, sampled: int, answer: int) -> Rollout:
    ids = iter(range(1, 1000))
    return Rollout(
        prompt_ids=[next(ids) for _ in range(prompt)],
        sampled_ids=[next(ids) for _ in range(sampled)],
        answer_ids=[next(ids) for _ in range(answer)],
        answer_start=sampled,
        finished=sampled % 2 == 0,
    )


sequences = st.builds(made, st.integers(1, 9), st.integers(0, 12), st.integers(1, 5))


@given(st.lists(sequences, min_size=1, max_size=8))
def test_every_row_predicts_its_token_from_the_position_before(rollouts):
    batch = collate(rollouts, CPU)
    width = batch.input_ids.shape[1]
    bounds = batch.offsets.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == batch.num_rows == len(batch.positions)
    for index, rollout in enumerate(rollouts):
        whole = rollout.prompt_ids + rollout.sampled_ids + rollout.answer_ids
        assert batch.input_ids[index].tolist() == whole[:-1] + [0] * (width - len(whole) + 1)
        rows = range(bounds[2 * index], bounds[2 * index + 2])
        read = [batch.positions[row].item() - index * width for row in rows]
        # Here z and y stand one after the other, so every row predicts the next token.
        assert [whole[position + 1] for position in read] == batch.target[rows].tolist()
        assert bounds[2 * index + 1] - bounds[2 * index] == len(rollout.sampled_ids)
    assert batch.finished.tolist() == [r.finished for r in rollouts]


def test_the_end_token_and_the_answer_are_predicted_from_one_position(rollouts):
    (group,) = rollouts(1, 4)
    ended = group[1]
    assert ended.answer_start == len(ended.sampled_ids) - 1
    batch = collate([ended], CPU)
    end_row = len(ended.sampled_ids) - 1
    assert batch.positions[end_row] == batch.positions[end_row + 1]
    assert batch.target[end_row : end_row + 2].tolist() == [
        ended.sampled_ids[-1],
        ended.answer_ids[0],
    ]


def test_layouts_of_pieces_join_into_the_groups(rollouts):
    (group,) = rollouts(1, 8)
    pieces = [collate(group[:3], CPU), collate(group[3:], CPU)]
    layout = group_layout(pieces, 8, 5)
    layout.check(sum(piece.num_rows for piece in pieces))
    whole = collate(group, CPU)
    assert torch.equal(layout.offsets, whole.offsets)
    assert torch.equal(layout.finished, whole.finished)
    assert layout.num_groups == 5


@given(
    groups=st.lists(st.lists(sequences, min_size=2, max_size=5), min_size=1, max_size=8),
    budget=st.integers(1, 200),
)
def test_micro_batches_hold_whole_groups_within_the_budget(groups, budget):
    planned = plan(groups, budget)
    placed = [id(r) for micro in planned for r in micro.rollouts]
    assert sorted(placed) == sorted(id(r) for group in groups for r in group)
    for micro in planned:
        members = {id(r) for r in micro.rollouts}
        for group in groups:
            inside = [id(r) in members for r in group]
            assert all(inside) or not any(inside)
        for piece in micro.pieces:
            cost = len(piece) * max(len(r.input_ids) for r in piece)
            assert cost <= budget or len(piece) == 1
        if len(micro.pieces) > 1:
            assert len([g for g in groups if id(g[0]) in members]) == 1


@pytest.mark.parametrize("budget", [10**6, 1])
def test_no_groups_no_micro_batches(budget):
    assert plan([], budget) == []
