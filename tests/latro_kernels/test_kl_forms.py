"""The three forms of KL: one expectation, that of whole sequences, and what each one follows.

Both are found by enumeration of every sequence that there is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from latro_kernels import GroupLayout, group_advantage, linear_kl, linear_logprob
from latro_kernels.group_advantage import KL_FORMS
from tests.latro_kernels.ops.op import gate

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


BETA, K = 0.7, 2
RATIONALES = list(itertools.product(range(V), repeat=2))
PREFIXES: list[tuple[int, ...]] = [(), *((token,) for token in range(V))]


@dataclass(frozen=True, eq=False)
class Model:
    """π and π_0 by a head over a hidden state of its own for every prefix; answers are one token.

    The answer is the last token of the vocabulary after every rationale of two tokens.
    """

    states: Tensor
    answer_states: Tensor
    weight: Tensor
    ref_states: Tensor
    ref_weight: Tensor

    @classmethod
    def random(cls, dtype: torch.dtype) -> Model:
        random = torch.Generator().manual_seed(3)
        rows = (len(PREFIXES), len(RATIONALES), V, len(PREFIXES), V)
        made = [torch.randn(n, H, generator=random, dtype=torch.float64).to(dtype) for n in rows]
        for trained in made[:3]:
            trained.requires_grad_()
        return cls(*made)

    def gradients(self, value: Tensor) -> list[Tensor]:
        trained = [self.states, self.answer_states, self.weight]
        return list(torch.autograd.grad(value, trained, retain_graph=True))

    def log_probs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log π and log π_0 of each token after each prefix, log π of each answer."""
        log_p = (self.states @ self.weight.T).log_softmax(-1)
        log_q = (self.ref_states @ self.ref_weight.T).log_softmax(-1)
        return log_p, log_q, (self.answer_states @ self.weight.T).log_softmax(-1)[:, -1]


def objective(model: Model, kl: str) -> Tensor:
    """Return the number whose gradient an update of that form follows."""
    log_p, log_q, answer = model.log_probs()
    log_z = torch.stack([log_p[0, a] + log_p[1 + a, b] for a, b in RATIONALES])
    log_z0 = torch.stack([log_q[0, a] + log_q[1 + a, b] for a, b in RATIONALES])
    likelihood = (log_z.exp() * answer).sum()
    if kl != "k3":
        return likelihood - BETA * (log_z.exp() * (log_z - log_z0)).sum()
    reach = torch.cat([torch.ones(1, dtype=log_p.dtype), log_p[0].detach().exp()])
    rows = (log_q.exp() * (log_q - log_p)).sum(-1)
    return likelihood - BETA * (reach * rows).sum()


def updates(model: Model, kl: str, backend: str) -> tuple[Tensor, Tensor]:
    """Minus the loss of every K-tuple of rationales by the ops, and the chance of each tuple."""
    tuples = list(itertools.product(range(len(RATIONALES)), repeat=K))
    drawn = [RATIONALES[i] for chosen in tuples for i in chosen]
    # Three rows a sequence: two of the rationale, one of the answer.
    rows = torch.tensor([[0, 1 + a, len(PREFIXES) + RATIONALES.index((a, b))] for a, b in drawn])
    target = torch.tensor([[a, b, V - 1] for a, b in drawn]).flatten()
    hidden = torch.cat([model.states, model.answer_states])[rows.flatten()]
    ref_states = torch.cat([model.ref_states, torch.zeros_like(model.answer_states)])
    ref_hidden = ref_states[rows.flatten()]
    logp = linear_logprob(hidden, model.weight, target, backend=backend)
    ref_logp = linear_logprob(ref_hidden, model.ref_weight, target, backend=backend)
    row_kl = linear_kl(hidden, model.weight, ref_hidden, model.ref_weight, backend=backend)
    offsets = torch.arange(3 * len(drawn) + 1)[torch.arange(3 * len(drawn) + 1) % 3 != 1]
    exact = kl == "exact"
    out = group_advantage(
        logp,
        None if exact else ref_logp,
        GroupLayout(offsets, K),
        beta=BETA,
        kl=kl,
        row_kl=row_kl if exact else None,
        backend=backend,
    )
    loss = out.coefficient * logp
    if out.kl_coefficient is not None:
        loss = loss + out.kl_coefficient * row_kl
    # The coefficients hold the mean over all groups; of each its own is wanted.
    of_each = -len(tuples) * loss.view(len(tuples), -1).sum(1)
    chance = logp.detach().view(len(tuples), K, 3)[..., :2].sum((1, 2)).exp()
    return of_each, chance


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)]
)
@pytest.mark.parametrize("kl", KL_FORMS)
def test_what_each_form_follows(kl: str, backend: str, dtype: torch.dtype) -> None:
    """By every pair of the nine rationales there are, each as often as it is drawn."""
    model, exact, plain = (Model.random(d) for d in (dtype, torch.float64, dtype))
    of_each, chance = updates(model, kl, backend)
    torch.testing.assert_close(chance.sum(), torch.ones((), dtype=dtype))
    got = model.gradients((chance * of_each).sum())
    true = exact.gradients(objective(exact, kl))
    unfused = plain.gradients(objective(plain, kl))
    for name, ours, expected, theirs in zip(
        ("states", "answer states", "weight"), got, true, unfused, strict=True
    ):
        gate(name, ours, expected, theirs)
        if dtype == torch.float64:
            torch.testing.assert_close(ours, expected)


def test_the_forms_follow_different_things() -> None:
    """So that the test above tells them apart, and from the exact KL without its score term."""
    model = Model.random(torch.float64)
    log_p, log_q, _ = model.log_probs()
    reach = torch.cat([torch.ones(1).double(), log_p[0].detach().exp()])
    held = (reach * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()
    log_z = torch.stack([log_p[0, a] + log_p[1 + a, b] for a, b in RATIONALES])
    likelihood = (log_z.exp() * model.log_probs()[2]).sum()
    values = [objective(model, "exact"), objective(model, "k3"), likelihood - BETA * held]
    for one, other in itertools.combinations([model.gradients(v)[0] for v in values], 2):
        assert not torch.allclose(one, other)


def test_the_exact_form_varies_less_than_the_sampled_one() -> None:
    """Both have one expectation; the variance is summed over the entries of the gradient."""
    variance = {}
    for kl in ("reward", "exact"):
        model = Model.random(torch.float64)
        of_each, chance = updates(model, kl, "reference")
        gradients = [model.gradients(value)[0].flatten() for value in of_each]
        drawn = torch.stack(gradients)
        mean = (chance[:, None] * drawn).sum(0)
        variance[kl] = (chance[:, None] * (drawn - mean) ** 2).sum().item()
    assert variance["exact"] < variance["reward"]
