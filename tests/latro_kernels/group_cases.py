"""Batches for the tests of group_advantage, and the gate that every backend has to pass."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from latro_kernels.group_advantage import (
    KL_FORMS,
    UNFINISHED_RULES,
    GroupAdvantage,
    GroupLayout,
    group_advantage,
)
from latro_kernels.group_advantage.formulas import reference

FIELDS = [field.name for field in fields(GroupAdvantage)]
SETTINGS = [{"kl": kl, "unfinished": rule} for kl in KL_FORMS for rule in UNFINISHED_RULES]


@dataclass(frozen=True)
class Batch:
    """The inputs of one call of any form of KL."""

    logp: Tensor
    ref_logp: Tensor
    row_kl: Tensor
    layout: GroupLayout

    def of_kl(self, kl: str = "reward") -> dict[str, Tensor | None]:
        """The inputs that this form takes."""
        exact = kl == "exact"
        return {
            "ref_logp": None if exact else self.ref_logp,
            "row_kl": self.row_kl if exact else None,
        }

    def to(self, device: str) -> Batch:
        finished = self.layout.finished
        layout = replace(
            self.layout,
            offsets=self.layout.offsets.to(device),
            finished=None if finished is None else finished.to(device),
        )
        rows = (t.to(device) for t in (self.logp, self.ref_logp, self.row_kl))
        return Batch(*rows, layout)

    def double(self) -> Batch:
        return replace(
            self,
            logp=self.logp.double(),
            ref_logp=self.ref_logp.double(),
            row_kl=self.row_kl.double(),
        )

    @property
    def answer_rows(self) -> Tensor:
        """bool [N]."""
        return answer_rows(self.layout.offsets)


def answer_rows(offsets: Tensor) -> Tensor:
    segment = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(segment, offsets.diff()) % 2 == 1


def make_batch(
    lengths: list[int],
    num_generations: int,
    *,
    finished: list[bool] | None = None,
    num_groups: int | None = None,
    seed: int = 0,
) -> Batch:
    """A batch of segments of these lengths.

    ref_logp and row_kl are NaN on answer rows: nobody computes them there.
    """
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    N = sum(lengths)
    logp = -torch.rand(N, generator=generator) * 8
    ref_logp = torch.minimum(logp + torch.randn(N, generator=generator), torch.zeros(()))
    row_kl = torch.rand(N, generator=generator)
    for unread in (ref_logp, row_kl):
        unread[answer_rows(offsets)] = torch.nan
    flags = None if finished is None else torch.tensor(finished, dtype=torch.bool)
    return Batch(logp, ref_logp, row_kl, GroupLayout(offsets, num_generations, flags, num_groups))


def ragged_batch(num_generations: int, seed: int = 0) -> Batch:
    """1.8 M rows: segments of 1 to 100 rows and, together and apart, some of up to 100,000."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 100) for _ in range(2048)]
    for i in (*range(16), *range(64, 2048, 42)):
        lengths[i] = draw.randint(1, 50_000)
    lengths[2047] = 100_000
    finished = [draw.random() < 0.9 for _ in range(1024)]
    return make_batch(lengths, num_generations, finished=finished, seed=seed)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Ragged groups: empty segments, no groups, any sequences unfinished."""
    K, G = draw(st.integers(2, 9)), draw(st.integers(0, 5))
    lengths = draw(st.lists(st.integers(0, 50), min_size=2 * G * K, max_size=2 * G * K))
    finished = st.lists(st.booleans(), min_size=G * K, max_size=G * K)
    return make_batch(
        lengths,
        K,
        finished=draw(st.none() | finished),
        num_groups=draw(st.none() | st.integers(max(1, G), 20)),
        seed=draw(st.integers(0, 2**31)),
    )


@contextlib.contextmanager
def nan_filled_empty() -> Iterator[None]:
    """`torch.empty` holds NaN, so that an output row nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(batch: Batch, backend: str, **settings: object) -> GroupAdvantage:
    inputs = batch.of_kl(settings.get("kl", "reward"))
    with nan_filled_empty():
        return group_advantage(
            batch.logp, layout=batch.layout, backend=backend, **inputs, **settings
        )


def run_reference(batch: Batch, **settings: object) -> GroupAdvantage:
    inputs = batch.of_kl(settings.get("kl", "reward"))
    return reference(batch.logp, layout=batch.layout, **inputs, **settings)


def present(out: GroupAdvantage) -> dict[str, Tensor]:
    """The fields that there are, by name."""
    return {name: getattr(out, name) for name in FIELDS if getattr(out, name) is not None}


def objective(batch: Batch, beta: float, answer_weight: float, kl: str, unfinished: str) -> Tensor:
    """The loss of the paper's update, written out with a loop and differentiable in logp."""
    offsets, K = batch.layout.offsets.tolist(), batch.layout.num_generations
    sequences = range(len(offsets) // 2)
    finished = (
        [True] * len(sequences) if batch.layout.finished is None else batch.layout.finished.tolist()
    )
    log_z, log_y, divergence, rewards = [], [], [], []
    for s in sequences:
        z = slice(offsets[2 * s], offsets[2 * s + 1])
        log_z.append(batch.logp[z].sum())
        log_y.append(batch.logp[offsets[2 * s + 1] : offsets[2 * s + 2]].sum())
        log_ratio = batch.logp[z] - batch.ref_logp[z]
        k3 = torch.exp(-log_ratio) + log_ratio - 1
        rows = {"reward": log_ratio, "k3": k3, "exact": batch.row_kl[z]}[kl]
        divergence.append(rows.sum())
        penalty = 0.0 if kl == "k3" else beta * divergence[s].item()
        rewards.append(log_y[s].item() - penalty)
    loss = batch.logp.new_zeros(())
    for first in sequences[::K]:
        group = range(first, first + K)
        if unfinished == "floor":
            lowest = min(rewards[s] for s in group)
            included = {s: rewards[s] if finished[s] else lowest for s in group}
        else:
            included = {s: rewards[s] for s in group if finished[s]}
        for s in included:
            others = [included[j] for j in included if j != s]
            advantage = included[s] - sum(others) / len(others) if others else 0.0
            loss = loss - advantage * log_z[s] - answer_weight * log_y[s]
            if kl != "reward":
                loss = loss + beta * divergence[s]
    num_groups = batch.layout.num_groups or len(sequences) // K
    return loss / (num_groups * K)


def assert_gate(batch: Batch, backend: str, **settings: object) -> None:
    """Error against fp64 truth at most twice that of fp32 PyTorch, plus 1e-5, in every field."""
    inputs = (batch.logp, batch.ref_logp, batch.row_kl, batch.layout.offsets)
    before = [tensor.clone() for tensor in inputs]
    out = present(run(batch, backend, **settings))
    for tensor, copy in zip(inputs, before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)

    truth = present(run_reference(batch.double(), **settings))
    unfused = present(run_reference(batch, **settings))
    assert out.keys() == truth.keys()
    for name in truth:
        exact, got, plain = (x[name] for x in (truth, out, unfused))
        assert got.dtype == torch.float32
        assert got.shape == exact.shape
        if exact.numel():
            error, allowed = ((x - exact).abs().max().item() for x in (got, plain))
            assert error <= 2 * allowed + 1e-5, f"{name}: {error:.2e} against {allowed:.2e}"


def assert_same(left: GroupAdvantage, right: GroupAdvantage) -> None:
    """The same bits in every field."""
    one, other = present(left), present(right)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True, msg=name)


def assert_nan_stays_in_its_group(batch: Batch, backend: str, row: int, **settings: object) -> None:
    """NaN at a row shows in its whole group and leaves the other groups as they were."""
    layout, K = batch.layout, batch.layout.num_generations
    clean = run(batch, backend, **settings)
    logp = batch.logp.clone()
    logp[row] = torch.nan
    spoilt = run(replace(batch, logp=logp), backend, **settings)

    sequence = int(torch.searchsorted(layout.offsets, row, right=True) - 1) // 2
    group = torch.arange(layout.num_sequences, device=logp.device) // K == sequence // K
    rows = group.repeat_interleave(layout.offsets[::2].diff())
    assert spoilt.reward[sequence].isnan()
    assert spoilt.advantage[group].isnan().all()
    assert spoilt.coefficient[rows & ~batch.answer_rows].isnan().all()
    torch.testing.assert_close(spoilt.advantage[~group], clean.advantage[~group], rtol=0, atol=0)
    torch.testing.assert_close(spoilt.coefficient[~rows], clean.coefficient[~rows], rtol=0, atol=0)


def assert_exact_advantages(backend: str, device: str) -> None:
    """Rewards at -10,000 that lie 2⁻¹⁴ apart, where fp32 has a step of 2⁻¹⁰."""
    K, step = 5, 2.0**-14
    excess = torch.tensor([3.0, 0.0, 7.0, 1.0, 4.0], dtype=torch.float64) * step
    answers = torch.stack([torch.full((K,), -10_001.0), 1 + excess.float()], 1)
    logp = torch.cat([torch.zeros(K, 1), answers], 1).view(-1).to(device)
    offsets = torch.tensor([0, *[1, 2] * K]).cumsum(0).to(device)
    batch = Batch(logp, logp.clone(), torch.zeros_like(logp), GroupLayout(offsets, K))
    expected = (K * excess - excess.sum()) / (K - 1)
    assert (expected.float().double() == expected).all(), "the expected values are exact in fp32"
    torch.testing.assert_close(
        run(batch, backend).advantage.cpu(), expected.float(), rtol=0, atol=0
    )


def assert_equal_rewards_give_zero(backend: str, device: str) -> None:
    for K in range(2, 10):
        one = -torch.rand(9, generator=torch.Generator().manual_seed(K))
        logp = one.repeat(K).to(device)
        offsets = torch.tensor([0, *[5, 4] * K]).cumsum(0).to(device)
        batch = Batch(logp, logp - 0.1, torch.zeros_like(logp), GroupLayout(offsets, K))
        out = run(batch, backend)
        assert (out.advantage == 0).all()
        assert (out.coefficient[~batch.answer_rows] == 0).all()


def assert_without_weight_an_infinite_kl_is_not_seen(
    batch: Batch, backend: str, **settings: object
) -> None:
    """π_0 rules a sampled token out: with β = 0 the KL is told, and nothing else knows of it."""
    offsets = batch.layout.offsets
    first = offsets[::2][:-1][offsets.diff()[::2] > 0]
    ruled_out = replace(batch, ref_logp=batch.ref_logp.clone(), row_kl=batch.row_kl.clone())
    ruled_out.ref_logp[first] = -torch.inf
    ruled_out.row_kl[first] = torch.inf
    out = run(ruled_out, backend, beta=0.0, **settings)
    expected = run(batch, backend, beta=0.0, **settings)
    assert out.kl.isinf().any()
    assert_same(replace(out, kl=expected.kl), expected)
