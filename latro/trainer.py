"""`LatroTrainer`: the LaTRO update inside Hugging Face's Trainer.

One update, for N prompts x with answers y and K rationales z each (arXiv 2411.04282):

    r_k = log π(y|x⊕z_k) − β [log π(z_k|x) − log π_0(z_k|x)]
    A_k = r_k − mean_{j≠k} r_j
    loss = −1/(NK) Σ [A_k log π(z_k|x) + λ log π(y|x⊕z_k)]        A_k held constant

With kl="k3" the KL stands in the loss in place of the reward, with kl="exact" in both.

One policy forward over x⊕z⊕y gives both log-probs, since attention is causal; one reference
forward gives log π_0, or the hidden states that an exact KL needs; the objective, LaTRO or a
relative of it (`latro.objectives`), turns them into one coefficient per row; one backward follows
(`latro.update.gradient`). The optimiser, schedule, precision, accumulation, checkpoints, callbacks
and reporting are the Trainer's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from latro.base_trainer import AnswerTrainer
from latro.config.training import AnswerConfig, LatroConfig
from latro.engines.ahead import Request, RolloutsAhead
from latro.engines.make import make_engine
from latro.engines.transformers import TransformersEngine, seed_of
from latro.engines.vllm import VllmEngine
from latro.engines.vllm_sampling import check_length
from latro.evaluation.accuracy import most_new_tokens
from latro.model.adapters import has_adapter
from latro.model.distribution import (
    follow_fp32_weights,
    gathered,
    is_sharded,
    prepare_reference,
)
from latro.model.initial import (
    AdapterOff,
    InitialAdapter,
    adds_nothing,
    initial_of_checkpoint,
    trained_weights,
)
from latro.model.scoring import Scorer
from latro.objectives import PLAIN_OBJECTIVES
from latro.reporting.callbacks import CompletionsTable
from latro.reporting.collapse import CollapseWarnings
from latro.reporting.trackers import SequenceReports, sinks_of
from latro.rollout.prompts import check_dataset, encode_prompt
from latro.rollout.sequences import Rollout, RolloutEngine, Sample
from latro.run.identity import Facts, weights_fingerprint
from latro.tasks import Task
from latro.update.coefficients import ObjectiveCoefficients
from latro.update.metrics import rollout_sums
from latro.update.nonfinite import Finding

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class LatroTrainer(AnswerTrainer):
    """Trains a causal language model on the likelihood that its own rationales give the answers.

    Args:
        model: the policy; `model.generation_config` is not used for sampling. Its dropout is set to
            0, since a rationale must be scored by the policy that sampled it. Of a `PeftModel` the
            adapter is trained.
        args: the settings.
        train_dataset: rows with `prompt`, a string or messages, and `answer`, a string.
        processing_class: the model's tokenizer.
        task: its answer template ends rationales and opens answers; it grades in evaluation.
        eval_dataset: held-out rows for `evaluate()`.
        ref_model: π_0. None: no reference if β is 0; for a model with an adapter, the model with
            the adapter as it is now; otherwise a frozen copy. A resumed run has the π_0 that it
            began with.
        peft_config: puts an adapter on `model`, and that is trained; needs the package peft.
        callbacks: added to the Trainer's own; None for none.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a row that cannot be trained on, or a model that cannot be scored.
    """

    panels = (
        ("reward: mean log π(y|x⊕z), nats", ("reward",)),
        ("held-out accuracy", ("eval_accuracy_greedy", "eval_accuracy_sampled")),
        ("rationale length, tokens", ("rationale_length",)),
        ("KL to the initial model, nats", ("kl",)),
    )
    args: LatroConfig

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
        callbacks: Sequence[TrainerCallback] | None = None,
    ) -> None:
        if not isinstance(args, LatroConfig):
            raise TypeError(f"args: expected a LatroConfig, got {type(args).__name__}")
        super().__init__(
            model,
            args,
            train_dataset,
            processing_class,
            task,
            coefficients=ObjectiveCoefficients(args),
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            callbacks=callbacks,
            temperature=args.temperature,
        )
        self.targets = f"{args.num_generations} rationales each"
        self.update.ref_scorer = self._make_ref_scorer(ref_model)
        self.engine = make_engine(
            args,
            model=self.model,
            tokenizer=processing_class,
            folder=args.output_dir,
            sharded=is_sharded(self.accelerator),
        )
        self._check_engine_length()
        self._engine_is_stale = True
        self._micro_step = 0
        self._groups: list[list[Rollout]] = []
        self._sampling: dict[str, Any] = {
            "num_samples": args.num_generations,
            "max_new_tokens": args.max_completion_length,
            "temperature": args.temperature,
            "template": self.join.ending,
        }
        self._ahead: RolloutsAhead | None = None
        if args.async_rollouts and isinstance(self.engine, VllmEngine):
            self._ahead = RolloutsAhead(self.engine, self._sampling)
        self._of_update: list[dict[str, Any]] = []
        self._drawn: dict[int, list[Sample]] = {}
        self.add_callback(CollapseWarnings())
        sinks = sinks_of(self.callback_handler.callbacks)
        if args.log_completions:
            sinks.append(CompletionsTable())
        self.reports: SequenceReports | None = None
        if sinks:
            self.reports = SequenceReports(
                sinks,
                processing_class,
                self.accelerator,
                num_generations=args.num_generations,
                num_samples=args.num_completions_to_print,
            )
            self.add_callback(self.reports)

    def _make_ref_scorer(
        self, ref_model: PreTrainedModel | None
    ) -> Scorer | AdapterOff | InitialAdapter | None:
        """Return the scorer of π_0; None where β is 0 and no reference is given."""
        if ref_model is None:
            if self.args.beta == 0:
                return None
            if has_adapter(self.model):
                self._trained = trained_weights(self.model)
                off = adds_nothing(self.model)
                return self._ref_of_adapter(None if off else self._trained)
            ref_model = copy.deepcopy(self.model)
        else:
            _check_apart(ref_model, self.model)
        follow_fp32_weights(ref_model, self.model, self.accelerator)
        ref_model.requires_grad_(False).eval().to(self.args.device)
        ref_scorer = Scorer(ref_model, temperature=self.args.temperature, backend=self.args.backend)
        self.scorer.check_comparable(ref_scorer, exact=self.args.kl == "exact")
        # Both read the same batches: KL is exactly 0 while both models are equal.
        self.scorer.packed &= ref_scorer.packed
        prepare_reference(ref_scorer, self.accelerator)
        return ref_scorer

    def _check_engine_length(self) -> None:
        """Raise ValueError where a rollout, or an evaluation, is too long for the engine."""
        args = self.args
        if self.train_dataset is not None:
            check_length(self.engine, self._longest.prompt + args.max_completion_length)
        evaluates = args.eval_on_start or args.eval_strategy != IntervalStrategy.NO
        if self.eval_dataset is not None and evaluates:
            longest = self._longest_held_out
            most = most_new_tokens(self.model, longest, args.max_completion_length)
            check_length(self.engine, longest.prompt + most)

    @property
    def ref_scorer(self) -> Scorer | AdapterOff | InitialAdapter | None:
        """The scorer of π_0."""
        return self.update.ref_scorer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `AnswerTrainer` does; a checkpoint has the run's initial adapter too.

        Where rollouts of the next update are under way, it waits for them and has them too.
        """
        super().save_model(output_dir, _internal_call)
        if not _internal_call or output_dir is None:
            return
        drawn = gather_object([self._ahead.state()]) if self._ahead is not None else []
        if not self.args.should_save:
            return
        if self._ahead is not None:
            self._ahead.save(Path(output_dir), drawn)
        if isinstance(self.ref_scorer, InitialAdapter):
            self.ref_scorer.save(Path(output_dir))

    def _ref_of_adapter(self, initial: Mapping[str, Tensor] | None) -> AdapterOff | InitialAdapter:
        """Return the policy with `initial` for what is trained; where None, with adapters off."""
        if initial is None:
            return AdapterOff(self.scorer)
        return InitialAdapter(self.scorer, initial, self.accelerator)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Called wherever a run goes on, whatever the engine.
        if checkpoint is not None and isinstance(self.ref_scorer, (AdapterOff, InitialAdapter)):
            initial = initial_of_checkpoint(Path(checkpoint), self._trained)
            self.update.ref_scorer = self._ref_of_adapter(initial)
        if checkpoint is not None and self._ahead is not None:
            self._ahead.load(Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _check_train_dataset(
        self, dataset: Dataset, model: PreTrainedModel | PeftModel, args: AnswerConfig
    ) -> None:
        self._longest = check_dataset(
            dataset,
            name="train_dataset",
            model=model,
            join=self.join,
            max_completion_length=args.max_completion_length,
        )

    def _run_identity(self) -> Facts:
        identity = super()._run_identity()
        if isinstance(self.ref_scorer, Scorer):
            weights = weights_fingerprint(self.ref_scorer.model)
            identity["decides"]["reference weights"] = weights
        return identity

    # The update.

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # A checkpoint may have been loaded.
        self._engine_is_stale = True
        self._micro_step = 0
        if self.reports is not None:
            self.reports.reset()
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            if self._ahead is not None:
                self._ahead.cancel()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: int | None = None
    ) -> Tensor:
        """Backpropagate one batch of rows with the update's λ; return the detached loss."""
        if isinstance(self.update.coefficients, ObjectiveCoefficients):
            self.update.coefficients.at_step(self.state.global_step)
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `AnswerTrainer` does; with the λ of the last update, where it has a warm-up."""
        if "loss" in logs and self.args.answer_weight_warmup_steps:
            last = max(0, self.state.global_step - 1)
            logs = {**logs, "answer_weight": self.args.answer_weight_at(last)}
        super().log(logs, start_time)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """Return an update's batches as `AnswerTrainer` does; those after it may be seen ahead."""
        if self._ahead is not None:
            epoch_iterator = self._ahead.watch(epoch_iterator)
        self._of_update, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._of_update, count

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._engine_is_stale = True

    def _end_step(self, finding: Finding) -> None:
        if finding.sums is not None:
            for name, value in rollout_sums(self._groups).items():
                self._sums[name] += value
            ratios = [o.importance for o in self.update.outcomes if o.importance is not None]
            if ratios:
                # The device has been waited for already, so that this costs one short copy.
                totals, largest = zip(*torch.stack(ratios).tolist(), strict=True)
                self._sums["importance_ratio"] += sum(totals)
                so_far = self._sums["importance_ratio_max"]
                self._sums["importance_ratio_max"] = max(so_far, *largest)
        last = self.accelerator.sync_gradients
        self._engine_is_stale |= last
        self._micro_step = 0 if last else self._micro_step + 1
        if self.reports is not None:
            self.reports.add(self.update.outcomes, last=last, skipped=finding.skipped)

    def _rollouts(self, examples: Sequence[dict[str, Any]]) -> list[list[Rollout]]:
        with self.update.stopwatch.lap("time_rollout"):
            if self._ahead is None:
                self._groups = self.rollout(examples)
            else:
                self._groups = self._rollout_ahead(self._ahead, examples)
        if self.args.objective not in PLAIN_OBJECTIVES:
            return self._groups
        return [
            [*group, replace(self.join(group[0].prompt_ids, Sample([]), e["answer"]), plain=True)]
            for group, e in zip(self._groups, examples, strict=True)
        ]

    def rollout(self, examples: Sequence[dict[str, Any]]) -> list[list[Rollout]]:
        """Sample K rationales for each example, by the seed, the step and its place in a batch."""
        requests = self._requests(
            [examples], step=self.state.global_step, first_batch=self._micro_step
        ).values()
        self._refresh_engine()
        here = isinstance(self.engine, TransformersEngine)
        whole = gathered(self.scorer, self.accelerator) if here else nullcontext()
        # One autocast around all decoding steps, so that fp32 weights are cast once.
        with self.accelerator.autocast(), whole:
            if not requests:
                # Other processes have all of them; the weights are gathered by all together.
                return []
            samples = self.engine.generate(
                [request.prompt for request in requests],
                seeds=[request.seed for request in requests],
                **self._sampling,
            )
        return self._joined(requests, samples, examples)

    def _rollout_ahead(
        self, ahead: RolloutsAhead, examples: Sequence[dict[str, Any]]
    ) -> list[list[Rollout]]:
        """Return the rollouts that were requested, and request those of the next update."""
        step = self.state.global_step
        if self._micro_step == 0:
            now = self._requests((b["examples"] for b in self._of_update), step=step)
            if not ahead.requested:
                self._refresh_engine()
                ahead.request(now)
            self._drawn = ahead.take(now)
            self._refresh_engine()
            if step + 1 < self.state.max_steps:
                coming = ahead.batches.peek(self.args.gradient_accumulation_steps)
                ahead.request(self._requests((b["examples"] for b in coming), step=step + 1))
        requests = self._requests([examples], step=step, first_batch=self._micro_step)
        samples = [self._drawn[place] for place in requests]
        return self._joined(requests.values(), samples, examples)

    def _joined(
        self,
        requests: Iterable[Request],
        samples: Sequence[Sequence[Sample]],
        examples: Sequence[dict[str, Any]],
    ) -> list[list[Rollout]]:
        return [
            [self.join(request.prompt, sample, example["answer"]) for sample in group]
            for request, group, example in zip(requests, samples, examples, strict=True)
        ]

    def _evaluation_engine(self) -> RolloutEngine:
        # Schedule-free optimisers put other weights into the model here than in training.
        # accelerate's wrapper around an optimiser has the method in any case.
        other_weights = hasattr(getattr(self.optimizer, "optimizer", self.optimizer), "eval")
        self._engine_is_stale |= other_weights
        self._refresh_engine()
        self._engine_is_stale |= other_weights
        return self.engine

    def _refresh_engine(self) -> None:
        """Hand the engine the policy, where it has changed since."""
        if not self._engine_is_stale:
            return
        if self._ahead is not None:
            # No process has requests under way while the server's weights are replaced.
            self._ahead.drain()
            self.accelerator.wait_for_everyone()
        weights = None
        if is_sharded(self.accelerator) and isinstance(self.engine, VllmEngine):
            # All processes give their shards; the main one has the whole.
            weights = self.accelerator.get_state_dict(self.model_wrapped)
        # A server is every process's; what samples in this process has weights of its own.
        if self.accelerator.is_main_process or not isinstance(self.engine, VllmEngine):
            self.engine.update_weights(self.model, self.state.global_step, weights)
        self.accelerator.wait_for_everyone()
        self._engine_is_stale = False

    def _requests(
        self, batches: Iterable[Sequence[dict[str, Any]]], *, step: int, first_batch: int = 0
    ) -> dict[int, Request]:
        """Return the prompts of an update's batches with their seeds, by place in the whole update.

        Seeds are made from the step and the place, not by a running state, so that a resumed run
        draws the same, and so does one on another number of processes.
        """
        requests = {}
        for number, examples in enumerate(batches, first_batch):
            batch = number * self.accelerator.num_processes + self.accelerator.process_index
            for place, example in enumerate(examples, batch * self._train_batch_size):
                prompt = encode_prompt(self.processing_class, example["prompt"], self.join.frame)
                requests[place] = Request(prompt, seed_of(self.args.seed, step, place))
        return requests


def _check_apart(ref_model: nn.Module, policy: nn.Module) -> None:
    """Raise ValueError for a reference that changes as the policy does."""
    trained = {parameter for parameter in policy.parameters() if parameter.requires_grad}
    if any(parameter in trained for parameter in ref_model.parameters()):
        raise ValueError(
            "ref_model: expected a model with weights of its own, got one that has the policy's; "
            "leave ref_model out, or pass a copy"
        )
