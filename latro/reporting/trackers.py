"""Sequences of the updates, as histograms and a table of samples, to whoever watches a run.

Scalars go to TensorBoard, Weights & Biases or Trackio by the callbacks of transformers
(`--report_to`). Into the very runs that those have opened go, whenever the run logs:

    train/advantages          histogram of A, of every sequence since the last log, of all processes
    train/rationale_lengths   histogram of the rationales' lengths in tokens, of the same sequences
    train/samples             table: prompt, rationale, answer, reward, advantage; of one prompt

An update that was skipped shows in none of them. Values stay on the device until then: logging
waits for the loss anyway, and the step for nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from latro.rollout.sequences import Rollout, decode
from latro.terminal import shown
from latro.update.metrics import Outcome


@dataclass(frozen=True)
class Sample:
    """One sequence to read: texts to the letter, special tokens and what ended it included."""

    prompt: str
    rationale: str
    answer: str
    reward: float
    advantage: float


@dataclass(frozen=True)
class Report:
    """What was seen since the last log."""

    advantages: list[float]
    rationale_lengths: list[int]
    samples: list[Sample]
    """Of the first prompt of the last update, in the main process."""


class Sink(Protocol):
    """Who shows a report; called in the main process alone."""

    def __call__(self, step: int, report: Report) -> None: ...


@dataclass
class _Seen:
    rewards_and_advantages: list[Tensor] = field(default_factory=list)
    """[2, S] each, on the device."""
    rationale_lengths: list[int] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    """The first group of the last update alone, so that a log's worth of token ids is not kept."""
    first: int = 0
    """Where that group stands among the sequences."""


class SequenceReports(TrainerCallback):
    """Hands a `Report` to each sink whenever the run logs its updates.

    Args:
        sinks: who shows it.
        tokenizer: of the samples.
        accelerator: knows the processes, whose sequences are gathered.
        num_generations: K, sequences of one prompt.
        num_samples: sequences of the table, at most K; 0: none.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        *,
        num_generations: int,
        num_samples: int,
    ) -> None:
        self.sinks = sinks
        self.tokenizer = tokenizer
        self.accelerator = accelerator
        self.num_generations = num_generations
        self.num_samples = num_samples
        self._update: list[Outcome] = []
        self._seen = _Seen()

    def reset(self) -> None:
        """Forget what was seen, and an update that an error ended half-way."""
        self._update = []
        self._seen = _Seen()

    def add(self, outcomes: Sequence[Outcome], *, last: bool, skipped: bool) -> None:
        """Take in an accumulation step.

        Args:
            outcomes: its sequences.
            last: the update ends with it.
            skipped: that update was skipped, and none of its sequences is reported.
        """
        self._update += outcomes
        if not last:
            return
        if not skipped:
            self._take(self._update)
        self._update = []

    def _take(self, outcomes: Sequence[Outcome]) -> None:
        seen = self._seen
        seen.first = len(seen.rationale_lengths)
        # There are none where other processes have all prompts of the update.
        seen.rollouts = [r for outcome in outcomes[:1] for r in outcome.rollouts]
        seen.rollouts = seen.rollouts[: self.num_generations][: self.num_samples]
        for outcome in outcomes:
            seen.rewards_and_advantages.append(torch.stack([outcome.reward, outcome.advantage]))
            seen.rationale_lengths += [len(r.rationale_ids) for r in outcome.rollouts]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # All processes are here together at a log of updates, with or without sequences to tell of.
        if not logs or "loss" not in logs:
            return
        report = self._report()
        if state.is_world_process_zero and report.advantages:
            for sink in self.sinks:
                sink(state.global_step, report)

    def _report(self) -> Report:
        seen, self._seen = self._seen, _Seen()
        rewards: list[float] = []
        advantages: list[float] = []
        if seen.rewards_and_advantages:
            rewards, advantages = torch.cat(seen.rewards_and_advantages, 1).tolist()
        own = slice(seen.first, None)
        samples = [
            Sample(
                prompt=decode(self.tokenizer, rollout.prompt_ids),
                rationale=decode(self.tokenizer, rollout.sampled_ids),
                answer=decode(self.tokenizer, rollout.answer_ids),
                reward=reward,
                advantage=advantage,
            )
            for rollout, reward, advantage in zip(
                seen.rollouts, rewards[own], advantages[own], strict=False
            )
        ]
        lengths = seen.rationale_lengths
        if self.accelerator.num_processes > 1:
            everyone = gather_object([(advantages, lengths)])
            advantages = [value for values, _ in everyone for value in values]
            lengths = [length for _, of_process in everyone for length in of_process]
        return Report(advantages, lengths, samples)


def sinks_of(callbacks: Sequence[TrainerCallback]) -> list[Sink]:
    """A sink for each tracker that a Trainer's callbacks report to."""
    sinks: list[Sink] = []
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            sinks.append(TensorBoard(callback))
        elif isinstance(callback, WandbCallback):
            sinks.append(WeightsAndBiases())
        elif isinstance(callback, TrackioCallback):
            sinks.append(Trackio())
    return sinks


class TensorBoard:
    """Into the writer of the Trainer's callback."""

    def __init__(self, callback: TensorBoardCallback) -> None:
        self.callback = callback

    def __call__(self, step: int, report: Report) -> None:
        writer = self.callback.tb_writer
        if writer is None:
            return
        writer.add_histogram("train/advantages", np.array(report.advantages), step)
        writer.add_histogram("train/rationale_lengths", np.array(report.rationale_lengths), step)
        if report.samples:
            writer.add_text("train/samples", _markdown_table(report.samples), step)
        writer.flush()


class WeightsAndBiases:
    """Into the run that is open."""

    def __call__(self, step: int, report: Report) -> None:
        import wandb

        if wandb.run is not None:
            wandb.log(_media(wandb, step, report))


class Trackio:
    """Into the run that is open."""

    def __call__(self, step: int, report: Report) -> None:
        import trackio

        if trackio.context_vars.current_run.get() is not None:
            trackio.log(_media(trackio, step, report))


def _media(tracker: ModuleType, step: int, report: Report) -> dict[str, Any]:
    """The report in the classes of wandb, which Trackio has by the same names."""
    import pandas as pd

    media: dict[str, Any] = {
        "train/advantages": tracker.Histogram(report.advantages),
        "train/rationale_lengths": tracker.Histogram(report.rationale_lengths),
        # What the Trainer's callbacks draw everything over.
        "train/global_step": step,
    }
    if report.samples:
        rows = pd.DataFrame([astuple(sample) for sample in report.samples], columns=_COLUMNS)
        media["train/samples"] = tracker.Table(dataframe=rows)
    return media


_COLUMNS = [f.name for f in fields(Sample)]


def _markdown_table(samples: Sequence[Sample]) -> str:
    lines = ["|".join(_COLUMNS), "|".join("---" for _ in _COLUMNS)]
    for sample in samples:
        texts = (sample.prompt, sample.rationale, sample.answer)
        cells = [*map(_literal, texts), f"{sample.reward:.4g}", f"{sample.advantage:.4g}"]
        lines.append("|".join(cells))
    return "\n".join(f"|{line}|" for line in lines)


def _literal(text: str) -> str:
    """Text as it is, in a cell of Markdown: no mark-up in it, line ends shown."""
    return "".join(
        "<br>" if c == "\n" else c if c.isalnum() or c == " " else f"&#{ord(c)};"
        for c in shown(text)
    )
