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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from latro.config.training import LatroConfig
from latro.model.adapters import has_adapter
from latro.model.distribution import follow_fp32_weights, prepare_reference
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
from latro.rollout.sequences import Rollout, Sample
from latro.run.identity import Facts, weights_fingerprint
from latro.sampling_trainer import SamplingTrainer
from latro.tasks import Task
from latro.update.coefficients import ObjectiveCoefficients
from latro.update.nonfinite import Finding

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class LatroTrainer(SamplingTrainer):
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
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            task=task,
            coefficients=ObjectiveCoefficients(args),
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            callbacks=callbacks,
            temperature=args.temperature,
        )
        self.targets = f"{args.num_generations} rationales each"
        self.update.ref_scorer = self._make_ref_scorer(ref_model)
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

    @property
    def ref_scorer(self) -> Scorer | AdapterOff | InitialAdapter | None:
        """The scorer of π_0."""
        return self.update.ref_scorer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `SamplingTrainer` does; a checkpoint has the run's initial adapter too."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call or output_dir is None or not self.args.should_save:
            return
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
        super()._load_optimizer_and_scheduler(checkpoint)

    def _run_identity(self) -> Facts:
        identity = super()._run_identity()
        if isinstance(self.ref_scorer, Scorer):
            weights = weights_fingerprint(self.ref_scorer.model)
            identity["decides"]["reference weights"] = weights
        return identity

    # The update.

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.reports is not None:
            self.reports.reset()
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: int | None = None
    ) -> Tensor:
        """Backpropagate one batch of rows with the update's λ; return the detached loss."""
        if isinstance(self.update.coefficients, ObjectiveCoefficients):
            self.update.coefficients.at_step(self.state.global_step)
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `SamplingTrainer` does; with the λ of the last update, where it has a warm-up."""
        if "loss" in logs and self.args.answer_weight_warmup_steps:
            last = max(0, self.state.global_step - 1)
            logs = {**logs, "answer_weight": self.args.answer_weight_at(last)}
        super().log(logs, start_time)

    def _end_step(self, finding: Finding) -> None:
        super()._end_step(finding)
        if self.reports is not None:
            last = self.accelerator.sync_gradients
            self.reports.add(self.update.outcomes, last=last, skipped=finding.skipped)

    def _rollouts(self, examples: Sequence[dict[str, Any]]) -> list[list[Rollout]]:
        groups = super()._rollouts(examples)
        if self.args.objective not in PLAIN_OBJECTIVES:
            return groups
        return [
            [*group, replace(self.join(group[0].prompt_ids, Sample([]), e["answer"]), plain=True)]
            for group, e in zip(groups, examples, strict=True)
        ]


def _check_apart(ref_model: nn.Module, policy: nn.Module) -> None:
    """Raise ValueError for a reference that changes as the policy does."""
    trained = {parameter for parameter in policy.parameters() if parameter.requires_grad}
    if any(parameter in trained for parameter in ref_model.parameters()):
        raise ValueError(
            "ref_model: expected a model with weights of its own, got one that has the policy's; "
            "leave ref_model out, or pass a copy"
        )
