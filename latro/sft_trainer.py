"""`SftTrainer`: supervised fine-tuning on written rationales and answers, or on answers alone.

For rows of a prompt x, a written rationale z and an answer y, with T target tokens in an update:

    loss = −1/T Σ [log π(z|x) + log π(y|x⊕z)]        or, with target "answer",  −1/T Σ log π(y|x)

Prompts and answers are the tokens that evaluation and LaTRO take for the same row, and the answer
ends as an assistant's turn does (`latro.rollout.answer_join`). T counts the tokens of all
accumulation steps and processes, so that each weighs the same however an update is cut up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from latro.base_trainer import AnswerTrainer
from latro.config.training import AnswerConfig, SftConfig
from latro.model.packing import Group
from latro.rollout.dataset_rows import check_dataset, check_rationales
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import Rollout, Sample
from latro.tasks import Task
from latro.update.coefficients import LikelihoodCoefficients

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


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
        callbacks: added to the Trainer's own; None for none.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a row that cannot be trained on, or a model that cannot be scored.
    """

    panels = (
        ("loss, nats per token", ("loss",)),
        ("held-out accuracy", ("eval_accuracy_greedy", "eval_accuracy_sampled")),
        ("held-out rationale length, tokens", ("eval_rationale_length",)),
        ("mean log π of the answer, nats", ("answer_logp", "eval_answer_logp")),
    )
    args: SftConfig

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
        callbacks: Sequence[TrainerCallback] | None = None,
    ) -> None:
        if not isinstance(args, SftConfig):
            raise TypeError(f"args: expected a SftConfig, got {type(args).__name__}")
        super().__init__(
            model,
            args,
            train_dataset,
            processing_class,
            task,
            coefficients=LikelihoodCoefficients(),
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        targets = {"rationale": "rationale and answer of each", "answer": "the answer of each"}
        self.targets = targets[args.target]
        self.data_collator = self._collate

    def _check_train_dataset(
        self, dataset: Dataset, model: PreTrainedModel | PeftModel, args: AnswerConfig
    ) -> None:
        progress = not args.disable_tqdm
        check_dataset(
            dataset,
            name="train_dataset",
            model=model,
            join=self.join,
            max_completion_length=0,
            progress=progress,
        )
        if args.target == "answer":
            return
        if "rationale" not in dataset.column_names:
            raise ValueError(
                f"target: {self.task.description} has no worked rationales to learn from; take "
                "--target answer"
            )
        for index, rationale in enumerate(dataset["rationale"]):
            if not isinstance(rationale, str) or not rationale.strip():
                raise ValueError(
                    f"train_dataset: row {index}: expected a rationale, got {rationale!r}; drop "
                    "the row, or take --target answer"
                )
        check_rationales(
            dataset, name="train_dataset", model=model, join=self.join, progress=progress
        )

    def _collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        # Every rollout is alone in its group.
        return {"examples": [[self._target(row)] for row in examples]}

    def _target(self, row: dict[str, Any]) -> Rollout:
        prompt = encode_prompt(self.join.tokenizer, row["prompt"], self.join.frame)
        if self.args.target == "answer":
            return self.join(prompt, Sample([]), row["answer"])
        return self.join.written(prompt, row["rationale"], row["answer"])

    def _rollouts(self, examples: Sequence[Group]) -> Sequence[Group]:
        return examples

    def _num_items(self, examples: Sequence[Group]) -> int:
        """Return the number of target tokens, which are all of those behind the prompts."""
        return sum(len(r.sampled_ids) + len(r.answer_ids) for group in examples for r in group)
