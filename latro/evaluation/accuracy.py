"""Accuracy of a model on a task: greedy, sampled, by majority, with the answer's likelihood."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.config.ranges import above_zero, at_least, check_number
from latro.engines.transformers import TransformersEngine, seed_of
from latro.engines.vllm_sampling import check_length
from latro.evaluation.few_shot import SEPARATOR, cut_at_separator, with_examples
from latro.evaluation.metrics import metrics_of
from latro.evaluation.progress import EvaluationBar
from latro.evaluation.resume import Journal
from latro.model.forwards import evaluation_mode
from latro.model.packing import answer_sums, plan
from latro.model.scoring import Scorer
from latro.rollout.answer_join import AnswerJoin
from latro.rollout.dataset_rows import Longest, check_dataset, encode_each
from latro.rollout.sequences import (
    Progress,
    Rollout,
    RolloutEngine,
    Sample,
    decode,
    eos_token_ids,
)
from latro.tasks import Task

# Tokens for the answer after a rationale of full length, unless the data has longer answers.
ANSWER_TOKENS = 32

# The columns of a row that are copied into its record.
_SHOWN = ("prompt", "answer", "ground_truth")


@dataclass(frozen=True)
class EvaluationSettings:
    """How to evaluate.

    Attributes:
        num_samples: sampled completions per problem; 0: greedy only.
        majority: the k of maj@k, each at most `num_samples`.
        max_completion_length: the longest rationale, in tokens; the answer may take 32 more, or as
            many as the longest answer in the data.
        batch_size: problems per call of the engine and process; results do not depend on it, up
            to rounding in the model.
        temperature: the sampling temperature.
        seed: decides the samples.
        token_budget: padded tokens of one scoring batch.
        rationale_gain: whether to score the answers without a rationale too, which is one more
            forward of each prompt and answer, and tells what the rationales add.
        progress: whether to show a progress bar.
    """

    num_samples: int = 1
    majority: tuple[int, ...] = ()
    max_completion_length: int = 500
    batch_size: int = 512
    temperature: float = 1.0
    seed: int = 0
    token_budget: int = 16384
    rationale_gain: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 0), ("max_completion_length", 1), ("batch_size", 1)):
            at_least(name, getattr(self, name), least)
        check_temperature(self.temperature)
        for k in self.majority:
            if not 1 <= k <= self.num_samples:
                raise ValueError(
                    f"majority: expected k from 1 to num_samples = {self.num_samples}, got {k}"
                )


def evaluate_model(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    dataset: Dataset,
    settings: EvaluationSettings,
    *,
    engine: RolloutEngine | None = None,
    accelerator: Accelerator | PartialState | None = None,
    examples: Sequence[Mapping[str, Any]] = (),
    journal: Journal | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Generate completions of a dataset's prompts, grade them and score the known answers.

    Several processes share the problems, and each returns the results of all.

    Args:
        scorer: computes log π(y|x⊕z) with the model.
        tokenizer: the model's tokenizer.
        task: grades the completions.
        dataset: rows of the task, at least one.
        settings: number of samples, lengths and so on.
        engine: samples the completions with the model's weights; None: transformers, here.
        accelerator: knows the processes; None: there is only this one.
        examples: rows of the training split, shown as worked examples before each problem
            (`latro.evaluation.few_shot`).
        journal: receives the records batch by batch, and may hold those of a killed evaluation.

    Raises:
        ValueError: the dataset lacks a column, a row does not fit the model, or the journal belongs
            to another evaluation.

    Returns:
        The metrics, and one record per problem.

        A record has `index`, the row's `prompt`, `answer` and (if it has one) `ground_truth`, and
        the lists of completions `greedy` and, with samples, `sampled`. Each completion has `text`,
        `predicted` (the answer it states, or None), `correct`, `finished`, `rationale_tokens` and
        `answer_logp` (log π(y|x⊕z), nats). With `rationale_gain` a record also has
        `plain_answer_logp` (log π(y|x), nats), which every completion is compared with.

        The metrics are `accuracy_greedy`; with samples `accuracy_sampled` (mean over all samples),
        its standard error over problems `accuracy_sampled_stderr`, and `maj@k`; and over the
        samples, or else over the greedy completions, `rationale_length` (tokens), `unfinished`
        (share that states no answer and does not end), `answer_logp` (mean) and, where it is asked
        for, `rationale_gain` (mean of log π(y|x⊕z) − log π(y|x), nats).
    """
    model = scorer.model
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    shows = settings.progress and rank == 0
    join = AnswerJoin(tokenizer, task.answer_template, eos_token_ids(model, tokenizer), task.chat)
    longest = check_dataset(
        dataset,
        name="dataset",
        model=model,
        join=join,
        max_completion_length=settings.max_completion_length,
        progress=shows,
    )
    separator = None
    shown = dataset
    if examples:
        shown = with_examples(
            dataset, examples=examples, answer_template=task.answer_template, tokenizer=tokenizer
        )
        longest = check_dataset(
            shown,
            name="dataset",
            model=model,
            join=join,
            max_completion_length=settings.max_completion_length,
            progress=shows,
        )
        # The turns of a conversation have ends of their own.
        separator = None if tokenizer.chat_template else SEPARATOR
    max_new_tokens = most_new_tokens(model, longest, settings.max_completion_length)
    engine = engine or TransformersEngine(model, tokenizer)
    check_length(engine, longest.prompt + max_new_tokens)
    evaluator = _Evaluator(
        scorer,
        engine=engine,
        tokenizer=tokenizer,
        task=task,
        join=join,
        settings=settings,
        separator=separator,
        max_new_tokens=max_new_tokens,
    )

    batch_size = settings.batch_size * world
    records: list[dict[str, Any]] = []
    if journal and rank == 0:
        records = journal.open(encode_each(shown, join), batch_size)
    if journal and world > 1:
        (records,) = broadcast_object_list([records])
    accuracies = _Accuracies()
    accuracies(records)
    with EvaluationBar(
        "evaluating",
        total=len(dataset),
        done=len(records),
        shown=shows,
    ) as bar:
        for start in range(len(records), len(dataset), batch_size):
            indices = range(start, min(start + batch_size, len(dataset)))[rank::world]
            problems = zip(indices, encode_each(shown.select(indices), join), strict=True)
            batch = evaluator([_Problem(i, dataset[i], prompt) for i, prompt in problems], bar)
            if world > 1:
                batch = sorted(gather_object(batch), key=lambda record: record["index"])
            if journal and rank == 0:
                journal.append(batch)
            records += batch
            bar.add(len(batch), accuracies(batch))
    return metrics_of(records, settings.majority), records


def most_new_tokens(model: PreTrainedModel, longest: Longest, max_completion_length: int) -> int:
    """Return the most tokens that an evaluation samples behind a prompt, whatever the problem."""
    most = max_completion_length + max(ANSWER_TOKENS, longest.answer)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return most
    # Leave room for the known answer, which is scored after whatever was sampled. All problems
    # have the same limit, so that batches do not matter.
    return int(min(most, positions - longest.prompt_and_answer))


def check_temperature(temperature: float) -> None:
    """Raise ValueError for a temperature at which sampling or scoring is impossible."""
    check_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature: expected a number above 0, got {temperature}; greedy completions are "
            "made in any case"
        )
    above_zero("temperature", temperature)


@torch.no_grad()
def answer_logp(scorer: Scorer, rollouts: Sequence[Rollout], token_budget: int) -> list[float]:
    """Return log π(y|x⊕z) of each rollout in nats, scored in micro-batches under a token budget."""
    values: dict[int, float] = {}
    alone = [[rollout] for rollout in rollouts]
    with evaluation_mode(scorer.model):
        for micro in plan(alone, token_budget, packed=scorer.packed, boundary=scorer.boundary):
            (piece,) = micro
            batch = scorer.collate(piece)
            of_each = answer_sums(scorer(batch).logp, batch)
            values.update(zip(map(id, batch.sequences), of_each.tolist(), strict=True))
    # Micro-batches are sorted by length; return to the caller's order.
    return [values[id(r)] for r in rollouts]


@dataclass(frozen=True)
class _Problem:
    """One row of the dataset."""

    index: int
    row: Mapping[str, Any]
    prompt_ids: list[int]


@dataclass(frozen=True)
class _Completion:
    """One completion of a problem."""

    text: str
    """The text for the record, without an end token or separator at its end."""
    stated: str
    """The text to grade, without thoughts, and without end tokens and padding at its end."""
    rollout: Rollout
    """The rollout to score."""


@dataclass(frozen=True)
class _Evaluator:
    """Turns problems into their records."""

    scorer: Scorer
    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    task: Task
    join: AnswerJoin
    settings: EvaluationSettings
    separator: str | None
    max_new_tokens: int
    """The longest completion (rationale and answer), in tokens."""

    def __call__(self, problems: Sequence[_Problem], bar: EvaluationBar) -> list[dict[str, Any]]:
        shown = [name for name in _SHOWN if problems and name in problems[0].row]
        records = [{"index": p.index} | {name: p.row[name] for name in shown} for p in problems]
        # Some processes may have no problem of the last batch.
        if not problems:
            return records
        modes = [("greedy", 0.0, 1)]
        if self.settings.num_samples:
            modes.append(("sampled", self.settings.temperature, self.settings.num_samples))
        for name, temperature, num_samples in modes:
            groups = self._generate(
                problems, temperature, num_samples=num_samples, progress=bar.sampling()
            )
            rollouts = [completion.rollout for group in groups for completion in group]
            logps = iter(answer_logp(self.scorer, rollouts, self.settings.token_budget))
            for problem, record, group in zip(problems, records, groups, strict=True):
                record[name] = [
                    self._record(problem.row, completion, next(logps)) for completion in group
                ]
        if self.settings.rationale_gain:
            plain = [self.join(p.prompt_ids, Sample([]), p.row["answer"]) for p in problems]
            scored = answer_logp(self.scorer, plain, self.settings.token_budget)
            for record, logp in zip(records, scored, strict=True):
                record["plain_answer_logp"] = logp
        return records

    def _generate(
        self,
        problems: Sequence[_Problem],
        temperature: float,
        *,
        num_samples: int,
        progress: Progress,
    ) -> list[list[_Completion]]:
        """Return the completions of each problem."""
        samples = self.engine.generate(
            [problem.prompt_ids for problem in problems],
            num_samples=num_samples,
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
            seeds=[seed_of(self.settings.seed, problem.index) for problem in problems],
            template=self.separator,
            progress=progress,
        )
        return [
            [self._ended(problem, sample) for sample in group]
            for problem, group in zip(problems, samples, strict=True)
        ]

    def _ended(self, problem: _Problem, sample: Sample) -> _Completion:
        kept = cut_at_separator(self.tokenizer, sample.ids) if self.separator else None
        if kept is not None:
            # The separator ends a completion as an end token does, and is dropped.
            text = decode(self.tokenizer, sample.ids).partition(SEPARATOR)[0]
            rollout = self._joined(problem, Sample(kept), text)
            return _Completion(text, text, replace(rollout, finished=True))
        ids = sample.ids
        ended = ids[:-1] if ids and ids[-1] in self.join.eos_token_ids else ids
        stated = self.join.said(decode(self.tokenizer, self.join.without_ends(ids)))
        text = decode(self.tokenizer, ended)
        return _Completion(text, stated, self._joined(problem, sample, stated))

    def _joined(self, problem: _Problem, sample: Sample, stated: str) -> Rollout:
        """Put the known answer in place of the stated one that counts, else of the first one."""
        starts = [match.start() for match in self.join.pattern.finditer(stated)]
        counted = 0
        for index, end in enumerate([*starts[1:], len(stated)]):
            if self.task.extract(stated[:end], problem.row) is not None:
                counted = index
                break
        return self.join(problem.prompt_ids, sample, problem.row["answer"], statement=counted)

    def _record(
        self, row: Mapping[str, Any], completion: _Completion, logp: float
    ) -> dict[str, Any]:
        predicted = self.task.extract(completion.stated, row)
        return {
            "text": completion.text,
            "predicted": predicted,
            "correct": self.task.is_correct(predicted, row),
            "finished": completion.rollout.finished,
            "rationale_tokens": len(completion.rollout.rationale_ids),
            "answer_logp": logp,
        }


class _Accuracies:
    """Counts right completions, for the progress bar."""

    def __init__(self) -> None:
        self._right: Counter[str] = Counter()
        self._all: Counter[str] = Counter()

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Add the records of some problems; return the accuracies on all so far."""
        for record in records:
            for name in ("greedy", "sampled"):
                grades = [completion["correct"] for completion in record.get(name, ())]
                self._right[name] += sum(grades)
                self._all[name] += len(grades)
        return {name: f"{self._right[name] / n:.1%}" for name, n in self._all.items() if n}
