"""The trainer and its engine: when the engine gets weights, and how its log-probs are used."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from latro.config.engine import EngineArguments
from latro.engines.make import make_engine
from latro.engines.vllm import VllmEngine
from latro.evaluation import EvaluationSettings, evaluate_model
from latro.evaluation.likelihood import ProbeSettings, probe_model
from latro.model.scoring import Scorer
from latro.rollout.answer_template import stop_strings
from latro.rollout.sequences import Rollout, Sample
from tests.latro.fake_vllm import FakeVllm
from tests.latro.other_models import other_model


class Recorder:
    """An engine that returns fixed samples and records its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.weights: list[torch.Tensor] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], *, num_samples: int, **options: Any
    ) -> list[list[Sample]]:
        self.calls.append("generate")
        return [[Sample([10 + k, 20], [-3.0, -4.0]) for k in range(num_samples)] for _ in prompts]

    def update_weights(self, model: PreTrainedModel, step: int, weights: Any = None) -> None:
        self.calls.append(f"weights of step {step}")
        self.weights.append(model.get_input_embeddings().weight.detach().clone())


def test_engine_has_the_policy_of_each_update_before_it_samples(make_trainer: Any) -> None:
    trainer = make_trainer(beta=0.0, max_steps=3, gradient_accumulation_steps=2)
    trainer.engine = engine = Recorder()
    trainer.train()
    assert engine.calls == [
        call for step in range(3) for call in (f"weights of step {step}", "generate", "generate")
    ]
    for before, after in zip(engine.weights, engine.weights[1:], strict=False):
        assert not torch.equal(before, after)


def test_engine_gets_the_weights_of_a_checkpoint(make_trainer: Any) -> None:
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.engine = Recorder()
    trainer.train()
    resumed = make_trainer(max_steps=2)
    resumed.engine = engine = Recorder()
    # This loads weights into it, which the checkpoint's then replace.
    resumed.rollout([resumed.train_dataset[0]])
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-1"))
    assert engine.calls == ["weights of step 0", "generate", "weights of step 1", "generate"]
    assert torch.equal(engine.weights[1], trainer.engine.weights[1])


def row_logps(model: PreTrainedModel, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log π of each rationale token and of each answer token."""
    logp = model(input_ids=torch.tensor([rollout.input_ids])).logits[0].log_softmax(-1)
    first = len(rollout.prompt_ids) - 1
    z = [logp[first + i, t] for i, t in enumerate(rollout.sampled_ids)]
    y = [logp[first + rollout.answer_start + j, t] for j, t in enumerate(rollout.answer_ids)]
    return torch.stack(z), torch.stack(y)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("token_budget", [10**6, 150, 1])
def test_gradients_are_the_formula_with_truncated_ratios(
    make_trainer: Any, tiny: Any, rollouts: Any, cap: float | None, token_budget: int
) -> None:
    model = tiny(seed=1).double()
    with torch.no_grad():
        # A sharper distribution than that of fresh weights makes rewards differ.
        model.get_output_embeddings().weight.mul_(10)
    numbers = torch.Generator().manual_seed(0)
    groups = []
    for group in rollouts(3, 4):
        drawn = [row_logps(model, rollout)[0].detach() for rollout in group]
        drawn = [z + torch.randn(len(z), generator=numbers) for z in drawn]
        groups.append(
            [replace(r, sampled_logp=z.tolist()) for r, z in zip(group, drawn, strict=True)]
        )
    reference = copy.deepcopy(model)
    trainer = make_trainer(
        model,
        beta=0.0,
        backend="reference",
        token_budget=token_budget,
        answer_weight=0.7,
    )
    trainer.update.coefficients.importance_cap = cap
    trainer.rollout = lambda examples: groups
    trainer.training_step(model, {"examples": []})

    loss, ratios = torch.zeros((), dtype=torch.float64), []
    for group in groups:
        logps = [row_logps(reference, rollout) for rollout in group]
        rewards = [y.sum().item() for _, y in logps]
        floor = min(rewards)
        rewards = [r if g.finished else floor for r, g in zip(rewards, group, strict=True)]
        for reward, (z, y), rollout in zip(rewards, logps, group, strict=True):
            # In fp32, like the engine's log-probs.
            ratio = (z.detach() - torch.tensor(rollout.sampled_logp)).exp()
            ratios += ratio.tolist()
            weight = torch.ones_like(ratio) if cap is None else ratio.clamp(max=cap)
            advantage = reward - (sum(rewards) - reward) / 3
            loss = loss - (advantage * (weight * z).sum() + 0.7 * y.sum()) / 12
    loss.backward()
    assert any(ratio > 1.5 for ratio in ratios)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        # transformers' norms compute in fp32 even in an fp64 model; all else here is fp64.
        scale = theirs.grad.abs().max()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6 * scale, msg=name)
    trainer.log({"loss": 0.0})
    metrics = trainer.state.log_history[-1]
    assert metrics["importance_ratio"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-6)
    assert metrics["importance_ratio_max"] == pytest.approx(max(ratios), rel=1e-6)


def test_evaluation_samples_with_the_engine_and_the_weights_of_now(make_trainer: Any) -> None:
    trainer = make_trainer(max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.engine = engine = Recorder()
    trainer.train()
    evaluation = ["generate", "generate"]  # greedy, and sampled
    assert engine.calls == [
        *("weights of step 0", "generate", "weights of step 1", *evaluation, "generate"),
        *("weights of step 2", *evaluation),
    ]


def test_weights_that_are_only_evaluated_are_not_trained_on(make_trainer: Any) -> None:
    """A schedule-free optimiser has other weights in the model in an evaluation."""
    trainer = make_trainer(max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.engine = engine = Recorder()
    trainer.create_optimizer()
    weight = trainer.model.get_input_embeddings().weight
    modes = ["train"]

    def switch(mode: str) -> None:
        with torch.no_grad():
            weight.add_((modes[-1] != mode) * (1.0 if mode == "eval" else -1.0))
        modes.append(mode)

    trainer.optimizer.train = lambda: switch("train")
    trainer.optimizer.eval = lambda: switch("eval")
    trainer.train()
    assert [call for call in engine.calls if call != "generate"] == [
        f"weights of step {step}" for step in (0, 1, 1, 2)
    ]
    shift = (engine.weights[1] - engine.weights[2]).mean().item()
    assert shift == pytest.approx(1.0, abs=1e-3)


def test_transformers_engine_draws_from_the_policy(make_trainer: Any) -> None:
    trainer = make_trainer(max_steps=1)
    trainer.train()
    [logged] = [entry for entry in trainer.state.log_history if "importance_ratio" in entry]
    assert logged["importance_ratio"] == pytest.approx(1, abs=1e-4)
    assert logged["importance_ratio_max"] == pytest.approx(1, abs=1e-4)


def test_a_model_that_transformers_samples_from_logs_a_ratio_too(
    make_trainer: Any, tokenizer: Any
) -> None:
    trainer = make_trainer(other_model("lfm2", tokenizer), max_steps=1)
    trainer.train()
    [logged] = [entry for entry in trainer.state.log_history if "importance_ratio" in entry]
    assert logged["importance_ratio"] == pytest.approx(1, abs=1e-3)
    assert logged["importance_ratio_max"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("objective", ["verifree", "jepo", "rlpr", "sft"])
@pytest.mark.parametrize("token_budget", [10**6, 1])
def test_every_objective_has_a_ratio(make_trainer: Any, objective: str, token_budget: int) -> None:
    """RLPR's plain answers are among the rows, though they were not sampled."""
    trainer = make_trainer(max_steps=1, objective=objective, token_budget=token_budget)
    trainer.engine = Recorder()
    trainer.train()
    [logged] = [entry for entry in trainer.state.log_history if "importance_ratio" in entry]
    assert 0 < logged["importance_ratio"] < logged["importance_ratio_max"]


def test_vllm_settings_reach_the_engine(make_trainer: Any, fake: FakeVllm, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=2, rollout_engine="vllm", vllm_url=fake.url)
    assert trainer.engine.url == fake.url
    assert trainer.engine.weights_dir == tmp_path / "run" / "vllm_weights"
    trainer.train()
    assert len(fake.loaded) == 2
    bodies = fake.of("/v1/completions")
    assert {body["max_tokens"] for body in bodies} == {6}
    assert {tuple(body["stop"]) for body in bodies} == {tuple(stop_strings("The answer is"))}
    assert len({body["seed"] for body in bodies}) == len(bodies) == 4
    elsewhere = make_trainer(
        rollout_engine="vllm", vllm_url=fake.url, vllm_weights_dir=str(tmp_path / "shm")
    )
    assert elsewhere.engine.weights_dir == tmp_path / "shm"


def test_a_server_too_short_for_one_row_is_found_before_the_run(
    make_trainer: Any, fake: FakeVllm, task: Any, tokenizer: Any
) -> None:
    short = task.load("train")
    long = {"prompt": "Tom has 9 pens. " * 20, "answer": "9"}
    rows = Dataset.from_list([*short, long])
    tokens = len(tokenizer.encode(long["prompt"])) + 6
    assert tokens > 64
    served = {"rollout_engine": "vllm", "vllm_url": fake.url}
    with pytest.raises(ValueError, match=rf"takes 64 tokens .* has {tokens}; serve with"):
        make_trainer(train_dataset=rows, **served)
    # An evaluation lets a completion go on behind a rationale of full length.
    make_trainer(**served, max_completion_length=40)
    with pytest.raises(ValueError, match=r"takes 64 tokens .*; serve with --max-model-len"):
        make_trainer(**served, max_completion_length=40, eval_strategy="steps", eval_steps=2)


@pytest.mark.parametrize("command", [evaluate_model, probe_model])
def test_a_server_too_short_for_the_last_problem_is_found_before_the_first(
    fake: FakeVllm, tiny: Any, tokenizer: Any, task: Any, tmp_path: Path, command: Any
) -> None:
    rows = [*task.load("train"), {"prompt": "Tom has 9 pens. " * 20, "answer": "9"}]
    kind = EvaluationSettings if command is evaluate_model else ProbeSettings
    engine = VllmEngine(fake.url, tokenizer, eos_token_ids=[0], weights_dir=tmp_path)
    settings = kind(num_samples=0, max_completion_length=6, batch_size=1)
    with pytest.raises(ValueError, match=r"takes 64 tokens .*; serve with --max-model-len"):
        command(Scorer(tiny()), tokenizer, task, Dataset.from_list(rows), settings, engine=engine)
    assert not fake.of("/v1/completions")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout_engine": "sglang"}, "rollout_engine: expected one of transformers, vllm"),
        (
            {"rollout_engine": "vllm", "importance_cap": 0.0},
            "importance_cap: expected more than 0, got 0.0",
        ),
        (
            {"rollout_engine": "vllm", "temperature": 0.005},
            "temperature: expected from 0.01 to 2 with .*, which .* samples at 0.01 .*; got 0.005",
        ),
        (
            {"rollout_engine": "vllm", "temperature": 2.5},
            "temperature: expected from 0.01 to 2 with rollout_engine='vllm', .*; got 2.5",
        ),
        ({"vllm_mode": "local"}, "vllm_mode: expected one of server, colocate, got 'local'"),
        ({"vllm_sync": "tcp"}, "vllm_sync: expected one of files, nccl, got 'tcp'"),
        (
            {"vllm_mode": "colocate"},
            "vllm_mode: expected rollout_engine='vllm' with colocate, got 'transformers'",
        ),
        (
            {"vllm_sync": "nccl"},
            "vllm_sync: expected rollout_engine='vllm' with nccl, got 'transformers'",
        ),
        (
            {"vllm_gpu_memory_utilization": 1.5},
            "vllm_gpu_memory_utilization: expected at most 1, got 1.5",
        ),
        ({"vllm_gpu_memory_utilization": 0.0}, "vllm_gpu_memory_utilization: expected more than"),
        ({"vllm_max_model_length": 0}, "vllm_max_model_length: expected at least 1, got 0"),
        (
            {"rollout_engine": "vllm", "vllm_max_model_length": 9},
            "vllm_max_model_length: expected vllm_mode='colocate' with it, got 'server' and 9",
        ),
        (
            {"rollout_engine": "vllm", "vllm_mode": "colocate", "vllm_sync": "nccl"},
            "vllm_sync: expected vllm_mode='server' with it, got 'colocate' and 'nccl'",
        ),
        (
            {"rollout_engine": "vllm", "vllm_mode": "colocate", "vllm_url": "http://h:1"},
            "vllm_url: expected vllm_mode='server' with it, got 'colocate' and 'http://h:1'",
        ),
        (
            {"rollout_engine": "vllm", "vllm_sync": "nccl", "vllm_weights_dir": "w"},
            "vllm_weights_dir: expected vllm_sync='files' with it, .*; got 'w'",
        ),
        ({"importance_cap": 2.0}, "importance_cap: expected rollout_engine='vllm'"),
        ({"rollout_dtype": "fp8"}, "rollout_dtype: expected one of auto, float32, bfloat16"),
    ],
)
def test_bad_settings(make_trainer: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)


def test_an_adapter_on_weights_in_shards_is_not_for_vllm(
    tiny: Any, tokenizer: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules="all-linear"))
    args = EngineArguments(rollout_engine="vllm")
    with pytest.raises(ValueError, match="expected transformers where a model with an adapter is"):
        make_engine(args, model, tokenizer, tmp_path, sharded=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_mode": "colocate"}, "vllm_mode: colocate needs the package vllm in the trainer's"),
        ({"vllm_sync": "nccl"}, "vllm_sync: nccl needs the package vllm in the trainer's"),
    ],
)
def test_what_needs_vllm_in_the_process_says_so(
    make_trainer: Any, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        make_trainer(rollout_engine="vllm", **settings)


def test_nccl_needs_a_gpu(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="vllm_sync: expected files on a machine without a CUDA"):
        make_trainer(rollout_engine="vllm", vllm_sync="nccl")
