"""A Hugging Face Trainer whose loss takes no logits: `compute_loss` through `linear_logprob`.

    python examples/hf_trainer.py --max_steps 40

Supervised fine-tuning on worked word problems with the model that ships. The model's own forward
runs, inside of DDP or what else wraps it, and only its head does another thing. Arguments are those
of `transformers.TrainingArguments`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from latro.tasks import get_task
from latro_kernels import linear_logprob

MODEL = Path(__file__).resolve().parents[1] / "latro" / "assets" / "small"


class FusedHeadTrainer(Trainer):
    """Trains on labels as Trainer does, on the mean of −log p over all labels of an update.

    Raises:
        ValueError: the model does something to its logits after the head.
    """

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        config = model.config.get_text_config()
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(config, name, None):
                raise ValueError(f"model: expected logits straight from the head, got {name}")
        super().__init__(model, *args, compute_loss_func=mean_loss, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        labels = inputs["labels"][:, 1:]
        scored = labels != -100
        head = self.accelerator.unwrap_model(model).get_output_embeddings()

        def logp_of_labels(hidden: Tensor) -> Tensor:
            rows = hidden[:, :-1][scored]
            return linear_logprob(rows, head.weight, labels[scored], bias=head.bias)

        with head_replaced(head, logp_of_labels):
            return super().compute_loss(model, inputs, *args, **kwargs)


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
    """Return the mean over all labels of an update, for `compute_loss_func`.

    The Trainer counts `num_items_in_batch` over the update's micro-batches and processes.
    """
    logp = outputs["logits"]
    return -logp.sum() / (len(logp) if num_items_in_batch is None else num_items_in_batch)


@contextmanager
def head_replaced(head: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Make the model return `function(hidden states)` instead of logits within the block.

    The module is still called, so hooks that gather sharded weights find it.
    """
    head.forward = function
    try:
        yield
    finally:
        del head.forward


def worked_problems(tokenizer: PreTrainedTokenizerBase, split: str, count: int) -> Dataset:
    """Return problems with their solutions; labels of −100 mark tokens that are not learned."""

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer.encode(row["prompt"])
        solution = tokenizer.encode(f" {row['rationale']} The answer is {row['answer']}")
        solution.append(tokenizer.eos_token_id)
        return {"input_ids": prompt + solution, "labels": [-100] * len(prompt) + solution}

    rows = get_task("arithmetic").load(split, num_examples=count)
    return rows.map(encode, remove_columns=rows.column_names)


def train(args: TrainingArguments) -> tuple[float, float]:
    """Train, and return the loss on held-out problems before and after."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = FusedHeadTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL),
        args,
        train_dataset=worked_problems(tokenizer, "train", 2000),
        eval_dataset=worked_problems(tokenizer, "validation", 64),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        own = trainer.model(**batch).loss
        ours = trainer.compute_loss(trainer.model, batch)
    print(f"loss of one batch: {own:.6f} by the model itself, {ours:.6f} through linear_logprob")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss of held-out problems: {before:.3f} before, {after:.3f} after")
    return before, after


def main() -> None:
    with TemporaryDirectory() as folder:
        defaults = {"output_dir": folder, "max_steps": 40, "learning_rate": 1e-4}
        defaults |= {"save_strategy": "no", "report_to": "none", "use_cpu": True}
        parser = HfArgumentParser(TrainingArguments)
        parser.set_defaults(**defaults, per_device_train_batch_size=16)
        train(parser.parse_args_into_dataclasses()[0])


if __name__ == "__main__":
    main()
