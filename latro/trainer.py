"""`LatroTrainer`: the LaTRO update inside Hugging Face's Trainer.

One update, for N prompts x with answers y and K rationales z each (arXiv 2411.04282):

    r_k = log π(y|x⊕z_k) − β [log π(z_k|x) − log π_0(z_k|x)]
    A_k = r_k − mean_{j≠k} r_j
    loss = −1/(NK) Σ [A_k log π(z_k|x) + λ log π(y|x⊕z_k)]        A_k held constant

With kl="k3" or "exact" the KL stands in the loss, and not in the reward.

One policy forward over x⊕z⊕y gives both log-probs, since attention is causal; one reference
forward gives log π_0, or the hidden states that an exact KL needs; `group_advantage` turns them
into one coefficient a row; one backward follows. The optimiser, schedule, precision, accumulation,
checkpoints, callbacks and reporting are the Trainer's.
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from latro.callbacks import CompletionsTable, MetricsFiles, ProgressBar
from latro.config import LatroConfig
from latro.evaluation import EvaluationSettings, evaluate_model
from latro.layout import Batch, MicroBatch, collate, group_layout, plan
from latro.long_run import LongRunTrainer
from latro.prompts import check_dataset, encode_prompt
from latro.rollout import AnswerJoin, Rollout, decode, eos_token_ids, generate
from latro.scoring import Reference, Scorer
from latro.stopwatch import Stopwatch
from latro.tasks import Task
from latro_kernels import GroupAdvantage, group_advantage


class LatroTrainer(LongRunTrainer):
    """Trains a causal language model on the likelihood that its own rationales give the answers.

    Args:
        model: the policy; `model.generation_config` is not used for sampling. Its dropout is set to
            0, since a rationale must be scored by the policy that sampled it.
        args: the settings.
        train_dataset: rows with `prompt` and `answer`, both strings.
        processing_class: the model's tokenizer.
        task: its answer template ends rationales and opens answers; it grades in evaluation.
        eval_dataset: held-out rows for `evaluate()`.
        ref_model: π_0; None: a frozen copy of `model` as it is now. Not made when β is 0.
        callbacks: added to the Trainer's own.

    Raises:
        ValueError: a row that cannot be trained on, or a model that cannot be scored.
    """

    args: LatroConfig
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: PreTrainedModel,
        args: LatroConfig,
        train_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        task: Task,
        *,
        eval_dataset: Dataset | None = None,
        ref_model: PreTrainedModel | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
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
        if ref_model is None and args.beta > 0:
            ref_model = copy.deepcopy(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=_collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=list(callbacks),
        )
        self.scorer = Scorer(model, temperature=args.temperature, backend=args.backend)
        self.ref_scorer: Scorer | None = None
        if ref_model is not None:
            _disable_dropout(ref_model)
            ref_model.requires_grad_(False).eval().to(self.args.device)
            self.ref_scorer = Scorer(ref_model, temperature=args.temperature, backend=args.backend)
            if args.kl == "exact":
                self.scorer.check_comparable(self.ref_scorer)
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._flos = 0
        self._micro_step = 0
        self._stopwatch = Stopwatch(self.args.device)
        for shown in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown)
        self.add_callback(MetricsFiles())
        if not args.disable_tqdm:
            self.add_callback(ProgressBar())
        self.completions_table = CompletionsTable() if args.log_completions else None
        if self.completions_table:
            self.add_callback(self.completions_table)

    # The update.

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Sample, score and backpropagate one batch of prompts; returns the detached loss."""
        started = time.perf_counter()
        model.train()
        with self.compute_loss_context_manager(), self._stopwatch.lap("time_rollout"):
            groups = self.rollout(inputs["examples"])
        num_groups = len(groups) * self.current_gradient_accumulation_steps
        loss = torch.zeros((), device=self.args.device)
        stats = torch.zeros(len(_STATISTICS), dtype=torch.float64, device=self.args.device)
        for micro in plan(groups, self.args.token_budget):
            micro_loss, micro_stats = self._backward(micro, num_groups)
            loss += micro_loss
            stats += micro_stats
        self._record(stats, groups)
        last = self.accelerator.sync_gradients
        self._micro_step = 0 if last else self._micro_step + 1
        self._sums["updates"] += last
        # The statistics have waited for the device, so the clock tells the whole step.
        self._sums["time_step"] += time.perf_counter() - started
        for name, seconds in self._stopwatch.read().items():
            self._sums[name] += seconds
        return loss

    def rollout(self, examples: Sequence[dict[str, Any]]) -> list[list[Rollout]]:
        """K rationales for each example, drawn by the seed, the step and nothing else."""
        prompts = [encode_prompt(self.processing_class, e["prompt"]) for e in examples]
        completions = generate(
            self.model,
            self.processing_class,
            prompts,
            num_samples=self.args.num_generations,
            max_new_tokens=self.args.max_completion_length,
            temperature=self.args.temperature,
            seed=self._rollout_seed(),
            template=self.task.answer_template,
        )
        return [
            [self.join(prompt, ids, example["answer"]) for ids in samples]
            for prompt, samples, example in zip(prompts, completions, examples, strict=True)
        ]

    def _rollout_seed(self) -> int:
        # From the step and not from a running random state, so that a resumed run draws the same.
        return (self.args.seed * 1_000_003 + self.state.global_step) * 1_009 + self._micro_step

    def _backward(self, micro: MicroBatch, num_groups: int) -> tuple[Tensor, Tensor]:
        """Accumulate one micro-batch's gradient; returns its loss and the sums of its statistics.

        In one piece the policy's forward serves the coefficients and the gradient. A group over the
        token budget comes in several: all are scored without gradient first, because an advantage
        needs its whole group, and then each is run once more for its gradient.
        """
        batches = [collate(piece, self.args.device) for piece in micro.pieces]
        whole = len(batches) == 1
        with self._stopwatch.lap("time_score"):
            with self.compute_loss_context_manager():
                references = [self._reference(batch) for batch in batches]
                with torch.set_grad_enabled(whole):
                    scores = [
                        self.scorer(batch, reference)
                        for batch, reference in zip(batches, references, strict=True)
                    ]
                ref_logp = self._ref_logp(batches)
            layout = group_layout(batches, self.args.num_generations, num_groups)
            advantage = group_advantage(
                torch.cat([s.logp for s in scores]),
                ref_logp,
                layout,
                beta=self.args.beta,
                answer_weight=self.args.answer_weight,
                kl=self.args.kl,
                unfinished=self.args.unfinished,
                row_kl=_cat([s.row_kl for s in scores]),
                backend=self.args.backend,
            )

        loss = torch.zeros((), device=self.args.device)
        end = 0
        with self._stopwatch.lap("time_backward"):
            for batch, reference, score in zip(batches, references, scores, strict=True):
                rows = slice(end, end := end + batch.num_rows)
                with self.compute_loss_context_manager():
                    piece = score if whole else self.scorer(batch, reference)
                    piece_loss = (advantage.coefficient[rows] * piece.logp).sum()
                    if piece.row_kl is not None and advantage.kl_coefficient is not None:
                        piece_loss = (
                            piece_loss + (advantage.kl_coefficient[rows] * piece.row_kl).sum()
                        )
                self.accelerator.backward(piece_loss)
                loss += piece_loss.detach()
        self._flos += sum(self._batch_flos(batch.input_ids) for batch in batches)
        entropy = torch.cat([s.entropy for s in scores])
        return loss, _statistics(advantage, entropy, layout.offsets, self.args.num_generations)

    @torch.no_grad()
    def _reference(self, batch: Batch) -> Reference | None:
        """π_0 at the rows of a batch, where the KL is exact."""
        if self.ref_scorer is None or self.args.kl != "exact":
            return None
        return Reference(self.ref_scorer, self.ref_scorer.hidden(batch))

    @torch.no_grad()
    def _ref_logp(self, batches: Sequence[Batch]) -> Tensor | None:
        """log π_0 of the rows of all batches, where the KL is of sampled tokens."""
        if self.ref_scorer is None or self.args.kl == "exact":
            return None
        return torch.cat([self.ref_scorer(batch).logp for batch in batches])

    def _batch_flos(self, input_ids: Tensor) -> int:
        # 2 FLOP a parameter and token: policy forward, twice that backward, reference forward.
        passes = 3 + (self.ref_scorer is not None)
        return 2 * passes * self.model.num_parameters() * input_ids.numel()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of the last update; the Trainer adds them up."""
        flos, self._flos = self._flos, 0
        return flos

    # What is logged.

    def _record(self, stats: Tensor, groups: list[list[Rollout]]) -> None:
        """Add a step's statistics to the sums; the step's one wait for the device."""
        values = dict(zip(_STATISTICS, stats.tolist(), strict=True))
        rollouts = [rollout for group in groups for rollout in group]
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(
                f"step {self.state.global_step}: the log-probs or advantages are not finite "
                f"({values}); check the weights for NaN, lower the learning rate or use fp32. "
                "The last checkpoint is untouched"
            )
        for name, value in values.items():
            self._sums[name] += value
        self._sums["sequences"] += len(rollouts)
        self._sums["groups"] += len(groups)
        self._sums["rationale_tokens"] += sum(len(r.rationale_ids) for r in rollouts)
        self._sums["unfinished"] += sum(not r.finished for r in rollouts)
        self._sums["rows"] += sum(len(r.sampled_ids) + len(r.answer_ids) for r in rollouts)
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
        if "loss" in logs and self._sums["sequences"]:
            logs = {**logs, **self._averages()}
            self._sums.clear()
        super().log(logs, start_time)

    def _averages(self) -> dict[str, float]:
        sums = self._sums
        sequences, groups = sums["sequences"], sums["groups"]
        updates = max(1.0, sums["updates"])
        averages = {
            "reward": sums["answer_logp"] / sequences,
            "kl": sums["kl"] / sequences,
            "entropy": sums["entropy"] / max(1.0, sums["rationale_rows"]),
            # About 0, which is the mean of leave-one-out advantages.
            "advantage_std": (sums["advantage_squared"] / sequences) ** 0.5,
            "groups_without_advantage": sums["flat_groups"] / groups,
            "rationale_length": sums["rationale_tokens"] / sequences,
            "unfinished": sums["unfinished"] / sequences,
            "rows_per_second": sums["rows"] / sums["time_step"],
        }
        for name in ("time_rollout", "time_score", "time_backward", "time_step"):
            averages[name] = sums[name] / updates
        averages["peak_memory_gib"] = _peak_memory_gib(self.args.device)
        return averages

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
        with self.compute_loss_context_manager():
            metrics, _ = evaluate_model(
                self.scorer,
                self.processing_class,
                self.task,
                dataset,
                EvaluationSettings(
                    max_completion_length=self.args.max_completion_length,
                    batch_size=self.args.per_device_eval_batch_size,
                    temperature=self.args.temperature,
                    seed=self.args.seed,
                    token_budget=self.args.token_budget,
                ),
            )
        metrics["runtime"] = time.perf_counter() - started
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


_STATISTICS = (
    "answer_logp",
    "kl",
    "advantage_squared",
    "flat_groups",
    "entropy",
    "rationale_rows",
)


def _statistics(
    advantage: GroupAdvantage, entropy: Tensor, offsets: Tensor, num_generations: int
) -> Tensor:
    """Sums over a micro-batch of what `_STATISTICS` names, fp64, left on the device."""
    flat = (advantage.advantage.view(-1, num_generations) == 0).all(dim=1)
    # A row is a rationale's where it stands in an even segment.
    row = torch.arange(entropy.shape[0], device=entropy.device)
    rationale = torch.searchsorted(offsets, row, right=True) % 2 == 1
    return torch.stack(
        [
            advantage.answer_logp.double().sum(),
            advantage.kl.double().sum(),
            advantage.advantage.double().square().sum(),
            flat.double().sum(),
            (entropy.double() * rationale).sum(),
            rationale.double().sum(),
        ]
    )


def _cat(rows: Sequence[Tensor | None]) -> Tensor | None:
    """All of them or none are there."""
    there = [t for t in rows if t is not None]
    return torch.cat(there) if there else None


def _peak_memory_gib(device: torch.device) -> float:
    """Of the device since the start; of the process, resident, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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
