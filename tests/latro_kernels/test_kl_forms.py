"""The three forms of KL have one expectation: the KL of the two distributions of sequences."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from latro_kernels import GroupLayout, group_advantage, linear_kl
from latro_kernels.group_advantage import KL_FORMS

V, H, LONGEST, END = 3, 4, 3, 0


def sequences(prefix: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Every sequence of a policy that samples up to the end token or the length limit."""
    for token in range(V):
        longer = (*prefix, token)
        if token == END or len(longer) == LONGEST:
            yield longer
        else:
            yield from sequences(longer)


class Policy:
    """A softmax of a head over a hidden state of its own for every prefix."""

    def __init__(self, prefixes: list[tuple[int, ...]], seed: int, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(seed)
        self.places = {prefix: place for place, prefix in enumerate(prefixes)}
        self.states = torch.randn(len(prefixes), H, generator=random, dtype=torch.float64).to(dtype)
        self.weight = torch.randn(V, H, generator=random, dtype=torch.float64).to(dtype)

    def hidden(self, prefixes: list[tuple[int, ...]]) -> Tensor:
        return self.states[[self.places[prefix] for prefix in prefixes]]

    def logp(self, prefixes: list[tuple[int, ...]], tokens: list[int]) -> Tensor:
        log_p = (self.hidden(prefixes) @ self.weight.T).log_softmax(-1)
        return log_p[torch.arange(len(tokens)), tokens]


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)]
)
def test_the_forms_agree_in_expectation(backend: str, dtype: torch.dtype) -> None:
    """Summed over every sequence there is, so that nothing is left to chance."""
    every = list(sequences())
    assert len(every) == 15
    prefixes = [s[:i] for s in every for i in range(len(s))]
    tokens = [token for s in every for token in s]
    distinct = sorted(set(prefixes))
    policy, initial = (Policy(distinct, seed, dtype) for seed in (1, 2))
    row_kl = linear_kl(
        *(policy.hidden(prefixes), policy.weight, initial.hidden(prefixes), initial.weight),
        backend=backend,
    )

    def with_answers(rows: Tensor) -> Tensor:
        # One answer row after each rationale, which no form of KL may read.
        parts = rows.split([len(s) for s in every])
        return torch.cat([torch.cat([part, part.new_full((1,), -1.0)]) for part in parts])

    logp, ref_logp = (p.logp(prefixes, tokens) for p in (policy, initial))
    lengths = torch.tensor([n for s in every for n in (len(s), 1)])
    layout = GroupLayout(torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]), 5)
    log_p, log_q = (
        torch.stack([part.sum() for part in rows.split([len(s) for s in every])])
        for rows in (logp, ref_logp)
    )
    assert log_p.exp().sum() == pytest.approx(1.0)
    expected = (log_p.exp() * (log_p - log_q)).sum()
    assert expected > 0.1
    for kl in KL_FORMS:
        exact = kl == "exact"
        out = group_advantage(
            with_answers(logp),
            None if exact else with_answers(ref_logp),
            layout,
            kl=kl,
            row_kl=with_answers(row_kl) if exact else None,
            backend=backend,
        )
        torch.testing.assert_close((log_p.exp() * out.kl).sum(), expected, msg=kl)
