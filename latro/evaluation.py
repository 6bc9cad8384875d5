"""Accuracy of a model on a task: greedy, sampled, by majority, with the answer's likelihood."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from latro.generation import TransformersEngine, seed_of
from latro.layout import plan
from latro.prompts import check_dataset, encode_prompt
from latro.rollout import AnswerJoin, Rollout, Sample, decode, eos_token_ids
from latro.scoring import Scorer
from latro.tasks import Task

# Room for the answer after a rationale of full length: no answer of the tasks here is longer.
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class EvaluationSettings:
    """How to evaluate.

    Attributes:
        num_samples: completions a problem, sampled at `temperature`; 0: greedy only.
        majority: the k of maj@k, each at most `num_samples`.
        max_completion_length: tokens of a rationale; the answer may take 32 more.
        batch_size: problems a batch.
        temperature: of sampling.
        seed: decides the samples.
        token_budget: padded tokens of one scoring batch.
        progress: show a progress bar.
    """

    num_samples: int = 1
    majority: tuple[int, ...] = ()
    max_completion_length: int = 500
    batch_size: int = 64
    temperature: float = 1.0
    seed: int = 0
    token_budget: int = 16384
    progress: bool = False

    def __post_init__(self) -> None:
        if self.num_samples < 0:
            raise ValueError(f"num_samples: expected 0 or more, got {self.num_samples}")
        for k in self.majority:
            if not 1 <= k <= self.num_samples:
                raise ValueError(
                    f"majority: expected k from 1 to num_samples = {self.num_samples}, got {k}"
                )


@dataclass(frozen=True)
class Completion:
    """One graded completion."""

    text: str
    rollout: Rollout
    predicted: str | None
    correct: bool


@dataclass
class Problem:
    """One row of the dataset with what was made of it."""

    index: int
    row: Mapping[str, Any]
    graded: dict[str, list[Completion]] = field(default_factory=dict)
    """The completions of each mode: "greedy", and "sampled" where there are samples."""
    answer_logps: list[float] = field(default_factory=list)
    """log π(y|x⊕z), in nats, of the last mode's completions."""


def evaluate_model(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    dataset: Dataset,
    settings: EvaluationSettings,
    *,
    accelerator: Accelerator | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Generate, grade and score.

    Several processes share the problems, and each returns the results of all.

    Args:
        scorer: of the model; used for the mean log π(y|x⊕z).
        tokenizer: the model's.
        task: grades the completions.
        dataset: rows of the task; at least one.
        settings: how many samples, how long, and so on.
        accelerator: knows the processes; None: there is one.

    Raises:
        ValueError: the dataset lacks a column or a row of it does not fit the model.

    Returns:
        Metrics, and one record a problem (prompt, answer, the completions and their grades).
        Metrics: `accuracy_greedy`; with samples `accuracy_sampled` (mean over all) and its standard
        error over problems `accuracy_sampled_stderr`, and `maj@k`; `rationale_length` (tokens),
        `unfinished` (share that states no answer and does not end) and `answer_logp` (mean
        log π(y|x⊕z), nats), each over the samples, or over the greedy completions without samples.
    """
    model = scorer.model
    join = AnswerJoin(tokenizer, task.answer_template, eos_token_ids(model, tokenizer))
    modes = [("greedy", 0.0, 1)]
    if settings.num_samples:
        modes.append(("sampled", settings.temperature, settings.num_samples))
    check_dataset(dataset, "dataset", model, tokenizer, join, settings.max_completion_length)
    engine = TransformersEngine(model, tokenizer)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    indices = range(rank, len(dataset), world)
    problems: list[Problem] = []
    starts = range(0, len(indices), settings.batch_size)
    hidden = not settings.progress or rank > 0
    for start in track(starts, "evaluating", disable=hidden, transient=True):
        batch = [Problem(i, dataset[i]) for i in indices[start : start + settings.batch_size]]
        prompts = [encode_prompt(tokenizer, problem.row["prompt"]) for problem in batch]
        for name, temperature, num_samples in modes:
            samples = engine.generate(
                prompts,
                num_samples=num_samples,
                max_new_tokens=settings.max_completion_length + ANSWER_TOKENS,
                temperature=temperature,
                seeds=[seed_of(settings.seed, problem.index) for problem in batch],
            )
            for problem, prompt, group in zip(batch, prompts, samples, strict=True):
                problem.graded[name] = [
                    _grade(task, tokenizer, join, problem.row, prompt, s) for s in group
                ]
        problems += batch
    scored = [c.rollout for problem in problems for c in problem.graded[modes[-1][0]]]
    logps = iter(answer_logp(scorer, scored, settings.token_budget))
    for problem in problems:
        problem.answer_logps = [next(logps) for _ in problem.graded[modes[-1][0]]]
    if world > 1:
        problems = sorted(gather_object(problems), key=lambda problem: problem.index)
    return _metrics(task, problems, modes[-1][0], settings), [_record(p) for p in problems]


def _metrics(
    task: Task, problems: Sequence[Problem], last: str, settings: EvaluationSettings
) -> dict[str, float]:
    """As `evaluate_model` returns them; `last` names the completions that lengths are of."""
    metrics = {
        "accuracy_greedy": _mean(
            c.correct for problem in problems for c in problem.graded["greedy"]
        )
    }
    if settings.num_samples:
        shares = [_mean(c.correct for c in problem.graded["sampled"]) for problem in problems]
        metrics["accuracy_sampled"] = _mean(shares)
        metrics["accuracy_sampled_stderr"] = _standard_error(shares)
        for k in settings.majority:
            metrics[f"maj@{k}"] = _mean(
                majority_correct(task, problem.graded["sampled"][:k], problem.row)
                for problem in problems
            )
    rollouts = [c.rollout for problem in problems for c in problem.graded[last]]
    metrics["rationale_length"] = _mean(len(r.rationale_ids) for r in rollouts)
    metrics["unfinished"] = _mean(not r.finished for r in rollouts)
    metrics["answer_logp"] = _mean(v for problem in problems for v in problem.answer_logps)
    return metrics


def majority_correct(task: Task, group: Sequence[Completion], row: Mapping[str, Any]) -> bool:
    """Whether the commonest stated answer is right; of equally common ones the first stated."""
    votes = Counter(c.predicted for c in group if c.predicted is not None)
    return bool(votes) and task.is_correct(votes.most_common(1)[0][0], row)


@torch.no_grad()
def answer_logp(scorer: Scorer, rollouts: Sequence[Rollout], token_budget: int) -> list[float]:
    """log π(y|x⊕z) of each rollout, in nats, in micro-batches under a token budget."""
    was_training = scorer.model.training
    scorer.model.eval()
    values: dict[int, float] = {}
    alone = [[rollout] for rollout in rollouts]
    for micro in plan(alone, token_budget, packed=scorer.packed, boundary=scorer.boundary):
        (piece,) = micro.pieces
        batch = scorer.collate(piece)
        summed = scorer(batch).logp.double().cumsum(0)
        of_each = summed[batch.offsets[2::2] - 1] - summed[batch.offsets[1::2] - 1]
        values.update(zip(map(id, micro.rollouts), of_each.tolist(), strict=True))
    scorer.model.train(was_training)
    # Micro-batches go by length; the caller's order is another.
    return [values[id(r)] for r in rollouts]


def _grade(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    join: AnswerJoin,
    row: Mapping[str, Any],
    prompt_ids: list[int],
    sample: Sample,
) -> Completion:
    ids = sample.ids
    ended = ids[:-1] if ids and ids[-1] in join.eos_token_ids else ids
    text = decode(tokenizer, ended)
    predicted = task.extract(text, row)
    return Completion(
        text=text,
        rollout=join(prompt_ids, sample, row["answer"]),
        predicted=predicted,
        correct=task.is_correct(predicted, row),
    )


def _record(problem: Problem) -> dict[str, Any]:
    return {
        "prompt": problem.row["prompt"],
        "answer": problem.row["answer"],
        **{
            name: [
                {"text": c.text, "predicted": c.predicted, "correct": c.correct}
                for c in completions
            ]
            for name, completions in problem.graded.items()
        },
    }


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
