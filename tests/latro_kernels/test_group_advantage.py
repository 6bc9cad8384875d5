"""What group_advantage alone has: groups, the objective that it serves, NaN and ∞ within groups."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latro_kernels import GroupLayout, group_advantage
from latro_kernels.group_advantage import KL_FORMS
from tests.latro_kernels.ops.group_advantage import (
    SETTINGS,
    SMALL,
    Batch,
    answer_rows,
    batches,
    make_batch,
    present,
    ragged_batch,
)
from tests.latro_kernels.ops.op import (
    FUSED,
    INTERPRETED,
    Results,
    assert_same,
    check,
    each_backend,
)

each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(s.values()))
SPOILABLE = make_batch([2, 3] * 9, 3, finished=[s != 4 for s in range(9)])


def solve(batch: Batch, backend: str, **setting: object) -> Results:
    return batch.problem(**setting).on(backend).solve(backend)


@pytest.mark.parametrize("backend", [b for b in FUSED if b.values != ("cpu",) and not INTERPRETED])
@pytest.mark.parametrize("num_generations", [2, 1024])
@each_setting
def test_millions_of_ragged_rows(
    setting: dict[str, str], num_generations: int, backend: str
) -> None:
    given = ragged_batch(num_generations).problem(**setting).on(backend)
    assert_same(check(given, backend), given.solve(backend))


@each_backend
def test_rewards_large_and_close_together(backend: str) -> None:
    """Rewards at -10,000 that lie 2⁻¹⁴ apart, where fp32 has a step of 2⁻¹⁰."""
    K, step = 5, 2.0**-14
    excess = torch.tensor([3.0, 0.0, 7.0, 1.0, 4.0], dtype=torch.float64) * step
    answers = torch.stack([torch.full((K,), -10_001.0), 1 + excess.float()], 1)
    logp = torch.cat([torch.zeros(K, 1), answers], 1).view(-1)
    layout = GroupLayout(torch.tensor([0, *[1, 2] * K]).cumsum(0), K)
    expected = (K * excess - excess.sum()) / (K - 1)
    assert (expected.float().double() == expected).all(), "the expected values are exact in fp32"
    got = solve(Batch(logp, logp.clone(), torch.zeros_like(logp), layout), backend)
    assert torch.equal(got["advantage"].cpu(), expected.float())


@each_backend
def test_equal_rewards_give_exactly_zero(backend: str) -> None:
    for K in range(2, 10):
        logp = -torch.rand(9, generator=torch.Generator().manual_seed(K)).repeat(K)
        layout = GroupLayout(torch.tensor([0, *[5, 4] * K]).cumsum(0), K)
        got = solve(Batch(logp, logp - 0.1, torch.zeros_like(logp), layout), backend)
        assert (got["advantage"] == 0).all()
        assert (got["coefficient"].cpu()[~answer_rows(layout.offsets)] == 0).all()


@each_backend
def test_beta_keeps_its_digits(backend: str) -> None:
    """0.1 in fp64, of which fp32 is 1.5·10⁻⁹ off: 2⁻⁶ of a penalty of 2²⁰."""
    KL, answer = 10.0 * 2**20, 2.0**20
    logp = torch.tensor([0.0, answer, 0.0, 0.0])
    ref_logp = torch.tensor([-KL, 0.0, 0.0, 0.0])
    layout = GroupLayout(torch.arange(5), 2)
    got = solve(Batch(logp, ref_logp, torch.tensor([KL, 0.0, 0.0, 0.0]), layout), backend, beta=0.1)
    # The penalty is rounded, or by a fused multiply-add it is not.
    step = torch.finfo(torch.float64).eps * answer
    assert got["reward"].abs().max() <= step
    assert got["advantage"].abs().max() <= step


@each_backend
def test_coefficients_are_rounded_once(backend: str) -> None:
    """λ and the scale are multiplied in fp64."""
    logp, num_groups = torch.zeros(4), 7
    layout = GroupLayout(torch.arange(5), 2, num_groups=num_groups)
    batch, scale = Batch(logp, logp, logp, layout), 1 / (2 * num_groups)
    weights = [n / 10 for n in range(1, 16)]
    exact = torch.tensor([-scale * weight for weight in weights], dtype=torch.float64).float()
    assert not torch.equal(exact, -torch.tensor(scale) * torch.tensor(weights)), "the test can fail"
    for weight, expected in zip(weights, exact, strict=True):
        got = solve(batch, backend, answer_weight=weight)["coefficient"].cpu()
        assert (got[1::2] == expected).all()


def test_weights_of_fp64_rows_are_fp64() -> None:
    """β, λ and the scale, none of which fp32 has, in each coefficient that they make alone."""
    beta, answer_weight, num_groups = 0.1, 0.7, 7
    rows = torch.zeros(4, dtype=torch.float64)
    layout = GroupLayout(torch.arange(5), 2, num_groups=num_groups)
    settings = {"beta": beta, "answer_weight": answer_weight, "kl": "exact"}
    out = solve(Batch(rows, rows, rows, layout), "reference", **settings)
    answer = torch.full((2,), -answer_weight / (2 * num_groups), dtype=torch.float64)
    rationale = torch.full((2,), beta / (2 * num_groups), dtype=torch.float64)
    step = torch.finfo(torch.float64).eps
    torch.testing.assert_close(out["coefficient"][1::2], answer, rtol=step, atol=0)
    torch.testing.assert_close(out["kl_coefficient"][::2], rationale, rtol=step, atol=0)


@each_backend
@pytest.mark.parametrize(
    ("setting", "row"),
    [
        (setting, row)
        for setting in SETTINGS
        for row, is_read in (
            (0, setting["kl"] == "reward"),
            (4, True),
            (24, setting["unfinished"] == "floor"),
        )
        if is_read
    ],
    ids=lambda of: "-".join(of.values()) if isinstance(of, dict) else None,
)
def test_nan_stays_in_its_group(setting: dict[str, str], row: int, backend: str) -> None:
    """It shows in its whole group and leaves the other groups as they were.

    Row 0 is of a rationale, 4 of an answer, 24 of an answer after an unfinished one.
    """
    layout, logp = SPOILABLE.layout, SPOILABLE.logp.clone()
    logp[row] = torch.nan
    clean = solve(SPOILABLE, backend, **setting)
    spoilt = solve(replace(SPOILABLE, logp=logp), backend, **setting)
    clean, spoilt = ({n: t.cpu() for n, t in results.items()} for results in (clean, spoilt))
    sequence = int(torch.searchsorted(layout.offsets, row, right=True) - 1) // 2
    group = torch.arange(9) // 3 == sequence // 3
    rows = group.repeat_interleave(layout.offsets[::2].diff())
    assert spoilt["reward"][sequence].isnan()
    assert spoilt["advantage"][group].isnan().all()
    assert spoilt["coefficient"][rows & ~answer_rows(layout.offsets)].isnan().all()
    assert torch.equal(spoilt["advantage"][~group], clean["advantage"][~group])
    assert torch.equal(spoilt["coefficient"][~rows], clean["coefficient"][~rows])


@each_backend
@pytest.mark.parametrize("kl", KL_FORMS)
def test_an_excluded_sequence_passes_nothing_on(kl: str, backend: str) -> None:
    logp = SPOILABLE.logp.clone()
    logp[20:25] = torch.nan
    clean = solve(SPOILABLE, backend, kl=kl, unfinished="exclude")
    spoilt = solve(replace(SPOILABLE, logp=logp), backend, kl=kl, unfinished="exclude")
    assert spoilt["reward"][4].isnan()
    assert (clean["coefficient"][20:25] == 0).all()
    for name in ("advantage", "coefficient"):
        assert torch.equal(spoilt[name], clean[name])


@each_backend
@each_setting
def test_same_bits_twice(setting: dict[str, str], backend: str) -> None:
    lengths = [600, 40, 700, 7] if INTERPRETED else [9_001, 40, 12_345, 7, 0, 1, 3, 3]
    given = make_batch(lengths, 2).problem(**setting).on(backend)
    assert_same(given.solve(backend), given.solve(backend))


def objective(batch: Batch, beta: float, answer_weight: float, kl: str, unfinished: str) -> Tensor:
    """Return the loss of the paper's update, written out with a loop and differentiable in logp."""
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


@each_setting
@given(batch=batches(), beta=st.floats(0, 1), answer_weight=st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_coefficients_are_the_gradient_of_the_objective(
    setting: dict[str, str], batch: Batch, beta: float, answer_weight: float
) -> None:
    N = batch.logp.numel()
    generator = torch.Generator().manual_seed(N)
    logits = torch.randn(N, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.randint(7, (N, 1), generator=generator)
    logp = logits.log_softmax(-1).gather(1, target).squeeze(1)
    ref_log_p = torch.randn(N, 7, dtype=torch.float64, generator=generator).log_softmax(-1)
    row_kl = (logits.log_softmax(-1) - ref_log_p).mul(logits.softmax(-1)).sum(-1)
    batch = replace(batch, logp=logp, ref_logp=batch.ref_logp.double(), row_kl=row_kl)
    loss = objective(batch, beta, answer_weight, **setting)
    (expected,) = torch.autograd.grad(loss + 0 * logp.sum(), logits, retain_graph=True)

    out = solve(batch, "reference", beta=beta, answer_weight=answer_weight, **setting)
    ours = (out["coefficient"] * logp).sum()
    if "kl_coefficient" in out:
        ours = ours + (out["kl_coefficient"] * row_kl).sum()
    (got,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(got, expected)


@each_backend
@each_setting
def test_micro_batches_add_up_to_the_update(setting: dict[str, str], backend: str) -> None:
    draw = random.Random(1)
    whole = make_batch([draw.randrange(1, 9) for _ in range(24)], 3)
    parts = []
    for offsets in (whole.layout.offsets[:13], whole.layout.offsets[12:]):
        rows = slice(int(offsets[0]), int(offsets[-1]))
        layout = GroupLayout(offsets - offsets[0], 3, num_groups=4)
        part = Batch(whole.logp[rows], whole.ref_logp[rows], whole.row_kl[rows], layout)
        parts.append(solve(part, backend, **setting)["coefficient"])
    assert torch.equal(torch.cat(parts), solve(whole, backend, **setting)["coefficient"])


@each_backend
@pytest.mark.parametrize("kl", KL_FORMS)
def test_without_a_reference(kl: str, backend: str) -> None:
    given = SMALL.problem(beta=0, kl=kl).on(backend)
    out, with_one = given.but(ref_logp=None, row_kl=None).solve(backend), given.solve(backend)
    assert "kl_coefficient" not in out
    assert (out["kl"] == 0).all()
    assert not (with_one["kl"] == 0).all()
    assert torch.equal(out["coefficient"], with_one["coefficient"])


@each_backend
@each_setting
def test_without_weight_an_infinite_kl_is_not_seen(setting: dict[str, str], backend: str) -> None:
    """π_0 rules a sampled token out: with β = 0 the KL is told, and nothing else knows of it."""
    offsets = SMALL.layout.offsets
    first = offsets[::2][:-1][offsets.diff()[::2] > 0]
    ruled_out = replace(SMALL, ref_logp=SMALL.ref_logp.clone(), row_kl=SMALL.row_kl.clone())
    ruled_out.ref_logp[first] = -torch.inf
    ruled_out.row_kl[first] = torch.inf
    out = solve(ruled_out, backend, beta=0.0, **setting)
    expected = solve(SMALL, backend, beta=0.0, **setting)
    assert out["kl"].isinf().any()
    assert_same(out | {"kl": expected["kl"]}, expected)


@each_backend
def test_no_gradient_comes_of_it(backend: str) -> None:
    given = SMALL.problem().on(backend)
    logp, ref_logp = (given[name].requires_grad_() for name in ("logp", "ref_logp"))
    layout = GroupLayout(given["offsets"], 2)
    out = group_advantage(logp, ref_logp, layout, backend=backend)
    assert not any(value.requires_grad for value in present(out).values())


def test_auto_is_the_cpu_backend_on_the_cpu() -> None:
    assert_same(solve(SMALL, "auto"), solve(SMALL, "cpu"))


@pytest.mark.gpu
@each_setting
def test_the_reference_on_a_gpu(setting: dict[str, str]) -> None:
    given = SPOILABLE.problem(**setting)
    on_gpu = given.map(lambda t: t.to("cuda"))
    torch.testing.assert_close(
        {n: t.cpu() for n, t in on_gpu.solve("reference").items()}, given.solve("reference")
    )
