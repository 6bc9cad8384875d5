from __future__ import annotations

import copy

import pytest
import torch

from latro.model.packing import collate
from latro.model.scoring import Scorer
from latro.objectives import OBJECTIVES, ObjectiveSettings, Rows
from latro.rollout.sequences import Sample
from latro_kernels import GroupLayout
from tests.latro.formula import formula_loss, sequence_logps
from tests.latro.objective_cases import surrogate


@pytest.mark.parametrize("kl", ["reward", "k3", "exact"])
@pytest.mark.parametrize("unfinished", ["floor", "exclude"])
@pytest.mark.parametrize("token_budget", [10**6, 150, 1])
def test_gradients_equal_autograd_through_the_formula(
    make_trainer, tiny, rollouts, kl, unfinished, token_budget
):
    model, ref_model = tiny(seed=1).double(), tiny(seed=2).double()
    with torch.no_grad():
        # Sharper than fresh weights, so that rewards differ and rows are not all alike.
        for m in (model, ref_model):
            m.get_output_embeddings().weight.mul_(10)
    reference = copy.deepcopy(model)
    settings = {"beta": 0.3, "answer_weight": 0.7, "kl": kl, "unfinished": unfinished}
    trainer = make_trainer(
        model, ref_model, backend="reference", token_budget=token_budget, **settings
    )
    groups = rollouts(3, 4)
    trainer.rollout = lambda examples: groups
    loss = trainer.training_step(model, {"examples": []})
    expected = formula_loss(reference, ref_model, groups, **settings)
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        # transformers' norms compute in fp32 even in an fp64 model; all else here is fp64.
        scale = theirs.grad.abs().max()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6 * scale, msg=name)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("tokens", ["answer", "template+answer"])
@pytest.mark.parametrize("token_budget", [10**6, 1])
def test_the_gradient_of_a_reward_of_some_tokens(
    make_trainer, tiny, rollouts, tokens, token_budget
):
    model, ref_model = tiny(seed=1).double(), tiny(seed=2).double()
    with torch.no_grad():
        for m in (model, ref_model):
            m.get_output_embeddings().weight.mul_(10)
    settings = {"beta": 0.3, "answer_weight": 0.7, "kl": "reward", "unfinished": "floor"}
    settings["reward_tokens"] = tokens
    groups = rollouts(3, 4)
    losses = [copy.deepcopy(model) for _ in range(2)]
    formula_loss(losses[0], ref_model, groups, **settings).backward()
    formula_loss(losses[1], ref_model, groups, **settings | {"reward_tokens": "all"}).backward()
    trainer = make_trainer(
        model, ref_model, backend="reference", token_budget=token_budget, **settings
    )
    trainer.rollout = lambda examples: groups
    trainer.training_step(model, {"examples": []})
    differs = False
    for (name, ours), theirs, of_all in zip(
        model.named_parameters(), *(other.parameters() for other in losses), strict=True
    ):
        scale = theirs.grad.abs().max()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6 * scale, msg=name)
        differs |= bool((ours.grad - of_all.grad).abs().max() > 0.01 * scale)
    assert differs


@pytest.fixture(scope="module")
def likely(tiny, rollouts):
    """Return a model that has learnt the rollouts' answers so far that e^ℓ is no rounding error."""
    model = tiny(seed=1)
    batch = collate(rollouts(3, 8), model.device, packed=False)
    answer = torch.searchsorted(batch.offsets, torch.arange(batch.num_rows), right=True) % 2 == 0
    scorer = Scorer(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        (-scorer(batch).logp[answer].mean()).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.double()


def whole_logit_rows(model, ref_model, groups, plain, kl):
    """Every row of the groups and of the plain answers, through whole logits one by one."""
    logp, ref_logp, row_kl, own_answer, lengths = [], [], [], [], [0]
    for rollout in (rollout for group in groups for rollout in group):
        z, y, log_p = sequence_logps(model, rollout)
        with torch.no_grad():
            ref_z, ref_y, log_q = sequence_logps(ref_model, rollout)
        logp += [z, y]
        ref_logp += [ref_z, ref_y]
        row_kl += [(log_p.exp() * (log_p - log_q)).sum(-1), torch.full_like(y, torch.nan)]
        lengths += [len(z), len(y)]
        own_answer += [False] * len(z) + [j in rollout.own_rows for j in range(len(y))]
    finished = torch.tensor([r.finished for group in groups for r in group])
    with torch.no_grad():
        plain_logp = [
            model(input_ids=torch.tensor([[*r.prompt_ids, *r.answer_ids]]))
            .logits[0, len(r.prompt_ids) - 1 : -1]
            .log_softmax(-1)
            .gather(1, torch.tensor(r.answer_ids)[:, None])[r.own_rows, 0]
            for r in plain
        ]
    return Rows(
        torch.cat(logp),
        GroupLayout(torch.tensor(lengths).cumsum(0), len(groups[0]), finished, len(groups)),
        None if kl == "exact" else torch.cat(ref_logp),
        torch.cat(row_kl) if kl == "exact" else None,
        torch.tensor(own_answer),
        torch.cat(plain_logp),
        torch.tensor([0, *map(len, plain_logp)]).cumsum(0),
    )


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "latro"])
@pytest.mark.parametrize("setting", [("reward", "floor"), ("exact", "exclude"), ("k3", "floor")])
@pytest.mark.parametrize("token_budget", [10**6, 150, 1])
def test_gradients_equal_autograd_through_every_objective(
    make_trainer, tiny, rollouts, likely, objective, setting, token_budget
):
    model, reference, ref_model = copy.deepcopy(likely), likely, tiny(seed=2).double()
    reference.zero_grad()
    kl, unfinished = setting
    settings = {"beta": 1e-3, "answer_weight": 0.7, "kl": kl, "unfinished": unfinished}
    trainer = make_trainer(
        model,
        ref_model,
        backend="reference",
        token_budget=token_budget,
        num_generations=8,
        objective=objective,
        rlpr_min_std=0.0,
        **settings,
    )
    groups = rollouts(3, 8)
    # Answers that the model has learnt, so that some rationales do harm.
    answers = ["55", "67", "40"]
    plain = [
        trainer.join(group[0].prompt_ids, Sample([]), answer)
        for group, answer in zip(groups, answers, strict=True)
    ]
    trainer.rollout = lambda examples: groups
    trainer.training_step(model, {"examples": [{"answer": answer} for answer in answers]})
    rows = whole_logit_rows(reference, ref_model, groups, plain, kl)
    loss = surrogate(objective, rows, ObjectiveSettings(rlpr_min_std=0.0, **settings))
    loss.backward()
    if objective == "rlpr":
        # Normalised advantages see the plain answers through the clip at 0 alone.
        without_kl = ObjectiveSettings(beta=0.0, kl=kl, rlpr_min_std=0.0)
        assert 0 < (OBJECTIVES["rlpr"](rows, without_kl).reward == 0).sum() < 24
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        # transformers' norms compute in fp32 even in an fp64 model; all else here is fp64.
        scale = theirs.grad.abs().max()
        assert scale > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("token_budget", [10**6, 150])
def test_exact_kl_is_in_the_loss_and_in_the_reward(make_trainer, tiny, rollouts, token_budget):
    """A larger β adds its share of the KL to the loss, and of the score term, and nothing else."""
    groups = rollouts(3, 4)
    model, ref_model = tiny(seed=1), tiny(seed=2)

    def step(beta):
        trainer = make_trainer(
            model, tiny(seed=2), kl="exact", beta=beta, token_budget=token_budget
        )
        trainer.rollout = lambda examples: groups
        loss = trainer.training_step(model, {"examples": []})
        return loss.item(), trainer._sums["kl"] / 12

    def formula(beta):
        settings = {"answer_weight": 1.0, "kl": "exact", "unfinished": "floor"}
        return formula_loss(model, ref_model, groups, beta=beta, **settings).item()

    (low, kl), (high, same_kl) = step(0.5), step(1.5)
    assert kl == same_kl > 0
    assert high - low == pytest.approx(formula(1.5) - formula(0.5), rel=1e-4)
    assert high - low != pytest.approx(kl, rel=1e-2)


def test_an_update_in_the_warm_up_is_that_of_its_answer_weight(make_trainer, tiny, rollouts):
    """At first λ is 0; after 1 of 4 updates it is a quarter of 0.8, and after 9 it is 0.8."""
    groups = rollouts(3, 4)

    def gradient(step, **settings):
        model = tiny(seed=1)
        trainer = make_trainer(model, tiny(seed=2), **settings)
        trainer.rollout = lambda examples: groups
        trainer.state.global_step = step
        trainer.training_step(model, {"examples": []})
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    for step, weight in ((0, 0.0), (1, 0.2), (9, 0.8)):
        warm = gradient(step, answer_weight=0.8, answer_weight_warmup_steps=4)
        assert torch.equal(warm, gradient(step, answer_weight=weight))
