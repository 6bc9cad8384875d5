from __future__ import annotations

import pytest
import torch

from latro.evaluation.accuracy import answer_logp
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import Sample


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
    for save in (trainer.save_model, trainer.write_model):
        optimizer.train()
        save()
        assert optimizer.face == "eval"
