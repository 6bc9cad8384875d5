"""`AnswerTrainer`: what the trainers on prompts with known answers share."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from latro.config.data import DataArguments
from latro.config.training import AnswerConfig
from latro.evaluating_trainer import EvaluatingTrainer
from latro.loading import check_vocabulary
from latro.model.adapters import add_adapter, check_adapter, has_adapter, without_wrapper
from latro.model.distribution import (
    check_whole,
    is_sharded,
    keep_fp32_weights,
    keep_output_dtype,
)
from latro.model.dropout import disable_dropout
from latro.model.packing import Group
from latro.model.quantized import check_shardable, check_trainable, prepare_layers
from latro.model.scoring import Scorer
from latro.reporting.callbacks import METRICS_FILE, PLOT_FILE, MetricsFiles, Panels, ProgressBar
from latro.reporting.held_out_samples import HeldOutSamples
from latro.reporting.model_card import CARD_FILE, is_own_card, write_card
from latro.reporting.run_summary import run_of
from latro.rollout.answer_join import AnswerJoin
from latro.rollout.dataset_rows import check_dataset
from latro.rollout.sequences import eos_token_ids, let_generation_end
from latro.run.folder import check_apart
from latro.run.identity import Facts, data_facts, merged, model_facts
from latro.tasks import Task
from latro.update.coefficients import Coefficients
from latro.update.gradient import Update
from latro.update.metrics import over_processes, peak_memory_gib
from latro.update.nonfinite import Finding, FiniteUpdates

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

RESULTS_FILE = "results.json"
_NEVER_CALLED = ("compute_loss", "evaluation_loop", "prediction_step")
"""Methods of the Trainer: an update has no batch of labels, an evaluation samples completions."""


class AnswerTrainer(EvaluatingTrainer):
    """Trains a causal language model on prompts, and evaluates it by the answers it states.

    An update is two choices: where rollouts come from, which is `_rollouts`, and what their rows
    count for, which is `coefficients`. The rest is one path (`latro.update.gradient`).

    Args:
        model: what is trained. Its dropout is set to 0, and its generation config gets the tokens
            that end answers. Of a `PeftModel` the adapter is trained.
        args: the settings.
        train_dataset: rows with `prompt` and `answer`.
        processing_class: the model's tokenizer.
        task: its answer template opens answers; it grades in evaluation.
        coefficients: what the rows of rollouts count for in the loss.
        eval_dataset: held-out rows for `evaluate()`.
        peft_config: puts an adapter on `model`, and that is trained; needs the package peft.
        callbacks: added to the Trainer's own; None for none.
        temperature: of the policy, in the loss and in evaluation.

    Attributes:
        panels: title and metrics of each part of the plot.
        targets: words for what is learnt from each prompt.
        scorer: scores rows with `model`.
        update: what gives the gradient.
        data: the arguments by which a command loaded the rows; the model card tells them.

    Raises:
        TypeError: an argument of another kind, or a subclass overrides what is never called.
        ValueError: a row that cannot be trained on, or a model that cannot be scored, or that
            computes differently in training than in evaluation.
    """

    run_files = (*EvaluatingTrainer.run_files, CARD_FILE, METRICS_FILE, PLOT_FILE, RESULTS_FILE)
    early_files = (*EvaluatingTrainer.early_files, METRICS_FILE, PLOT_FILE)
    panels: ClassVar[Panels]
    targets: str
    data: DataArguments | None = None

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: AnswerConfig,
        train_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        task: Task,
        *,
        coefficients: Coefficients,
        eval_dataset: Dataset | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        temperature: float = 1.0,
    ) -> None:
        _check_types(model, processing_class, task)
        _check_overrides(type(self))
        _check_precision(args)
        check_whole(model)
        if peft_config is not None:
            # The Trainer would seed only after the adapter's weights are drawn.
            set_seed(args.seed)
            model = add_adapter(model, peft_config)
        check_vocabulary(model, processing_class, "processing_class")
        self.task = task
        ends = eos_token_ids(model, processing_class)
        self.join = AnswerJoin(processing_class, task.answer_template, ends, task.chat)
        # The Trainer makes the output folder, so all that may be wrong is looked at before.
        if train_dataset is not None:
            self._check_train_dataset(train_dataset, model, args)
        if eval_dataset is not None:
            self._longest_held_out = check_dataset(
                eval_dataset,
                name="eval_dataset",
                model=model,
                join=self.join,
                max_completion_length=args.max_completion_length,
                progress=not args.disable_tqdm,
            )
        elif train_dataset is not None:
            _check_evaluations(args)
        check_trainable(model)
        # A command has done so as it loaded the model.
        prepare_layers(without_wrapper(model))
        if train_dataset is not None and not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "model: none of its weights requires a gradient; load an adapter with "
                "is_trainable=True, pass peft_config to put one on, or call "
                "model.requires_grad_(True) to train all weights"
            )
        if has_adapter(model):
            check_adapter(model)
            if args.gradient_checkpointing:
                # A reentrant checkpoint has no gradient where none of its inputs requires one.
                # Older transformers do not see to that for a PeftModel.
                model.enable_input_require_grads()
        super().__init__(
            model=model,
            args=args,
            data_collator=_collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        if is_sharded(self.accelerator):
            check_shardable(model)
        disable_dropout(model)
        let_generation_end(model, ends)
        keep_output_dtype(self.accelerator)
        keep_fp32_weights(model, self.accelerator)
        self.scorer = Scorer(model, temperature=temperature, backend=args.backend)
        self.update = Update(
            self.scorer, coefficients, accelerator=self.accelerator, token_budget=args.token_budget
        )
        self._finite_updates = FiniteUpdates(
            coefficients.names, args.max_skipped_updates, self.accelerator
        )
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._flos = 0
        for shown in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown)
        self.add_callback(MetricsFiles(self.panels))
        self.add_callback(HeldOutSamples())
        if not args.disable_tqdm:
            self.add_callback(ProgressBar(args.title))

    def _run_identity(self) -> Facts:
        identity = super()._run_identity()
        if self._model_facts is None:
            # Before the first update; later calls find trained weights.
            self._model_facts = model_facts(self.model, self.processing_class)
        facts = data_facts(
            self.train_dataset, self.eval_dataset, self.task.answer_template, self.task.chat
        )
        return merged(identity, self._model_facts, facts)

    def _check_output(self) -> None:
        base = without_wrapper(self.model).config.name_or_path
        check_apart(self.args.output_dir, [("model", base)])
        card = Path(self.args.output_dir) / CARD_FILE
        if self._owns_output and not self.args.overwrite_output_dir and not is_own_card(card):
            raise ValueError(
                f"output_dir: {card} is no model card of this run, which would write over it; move "
                "it away, or pass --overwrite_output_dir true"
            )
        super()._check_output()

    @abstractmethod
    def _check_train_dataset(
        self, dataset: Dataset, model: PreTrainedModel | PeftModel, args: AnswerConfig
    ) -> None:
        """Raise ValueError for a row that cannot be trained on; `join` and `task` are set."""

    # The update.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the Trainer's, but an epoch's last batch has only the prompts that are left.

        Every batch is made as a single process makes it, and cut into the processes' shares. The
        order is that of `data_seed`, else of `seed`.

        Raises:
            ValueError: the trainer has no training dataset, or drops its only batch.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset: expected a dataset, got None")
        accelerator = self.accelerator
        in_batch = self._train_batch_size * accelerator.num_processes
        if self.args.dataloader_drop_last and len(self.train_dataset) < in_batch:
            raise ValueError(
                f"dataloader_drop_last: expected at least one whole batch of {in_batch} rows, got "
                f"{len(self.train_dataset)} rows, which would all be dropped"
            )
        given = accelerator.dataloader_config
        # The order of prompts would otherwise be drawn by torch's seed of the moment, which whoever
        # shares the process may have set since, and which a resumed run would not have.
        seed = self.args.seed if given.data_seed is None else given.data_seed
        accelerator.dataloader_config = replace(
            given, split_batches=True, even_batches=False, data_seed=seed
        )
        try:
            return self._get_dataloader(
                dataset=self.train_dataset,
                description="Training",
                batch_size=in_batch,
                sampler_fn=self._get_train_sampler,
                is_training=True,
            )
        finally:
            accelerator.dataloader_config = given

    @abstractmethod
    def _rollouts(self, examples: Sequence[Any]) -> Sequence[Group]:
        """Return the rollouts that a collated batch is learnt from, by prompt."""

    def _num_items(self, examples: Sequence[Any]) -> int:
        """Return the number of items (prompts, or target tokens for SFT) to average over."""
        return len(examples)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Each training begins here, also one that `auto_find_batch_size` begins again. What an
        # earlier one left behind, which an error may have ended anywhere, is forgotten.
        self.update.reset()
        self._finite_updates.reset()
        self.update.stopwatch.read()
        self._sums.clear()
        self._flos = 0
        return super()._inner_training_loop(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """Return an update's batches, and the number of its loss's items in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._is_done():
            # Whoever has no share of an epoch's last batch takes part in the update all the same.
            batches += [self.data_collator([]) for _ in range(num_batches - len(batches))]
        own = sum(self._num_items(batch["examples"]) for batch in batches)
        return batches, sum(gather_object([own]))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: int | None = None
    ) -> Tensor:
        """Backpropagate one batch of rows; return the detached loss."""
        started = time.perf_counter()
        model.train()
        self._set_optimizer_mode("train")
        self.scorer.caller = model
        self.scorer.sharded = is_sharded(self.accelerator)
        groups = self._rollouts(inputs["examples"])
        # Without a number the update has this batch alone.
        count = self._num_items(groups) if num_items_in_batch is None else num_items_in_batch
        loss, sums = self.update(groups, count)
        # 2 FLOP a parameter and token: policy forward, twice that backward, reference forward.
        passes = 3 + (self.update.ref_scorer is not None)
        self._flos += 2 * passes * self.model.num_parameters() * self.update.trunk_tokens
        # The step's wait for the device.
        finding = self._finite_updates(model, loss, sums, self.state.global_step + 1)
        if finding.sums is not None:
            for name, value in zip(self.update.coefficients.names, finding.sums, strict=True):
                self._sums[name] += value
            self._sums["trunk_tokens"] += self.update.trunk_tokens
        self._sums["skipped_updates"] += finding.skipped
        self._sums["updates"] += self.accelerator.sync_gradients
        # The statistics have waited for the device, so the clock tells the whole step.
        self._sums["time_step"] += time.perf_counter() - started
        for name, seconds in self.update.stopwatch.read().items():
            self._sums[name] += seconds
        self._end_step(finding)
        return loss

    def _end_step(self, finding: Finding) -> None:
        """Do what else there is to do after an accumulation step; for classes that inherit."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the FLOP since the last call; the Trainer adds them up."""
        flos, self._flos = self._flos, 0
        return flos

    # What is logged.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the update's own statistics since the last log."""
        if "loss" in logs and self._sums["updates"]:
            sums = {**self._sums, "peak_memory_gib": peak_memory_gib(self.args.device)}
            if self.accelerator.num_processes > 1:
                sums = over_processes(gather_object([sums]))
            averages = self.update.coefficients.averages(sums)
            logs = {**logs, **averages, "peak_memory_gib": sums["peak_memory_gib"]}
            self._sums.clear()
        super().log(logs, start_time)

    # The model card.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the Trainer does, with a model card where it is no checkpoint."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            # Over the one that PEFT puts beside an adapter.
            self._write_card(Path(output_dir or self.args.output_dir))

    def write_model(self, output_dir: str | None = None) -> None:
        """Save the model as `save_model` does, and neither a card nor to the hub."""
        self._set_optimizer_mode("eval")
        super().write_model(output_dir)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `latro.reporting.model_card`'s card of the run into the output folder.

        The arguments are those of `Trainer.create_model_card`: `finetuned_from` counts where the
        model's config does not tell its hub id, `dataset_tags` where the task has no hub id, and
        `tasks`, `dataset` and `dataset_args` are not used.
        """
        told: dict[str, Any] = {"language": language, "licence": license, "name": model_name}
        told["tags"] = [tags] if isinstance(tags, str) else tags
        told["base_model"] = finetuned_from
        told["dataset"] = dataset_tags[0] if isinstance(dataset_tags, list) else dataset_tags
        self._write_card(Path(self.args.output_dir), **told)

    def _write_card(self, folder: Path, **told: Any) -> None:
        if self.is_world_process_zero():
            given = {name: value for name, value in told.items() if value}
            write_card(replace(run_of(self, folder), **given), folder)


def _check_types(model: Any, processing_class: object, task: object) -> None:
    """Raise TypeError for an argument of another kind than a trainer needs."""
    kinds: tuple[tuple[str, object, type, str], ...] = (
        ("model", without_wrapper(model), PreTrainedModel, "a PreTrainedModel or PeftModel"),
        ("processing_class", processing_class, PreTrainedTokenizerBase, "the model's tokenizer"),
        ("task", task, Task, "a task, such as latro.tasks.get_task('gsm8k')"),
    )
    for name, value, kind, expected in kinds:
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def _check_overrides(kind: type[AnswerTrainer]) -> None:
    """Raise TypeError for a method that a subclass overrides, and that nothing would call."""
    for name in _NEVER_CALLED:
        if getattr(kind, name) is not getattr(Trainer, name):
            raise TypeError(
                f"{kind.__name__}.{name}: expected the Trainer's own, as no update and no "
                "evaluation calls it; what rows count for in the loss is `coefficients`, and the "
                "metrics are those of `evaluate`"
            )


def _check_evaluations(args: AnswerConfig) -> None:
    """Raise ValueError where evaluations are asked for, and there is nothing to evaluate on."""
    if args.eval_on_start or args.eval_strategy != IntervalStrategy.NO:
        asked = (
            "eval_on_start=True"
            if args.eval_on_start
            else f"eval_strategy={args.eval_strategy.value!r}"
        )
        raise ValueError(f"eval_dataset: expected held-out rows with {asked}, got None")


def _check_precision(args: AnswerConfig) -> None:
    """Raise ValueError for a precision that accelerate would leave out without a word."""
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise ValueError(
            "fp16: expected bf16, or neither, on a CPU, where accelerate trains in fp32 instead; "
            "got True"
        )


def _collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows as they are."""
    return {"examples": examples}
