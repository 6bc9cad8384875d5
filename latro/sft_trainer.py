"""`SftTrainer`: supervised fine-tuning on written rationales and answers, or on answers alone.

For rows of a prompt x, a written rationale z and an answer y, with T target tokens in an update:

    loss = −1/T Σ [log π(z|x) + log π(y|x⊕z)]        or, with target "answer",  −1/T Σ log π(y|x)

Prompts and answers are the tokens that evaluation and LaTRO take for the same row, and the answer
ends as an assistant's turn does (`latro.rollout.sequences`). T counts the tokens of all
accumulation steps and processes, so that each weighs the same however an update is cut up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from latro.base_trainer import AnswerTrainer
from latro.config.training import AnswerConfig, SftConfig
from latro.model.packing import Batch, Group, answer_sums
from latro.rollout.prompts import check_dataset, check_rationales, encode_prompt
from latro.rollout.sequences import Rollout, Sample
from latro.tasks import Task
from latro.update.accumulation import Accumulation

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


SUM_NAMES = ("answer_logp", "sequences", "target_tokens")


class SftUpdate(Accumulation):
    """Accumulates the gradient of the targets' negative log-likelihood.

    Sequences are on their own in their groups, and all of their tokens behind the prompt are
    targets.
    """

    def __call__(self, groups: Sequence[Group], count: int) -> tuple[Tensor, Tensor]:
        """As `Accumulation`; `count` is of target tokens, and `SUM_NAMES` names the sums."""
        device = self.scorer.model.device
        loss = torch.zeros((), device=device)
        sums = torch.zeros(len(SUM_NAMES), dtype=torch.float64, device=device)
        self.trunk_tokens = 0
        pieces = [piece for micro in self.plan(groups) for piece in micro.pieces]
        (number,) = self._agree([len(pieces)])
        for index in range(number):
            fills_up = index >= len(pieces)
            batch = self._filler() if fills_up else self.scorer.collate(pieces[index])
            with self._exchange(index == number - 1):
                with self.stopwatch.lap("time_score"), self.accelerator.autocast():
                    logp = self.scorer(batch).logp
                with self.stopwatch.lap("time_backward"):
                    part = self._backward(-logp.sum() * (0 if fills_up else 1 / count))
            if not fills_up:
                loss += part
                sums += _sums(logp.detach(), batch)
                self.trunk_tokens += batch.input_ids.numel()
        return loss, sums


def _sums(logp: Tensor, batch: Batch) -> Tensor:
    """What `SUM_NAMES` names, of a batch, fp64 [3]."""
    answers = answer_sums(logp, batch)
    return torch.stack([answers.sum(), *answers.new_tensor([len(answers), len(logp)])])


class SftTrainer(AnswerTrainer):
    """Trains a causal language model on the rationales and answers that its data has.

    Args:
        model: what is trained. Its dropout is set to 0. Of a `PeftModel` the adapter is trained.
        args: the settings.
        train_dataset: rows with `prompt`, `answer` and, unless the target is the answer alone,
            `rationale`, the worked solution without the statement of the answer.
        processing_class: the model's tokenizer.
        task: its answer template opens answers; it grades in evaluation.
        eval_dataset: held-out rows for `evaluate()`.
        peft_config: puts an adapter on `model`, and that is trained; needs the package peft.
        callbacks: added to the Trainer's own.

    Raises:
        ValueError: a row that cannot be trained on, or a model that cannot be scored.
    """

    sum_names = SUM_NAMES
    panels = (
        ("loss, nats per token", ("loss",)),
        ("held-out accuracy", ("eval_accuracy_greedy", "eval_accuracy_sampled")),
        ("held-out rationale length, tokens", ("eval_rationale_length",)),
        ("mean log π of the answer, nats", ("answer_logp", "eval_answer_logp")),
    )
    args: SftConfig
    update: SftUpdate

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SftConfig,
        train_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        task: Task,
        *,
        eval_dataset: Dataset | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset,
            processing_class,
            task,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        self._set_update(
            SftUpdate(self.scorer, args.token_budget, self.accelerator, self._stopwatch)
        )
        self.data_collator = self._collate

    @property
    def targets(self) -> str:
        """What is learnt from each prompt, in words."""
        return {"rationale": "rationale and answer of each", "answer": "the answer of each"}[
            self.args.target
        ]

    def _check_train_dataset(
        self, dataset: Dataset, model: PreTrainedModel | PeftModel, args: AnswerConfig
    ) -> None:
        check_dataset(dataset, "train_dataset", model, self.join.tokenizer, self.join, 0)
        if args.target == "answer":
            return
        if "rationale" not in dataset.column_names:
            raise ValueError(
                f"target: {self.task.description} has no worked rationales to learn from; take "
                "--target answer"
            )
        for index, rationale in enumerate(dataset["rationale"]):
            if not rationale.strip():
                raise ValueError(
                    f"train_dataset: row {index}: expected a rationale, got {rationale!r}; drop "
                    "the row, or take --target answer"
                )
        check_rationales(dataset, "train_dataset", model, self.join)

    def _collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {"examples": [self._target(row) for row in examples]}

    def _target(self, row: dict[str, Any]) -> Rollout:
        prompt = encode_prompt(self.join.tokenizer, row["prompt"], self.join.encoder)
        if self.args.target == "answer":
            return self.join(prompt, Sample([]), row["answer"])
        return self.join.written(prompt, row["rationale"], row["answer"])

    def _num_items(self, examples: Sequence[Rollout]) -> int:
        return sum(len(r.sampled_ids) + len(r.answer_ids) for r in examples)

    def _backpropagate(
        self, examples: Sequence[Rollout], num_items: int | None
    ) -> tuple[Tensor, Tensor]:
        count = self._num_items(examples) if num_items is None else num_items
        return self._fitting_update([[rollout] for rollout in examples], count)

    def _metrics(self, sums: dict[str, float]) -> dict[str, float]:
        updates = max(1.0, sums["updates"])
        metrics = {"skipped_updates": sums["skipped_updates"]}
        for name in ("time_score", "time_backward", "time_step"):
            metrics[name] = sums[name] / updates
        if not sums.get("sequences"):
            return metrics
        return metrics | {
            "answer_logp": sums["answer_logp"] / sums["sequences"],
            "target_tokens": sums["target_tokens"] / updates,
            "trunk_tokens": sums["trunk_tokens"] / updates,
            "tokens_per_second": sums["trunk_tokens"] / sums["time_step"],
        }
