"""Report the sequences of updates to trackers, as histograms and a table of samples.

The callbacks of transformers report scalars to TensorBoard, Weights & Biases or Trackio
(`--report_to`). This module adds to the runs that they have opened, whenever the run logs:

    train/advantages          histogram of A over all sequences of all processes since the last log
                              (of each process the latest 100,000, for runs that seldom log)
    train/rationale_lengths   histogram of the same sequences' rationale lengths, in tokens
    train/samples             table for one prompt: prompt, rationale, answer, reward, advantage

Skipped updates are left out. Values stay on the device until a log, which waits for the loss
anyway, so steps need not wait for them.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

from latro.errors import told
from latro.rollout.sequences import Rollout, decode
from latro.terminal import one_line, shown
from latro.update.metrics import Outcome

_MOST_SEQUENCES = 100_000


@dataclass(frozen=True)
class Sample:
    """One sequence as exact text, including special tokens and what ended the rationale."""

    prompt: str
    rationale: str
    answer: str
    reward: float
    advantage: float


@dataclass(frozen=True)
class Report:
    """The sequences since the last log."""

    advantages: list[float]
    rationale_lengths: list[int]
    samples: list[Sample]
    """Sequences of the first prompt of the last update, in the main process."""


class Sink(Protocol):
    """Shows a report; called only in the main process."""

    def __call__(self, step: int, report: Report) -> None: ...


@dataclass
class _Seen:
    outcomes: deque[tuple[Tensor, list[int]]] = field(default_factory=deque)
    """Rewards and advantages, [2, S] on the device, and rationale lengths, by micro-batch."""
    count: int = 0
    """The sequences of these."""
    rollouts: list[Rollout] = field(default_factory=list)
    """The first group of the last update; the token ids of other groups are not kept."""
    first: int = 0
    """Index of that group's first sequence, counted from behind."""


class SequenceReports(TrainerCallback):
    """Hands a `Report` to each sink whenever the run logs its updates.

    Args:
        sinks: what shows the reports.
        tokenizer: decodes the samples.
        accelerator: knows the processes, whose sequences are gathered.
        num_generations: K, the number of sequences per prompt.
        num_samples: number of sequences in the table, at most K; 0: no table.
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
        """Forget all sequences, including those of an update that an error interrupted."""
        self._update = []
        self._seen = _Seen()

    def add(self, outcomes: Sequence[Outcome], *, last: bool, skipped: bool) -> None:
        """Add the sequences of one accumulation step.

        Args:
            outcomes: the outcomes of its sequences.
            last: whether the update ends with this step.
            skipped: whether that update was skipped, so that its sequences are not reported.
        """
        self._update += outcomes
        if not last:
            return
        if not skipped:
            self._take(self._update)
        self._update = []

    def _take(self, outcomes: Sequence[Outcome]) -> None:
        seen = self._seen
        # There are no outcomes if other processes have all prompts of the update.
        seen.rollouts = [r for outcome in outcomes[:1] for r in outcome.rollouts]
        seen.rollouts = seen.rollouts[: self.num_generations][: self.num_samples]
        seen.first = sum(len(outcome.rollouts) for outcome in outcomes)
        seen.count += seen.first
        for outcome in outcomes:
            lengths = [len(r.rationale_ids) for r in outcome.rollouts]
            seen.outcomes.append((torch.stack([outcome.reward, outcome.advantage]), lengths))
        # The last update stays in any case: its sequences are shown.
        most = max(_MOST_SEQUENCES, seen.first)
        while seen.outcomes and seen.count - len(seen.outcomes[0][1]) >= most:
            seen.count -= len(seen.outcomes.popleft()[1])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # At a log of updates all processes come here together, even those without sequences.
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
        if seen.outcomes:
            rewards, advantages = torch.cat([values for values, _ in seen.outcomes], 1).tolist()
        own = slice(seen.count - seen.first, None)
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
        lengths = [length for _, of_batch in seen.outcomes for length in of_batch]
        if self.accelerator.num_processes > 1:
            everyone = gather_object([(advantages, lengths)])
            advantages = [value for values, _ in everyone for value in values]
            lengths = [length for _, of_process in everyone for length in of_process]
        return Report(advantages, lengths, samples)


def sinks_of(callbacks: Sequence[TrainerCallback]) -> list[Sink]:
    """Return a sink for each tracker that a Trainer's callbacks report to."""
    sinks: list[Sink] = []
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            sinks.append(TensorBoard(callback))
        elif isinstance(callback, WandbCallback):
            sinks.append(WeightsAndBiases())
        elif isinstance(callback, TrackioCallback):
            sinks.append(Trackio())
    return sinks


@contextmanager
def telling_trackers() -> Iterator[None]:
    """Raise a tracker's error as one that names it, for example where nobody has logged in.

    Raises:
        OSError: one of transformers' callbacks for trackers raised an error of its own.
    """
    try:
        yield
    except Exception as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code is not CallbackHandler.call_event.__code__:
                continue
            callback = frame.f_locals.get("callback")
            for name, kind in INTEGRATION_TO_CALLBACK.items():
                if type(callback) is kind:
                    reason = one_line(told(error))
                    raise OSError(f"report_to: {name} cannot be written to: {reason}") from error
        raise


class TensorBoard:
    """Writes with the writer of the Trainer's callback."""

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
    """Writes into the open run."""

    def __call__(self, step: int, report: Report) -> None:
        import wandb

        if wandb.run is not None:
            wandb.log(_media(wandb, step, report))


class Trackio:
    """Writes into the open run."""

    def __call__(self, step: int, report: Report) -> None:
        import trackio

        if trackio.context_vars.current_run.get() is not None:
            trackio.log(_media(trackio, step, report))


def _media(tracker: ModuleType, step: int, report: Report) -> dict[str, Any]:
    """Return the report as objects of wandb's classes; Trackio's classes have the same names."""
    import pandas as pd

    media: dict[str, Any] = {
        "train/advantages": tracker.Histogram(report.advantages),
        "train/rationale_lengths": tracker.Histogram(report.rationale_lengths),
        # The Trainer's callbacks plot all metrics over this one.
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
    """Return a text for a cell of Markdown, with markup escaped and line ends shown."""
    return "".join(
        "<br>" if c == "\n" else c if c.isalnum() or c == " " else f"&#{ord(c)};"
        for c in shown(text)
    )
