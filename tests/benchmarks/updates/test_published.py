"""The published update computes the same as ours, so that their times are comparable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.updates.contenders import Ours
from benchmarks.updates.problem import QUICK, StepProblem
from benchmarks.updates.published import Published
from latro.rollout.sequences import Sample

TEMPLATE_IDS = [2, 3, 4]  # "The answer is" of the benchmark's tokenizer


@pytest.fixture
def problem() -> StepProblem:
    return StepProblem(QUICK, torch.device("cpu"))


def every_ending(problem: StepProblem) -> list:
    """Return groups of three prompt lengths that end by end token, by template, and at once."""
    groups = []
    for row, short in zip(problem.rows(3), (0, 2, 5), strict=True):
        prompt = problem.tokenizer.encode(row["prompt"])[short:]
        samples = [
            [7, 8, 9, problem.tokenizer.eos_token_id],
            [11, *TEMPLATE_IDS],
            [problem.tokenizer.eos_token_id],
            [*range(20, 28), problem.tokenizer.eos_token_id],
        ]
        groups.append([problem.join(prompt, Sample(sample), row["answer"]) for sample in samples])
    return groups


def published(problem: StepProblem, folder: Path, dtype=torch.float32, **settings) -> Published:
    made = Published(problem, folder, **{"one_batch": False} | settings)
    for model in (made.model, made.ref_model):
        model.to(dtype)
    return made


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("answer_weight", [1.0, 0.3])
@pytest.mark.parametrize(("micro_batch", "scoring_batch"), [(4, 48), (5, 7), (100, 1)])
def test_gradient_and_loss_are_those_of_latro_trainer(
    problem, tmp_path, answer_weight, micro_batch, scoring_batch
):
    groups = every_ending(problem)
    formula = {"beta": 0.5, "answer_weight": answer_weight}
    batches = {"micro_batch": micro_batch, "scoring_batch": scoring_batch}
    truth = published(problem, tmp_path, torch.float64, **formula)
    plain = published(problem, tmp_path, **formula, **batches)
    ours = Ours(problem, tmp_path, **formula)
    exact_loss, loss, our_loss = (one.update(groups) for one in (truth, plain, ours))

    exact, theirs, mine = (gradients(one.model) for one in (truth, plain, ours))
    for name, gradient in exact.items():
        scale = gradient.abs().max()
        unfused, error = ((g[name] - gradient).abs().max() / scale for g in (theirs, mine))
        assert error <= 2 * unfused + 1e-5, name
    assert abs(our_loss - exact_loss) <= 2 * abs(loss - exact_loss) + 1e-5 * abs(exact_loss)


def test_order_of_micro_batches_changes_nothing_but_rounding(problem, tmp_path):
    groups = every_ending(problem)
    updates = [published(problem, tmp_path, torch.float64, seed=seed) for seed in (0, 1)]
    for update in updates:
        update.update(groups)
    first, second = (gradients(update.model) for update in updates)
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_samples_go_to_the_limit_in_every_copy_and_pass_the_end_token(problem, tmp_path):
    update = published(problem, tmp_path)
    end = problem.tokenizer.eos_token_id

    def prefer_the_end(module, args, output):
        output.logits[..., end] += 100

    update.model.register_forward_hook(prefer_the_end)
    assert update.sample([[5, 6, 7], [8]]) == [[end] * QUICK.rationale[1]] * 8


def test_every_forward_is_padded_and_goes_through_the_head_whole(problem, tmp_path):
    groups = every_ending(problem)
    update = published(problem, tmp_path, micro_batch=5)
    rows = []
    for model in (update.model, update.ref_model):
        model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:2]))
    update.update(groups)
    z = max(len(group[0].prompt_ids) for group in groups) + QUICK.rationale[1]
    y = z + max(len(rollout.answer_ids) for group in groups for rollout in group)
    assert rows == [(12, z), (12, z), (12, y), (5, z), (5, y), (5, z), (5, y), (2, z), (2, y)]


def test_bad_groups_are_named(problem, tmp_path):
    groups = every_ending(problem)
    with pytest.raises(ValueError, match=r"groups: expected 4 sequences each, got \[3\]"):
        published(problem, tmp_path).update([groups[0][:3]])
    short = StepProblem(replace(QUICK, rationale=(3, 8)), problem.device)
    with pytest.raises(ValueError, match="rationales of up to 8 tokens, got 9"):
        published(short, tmp_path).update(groups)
