"""`EvaluatingTrainer`: a Trainer that evaluates a model by the answers it states."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import PredictionOutput

from latro.config.training import AnswerConfig
from latro.engines.transformers import TransformersEngine
from latro.evaluation.accuracy import EvaluationSettings, evaluate_model
from latro.model.distribution import gathered
from latro.model.scoring import Scorer
from latro.reporting.held_out_samples import SAMPLES_FILE, HeldOutSamples
from latro.rollout.sequences import RolloutEngine
from latro.run.resumable import LongRunTrainer
from latro.tasks import Task
from latro.update.gradient import Update

if TYPE_CHECKING:
    from peft import PeftModel


class EvaluatingTrainer(LongRunTrainer):
    """Evaluates a causal language model by the answers it states; a class that inherits trains it.

    Attributes:
        task: its answer template opens answers; it grades.
        scorer: scores rows with `model`.
        update: what gives the gradient, whose token budget holds in evaluation too.
    """

    run_files = (*LongRunTrainer.run_files, SAMPLES_FILE)
    early_files = (*LongRunTrainer.early_files, SAMPLES_FILE)
    args: AnswerConfig
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase
    task: Task
    scorer: Scorer
    update: Update

    @property
    def evaluation_settings(self) -> EvaluationSettings:
        """The settings of `evaluate`."""
        return EvaluationSettings(
            max_completion_length=self.args.max_completion_length,
            batch_size=self.args.per_device_eval_batch_size,
            temperature=self.scorer.temperature,
            seed=self.args.seed,
            token_budget=self.update.token_budget,
            rationale_gain=True,
        )

    def _evaluation_engine(self) -> RolloutEngine:
        """Return the engine that samples in an evaluation, with the model's weights."""
        return TransformersEngine(self.model, self.processing_class)

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return accuracies on held-out rows, and what rationales add to the answers' likelihood.

        The metrics are those of `latro.evaluation.accuracy.evaluate_model`. From the training on
        they are in the output folder's files too.

        Raises:
            ValueError: neither the call nor the trainer has an evaluation dataset.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset: expected a dataset, got None")
        metrics, records = self._evaluated(dataset, metric_key_prefix)
        # Before a training the folder may have another run's files.
        kept = dataset is self.eval_dataset and self._owns_output
        if kept and self.is_world_process_zero():
            HeldOutSamples.keep(self.args.output_dir, self.state.global_step, records)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def predict(
        self,
        test_dataset: Dataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Return the completions of a dataset's prompts, its answers and the metrics.

        `predictions` are the records of `latro.evaluation.accuracy.evaluate_model`, one a row, and
        `label_ids` the rows' answers. As in the Trainer, nothing is logged.

        Raises:
            ValueError: the dataset has no row, lacks a column, or has a row that does not fit.
        """
        metrics, records = self._evaluated(test_dataset, metric_key_prefix)
        self.control = self.callback_handler.on_predict(
            self.args, self.state, self.control, metrics
        )
        return PredictionOutput(records, [record["answer"] for record in records], metrics)

    def _evaluated(
        self, dataset: Dataset, prefix: str
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return the metrics of a dataset, their names with the prefix, and its records."""
        started = time.perf_counter()
        self._set_optimizer_mode("eval")
        self.scorer.caller = self.model_wrapped
        engine = self._evaluation_engine()
        with self.accelerator.autocast(), gathered(self.scorer, self.accelerator):
            metrics, records = evaluate_model(
                self.scorer,
                tokenizer=self.processing_class,
                task=self.task,
                dataset=dataset,
                settings=self.evaluation_settings,
                engine=engine,
                accelerator=self.accelerator,
            )
        metrics["runtime"] = time.perf_counter() - started
        return {f"{prefix}_{name}": value for name, value in metrics.items()}, records

    def _set_optimizer_mode(self, mode: Literal["train", "eval"]) -> None:
        # Schedule-free optimisers put the weights of training or of evaluation into the model.
        switch = getattr(self.optimizer, mode, None)
        if callable(switch):
            switch()
