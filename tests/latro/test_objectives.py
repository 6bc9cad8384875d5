"""The objectives against autograd through their formulas, and against exact expectations."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latro.objectives import OBJECTIVES, ObjectiveSettings, Rows
from latro_kernels import GroupLayout, group_advantage
from tests.latro.objective_cases import surrogate
from tests.latro_kernels.ops.group_advantage import SETTINGS, assert_same, make_batch, present

RELATIVES = [name for name in OBJECTIVES if name != "latro"]
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(s.values()))
each_relative = pytest.mark.parametrize("name", RELATIVES)
each_objective = pytest.mark.parametrize("name", OBJECTIVES)


def make_rows(G: int, K: int, kl: str = "reward", seed: int = 0, scale: float = 0.1) -> Rows:
    """Ragged groups with answers likely enough to tell e^ℓ apart, some of them unfinished."""
    draw = random.Random(seed)
    lengths = [draw.randint(part, 6) for _ in range(G * K) for part in (0, 1)]
    batch = make_batch(
        lengths,
        K,
        finished=[draw.random() < 0.7 for _ in range(G * K)],
        num_groups=G + draw.randint(0, 3),
        seed=seed,
    )
    plain = [draw.randint(1, 6) for _ in range(G)]
    own_answer = []
    for rationale, answer in zip(lengths[::2], lengths[1::2], strict=True):
        template = draw.randint(0, answer - 1)
        own = draw.randint(1, answer - template)
        own_answer += [False] * (rationale + template) + [True] * own
        own_answer += [False] * (answer - template - own)
    return Rows(
        batch.logp * scale,
        batch.layout,
        None if kl == "exact" else batch.ref_logp * scale,
        batch.row_kl if kl == "exact" else None,
        torch.tensor(own_answer),
        torch.tensor([-1.2 - draw.random() for _ in range(sum(plain))]),
        torch.tensor([0, *plain]).cumsum(0),
    )


def rewarding(rows: Rows, tokens: str) -> Rows:
    """Return the rows with the reward of `tokens` alone: "answer" or "template+answer"."""
    offsets = rows.layout.offsets.tolist()
    unrewarded = torch.zeros_like(rows.own_answer)
    for start, end in zip(offsets[1::2], offsets[2::2], strict=True):
        own = rows.own_answer[start:end].nonzero()[:, 0] + start
        unrewarded[own[-1] + 1 : end] = True
        if tokens == "answer":
            unrewarded[start : own[0]] = True
    return replace(rows, unrewarded=unrewarded)


def rows_of(answer_logps: list[float], K: int, rationale_logp: float = -1.0) -> Rows:
    """Sequences of one rationale and one answer row."""
    logp = torch.tensor([value for ell in answer_logps for value in (rationale_logp, ell)])
    layout = GroupLayout(torch.arange(logp.numel() + 1), K)
    G = len(answer_logps) // K
    own_answer = torch.tensor([False, True]).repeat(len(answer_logps))
    plain = torch.full((G,), -3.0), torch.arange(G + 1)
    return Rows(logp, layout, logp - 0.5, None, own_answer, *plain)


def cast(rows: Rows, dtype: torch.dtype) -> Rows:
    def to(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype)

    return replace(
        rows,
        logp=to(rows.logp),
        ref_logp=to(rows.ref_logp),
        row_kl=to(rows.row_kl),
        plain_logp=to(rows.plain_logp),
    )


def gradients(name: str, rows: Rows, settings: ObjectiveSettings) -> dict[str, Tensor]:
    """Of `surrogate`, for each row."""
    logp = rows.logp.clone().requires_grad_()
    inputs, row_kl = {"coefficient": logp}, rows.row_kl
    if row_kl is not None:
        row_kl = inputs["kl_coefficient"] = row_kl.clone().requires_grad_()
    loss = surrogate(name, replace(rows, logp=logp, row_kl=row_kl), settings)
    # Where all groups are left out, the loss is a constant.
    loss = loss + 0 * sum(x.nan_to_num().sum() for x in inputs.values())
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


@each_objective
@each_setting
@pytest.mark.parametrize("seed", range(12))
def test_coefficients_are_the_gradients_of_the_formula(name, setting, seed):
    """In fp64 to torch's tolerance of fp64; in fp32 as near as autograd in fp32, times two."""
    rows = make_rows(1 + seed % 4, 2 + seed % 7, setting["kl"], seed)
    settings = ObjectiveSettings(
        beta=0.3, answer_weight=0.7, rlpr_min_std=0.03, backend="reference", **setting
    )
    truth = gradients(name, cast(rows, torch.float64), settings)
    exact = OBJECTIVES[name](cast(rows, torch.float64), settings)
    out = OBJECTIVES[name](rows, settings)
    unfused = gradients(name, rows, settings)
    for field, expected in truth.items():
        torch.testing.assert_close(getattr(exact, field), expected, msg=field)
        got = getattr(out, field)
        assert got.dtype == torch.float32
        error, allowed = ((x - expected).abs().max().item() for x in (got, unfused[field]))
        assert error <= 2 * allowed + 1e-5
    if "kl_coefficient" not in truth:
        assert out.kl_coefficient is None


@each_setting
@pytest.mark.parametrize("tokens", ["answer", "template+answer"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("seed", range(4))
def test_latros_reward_may_be_of_some_tokens_of_y_alone(setting, tokens, backend, seed):
    """The coefficients are those of the formula, and the likelihood that is told is of all of y."""
    rows = rewarding(make_rows(1 + seed, 4 + seed, setting["kl"], seed), tokens)
    settings = ObjectiveSettings(beta=0.3, answer_weight=0.7, backend=backend, **setting)
    truth = gradients("latro", cast(rows, torch.float64), settings)
    out = OBJECTIVES["latro"](rows, settings)
    unfused = gradients("latro", rows, settings)
    for field, expected in truth.items():
        error, allowed = (
            (x - expected).abs().max().item() for x in (getattr(out, field), unfused[field])
        )
        assert error <= 2 * allowed + 1e-5
    whole = OBJECTIVES["latro"](replace(rows, unrewarded=None), settings)
    torch.testing.assert_close(out.answer_logp, whole.answer_logp)
    assert out.answer_logp.dtype == torch.float32
    assert not torch.equal(out.advantage, whole.advantage)


def test_the_reward_of_some_tokens_by_hand():
    """Two rationales of one row; template, own token and end have log-probs of their own."""
    logp = torch.tensor([-1.0, -8.0, -2.0, -16.0, -1.0, -1.0, -3.0, -0.5])
    layout = GroupLayout(torch.tensor([0, 1, 4, 5, 8]), 2)
    own = torch.tensor([False, False, True, False] * 2)
    rows = Rows(logp, layout, own_answer=own)
    settings = ObjectiveSettings(beta=0.0, answer_weight=0.5)
    for tokens, reward in {
        "answer": [-2.0, -3.0],
        "template+answer": [-10.0, -4.0],
        "all": [-26.0, -4.5],
    }.items():
        out = OBJECTIVES["latro"](rows if tokens == "all" else rewarding(rows, tokens), settings)
        gap = reward[0] - reward[1]
        assert out.reward.tolist() == reward
        assert out.answer_logp.tolist() == [-26.0, -4.5]
        assert out.advantage.tolist() == [gap, -gap]
        # −A/2 on the rationale, −λ/2 on all of y.
        assert out.coefficient.tolist() == [-gap / 2, *[-0.25] * 3, gap / 2, *[-0.25] * 3]


@pytest.mark.parametrize("tokens", ["answer", "template+answer"])
def test_the_mean_update_follows_the_rewarded_tokens_and_teaches_all_of_y(tokens):
    """Over all pairs of three possible rationales, weighted by their chance.

    Each is followed by a template, an answer and an end, one token of four each. The chance of
    rationales follows E[ℓ'] of the rewarded tokens, and the answers' log-probs follow E[ℓ] of all.
    """
    draw = torch.Generator().manual_seed(1)
    theta = torch.randn(3, generator=draw, dtype=torch.float64).requires_grad_()
    phi = torch.randn(3, 3, 4, generator=draw, dtype=torch.float64).requires_grad_()
    log_z, log_y = theta.log_softmax(0), phi.log_softmax(-1)[..., 0]
    rewarded = log_y[:, 1] if tokens == "answer" else log_y[:, :2].sum(1)
    (of_rationales,) = torch.autograd.grad((log_z.exp() * rewarded.detach()).sum(), theta)
    expected_answers = (log_z.exp().detach() * log_y.sum(1)).sum()
    (of_answers,) = torch.autograd.grad(expected_answers, phi, retain_graph=True)

    settings = ObjectiveSettings(beta=0.0, backend="reference")
    layout = GroupLayout(torch.tensor([0, 1, 4, 5, 8]), 2)
    own = torch.tensor([False, False, True, False] * 2)
    log_z = theta.log_softmax(0)
    loss = torch.zeros((), dtype=torch.float64)
    for drawn in torch.cartesian_prod(torch.arange(3), torch.arange(3)):
        logp = torch.cat([log_z[drawn][:, None], log_y[drawn]], 1).view(-1)
        rows = rewarding(Rows(logp, layout, own_answer=own), tokens)
        chance = log_z[drawn].sum().exp().detach()
        loss = loss + chance * (OBJECTIVES["latro"](rows, settings).coefficient * logp).sum()
    got = torch.autograd.grad(-loss, [theta, phi])
    torch.testing.assert_close(got, (of_rationales, of_answers))


@pytest.mark.parametrize("name", ["latro", "verifree", "jepo"])
@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_the_mean_update_is_the_gradient_of_the_objective(name, K, beta):
    """Over all K-tuples of three possible rationales, weighted by their chance: no bias, no factor.

    A rationale is one token of three, an answer one token of four.
    """
    draw = torch.Generator().manual_seed(K)
    theta = torch.randn(3, generator=draw, dtype=torch.float64).requires_grad_()
    phi = torch.randn(3, 4, generator=draw, dtype=torch.float64).requires_grad_()
    ref = torch.randn(3, generator=draw, dtype=torch.float64).log_softmax(0)
    log_z, ell = theta.log_softmax(0), phi.log_softmax(1)[:, 0]
    tuples = torch.cartesian_prod(*[torch.arange(3)] * K)
    chance = log_z[tuples].sum(1).exp()
    value = {
        "latro": ell[tuples].mean(1),
        "verifree": ell[tuples].exp().mean(1),
        "jepo": ell[tuples].logsumexp(1) - math.log(K),
    }[name]
    objective = (chance * value).sum() - beta * (log_z.exp() * (log_z - ref)).sum()
    expected = torch.autograd.grad(objective, [theta, phi], retain_graph=True)

    settings = ObjectiveSettings(beta=beta, backend="reference")
    layout = GroupLayout(torch.arange(2 * K + 1), K)
    loss = torch.zeros((), dtype=torch.float64)
    for weight, drawn in zip(chance.detach(), tuples, strict=True):
        logp = torch.stack([log_z[drawn], ell[drawn]], 1).view(-1)
        ref_logp = torch.stack([ref[drawn], torch.full((K,), torch.nan)], 1).view(-1)
        out = OBJECTIVES[name](Rows(logp, layout, ref_logp), settings)
        loss = loss + weight * (out.coefficient * logp).sum()
    got = torch.autograd.grad(-loss, [theta, phi])
    torch.testing.assert_close(got, expected)


@each_setting
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_latro_is_group_advantage(setting, backend):
    rows = make_rows(4, 5, setting["kl"])
    settings = ObjectiveSettings(beta=0.2, answer_weight=0.5, backend=backend, **setting)
    expected = group_advantage(
        rows.logp,
        rows.ref_logp,
        rows.layout,
        beta=0.2,
        answer_weight=0.5,
        row_kl=rows.row_kl,
        backend=backend,
        **setting,
    )
    assert_same(OBJECTIVES["latro"](rows, settings), expected)


@each_relative
@each_setting
def test_statistics_are_those_of_group_advantage(name, setting):
    """What does not depend on the objective: log-probs, KL and its coefficients."""
    rows = make_rows(3, 4, setting["kl"], seed=5)
    settings = ObjectiveSettings(rlpr_min_std=0.0, **setting)
    expected, out = OBJECTIVES["latro"](rows, settings), OBJECTIVES[name](rows, settings)
    for field in ("answer_logp", "rationale_logp", "kl"):
        torch.testing.assert_close(getattr(out, field), getattr(expected, field))
    assert present(out).keys() == present(expected).keys()
    if setting["kl"] == "exact" and name != "rlpr":
        torch.testing.assert_close(out.kl_coefficient, expected.kl_coefficient)


@each_relative
@pytest.mark.parametrize(
    "answer_logps",
    [[-2000.0, 0.0, -2000.0, 0.0], [0.0, -2000.0, -2000.0, -2000.0], [-2000.0] * 4, [0.0] * 4],
)
def test_extreme_likelihoods_stay_finite(name, answer_logps):
    out = OBJECTIVES[name](rows_of(answer_logps, 4), ObjectiveSettings())
    for field, value in present(out).items():
        assert value.isfinite().all(), field


def test_jepo_far_apart_and_near():
    """One rationale that alone explains the answer earns the distance to the rest, times m."""
    settings = ObjectiveSettings(beta=0.0)
    out = OBJECTIVES["jepo"](rows_of([-1000.0, -3000.0, -3000.0], 3), settings)
    gain = 2000 - math.log(3)
    loss = math.log(2 / 3)
    torch.testing.assert_close(out.advantage, 3 * torch.tensor([gain, loss, loss]))
    torch.testing.assert_close(out.coefficient[1::2], torch.tensor([-1.0, 0.0, 0.0]))
    # Nearly equal likelihoods: LaTRO's advantages, off by a share of them as small as what lies
    # between the likelihoods.
    near = cast(rows_of([-900.0, -900.001, -900.003], 3), torch.float64)
    near = replace(near, logp=near.logp.round(decimals=3))
    ours, latro = (
        OBJECTIVES[name](near, replace(settings, backend="reference")).advantage
        for name in ("jepo", "latro")
    )
    torch.testing.assert_close(ours, latro, rtol=3e-3, atol=0)


@each_relative
@pytest.mark.parametrize("K", range(2, 9))
def test_equal_sequences_have_no_advantage(name, K):
    one = -torch.rand(9, generator=torch.Generator().manual_seed(K))
    layout = GroupLayout(torch.tensor([0, *[5, 4] * K]).cumsum(0), K)
    logp = one.repeat(K)
    own_answer = torch.tensor([False] * 6 + [True] * 2 + [False]).repeat(K)
    plain = torch.tensor([-3.0]), torch.tensor([0, 1])
    rows = Rows(logp, layout, logp - 0.1, None, own_answer, *plain)
    for rule in ("floor", "exclude"):
        settings = ObjectiveSettings(unfinished=rule, rlpr_min_std=0.0)
        out = OBJECTIVES[name](rows, settings)
        assert (out.advantage == 0).all()
        assert (out.coefficient.view(K, 9)[:, :5] == 0).all()


@each_objective
@each_setting
def test_a_group_depends_on_itself_alone(name, setting):
    rows = make_rows(3, 4, setting["kl"], seed=2)
    settings = ObjectiveSettings(rlpr_min_std=0.0, **setting)
    offsets = rows.layout.offsets
    start, end = offsets[2 * 4], offsets[2 * 8]
    logp = rows.logp.clone()
    rationale = torch.zeros_like(logp, dtype=torch.bool)
    for s in range(4, 8):
        rationale[offsets[2 * s] : offsets[2 * s + 1]] = True
    assert rationale.any()
    logp[rationale] -= 1.0
    before = OBJECTIVES[name](rows, settings)
    after = OBJECTIVES[name](replace(rows, logp=logp), settings)
    other_rows = torch.ones_like(rationale)
    other_rows[start:end] = False
    other = torch.arange(12) // 4 != 1
    for field, value in present(before).items():
        keep = other_rows if len(value) == len(logp) else other
        assert torch.equal(getattr(after, field)[keep], value[keep]), field
    if setting["kl"] == "reward":
        assert not torch.equal(after.kl, before.kl)


@each_relative
def test_nan_is_seen_unless_left_out(name):
    rows = make_rows(2, 4, seed=3)
    rows.layout.finished[:] = True
    rows.layout.finished[1] = False
    logp = rows.logp.clone()
    logp[rows.layout.offsets[3]] = torch.nan
    spoilt = replace(rows, logp=logp)
    seen = OBJECTIVES[name](spoilt, ObjectiveSettings(rlpr_min_std=0.0))
    assert seen.answer_logp[1].isnan()
    left_out = ObjectiveSettings(unfinished="exclude", rlpr_min_std=0.0)
    out, clean = OBJECTIVES[name](spoilt, left_out), OBJECTIVES[name](rows, left_out)
    assert torch.equal(out.advantage, clean.advantage)
    assert torch.equal(out.coefficient, clean.coefficient)
    if name != "sft":
        assert seen.advantage[:4].isnan().all()
        assert seen.advantage[4:].isfinite().all()


@each_setting
def test_an_unfinished_rationale_is_never_above_another(setting):
    for name, seed in itertools.product(RELATIVES, range(6)):
        rows = make_rows(2, 5, setting["kl"], seed)
        out = OBJECTIVES[name](rows, ObjectiveSettings(beta=0.5, rlpr_min_std=0.0, **setting))
        finished = rows.layout.finished.view(2, 5)
        if setting["unfinished"] == "floor":
            lowest = out.advantage.view(2, 5).amin(1, keepdim=True).expand(2, 5)
            torch.testing.assert_close(out.advantage.view(2, 5)[~finished], lowest[~finished])
        else:
            assert (out.advantage.view(2, 5)[~finished] == 0).all()


def test_rlpr_drops_flat_groups_whole():
    """Two groups, the first of rewards 0.00 apart at most, the second of 0.3 and more."""
    ells = [math.log(p) for p in (0.6, 0.61, 0.6, 0.1, 0.4, 0.9)]
    rows = rows_of(ells, 3)
    settings = ObjectiveSettings(kl="k3", beta=0.5, rlpr_min_std=0.05)
    out = OBJECTIVES["rlpr"](rows, settings)
    assert (out.coefficient[:6] == 0).all()
    assert (out.advantage[:3] == 0).all()
    assert (out.coefficient[6::2] != 0).all()
    assert (out.coefficient[7::2] == 0).all()
    p_0 = math.exp(-3.0)
    rewards = torch.tensor([0.1 - p_0, 0.4 - p_0, 0.9 - p_0])
    torch.testing.assert_close(out.reward[3:], rewards)
    torch.testing.assert_close(out.advantage[3:], (rewards - rewards.mean()) / rewards.std())
    kept = OBJECTIVES["rlpr"](rows, replace(settings, rlpr_min_std=0.0))
    assert (kept.coefficient[:6:2] != 0).all()


def test_rlpr_reads_the_answers_own_tokens_alone():
    """The template's rows and the end token's may hold anything, and their number is nothing."""
    own, other = math.log(0.3), math.log(0.999)
    # A rationale of 1 row, and answers of template 3, own 2, end 1 and of template 1, own 1, end 1.
    logp = [-1.0, other, other, other, math.log(0.1), math.log(0.5), other]
    logp += [-1.0, -9.0, own + 0.2, -9.0]
    mask = [False] * 4 + [True] * 2 + [False] * 3 + [True, False]
    layout = GroupLayout(torch.tensor([0, 1, 7, 8, 11]), 2)
    plain = torch.tensor([math.log(0.05), math.log(0.15)]), torch.tensor([0, 2])
    rows = Rows(torch.tensor(logp), layout, None, None, torch.tensor(mask), *plain)
    out = OBJECTIVES["rlpr"](rows, ObjectiveSettings(beta=0.0))
    torch.testing.assert_close(out.reward, torch.tensor([0.2, 0.3 * math.exp(0.2) - 0.1]))


def test_rlpr_is_clipped_where_the_rationale_does_harm():
    rows = replace(rows_of([-5.0, -4.0, -0.1], 3), plain_logp=torch.tensor([-1.0]))
    out = OBJECTIVES["rlpr"](rows, ObjectiveSettings(beta=0.0))
    assert out.reward[:2].tolist() == [0.0, 0.0]
    assert out.reward[2] == pytest.approx(math.exp(-0.1) - math.exp(-1.0))


def test_bad_input():
    rows = make_rows(2, 3)
    for name in RELATIVES:
        with pytest.raises(ValueError, match="ref_logp: expected a tensor where beta is not 0"):
            OBJECTIVES[name](replace(rows, ref_logp=None), ObjectiveSettings())
        with pytest.raises(ValueError, match="ref_logp: expected None with kl='exact'"):
            OBJECTIVES[name](rows, ObjectiveSettings(kl="exact"))
        with pytest.raises(ValueError, match="unrewarded: expected None for objectives but latro"):
            OBJECTIVES[name](rewarding(rows, "answer"), ObjectiveSettings())
    with pytest.raises(ValueError, match="unrewarded: expected shape"):
        replace(rows, unrewarded=rows.own_answer[1:])
    with pytest.raises(ValueError, match="own_answer: expected a tensor for rlpr, got None"):
        OBJECTIVES["rlpr"](replace(rows, own_answer=None), ObjectiveSettings())
    with pytest.raises(ValueError, match="own_answer: expected shape"):
        replace(rows, own_answer=rows.own_answer[1:])
    for mask in ("own_answer", "unrewarded"):
        with pytest.raises(
            TypeError, match=rf"{mask}: expected dtype torch\.bool, got torch\.int64"
        ):
            replace(rows, **{mask: rows.own_answer.long()})
    with pytest.raises(ValueError, match="plain_logp: expected a tensor for rlpr, got None"):
        OBJECTIVES["rlpr"](replace(rows, plain_logp=None, plain_offsets=None), ObjectiveSettings())
    with pytest.raises(ValueError, match="plain_logp, plain_offsets: expected both or neither"):
        replace(rows, plain_logp=None)
    with pytest.raises(ValueError, match=r"plain_offsets: expected shape \(3,\), got \(4,\)"):
        replace(rows, plain_offsets=torch.arange(4))
    with pytest.raises(ValueError, match=r"logp: expected \[N\], got shape"):
        Rows(rows.logp[None], rows.layout)
    with pytest.raises(ValueError, match="ref_logp: expected shape"):
        replace(rows, ref_logp=rows.ref_logp[1:])


@each_objective
def test_no_groups(name):
    layout = GroupLayout(torch.zeros(1, dtype=torch.int64), 2)
    empty = torch.empty(0)
    plain = empty, torch.zeros(1, dtype=torch.int64)
    rows = Rows(empty, layout, empty, None, empty.bool(), *plain)
    out = OBJECTIVES[name](rows, ObjectiveSettings())
    assert out.coefficient.shape == out.advantage.shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@each_relative
def test_on_a_gpu_without_waiting_for_it(name):
    rows = make_rows(3, 4)
    layout = replace(
        rows.layout, offsets=rows.layout.offsets.cuda(), finished=rows.layout.finished.cuda()
    )
    moved = Rows(
        rows.logp.cuda(),
        layout,
        rows.ref_logp.cuda(),
        None,
        rows.own_answer.cuda(),
        rows.plain_logp.cuda(),
        rows.plain_offsets.cuda(),
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = OBJECTIVES[name](moved, ObjectiveSettings())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = OBJECTIVES[name](rows, ObjectiveSettings())
    for field, value in present(expected).items():
        torch.testing.assert_close(getattr(out, field).cpu(), value)
