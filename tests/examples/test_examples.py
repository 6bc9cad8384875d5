"""The examples learn, and compute the same numbers as what they replace."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GenerationMixin,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from examples import hf_trainer, plain_loop
from latro_kernels import linear_logprob

# TRL uses the old name of a setting that transformers has renamed.
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
]

QUIET = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(plain_loop.MODEL)


@pytest.fixture
def trl_trainer() -> ModuleType:
    pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")
    from examples import trl_trainer

    return trl_trainer


def assert_as_exact(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Hold an op to its gate: at most twice the error of the plain way, plus 1e-5."""

    def error(x: Tensor) -> Tensor:
        return (x.double() - truth).abs().max()

    assert error(ours) <= 2 * error(plain) + 1e-5


# plain_loop.py


def test_plain_loop_scores_rationales_and_answers(model: PreTrainedModel) -> None:
    sequences = plain_loop.Sequences(
        prompts=[[5, 6, 7], [8, 9]],
        rationales=[[10, 11], []],
        between=[[], [12, 13, 14]],
        answers=[[15], [16, 17]],
    )
    ids, place, target, offsets = sequences.rows()
    assert target.tolist() == [10, 11, 15, 16, 17]
    assert offsets.tolist() == [0, 2, 3, 3, 5]
    with torch.no_grad():
        hidden = plain_loop.hidden_states(model, ids, place)
        ours = linear_logprob(hidden, model.lm_head.weight, target)

        def expected(model: PreTrainedModel) -> Tensor:
            first = model(torch.tensor([[5, 6, 7, 10, 11, 15]])).logits.log_softmax(-1)[0]
            second = model(torch.tensor([[8, 9, 12, 13, 14, 16, 17]])).logits.log_softmax(-1)[0]
            return torch.stack(
                [first[2, 10], first[3, 11], first[4, 15], second[4, 16], second[5, 17]]
            )

        assert_as_exact(ours, expected(model), expected(copy.deepcopy(model).double()))


def published_gradient(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    dtype: torch.dtype,
    sequences: plain_loop.Sequences,
    finished: list[bool],
    K: int,
    beta: float,
) -> Tensor:
    """Return the gradient of LaTRO's loss from the logits of one sequence at a time."""
    policy, reference = (copy.deepcopy(model).to(dtype) for model in (policy, reference))
    loss = torch.zeros((), dtype=dtype)
    parts = zip(*vars(sequences).values(), strict=True)
    z, y, reward = [], [], []
    for prompt, rationale, between, answer in parts:
        ids = torch.tensor([prompt + rationale + between + answer])
        tokens = ids[0, 1:, None]
        logp = policy(ids).logits[0, :-1].log_softmax(-1).gather(1, tokens).flatten()
        with torch.no_grad():
            ref_logp = reference(ids).logits[0, :-1].log_softmax(-1).gather(1, tokens).flatten()
        rows = slice(len(prompt) - 1, len(prompt) - 1 + len(rationale))
        z.append(logp[rows].sum())
        y.append(logp[len(logp) - len(answer) :].sum())
        reward.append((y[-1] - beta * (z[-1] - ref_logp[rows].sum())).item())
    for first in range(0, len(reward), K):
        group = range(first, first + K)
        lowest = min(reward[k] for k in group)
        given = {k: reward[k] if finished[k] else lowest for k in group}
        for k in group:
            advantage = given[k] - sum(given[j] for j in group if j != k) / (K - 1)
            loss = loss - (advantage * z[k] + y[k]) / len(reward)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def test_plain_loop_follows_the_gradient_of_the_published_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the second update too, where the policy is no longer the reference."""
    policies, samples, gradients = [], [], []

    def sample(policy: PreTrainedModel, *given: Any) -> Any:
        policies.append(copy.deepcopy(policy))
        samples.append(sample_of_example(policy, *given))
        return samples[-1]

    def generate(policy: PreTrainedModel, **options: Any) -> Tensor:
        # So few tokens that some rationales are unfinished.
        return generate_of_model(policy, **(options | {"max_new_tokens": 20}))

    def clip(parameters: Iterable[nn.Parameter], largest: float) -> None:
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))

    sample_of_example, generate_of_model = plain_loop.sample, GenerationMixin.generate
    monkeypatch.setattr(plain_loop, "sample", sample)
    monkeypatch.setattr(GenerationMixin, "generate", generate)
    monkeypatch.setattr(plain_loop, "accuracy", lambda *_: 0.0)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    K, beta = 4, 2.0
    plain_loop.train(steps=2, prompts=6, K=K, beta=beta, seed=0)
    reference = policies[0]
    tokenizer = AutoTokenizer.from_pretrained(plain_loop.MODEL)
    assert len(gradients) == 2
    for policy, (sequences, finished), ours in zip(policies, samples, gradients, strict=True):
        assert 0 < finished.sum() < len(finished)
        for s, is_finished in enumerate(finished.tolist()):
            assert sequences.prompts[s] == sequences.prompts[s - s % K]
            assert (sequences.between[s] == []) == is_finished
            read = sequences.rationales[s] + sequences.between[s]
            assert tokenizer.decode(read).endswith(plain_loop.TEMPLATE)
        plain, truth = (
            published_gradient(policy, reference, dtype, sequences, finished.tolist(), K, beta)
            for dtype in (torch.float32, torch.float64)
        )
        assert_as_exact(ours, plain, truth)


def test_plain_loop_learns_to_reason(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = plain_loop.train(steps=10, prompts=8, K=8, beta=0.05, seed=0)
    assert after > before + 0.1
    assert capsys.readouterr().out.count("MiB of logits not made") == 10


# hf_trainer.py


def test_hf_trainer_learns(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), max_steps=8, learning_rate=1e-4, **QUIET)
    before, after = hf_trainer.train(args)
    assert after < before


STEP = {"max_steps": 1, "learning_rate": 1.0, "lr_scheduler_type": "constant"}
STEP |= {"optim": "sgd", "max_grad_norm": 0.0}


def weights_after(
    trainer: type[Trainer], dtype: torch.dtype, folder: Path, count: int, **options: int
) -> Tensor:
    """Return all weights after one step of SGD, with `count` problems to draw from."""
    tokenizer = AutoTokenizer.from_pretrained(hf_trainer.MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(hf_trainer.MODEL, dtype=dtype)
    trainer(
        model,
        TrainingArguments(str(folder), **STEP, **QUIET, **options),
        train_dataset=hf_trainer.worked_problems(tokenizer, "train", count),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    ).train()
    return flat(model)


def flat(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_hf_trainer_steps_as_trainer_does(tmp_path: Path, model: PreTrainedModel) -> None:
    """The step spans micro-batches with different numbers of labels."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    ours, plain, truth = (
        weights_after(trainer, dtype, tmp_path, 6, **options)
        for trainer, dtype in (
            (hf_trainer.FusedHeadTrainer, torch.float32),
            (Trainer, torch.float32),
            (Trainer, torch.float64),
        )
    )
    assert (truth - flat(model)).abs().max() > 1e-2
    assert_as_exact(ours, plain, truth)


def test_hf_trainer_refuses_a_softcap(tmp_path: Path, model: PreTrainedModel) -> None:
    capped = copy.deepcopy(model)
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        hf_trainer.FusedHeadTrainer(capped, TrainingArguments(str(tmp_path), **QUIET))


def test_a_replaced_head_is_put_back(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    with pytest.raises(ZeroDivisionError), hf_trainer.head_replaced(head, lambda hidden: 1 / 0):
        model(torch.tensor([[1, 2]]))
    assert "forward" not in vars(head)


# trl_trainer.py


def test_trl_trains_through_the_patched_head(
    tmp_path: Path, trl_trainer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import GRPOConfig

    from latro_kernels.integrations.trl import LinearLogprob, unpatch_trl

    calls = []
    apply = LinearLogprob.apply
    monkeypatch.setattr(LinearLogprob, "apply", lambda *rows: (calls.append(1), apply(*rows))[1])
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "logging_steps": 1}
    args = GRPOConfig(str(tmp_path), max_steps=2, bf16=False, **options, **QUIET)
    try:
        rewards = trl_trainer.train(args)
    finally:
        unpatch_trl()
    assert len(rewards) == 2
    assert calls


# trl_likelihood.py


@pytest.mark.parametrize("method", ["latro", "verifree", "rlpr"])
def test_trl_trains_on_likelihoods(tmp_path: Path, method: str) -> None:
    pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")
    from examples import trl_likelihood

    _, config, settings = trl_likelihood.METHODS[method]
    options = {"per_device_train_batch_size": 8, "num_generations": 4, "logging_steps": 1}
    args = config(str(tmp_path), max_steps=2, bf16=False, **options, **settings, **QUIET)
    rewards = trl_likelihood.train(method, args)
    assert len(rewards) == 2
    # Log-likelihoods, likelihoods, and what they gain.
    assert all(reward < 0 if method == "latro" else 0 < reward < 1 for reward in rewards)


def test_help_says_how_to_name_a_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")
    from examples import trl_likelihood

    monkeypatch.setattr("sys.argv", ["trl_likelihood.py", "--help"])
    trl_likelihood.main()
    assert "trl_likelihood.py verifree" in capsys.readouterr().out


# trl_shared_prefix.py


def test_trl_shares_prefixes(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs trl, of pip install '.[test]'")
    from trl import RLOOConfig, RLOOTrainer

    from examples import trl_shared_prefix

    options = {"per_device_train_batch_size": 8, "num_generations": 4, "optim": "sgd"}
    options |= {"max_completion_length": 48, "learning_rate": 0.1, "beta": 0.02}
    args = RLOOConfig(str(tmp_path), max_steps=1, bf16=False, **options, **QUIET)
    before = flat(AutoModelForCausalLM.from_pretrained(trl_shared_prefix.MODEL))
    ours, theirs = (
        flat(trl_shared_prefix.train(kind, args).model)
        for kind in (trl_shared_prefix.PackedRLOO, RLOOTrainer)
    )
    assert (theirs - before).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs)
