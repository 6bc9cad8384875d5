"""Sampling, training and evaluation with a real vLLM server.

These tests run if the environment variable LATRO_VLLM_PYTHON names the Python of an environment
with vLLM, which need not be this one.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import GenerationConfig, PreTrainedTokenizerBase

from latro import LatroConfig, LatroTrainer
from latro.engines.vllm import VllmEngine
from latro.evaluation import EvaluationSettings, evaluate_model
from latro.model.scoring import Scorer
from latro.rollout.sequences import Sample, decode
from scripts.make_tiny_model import make_model
from tests.latro.real_vllm import serve
from tests.latro.vllm_errors import errors

pytestmark = pytest.mark.long
# Attention on a CPU needs a head size of at least 32.
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


@pytest.fixture(scope="module")
def vllm_url(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: Any) -> Iterator[str]:
    """Serve a tiny Llama whose own generation config would truncate the distribution."""
    python = os.environ.get("LATRO_VLLM_PYTHON")
    if not python:
        pytest.skip("needs vLLM: LATRO_VLLM_PYTHON names no Python that has it")
    folder = tmp_path_factory.mktemp("vllm")
    model = make_model("llama", tokenizer, **SIZES)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, temperature=0.1, repetition_penalty=1.5
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with serve(python, folder / "model", folder / "log") as url:
        yield url


def draw(engine: VllmEngine, prompts: list[list[int]], num_samples: int) -> list[list[Sample]]:
    return engine.generate(
        prompts,
        num_samples=num_samples,
        max_new_tokens=60,
        temperature=0.7,
        seeds=list(range(len(prompts))),
        template=".",
    )


def test_vllm_samples_the_whole_distribution_of_the_weights_it_got(
    vllm_url: str, tiny: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    # Longer than a block of 128 tokens in the prefix cache, which must not be reused.
    prompts = [tokenizer.encode(f"Tom has {n} pens. " * 30) for n in range(4)]
    assert min(map(len, prompts)) > 128
    served, other = tiny(**SIZES), tiny(seed=1, **SIZES)
    engine = VllmEngine(vllm_url, tokenizer, eos_token_ids=[0], weights_dir=tmp_path)
    for step, (now, not_now) in enumerate([(served, other), (other, served)]):
        engine.update_weights(now, step)
        groups = draw(engine, prompts, 8)
        error, allowed = errors(now, prompts, groups, temperature=0.7)
        assert error <= allowed
        assert errors(not_now, prompts, groups, temperature=0.7)[0] > 100 * allowed


def test_vllm_ends_a_sample_where_its_text_shows_the_template(
    vllm_url: str, tiny: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    prompts = [tokenizer.encode(f"Tom has {n} pens.") for n in range(8)]
    ends = [0, *tokenizer.encode("012345")]
    engine = VllmEngine(vllm_url, tokenizer, eos_token_ids=ends, weights_dir=tmp_path)
    engine.update_weights(tiny(**SIZES), 0)
    groups = draw(engine, prompts, 16)
    endings = {"template": 0, "eos": 0, "length": 0}
    for sample in (sample for group in groups for sample in group):
        text, before = decode(tokenizer, sample.ids), decode(tokenizer, sample.ids[:-1])
        assert "." not in before
        assert not set(ends) & set(sample.ids[:-1])
        if "." in text:
            endings["template"] += 1
        elif sample.ids[-1] in ends:
            endings["eos"] += 1
        else:
            assert len(sample.ids) == 60
            endings["length"] += 1
    assert all(endings.values()), endings


def test_an_evaluation_is_the_same_with_both_engines(
    vllm_url: str, tiny: Any, tokenizer: Any, task: Any, dataset: Any, tmp_path: Path
) -> None:
    model = tiny(seed=2, **SIZES)
    engine = VllmEngine(vllm_url, tokenizer, eos_token_ids=[0], weights_dir=tmp_path)
    engine.update_weights(model, 0)
    settings = EvaluationSettings(num_samples=0, max_completion_length=20)
    here, served = (
        evaluate_model(Scorer(model), tokenizer, task, dataset, settings, engine=taken)
        for taken in (None, engine)
    )
    assert served[0] == pytest.approx(here[0], rel=1e-4)
    texts = [[record["greedy"][0]["text"] for record in records] for _, records in (here, served)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "LoRA"])
def test_training_samples_from_the_updated_policy(
    adapter: bool, vllm_url: str, tiny: Any, tokenizer: Any, task: Any, dataset: Any, tmp_path: Path
) -> None:
    settings = LatroConfig(
        output_dir=str(tmp_path / "run"),
        rollout_engine="vllm",
        vllm_url=vllm_url,
        importance_cap=2.0,
        num_generations=4,
        max_completion_length=20,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_steps=2,
        disable_tqdm=True,
        save_strategy="no",
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if adapter else None
    trainer = LatroTrainer(tiny(**SIZES), settings, dataset, tokenizer, task, peft_config=lora)
    drawn = []
    engine_generate = trainer.engine.generate

    def generate(prompts: list[list[int]], **options: Any) -> list[list[Sample]]:
        groups = engine_generate(prompts, **options)
        drawn.append((copy.deepcopy(trainer.model), prompts, groups))
        return groups

    trainer.engine.generate = generate
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "importance_ratio" in entry]
    assert len(drawn) == len(history) == 2
    for (model, prompts, groups), logged in zip(drawn, history, strict=True):
        error, allowed = errors(model, prompts, groups, temperature=1.0)
        assert error <= allowed
        # Engine and trainer are each within the allowed error of the truth.
        for name in ("importance_ratio", "importance_ratio_max"):
            assert abs(math.log(logged[name])) <= 2 * allowed
    initial, (_, prompts, groups) = drawn[0][0], drawn[1]
    assert errors(initial, prompts, groups, temperature=1.0)[0] > 100 * allowed


def test_rollouts_ahead_are_of_the_policy_before_the_update(
    vllm_url: str, tiny: Any, tokenizer: Any, task: Any, dataset: Any, tmp_path: Path
) -> None:
    settings = LatroConfig(
        output_dir=str(tmp_path / "run"),
        rollout_engine="vllm",
        vllm_url=vllm_url,
        async_rollouts=1,
        importance_cap=2.0,
        num_generations=4,
        max_completion_length=20,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_steps=3,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = LatroTrainer(tiny(**SIZES), settings, dataset, tokenizer, task)
    trainer.train()
    ratios = [e["importance_ratio_max"] for e in trainer.state.log_history if "loss" in e]
    assert len(ratios) == 3
    # The first update samples with its own weights, and the others with those before.
    assert ratios[0] == pytest.approx(1, rel=1e-4)
    assert min(ratios[1:]) > 1.01
