"""In training and in scoring, an answer ends as an assistant's turn does."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from latro import LatroConfig, LatroTrainer, SftConfig, SftTrainer
from latro.evaluation.accuracy import EvaluationSettings, evaluate_model
from latro.evaluation.likelihood import ProbeSettings, probe_model
from latro.model.scoring import Scorer
from tests.latro import frames

FRAMES = {
    "phi": (frames.PHI, ["<|user|>", "<|assistant|>", "<|end|>"], "<|end|>"),
    "llama": (
        frames.LLAMA_3,
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
    ),
    "plain": (frames.PLAIN, [], "<|endoftext|>"),
}


@pytest.fixture(params=FRAMES)
def chat(request, tokenizer):
    """Return a tokenizer and the token that ends its turns."""
    template, tokens, end = FRAMES[request.param]
    made = frames.framed(tokenizer, template, *tokens)
    return made, made.convert_tokens_to_ids(end)


def settings(tmp_path) -> dict[str, Any]:
    return {"output_dir": str(tmp_path / "run"), "max_completion_length": 6, "max_steps": 1}


def test_in_latro(chat, tiny, task, dataset, tmp_path):
    tokenizer, end = chat
    config = LatroConfig(**settings(tmp_path), num_generations=4, objective="rlpr")
    trainer = LatroTrainer(tiny(vocab_size=len(tokenizer)), config, dataset, tokenizer, task)
    examples = dataset.to_list()[:3]
    groups = trainer._rollouts(examples)
    rollouts = [rollout for group in groups for rollout in group]
    assert len(rollouts) == 3 * 5
    for rollout in rollouts:
        assert rollout.answer_ids[-1] == end
        assert not {end, tokenizer.eos_token_id} & set(rollout.rationale_ids)


@pytest.mark.parametrize("target", ["rationale", "answer"])
def test_in_sft(chat, tiny, task, dataset, tmp_path, target):
    tokenizer, end = chat
    worked = dataset.add_column("rationale", ["So it is."] * len(dataset))
    config = SftConfig(**settings(tmp_path), target=target)
    trainer = SftTrainer(tiny(vocab_size=len(tokenizer)), config, worked, tokenizer, task)
    for row in worked:
        ids = trainer._target(row).answer_ids
        assert ids[-1] == end
        assert ids.count(end) == 1


@pytest.mark.parametrize("configured", [[], [5], [5, 6]])
def test_in_what_other_programs_sample_from_the_saved_model(
    chat, tiny, task, dataset, tmp_path, configured
):
    tokenizer, end = chat
    model = tiny(vocab_size=len(tokenizer))
    # A config may have none, one by itself, or several.
    model.generation_config.eos_token_id = (
        [None, *configured][-1] if len(configured) < 2 else configured
    )
    config = LatroConfig(**settings(tmp_path), num_generations=2, save_strategy="no")
    trainer = LatroTrainer(model, config, dataset, tokenizer, task)
    ends = {end, tokenizer.eos_token_id, *configured}
    trainer.train()
    trainer.save_model()
    saved = GenerationConfig.from_pretrained(config.output_dir).eos_token_id
    assert set(saved if isinstance(saved, list) else [saved]) == ends == trainer.join.eos_token_ids


def test_in_probe_and_evaluation(chat, tiny, task, dataset, monkeypatch):
    tokenizer, end = chat
    scored = []

    def answer_logp(scorer, rollouts, token_budget):
        scored.extend(rollouts)
        return [-1.0] * len(rollouts)

    monkeypatch.setattr("latro.evaluation.likelihood.answer_logp", answer_logp)
    monkeypatch.setattr("latro.evaluation.accuracy.answer_logp", answer_logp)
    worked = dataset.add_column("rationale", ["So it is."] * len(dataset))
    scorer = Scorer(tiny(vocab_size=len(tokenizer)))
    shape = {"num_samples": 2, "max_completion_length": 6}
    probe_model(scorer, tokenizer, task, worked, ProbeSettings(**shape))
    assert len(scored) == len(worked) * (2 + 1 + 2)
    evaluate_model(scorer, tokenizer, task, dataset, EvaluationSettings(**shape))
    assert len(scored) == len(worked) * (2 + 1 + 2 + 1 + 2)
    assert all(rollout.answer_ids[-1] == end for rollout in scored)
