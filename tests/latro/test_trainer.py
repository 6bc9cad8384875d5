from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latro.model.head_rows import HeadRows, SampledRows
from latro.objectives import OBJECTIVES
from tests.latro.formula import sequence_logps


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


def test_the_order_of_prompts_is_that_of_the_seed_alone(make_trainer):
    def trained(**settings):
        trainer = make_trainer(max_steps=1, max_completion_length=2, **settings)
        seen = []
        trainer.rollout = lambda examples, do=trainer.rollout: seen.extend(examples) or do(examples)
        torch.manual_seed(7)
        trainer.train()
        return [example["prompt"] for example in seen]

    settled = make_trainer(max_steps=1, max_completion_length=2)
    drawn = next(iter(settled.get_train_dataloader()))["examples"]
    assert trained() == [example["prompt"] for example in drawn]
    assert trained(data_seed=5) == trained(data_seed=5) != trained()


def test_an_evaluation_before_the_training_leaves_the_folder_to_it(make_trainer, tmp_path):
    settings = {"max_steps": 1, "max_completion_length": 2, "overwrite_output_dir": False}
    trainer = make_trainer(**settings)
    before = trainer.evaluate()
    assert list((tmp_path / "run").iterdir()) == []
    trainer.train()
    after = trainer.evaluate()
    assert before.keys() == after.keys()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "eval_accuracy_greedy" in lines[-1]
    files = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert {p.name for p in files} == {"metrics.jsonl", "progress.png", "samples.jsonl"}
    # Another trainer in the folder has no part in that run.
    make_trainer(**settings).evaluate()
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == files
