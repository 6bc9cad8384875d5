from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

from latro import LatroConfig, LatroTrainer
from latro.evaluation.accuracy import answer_logp
from latro.model.head_rows import HeadRows, SampledRows
from latro.model.packing import collate
from latro.model.scoring import Scorer
from latro.objectives import OBJECTIVES, ObjectiveSettings, Rows
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import Sample
from latro_kernels import GroupLayout
from tests.latro.objective_cases import surrogate


def sequence_logps(model, rollout):
    """Return log π of each rationale token, of each answer token, and of all possible tokens."""
    logp = model(input_ids=torch.tensor([rollout.input_ids])).logits[0].log_softmax(-1)
    first = len(rollout.prompt_ids) - 1
    z = [logp[first + i, t] for i, t in enumerate(rollout.sampled_ids)]
    y = [logp[first + rollout.answer_start + j, t] for j, t in enumerate(rollout.answer_ids)]
    return torch.stack(z), torch.stack(y), logp[first : first + len(rollout.sampled_ids)]


def rewarded(rollout, tokens):
    """Return the indices of the answer tokens whose log-probs are the reward."""
    own = rollout.own_rows
    return list({"all": range(len(rollout.answer_ids)), "answer": own}.get(tokens, range(own.stop)))


def formula_loss(
    model, ref_model, groups, beta, answer_weight, kl, unfinished, reward_tokens="all"
):
    """Return the method's loss as the paper writes it, by autograd through whole logits.

    −1/(NK) Σ [A_k log π(z_k|x) + λ log π(y|x⊕z_k)], with the KL in the reward, added as k3, or both
    where it is exact.
    """
    loss = 0.0
    count = sum(map(len, groups))
    for group in groups:
        z_logp, y_logp, divergence, earned = [], [], [], []
        for rollout in group:
            z, y, log_p = sequence_logps(model, rollout)
            with torch.no_grad():
                ref, _, log_q = sequence_logps(ref_model, rollout)
            z_logp.append(z.sum())
            y_logp.append(y.sum())
            earned.append(y[rewarded(rollout, reward_tokens)].sum())
            k3 = torch.exp(ref - z) - (ref - z) - 1
            rows = {"reward": z - ref, "k3": k3, "exact": (log_p.exp() * (log_p - log_q)).sum(-1)}
            divergence.append(rows[kl].sum())
        weight = 0 if kl == "k3" else beta
        rewards = [(y - weight * d).item() for y, d in zip(earned, divergence, strict=True)]
        members = list(range(len(group)))
        if unfinished == "floor":
            floor = min(rewards)
            rewards = [r if g.finished else floor for r, g in zip(rewards, group, strict=True)]
        else:
            members = [k for k in members if group[k].finished]
        for k in members:
            others = [rewards[j] for j in members if j != k]
            advantage = rewards[k] - sum(others) / len(others) if others else 0.0
            loss = loss - advantage * z_logp[k] - answer_weight * y_logp[k]
            if kl != "reward":
                loss = loss + beta * divergence[k]
    return loss / count


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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_and_logs(make_trainer, objective):
    trainer = make_trainer(max_steps=2, objective=objective, kl="k3")
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    # K = 4 sequences of each of 2 prompts, plain answers not among them.
    assert all(0 < e["rationale_length"] <= 6 for e in entries)
    assert all(e["reward"] < 0 for e in entries)
    assert entries[0]["kl"] == 0.0
    if objective == "sft":
        assert entries[0]["groups_without_advantage"] == 1.0


@pytest.mark.parametrize("kl", ["reward", "k3", "exact"])
def test_kl_is_exactly_zero_at_the_start(make_trainer, kl):
    trainer = make_trainer(max_steps=2, kl=kl)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert history[0]["kl"] == 0.0
    assert history[1]["kl"] != 0.0


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


def test_exact_kl_wants_a_reference_that_can_be_compared(make_trainer, tiny):
    with pytest.raises(ValueError, match="ref_model: expected the logit scale of the policy"):
        make_trainer(tiny("cohere", logit_scale=0.5), tiny("cohere", logit_scale=0.25), kl="exact")


def test_a_reference_that_is_no_other_model_is_refused(make_trainer, tiny):
    model = tiny()
    with pytest.raises(ValueError, match="ref_model: expected a model with weights of its own"):
        make_trainer(model, model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"ref_model: expected the 395 tokens .* a head of 300"):
        make_trainer(tiny(), tiny(vocab_size=300))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(make_trainer, tiny):
    with pytest.raises(
        ValueError, match=r"processing_class: the tokenizer has 395 tokens but .* has 300"
    ):
        make_trainer(tiny(vocab_size=300))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_accumulated_micro_steps_equal_one_large_batch(
    make_trainer, tiny, rollouts, dataset, batch_size
):
    groups = rollouts(4, 4)

    def trained(batch_size, accumulation):
        model = tiny()
        trainer = make_trainer(
            model,
            # Of four rows a batch of three leaves one of one.
            train_dataset=dataset.select(range(4)),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
        )
        waiting = list(groups)
        trainer.rollout = lambda examples: [waiting.pop(0) for _ in examples]
        trainer.train()
        (loss,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        return model, loss

    (large, loss), (accumulated, same_loss) = trained(4, 1), trained(batch_size, 2)
    assert same_loss == pytest.approx(loss, rel=1e-5)
    for a, b in zip(large.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_micro_steps_of_one_update_draw_different_samples(make_trainer, task):
    row = task.load("train", num_examples=1)
    seen = []
    trainer = make_trainer(
        train_dataset=row.select([0, 0, 0, 0]),
        max_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
    )
    rollout = trainer.rollout
    trainer.rollout = lambda examples: seen.append(rollout(examples)) or seen[-1]
    trainer.train()
    draws = [str([r.sampled_ids for r in groups[0]]) for groups in seen]
    assert len(draws) == 4
    assert len(set(draws)) == 4


@pytest.mark.parametrize("warmup", [0, 3])
def test_resumed_from_a_checkpoint_it_ends_with_the_same_bits(make_trainer, tiny, tmp_path, warmup):
    straight, interrupted = tiny(), tiny()
    settings = {"answer_weight_warmup_steps": warmup}
    make_trainer(straight, save_strategy="steps", save_steps=2, **settings).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    # The Trainer saves in the middle of the schedule, so a fresh one can go on from there.
    trainer = make_trainer(interrupted, output_dir=str(tmp_path / "again"), **settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    for a, b in zip(straight.parameters(), interrupted.parameters(), strict=True):
        assert torch.equal(a, b)
    lines = map(json.loads, (tmp_path / "again" / "metrics.jsonl").read_text().splitlines())
    logged = [line for line in lines if "reward" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    weights = [line["answer_weight"] for line in logged if "answer_weight" in line]
    assert weights == ([0, 1 / 3, 2 / 3, 1.0] if warmup else [])


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


@pytest.mark.parametrize("tokens", ["all", "template+answer", "answer"])
def test_the_likelihood_of_y_and_its_part_on_own_tokens_are_told(make_trainer, tiny, tokens):
    trainer = make_trainer(tiny(), max_steps=1, beta=0, reward_tokens=tokens)
    trainer.train()
    (entry,) = [e for e in trainer.state.log_history if "reward" in e]
    groups = trainer._groups
    with torch.no_grad():
        answers = [(r, sequence_logps(tiny(), r)[1]) for group in groups for r in group]
    whole = torch.stack([logp.sum() for _, logp in answers]).mean()
    own = torch.stack([logp[list(r.own_rows)].sum() for r, logp in answers]).mean()
    assert entry["reward"] == pytest.approx(whole.item(), rel=1e-5)
    assert entry["reward_own_tokens"] == pytest.approx(own.item(), rel=1e-5)
    assert whole < own < 0


def test_every_statistic_is_logged(make_trainer):
    trainer = make_trainer(max_steps=2, logging_steps=2)
    trainer.train()
    (entry,) = [e for e in trainer.state.log_history if "loss" in e]
    assert {
        "reward",
        "kl",
        "entropy",
        "advantage_std",
        "groups_without_advantage",
        "rationale_length",
        "unfinished",
        "rows_per_second",
        "time_rollout",
        "time_score",
        "time_backward",
        "peak_memory_gib",
    } <= set(entry)
    # A fresh model of V tokens is nearly uniform: entropy log V, and no template in six tokens.
    vocab = trainer.model.config.vocab_size
    assert entry["entropy"] == pytest.approx(torch.tensor(vocab).log().item(), rel=0.02)
    assert 0 < entry["rationale_length"] <= 6
    assert 0 < entry["unfinished"] <= 1
    assert entry["reward"] < 0
    assert entry["time_step"] >= entry["time_rollout"] + entry["time_backward"]


def test_an_update_makes_the_answers_likelier(make_trainer):
    trainer = make_trainer(max_steps=20, lr_scheduler_type="constant", beta=0.0)
    assert trainer.ref_scorer is None
    trainer.train()
    rewards = [e["reward"] for e in trainer.state.log_history if "reward" in e]
    # Twenty steps of Adam at 1e-2 on a handful of answers: far above any noise of sampling.
    assert rewards[-1] > rewards[0] + 5


@pytest.mark.parametrize("kl", ["reward", "exact"])
def test_mixed_precision_is_the_trainers(make_trainer, kl):
    trainer = make_trainer(max_steps=1, bf16=True, use_cpu=True, kl=kl)
    dtypes = {HeadRows: [], SampledRows: []}

    def watch(head, args, kwargs):
        dtype = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        dtypes[type(kwargs["head_rows"])].append(dtype)

    head = trainer.model.get_output_embeddings()
    head.register_forward_pre_hook(watch, with_kwargs=True)
    trainer.train()
    assert dtypes[HeadRows] == [torch.bfloat16]
    assert set(dtypes[SampledRows]) == {torch.bfloat16}
    (entry,) = [e for e in trainer.state.log_history if "kl" in e]
    assert entry["kl"] == 0.0
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_a_rollout_casts_fp32_weights_once(make_trainer, tiny):
    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
                self.count += result.shape == head.shape
            return result

    trainer = make_trainer(tiny(tie_word_embeddings=False), bf16=True, use_cpu=True)
    head = trainer.model.get_output_embeddings().weight
    with Casts() as casts:
        (group, _) = trainer.rollout(trainer.train_dataset.select(range(2)))
    assert max(len(rollout.sampled_ids) for rollout in group) > 2
    assert casts.count == 1


@pytest.mark.parametrize("kl", ["reward", "exact"])
def test_a_model_saved_in_bf16_is_trained_in_fp32(make_trainer, tiny, kl):
    model = tiny().bfloat16()
    # Exactly 0.5 in bf16, whose next number is 0.002 away.
    with torch.no_grad():
        model.lm_head.weight.fill_(0.5)
    trainer = make_trainer(model, max_steps=1, bf16=True, use_cpu=True, learning_rate=5e-7, kl=kl)
    trainer.train()
    assert [e["kl"] for e in trainer.state.log_history if "kl" in e] == [0.0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    moved = (model.lm_head.weight - 0.5).abs()
    assert 0 < moved.max() < 1e-6


def test_a_reference_saved_in_bf16_is_the_policy_at_the_start(make_trainer, tiny):
    reference = tiny().bfloat16()
    trainer = make_trainer(tiny().bfloat16(), reference, max_steps=1, bf16=True, use_cpu=True)
    trainer.train()
    assert [e["kl"] for e in trainer.state.log_history if "kl" in e] == [0.0]


def test_a_reference_in_bf16_stays_so_without_mixed_precision(make_trainer, tiny):
    reference = tiny().bfloat16()
    make_trainer(tiny(), reference, use_cpu=True)
    assert all(p.dtype == torch.bfloat16 for p in reference.parameters())


def test_weights_trained_in_bf16_alone_are_warned_of(make_trainer, tiny, caplog):
    model = tiny().bfloat16()
    make_trainer(model, use_cpu=True)
    assert "small updates are lost in rounding" in caplog.text
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_dropout_is_off(make_trainer, tiny):
    model = tiny(attention_dropout=0.5)
    trainer = make_trainer(model, max_steps=1)
    trainer.train()
    assert [e["kl"] for e in trainer.state.log_history if "kl" in e] == [0.0]


def test_weights_that_become_nan_stop_the_run(make_trainer):
    trainer = make_trainer(max_steps=2, max_skipped_updates=0)
    rollout = trainer.rollout

    def spoiled(examples):
        groups = rollout(examples)
        with torch.no_grad():
            trainer.model.model.norm.weight[0] = float("nan")
        return groups

    trainer.rollout = spoiled
    with pytest.raises(FloatingPointError, match=r"update 1 is not finite \(loss, answer_logp"):
        trainer.train()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"prompt": ["a"]}, "columns prompt and answer"),
        ({"prompt": [], "answer": []}, "at least one row"),
        ({"prompt": ["How?", "How?"], "answer": ["5", " "]}, "row 1: expected a non-empty answer"),
        ({"prompt": [""], "answer": ["5"]}, "row 0: the prompt has no tokens"),
        ({"prompt": ["pens " * 2000], "answer": ["5"]}, "but the model has 1024"),
    ],
)
def test_bad_rows_are_refused_before_training(make_trainer, rows, message):
    from datasets import Dataset

    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=Dataset.from_dict(rows))


def test_evaluations_in_training_tell_what_rationales_are_worth(make_trainer):
    trainer = make_trainer(max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    told = [entry for entry in trainer.state.log_history if "eval_rationale_gain" in entry]
    assert [entry["step"] for entry in told] == [1, 2]
    settings = trainer.evaluation_settings
    problems = [(row["prompt"], row["answer"]) for row in trainer.eval_dataset]
    plain = [
        trainer.join(encode_prompt(trainer.processing_class, prompt), Sample([]), answer)
        for prompt, answer in problems
    ]
    without = answer_logp(trainer.scorer, plain, settings.token_budget)
    gain = told[-1]["eval_answer_logp"] - sum(without) / len(without)
    assert told[-1]["eval_rationale_gain"] == pytest.approx(gain, abs=1e-4)


def test_weights_that_zero_3_sharded_as_they_were_loaded_are_refused(make_trainer, tiny):
    model = tiny()
    # What tells such a weight, which is empty.
    model.get_input_embeddings().weight.ds_id = 0
    with pytest.raises(ValueError, match="model: expected whole weights, which the trainer shards"):
        make_trainer(model)


def test_predictions_are_the_records_of_an_evaluation(make_trainer):
    trainer = make_trainer()
    rows = trainer.eval_dataset.select([2, 0])
    predicted = trainer.predict(rows)
    assert predicted.label_ids == rows["answer"]
    assert [record["prompt"] for record in predicted.predictions] == rows["prompt"]
    right = [record["greedy"][0]["correct"] for record in predicted.predictions]
    assert predicted.metrics["test_accuracy_greedy"] == sum(right) / 2
    evaluated = trainer.evaluate(rows, metric_key_prefix="test")
    for metrics in (evaluated, predicted.metrics):
        assert metrics.pop("test_runtime") > 0
    # The epoch is of what is logged.
    assert evaluated == {**predicted.metrics, "epoch": 0}
    assert len(trainer.state.log_history) == 1


def test_evaluation_without_a_dataset(make_trainer):
    trainer = make_trainer()
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="eval_dataset: expected a dataset"):
        trainer.evaluate()


@pytest.mark.parametrize("fault", ["rollout", "gradient"])
def test_an_error_leaves_nothing_to_the_next_training(make_trainer, tiny, tmp_path, fault):
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "max_skipped_updates": 0}
    undisturbed = make_trainer(**settings, report_to="tensorboard")
    undisturbed.train()
    model = tiny()
    trainer = make_trainer(model, **settings, report_to="tensorboard")
    initial = copy.deepcopy(model.state_dict())
    rollout = trainer.rollout
    if fault == "rollout":

        def fail(examples):
            if trainer._micro_step == 1:
                raise ConnectionError
            return rollout(examples)

        trainer.rollout = fail
    else:
        hook = model.lm_head.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises((ConnectionError, FloatingPointError)):
        trainer.train()
    trainer.rollout = rollout
    if fault == "gradient":
        hook.remove()
    model.load_state_dict(initial)
    trainer.optimizer = None
    trainer.train()
    for a, b in zip(model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = ([e for e in t.state.log_history if "loss" in e] for t in (trainer, undisturbed))
    for name in ("loss", "reward", "kl", "rationale_length", "skipped_updates", "trunk_tokens"):
        assert [e[name] for e in ours] == [e[name] for e in theirs], name


class TwoFaced(torch.optim.SGD):
    """An optimiser with other weights in evaluation, as schedule-free ones are."""

    face = "neither"

    def train(self):
        self.face = "train"

    def eval(self):
        self.face = "eval"


def test_an_optimizer_shows_the_weights_of_each_mode(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=2, eval_strategy="steps", eval_steps=1)
    optimizer = trainer.optimizer = TwoFaced(trainer.model.parameters(), lr=1e-3)
    seen = []

    def evaluate_model(*args, **kwargs):
        seen.append(optimizer.face)
        return {}, []

    monkeypatch.setattr("latro.evaluating_trainer.evaluate_model", evaluate_model)
    rollout = trainer.rollout
    trainer.rollout = lambda examples: seen.append(optimizer.face) or rollout(examples)
    trainer.train()
    assert seen == ["train", "eval"] * 2
    optimizer.train()
    trainer.save_model()
    assert optimizer.face == "eval"


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("model", "org/model", "model: expected a PreTrainedModel or PeftModel, got str"),
        ("args", TrainingArguments(), "args: expected a LatroConfig, got TrainingArguments"),
        ("processing_class", None, "processing_class: expected the model's tokenizer, got None"),
        ("task", "gsm8k", "task: expected a task, such as .*, got str"),
        ("train_dataset", [{"prompt": "a", "answer": "5"}], "train_dataset: .* got list"),
        ("eval_dataset", {"prompt": ["a"], "answer": ["5"]}, "eval_dataset: .* got dict"),
    ],
)
def test_arguments_of_another_kind_are_named(tiny, tokenizer, task, argument, value, message):
    given = {
        "model": tiny(),
        "args": LatroConfig(),
        "train_dataset": None,
        "processing_class": tokenizer,
        "task": task,
    }
    with pytest.raises(TypeError, match=message):
        LatroTrainer(**{**given, argument: value})


@pytest.mark.parametrize(
    "prompts", [["How?", None], [1, 2], [[{"role": "user"}]], [[{"role": "user", "content": None}]]]
)
def test_a_prompt_of_another_kind_is_named_with_its_row(make_trainer, prompts):
    rows = Dataset.from_list([{"prompt": prompt, "answer": "5"} for prompt in prompts])
    with pytest.raises(ValueError, match=r"train_dataset: row \d: expected a string, or messages"):
        make_trainer(train_dataset=rows)


def test_a_model_without_weights_to_train_is_refused(make_trainer, tiny):
    with pytest.raises(ValueError, match="model: none of its weights requires a gradient"):
        make_trainer(tiny().requires_grad_(False))


def test_half_precision_that_a_cpu_would_leave_out_is_refused(make_trainer):
    with pytest.raises(ValueError, match="fp16: expected bf16, or neither, on a CPU"):
        make_trainer(fp16=True, use_cpu=True)


def test_rows_that_would_all_be_dropped_are_refused(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=16, dataloader_drop_last=True)
    with pytest.raises(ValueError, match=r"dataloader_drop_last: expected .* 16 rows, got 8 rows"):
        trainer.train()
