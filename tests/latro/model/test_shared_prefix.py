from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from latro.model.shared_prefix import SharedPrefix

CPU = torch.device("cpu")


@st.composite
def packed_rows(draw):
    """Prompts with 0 to 4 branches each, which may stand behind later prompts."""
    lengths, prefixes, prompts = [], [], []
    for _ in range(draw(st.integers(1, 9))):
        prompt = draw(st.sampled_from([-1, *prompts]))
        if prompt < 0:
            prompts.append(len(lengths))
        lengths.append(draw(st.integers(1, 6)))
        prefixes.append(prompt)
    return SharedPrefix(tuple(lengths), tuple(prefixes), CPU)


@given(packed_rows())
def test_whole_sequences_hold_each_branch_behind_its_prompt(row):
    starts = row.query_starts.tolist()
    spans = [list(range(a, b)) for a, b in itertools.pairwise(starts)]
    expected = [
        (spans[prefix] if prefix >= 0 else []) + spans[segment]
        for segment, prefix in enumerate(row.prefixes)
        if segment not in row.prefixes
    ]
    whole = row.whole_sequences.tolist()
    assert [w[: len(e)] for w, e in zip(whole, expected, strict=True)] == expected
    assert all(set(w[len(e) :]) <= {e[-1]} for w, e in zip(whole, expected, strict=True))


@given(packed_rows())
def test_every_token_is_found_again_at_its_position(row):
    T = sum(row.lengths)
    found = row.whole_sequences.flatten()[row.place_in_sequence]
    assert found.tolist() == list(range(T))
    width = row.whole_sequences.shape[1]
    assert torch.equal(row.place_in_sequence % width, row.position_ids[0])
