"""`LatroTrainer`: the LaTRO update inside Hugging Face's Trainer.

One update, for N prompts x with answers y and K rationales z each (arXiv 2411.04282):

    r_k = log π(y|x⊕z_k) − β [log π(z_k|x) − log π_0(z_k|x)]
    A_k = r_k − mean_{j≠k} r_j
    loss = −1/(NK) Σ [A_k log π(z_k|x) + λ log π(y|x⊕z_k)]        A_k held constant

With kl="k3" or "exact" the KL stands in the loss, and not in the reward.

One policy forward over x⊕z⊕y gives both log-probs, since attention is causal; one reference
forward gives log π_0, or the hidden states that an exact KL needs; the objective, LaTRO or a
relative of it (`latro.objectives`), turns them into one coefficient a row; one backward follows
(`latro.update`). The optimiser, schedule, precision, accumulation, checkpoints, callbacks and
reporting are the Trainer's.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from latro import statistics
from latro.callbacks import CompletionsTable, MetricsFiles, ProgressBar
from latro.config import LatroConfig
from latro.distribution import (
    gathered,
    is_sharded,
    keep_fp32_weights,
    keep_output_dtype,
    prepare_reference,
)
from latro.evaluation import EvaluationSettings, evaluate_model
from latro.finite import FiniteUpdates
from latro.generation import TransformersEngine, seed_of
from latro.long_run import LongRunTrainer
from latro.memory import FittingUpdate
from latro.objectives import PLAIN_OBJECTIVES
from latro.peft import AdapterOff, add_adapter, check_adapter, has_adapter
from latro.prompts import check_dataset, encode_prompt
from latro.rollout import AnswerJoin, Rollout, RolloutEngine, Sample, decode, eos_token_ids
from latro.scoring import Scorer
from latro.statistics import rollout_sums
from latro.stopwatch import Stopwatch
from latro.tasks import Task
from latro.update import Update
from latro.vllm_engine import VllmEngine

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class LatroTrainer(LongRunTrainer):
    """Trains a causal language model on the likelihood that its own rationales give the answers.

    Args:
        model: the policy; `model.generation_config` is not used for sampling. Its dropout is set to
            0, since a rationale must be scored by the policy that sampled it. Of a `PeftModel` the
            adapter is trained.
        args: the settings.
        train_dataset: rows with `prompt` and `answer`, both strings.
        processing_class: the model's tokenizer.
        task: its answer template ends rationales and opens answers; it grades in evaluation.
        eval_dataset: held-out rows for `evaluate()`.
        ref_model: π_0; None: a frozen copy of `model` as it is now, not made when β is 0, or, where
            it has an adapter, `model` itself with the adapter off.
        peft_config: puts an adapter on `model`, and that is trained; needs the package peft.
        callbacks: added to the Trainer's own.

    Raises:
        ValueError: a row that cannot be trained on, or a model that cannot be scored.
    """

    args: LatroConfig
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: LatroConfig,
        train_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        task: Task,
        *,
        eval_dataset: Dataset | None = None,
        ref_model: PreTrainedModel | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        if peft_config is not None:
            # The Trainer would seed only after the adapter's weights are drawn.
            set_seed(args.seed)
            model = add_adapter(model, peft_config)
        _disable_dropout(model)
        self.task = task
        self.join = AnswerJoin(
            processing_class, task.answer_template, eos_token_ids(model, processing_class)
        )
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                check_dataset(
                    dataset, name, model, processing_class, self.join, args.max_completion_length
                )
        adapted = has_adapter(model)
        if adapted:
            check_adapter(model, is_reference=ref_model is None and args.beta > 0)
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
            callbacks=list(callbacks),
        )
        keep_output_dtype(self.accelerator)
        keep_fp32_weights(model, self.accelerator)
        if ref_model is None and args.beta > 0 and not adapted:
            ref_model = copy.deepcopy(model)
        self._stopwatch = Stopwatch(self.args.device)
        self.scorer = Scorer(model, temperature=args.temperature, backend=args.backend)
        self.ref_scorer: Scorer | AdapterOff | None = None
        if ref_model is not None:
            _disable_dropout(ref_model)
            ref_model.requires_grad_(False).eval().to(self.args.device)
            ref_scorer = Scorer(ref_model, temperature=args.temperature, backend=args.backend)
            if args.kl == "exact":
                self.scorer.check_comparable(ref_scorer)
            # Both read the same batches: KL is exactly 0 where the two are one.
            self.scorer.packed &= ref_scorer.packed
            prepare_reference(ref_scorer, self.accelerator)
            self.ref_scorer = ref_scorer
        elif adapted and args.beta > 0:
            self.ref_scorer = AdapterOff(self.scorer)
        self.update = Update(self.scorer, self.ref_scorer, args, self.accelerator, self._stopwatch)
        self._fitting_update = FittingUpdate(self.update)
        self._finite_updates = FiniteUpdates(
            statistics.NAMES, args.max_skipped_updates, self.accelerator
        )
        self.engine = self._make_engine()
        self._engine_is_stale = True
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._flos = 0
        self._micro_step = 0
        for shown in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown)
        self.add_callback(MetricsFiles())
        if not args.disable_tqdm:
            self.add_callback(ProgressBar())
        self.completions_table = CompletionsTable() if args.log_completions else None
        if self.completions_table:
            self.add_callback(self.completions_table)

    # The update.

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `LongRunTrainer.train`."""
        # A checkpoint may be loaded now.
        self._engine_is_stale = True
        return super().train(*args, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Sample, score and backpropagate one batch of prompts; returns the detached loss."""
        started = time.perf_counter()
        model.train()
        self.scorer.caller = model
        self.scorer.sharded = is_sharded(self.accelerator)
        with self._stopwatch.lap("time_rollout"):
            groups = self.rollout(inputs["examples"])
        num_groups = len(groups) * self.current_gradient_accumulation_steps
        groups_and_plain = self._with_plain(groups, inputs["examples"])
        loss, sums = self._fitting_update(groups_and_plain, num_groups)
        self._flos += self._update_flos()
        # The step's one wait for the device.
        finding = self._finite_updates(model, loss, sums, self.state.global_step + 1)
        if finding.sums is not None:
            self._record(finding.sums, groups)
        self._sums["skipped_updates"] += finding.skipped
        last = self.accelerator.sync_gradients
        self._engine_is_stale |= last
        self._micro_step = 0 if last else self._micro_step + 1
        self._sums["updates"] += last
        # The statistics have waited for the device, so the clock tells the whole step.
        self._sums["time_step"] += time.perf_counter() - started
        for name, seconds in self._stopwatch.read().items():
            self._sums[name] += seconds
        return loss

    def rollout(self, examples: Sequence[dict[str, Any]]) -> list[list[Rollout]]:
        """K rationales for each example, drawn by the seed, the step and its place in the batch."""
        prompts = [encode_prompt(self.processing_class, e["prompt"]) for e in examples]
        self._refresh_engine()
        here = isinstance(self.engine, TransformersEngine)
        with gathered(self.scorer, self.accelerator) if here else nullcontext():
            samples = self.engine.generate(
                prompts,
                num_samples=self.args.num_generations,
                max_new_tokens=self.args.max_completion_length,
                temperature=self.args.temperature,
                seeds=self._rollout_seeds(len(prompts)),
                template=self.task.answer_template,
            )
        return [
            [self.join(prompt, sample, example["answer"]) for sample in group]
            for prompt, group, example in zip(prompts, samples, examples, strict=True)
        ]

    def _with_plain(
        self, groups: list[list[Rollout]], examples: Sequence[dict[str, Any]]
    ) -> list[list[Rollout]]:
        """The groups, each with its plain answer where the objective reads that."""
        if self.args.objective not in PLAIN_OBJECTIVES:
            return groups
        return [
            [
                *group,
                replace(self.join(group[0].prompt_ids, Sample([]), example["answer"]), plain=True),
            ]
            for group, example in zip(groups, examples, strict=True)
        ]

    def _make_engine(self) -> RolloutEngine:
        if self.args.rollout_engine == "transformers":
            return TransformersEngine(self.model, self.processing_class)
        if is_sharded(self.accelerator) and has_adapter(self.model):
            raise ValueError(
                "rollout_engine: expected transformers where a model with an adapter is in shards, "
                "got vllm, which is handed whole weights with the adapter merged into them"
            )
        return VllmEngine(
            self.args.vllm_url,
            self.processing_class,
            eos_token_ids=eos_token_ids(self.model, self.processing_class),
            weights_dir=self.args.vllm_weights_dir or Path(self.args.output_dir) / "vllm_weights",
        )

    def _refresh_engine(self) -> None:
        """Hand the engine the policy, where it has changed since."""
        if not self._engine_is_stale:
            return
        weights = None
        if is_sharded(self.accelerator) and not isinstance(self.engine, TransformersEngine):
            # All processes give their shards; the main one has the whole.
            weights = self.accelerator.get_state_dict(self.model_wrapped)
        if self.accelerator.is_main_process:
            self.engine.update_weights(self.model, self.state.global_step, weights)
        self.accelerator.wait_for_everyone()
        self._engine_is_stale = False

    def _rollout_seeds(self, count: int) -> list[int]:
        # From the step and the place in the whole batch, and not from a running random state, so
        # that a resumed run draws the same, and so does one on another number of processes.
        batch = self._micro_step * self.accelerator.num_processes + self.accelerator.process_index
        first = batch * self.args.per_device_train_batch_size
        entropy = (self.args.seed, self.state.global_step)
        return [seed_of(*entropy, first + index) for index in range(count)]

    def _update_flos(self) -> int:
        # 2 FLOP a parameter and token: policy forward, twice that backward, reference forward.
        passes = 3 + (self.ref_scorer is not None)
        return 2 * passes * self.model.num_parameters() * self.update.trunk_tokens

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of the last update; the Trainer adds them up."""
        flos, self._flos = self._flos, 0
        return flos

    # What is logged.

    def _record(self, sums: list[float], groups: list[list[Rollout]]) -> None:
        """Add a step's statistics to the sums."""
        values = dict(zip(statistics.NAMES, sums, strict=True))
        for name, value in (values | rollout_sums(groups)).items():
            self._sums[name] += value
        self._sums["trunk_tokens"] += self.update.trunk_tokens
        if self.update.importance is not None:
            total, largest = self.update.importance.tolist()
            self._sums["importance_ratio"] += total
            self._sums["importance_ratio_max"] = max(self._sums["importance_ratio_max"], largest)
        if self.completions_table:
            group = groups[0][: self.args.num_completions_to_print]
            self.completions_table.rows = [
                (
                    decode(self.processing_class, r.prompt_ids),
                    decode(self.processing_class, r.sampled_ids),
                    decode(self.processing_class, r.answer_ids),
                )
                for r in group
            ]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the update's own statistics since the last log."""
        if "loss" in logs and self._sums["updates"]:
            logs = {**logs, **self._averages()}
            self._sums.clear()
        super().log(logs, start_time)

    def _averages(self) -> dict[str, float]:
        """Over all processes, and the largest memory of them."""
        memory = statistics.peak_memory_gib(self.args.device)
        sums = dict(self._sums)
        if self.accelerator.num_processes > 1:
            everyone = gather_object([(sums, memory)])
            sums = statistics.over_processes([s for s, _ in everyone])
            memory = max(m for _, m in everyone)
        return statistics.averages(sums) | {"peak_memory_gib": memory}

    # Evaluation.

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Greedy and sampled accuracy on held-out rows; see `latro.evaluation`.

        Raises:
            ValueError: neither the call nor the trainer has an evaluation dataset.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset: expected a dataset, got None")
        started = time.perf_counter()
        settings = EvaluationSettings(
            max_completion_length=self.args.max_completion_length,
            batch_size=self.args.per_device_eval_batch_size,
            temperature=self.args.temperature,
            seed=self.args.seed,
            token_budget=self.update.token_budget,
        )
        self.scorer.caller = self.model_wrapped
        with self.accelerator.autocast(), gathered(self.scorer, self.accelerator):
            metrics, _ = evaluate_model(
                self.scorer,
                self.processing_class,
                self.task,
                dataset,
                settings,
                accelerator=self.accelerator,
            )
        metrics["runtime"] = time.perf_counter() - started
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Attention passes its rate to the kernel by value.
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch is its rows: tokenising them is the rollout's."""
    return {"examples": examples}
