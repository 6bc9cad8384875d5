from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latro.model.packing import collate, group_layout, plain_offsets, plan
from latro.rollout.long_rope import long_rope_boundary
from latro.rollout.sequences import Rollout, decode

CPU = torch.device("cpu")


def made(prompt: int, sampled: int, answer: int) -> Rollout:
    ids = iter(range(1, 1000))
    return Rollout(
        prompt_ids=[next(ids) for _ in range(prompt)],
        sampled_ids=[next(ids) for _ in range(sampled)],
        answer_ids=[next(ids) for _ in range(answer)],
        answer_start=sampled,
        finished=sampled % 2 == 0,
        own_start=answer // 3,
        own_end=answer - answer // 4,
    )


sequences = st.builds(made, st.integers(1, 9), st.integers(0, 12), st.integers(1, 5))


@given(st.lists(sequences, min_size=1, max_size=8))
def test_every_row_predicts_its_token_from_the_position_before(rollouts):
    batch = collate([[r] for r in rollouts], CPU, packed=False)
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


@pytest.mark.parametrize("packed", [True, False])
def test_the_end_token_and_the_answer_are_predicted_from_one_position(rollouts, packed):
    (group,) = rollouts(1, 4)
    ended = group[1]
    assert ended.answer_start == len(ended.sampled_ids) - 1
    batch = collate([[ended]], CPU, packed=packed)
    end_row = len(ended.sampled_ids) - 1
    assert batch.positions[end_row] == batch.positions[end_row + 1]
    assert batch.target[end_row : end_row + 2].tolist() == [
        ended.sampled_ids[-1],
        ended.answer_ids[0],
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_no_tensor_is_made_of_a_list_with_a_value_a_row(packed, monkeypatch):
    """Torch takes longer for that than for anything else here, and an update has many rows."""
    longest = 0
    make = torch.tensor

    def counted(values, **options):
        nonlocal longest
        longest = max(longest, len(values))
        return make(values, **options)

    monkeypatch.setattr(torch, "tensor", counted)
    logp = [-0.5] * 300
    group = [
        replace(made(200, 300, 9), sampled_logp=logp),
        replace(made(200, 300, 2), sampled_logp=logp),
    ]
    batch = collate([group], CPU, packed=packed)
    assert batch.num_rows == 611
    assert longest <= 5
    assert batch.engine_logp.dtype == torch.float32
    assert batch.engine_logp.isnan().tolist() == [
        z in "a" for z in "z" * 300 + "a" * 9 + "z" * 300 + "aa"
    ]
    assert {t.dtype for t in (batch.input_ids, batch.positions, batch.target)} == {torch.int64}
    assert {t.dtype for t in (batch.own_answer, batch.answer_end)} == {torch.bool}


@pytest.mark.parametrize("packed", [True, False])
def test_layouts_of_pieces_join_into_the_groups(rollouts, packed):
    (group,) = rollouts(1, 8)
    pieces = [collate([part], CPU, packed=packed) for part in (group[:3], group[3:])]
    layout = group_layout(pieces, 8, 5)
    layout.check(sum(piece.num_rows for piece in pieces))
    whole = collate([group], CPU, packed=packed)
    assert torch.equal(layout.offsets, whole.offsets)
    assert torch.equal(layout.finished, whole.finished)
    assert layout.num_groups == 5


@pytest.mark.parametrize("packed", [True, False])
def test_plain_answers_stand_after_all_sequences(packed):
    groups = [grouped(4, [(3, 2), (0, 4), (5, 1)]), grouped(2, [(1, 1), (0, 3), (2, 2)])]
    groups = [[a, replace(b, plain=True), c] for a, b, c in groups]
    batch = collate(groups, CPU, packed=packed)
    sequences = [[a, c] for a, _, c in groups]
    alone = collate(sequences, CPU, packed=packed)
    assert batch.num_rows == alone.num_rows == len(alone.target)
    assert torch.equal(batch.offsets, alone.offsets)
    assert torch.equal(batch.finished, alone.finished)
    assert torch.equal(batch.target[: batch.num_rows], alone.target)
    assert torch.equal(batch.own_answer, alone.own_answer)
    assert batch.plain_offsets.tolist() == [0, 2, 4]
    assert alone.plain_offsets.tolist() == [0]
    plain = [b for _, b, _ in groups]
    assert [r.own_rows for r in plain] == [range(1, 3), range(1, 3)]
    own = [r.answer_ids[1:3] for r in plain]
    assert batch.target[batch.num_rows :].tolist() == own[0] + own[1]
    # Each row stands on the token before.
    read = batch.input_ids.flatten()[batch.positions[batch.num_rows :]].tolist()
    before = [r.answer_ids[:2] for r in plain]
    assert read == before[0] + before[1]


@pytest.mark.parametrize("packed", [True, False])
def test_the_rows_of_the_answers_own_tokens(rollouts, tokenizer, packed):
    groups = rollouts(2, 8)
    batch = collate(groups, CPU, packed=packed)
    text = decode(tokenizer, batch.target[batch.own_answer].tolist())
    statements = decode(tokenizer, [t for group in groups for r in group for t in r.answer_ids])
    statements = statements.replace("The answer is", "").replace(tokenizer.eos_token, "")
    assert text.split() == statements.split()
    ends = batch.target[batch.answer_end].tolist()
    assert ends == [tokenizer.eos_token_id] * 16
    assert not (batch.answer_end & batch.own_answer).any()


@pytest.mark.parametrize("packed", [True, False])
def test_a_plain_answer_may_be_a_piece_of_its_own(packed):
    a, b, plain = grouped(4, [(3, 2), (2, 4), (0, 5)])
    parts = [[a], [b], [replace(plain, plain=True)]]
    pieces = [collate([part], CPU, packed=packed) for part in parts]
    layout = group_layout(pieces, 2, 1)
    layout.check(sum(piece.num_rows for piece in pieces))
    assert layout.offsets.tolist() == [0, 3, 5, 7, 11]
    assert layout.finished.tolist() == [False, True]
    assert plain_offsets(pieces).tolist() == [0, 3]


def grouped(prompt: int, branches: list[tuple[int, int]]) -> list[Rollout]:
    return [made(prompt, sampled, answer) for sampled, answer in branches]


groups_of_one_prompt = st.builds(
    grouped,
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), min_size=2, max_size=5),
)


@given(st.lists(groups_of_one_prompt, min_size=1, max_size=5))
def test_a_packed_row_holds_each_prompt_once_and_nothing_else(groups):
    batch = collate(groups, CPU, packed=True)
    ids, position_ids = batch.input_ids[0].tolist(), batch.shared_prefix.position_ids[0].tolist()
    # P + Σ (R + A - 1) tokens: nothing follows an answer's last.
    expected = sum(
        len(g[0].prompt_ids) + sum(len(r.sampled_ids) + len(r.answer_ids) - 1 for r in g)
        for g in groups
    )
    assert len(ids) == len(position_ids) == expected
    assert batch.num_rows == sum(len(r.sampled_ids) + len(r.answer_ids) for g in groups for r in g)
    layout = batch.shared_prefix
    assert sum(layout.lengths) == expected
    padded = collate(groups, CPU, packed=False)
    for name in ("target", "offsets", "finished"):
        assert torch.equal(getattr(batch, name), getattr(padded, name))
    # A row's position holds the token, at the place, that the padded batch has there.
    width = padded.input_ids.shape[1]
    places = [position_ids[p] for p in batch.positions.tolist()]
    assert places == [p % width for p in padded.positions.tolist()]
    read = [ids[p] for p in batch.positions.tolist()]
    assert read == padded.input_ids.flatten()[padded.positions].tolist()


@given(st.lists(groups_of_one_prompt, min_size=1, max_size=4))
def test_the_keys_of_a_branch_are_its_prompt_and_itself(groups):
    batch = collate(groups, CPU, packed=True)
    layout = batch.shared_prefix
    keys = batch.input_ids[0][layout.key_index].tolist()
    spans = [
        keys[start:end]
        for start, end in zip(layout.key_starts[:-1], layout.key_starts[1:], strict=True)
    ]
    expected = []
    for group in groups:
        expected.append(group[0].prompt_ids)
        expected += [r.input_ids for r in group if r.branch_ids]
    assert spans == expected
    assert layout.key_lengths == [len(ids) for ids in expected]
    assert layout.query_starts.tolist()[-1] == batch.input_ids.shape[1]


def cost(piece: list[list[Rollout]], packed: bool) -> int:
    """Positions of a piece, counted on the batch itself."""
    return collate(piece, CPU, packed=packed).input_ids.numel()


def rollouts_of(micro):
    return [rollout for piece in micro for group in piece for rollout in group]


@pytest.mark.parametrize("packed", [True, False])
@given(
    groups=st.lists(groups_of_one_prompt, min_size=1, max_size=8),
    budget=st.integers(1, 200),
    boundary=st.one_of(st.none(), st.integers(1, 25)),
)
def test_micro_batches_hold_whole_groups_within_the_budget(packed, groups, budget, boundary):
    planned = plan(groups, budget, packed=packed, boundary=boundary)
    placed = [id(r) for micro in planned for r in rollouts_of(micro)]
    assert sorted(placed) == sorted(id(r) for group in groups for r in group)
    for micro in planned:
        members = {id(r) for r in rollouts_of(micro)}
        for group in groups:
            inside = [id(r) in members for r in group]
            assert all(inside) or not any(inside)
        for piece in micro:
            assert cost(piece, packed) <= budget or sum(map(len, piece)) == 1
            if boundary is not None:
                assert len({len(r.input_ids) > boundary for g in piece for r in g}) == 1
        if len(micro) > 1:
            assert len([g for g in groups if id(g[0]) in members]) == 1


def test_groups_share_micro_batches_where_they_fit():
    groups = [grouped(4, [(n, 2)] * 2) for n in (1, 9, 3, 7, 5)]
    planned = plan(groups, 40, packed=True)
    assert sum(map(len, groups)) == sum(len(rollouts_of(micro)) for micro in planned)
    # 24 + 16 and 20 + 12 + 8 tokens: full to the last.
    assert len(planned) == 2
    assert len(plan(groups, 10**6, packed=True)) == 1


@pytest.mark.parametrize("budget", [10**6, 1])
def test_no_groups_no_micro_batches(budget):
    assert plan([], budget, packed=True) == []


@pytest.mark.parametrize(
    ("parameters", "boundary"),
    [
        (None, None),
        ({"rope_type": "default", "original_max_position_embeddings": 8}, None),
        ({"rope_type": "longrope", "original_max_position_embeddings": 8}, 8),
        ({"rope_type": "longrope"}, 4),
        ({"a": {"rope_type": "longrope"}, "b": {"rope_type": "default"}}, 4),
        (
            {
                "a": {"rope_type": "longrope", "original_max_position_embeddings": 8},
                "b": {"rope_type": "longrope", "original_max_position_embeddings": 8},
            },
            8,
        ),
    ],
)
def test_where_long_rope_changes_its_frequencies(tiny, parameters, boundary):
    model = tiny()
    model.config.rope_parameters = parameters
    model.config.original_max_position_embeddings = 4
    assert long_rope_boundary(model) == boundary


def test_layers_that_change_at_other_lengths_are_refused(tiny):
    model = tiny()
    model.config.rope_parameters = {
        name: {"rope_type": "longrope", "original_max_position_embeddings": at}
        for name, at in (("a", 8), ("b", 16))
    }
    with pytest.raises(ValueError, match=r"one original_max_position_embeddings, got \[8, 16\]"):
        long_rope_boundary(model)
