"""`SamplingTrainer`: a trainer whose rollouts an engine samples, from the policy that it trains.

Every update's weights reach the engine before it samples, and every prompt has a seed of its own,
which is made from its place in the run. With `--async_rollouts 1` the rollouts of the next update
are sampled while this one is computed (`latro.engines.ahead`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from latro.base_trainer import AnswerTrainer
from latro.config.training import AnswerConfig, LatroConfig
from latro.engines.ahead import Request, RolloutsAhead
from latro.engines.make import make_engine
from latro.engines.transformers import TransformersEngine, seed_of
from latro.engines.vllm import VllmEngine
from latro.engines.vllm_sampling import check_length
from latro.evaluation.accuracy import most_new_tokens
from latro.model.distribution import gathered, is_sharded
from latro.rollout.dataset_rows import check_dataset
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import Rollout, RolloutEngine, Sample
from latro.update.metrics import rollout_sums
from latro.update.nonfinite import Finding

if TYPE_CHECKING:
    from peft import PeftModel


class SamplingTrainer(AnswerTrainer):
    """Trains on rationales that the policy samples, and evaluates by the same engine.

    Its arguments are those of `AnswerTrainer`; `args`, a `LatroConfig`, names the engine.

    Attributes:
        engine: what samples.

    Raises:
        ValueError: as `AnswerTrainer`, or the engine cannot sample for this model or these lengths.
    """

    args: LatroConfig

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        args = self.args
        self.engine = make_engine(
            args,
            model=self.model,
            tokenizer=self.processing_class,
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

    def _check_train_dataset(
        self, dataset: Dataset, model: PreTrainedModel | PeftModel, args: AnswerConfig
    ) -> None:
        self._longest = check_dataset(
            dataset,
            name="train_dataset",
            model=model,
            join=self.join,
            max_completion_length=args.max_completion_length,
            progress=not args.disable_tqdm,
        )

    # Where a run begins, goes on and is saved.

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # A checkpoint may have been loaded.
        self._engine_is_stale = True
        self._micro_step = 0
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            if self._ahead is not None:
                self._ahead.cancel()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Called wherever a run goes on, whatever the engine.
        if checkpoint is not None and self._ahead is not None:
            self._ahead.load(Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `AnswerTrainer` does.

        A checkpoint waits for rollouts of the next update that are under way, and has them too.
        """
        super().save_model(output_dir, _internal_call)
        if self._ahead is None or not _internal_call or output_dir is None:
            return
        drawn = gather_object([self._ahead.state()])
        if self.args.should_save:
            self._ahead.save(Path(output_dir), drawn)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._engine_is_stale = True

    # Rollouts.

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """Return an update's batches as `AnswerTrainer` does; those after it may be seen ahead."""
        if self._ahead is not None:
            epoch_iterator = self._ahead.watch(epoch_iterator)
        self._of_update, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._of_update, count

    def _rollouts(self, examples: Sequence[dict[str, Any]]) -> list[list[Rollout]]:
        with self.update.stopwatch.lap("time_rollout"):
            if self._ahead is None:
                self._groups = self.rollout(examples)
            else:
                self._groups = self._rollout_ahead(self._ahead, examples)
        return self._groups

    def _end_step(self, finding: Finding) -> None:
        super()._end_step(finding)
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
