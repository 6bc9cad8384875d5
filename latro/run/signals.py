"""Stop a run at SIGTERM, SIGINT or SIGHUP after its current update, with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from latro.terminal import drop_closed_pipes

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def keep_workers(loader: DataLoader[Any]) -> None:
    """Let a loader's processes pass over the signals that stop a run, which ends them by itself.

    Schedulers and terminals send them to all processes of a run. A worker that one ends is an error
    in the run, which then could not even finish its update.
    """
    # accelerate puts its own around the loader that starts the processes.
    loader = getattr(loader, "base_dataloader", loader)
    loader.worker_init_fn = partial(_begin_worker, loader.worker_init_fn)


def _begin_worker(given: Callable[[int], None] | None, index: int) -> None:
    # By now torch has put its own handler of SIGTERM over an inherited one.
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if given is not None:
        given(index)


class Interruption(TrainerCallback):
    """A callback, and a context manager that installs signal handlers while a run trains.

    Schedulers send SIGTERM some time before they kill; Ctrl-C sends SIGINT; a terminal that is
    closed, or a connection that is lost, SIGHUP. At the first of any, the run finishes its update,
    saves a checkpoint, and stops without a further evaluation, which is made when the run resumes
    (`latro.run.due`). So the scheduler's grace period must cover one update, an evaluation or a
    rollout under way, and the saving. After the last update the trainer has to save
    (`after_training`). A second Ctrl-C raises KeyboardInterrupt at once; a second SIGTERM changes
    nothing, since schedulers send several. A signal that the process was started to ignore, as with
    `nohup`, stays ignored. With several processes, a signal to any one stops all at the same
    update.

    Python handles signals in the main thread only, so a run in another thread has no handlers.
    """

    signal: int | None
    """The number of the signal that stopped the last run; None: the run was completed."""

    def __init__(self) -> None:
        self.signal = None
        self._received = 0
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self.signal = None
        self._received = 0
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            # None stands for a handler that Python did not install and cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._received and self.signal is None and error is None:
            # The signal came after the end, with nothing to stop: it has its usual effect.
            signal.raise_signal(self._received)

    def after_training(self, args: TrainingArguments) -> bool:
        """Return whether a signal came after the last update, and keep it as `signal` then.

        Evaluation and saving follow that update. All processes must call this together.
        """
        if self.signal is None:
            self.signal = self._highest_received(args) or None
            return self.signal is not None
        return False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # This is a data loader's worker, which ends with its parent.
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt
        if not self._received:
            name = signal.Signals(number).name
            # Not by print, since the signal may have interrupted a print. The same Ctrl-C may have
            # ended what reads it.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{name}: saving after this update\n".encode())
        self._received = number

    def _highest_received(self, args: TrainingArguments) -> int:
        if args.world_size == 1:
            return self._received
        # All ranks must leave the loop at the same update, or the rest would wait for ever.
        highest = torch.tensor(self._received, device=args.device)
        distributed.all_reduce(highest, distributed.ReduceOp.MAX)
        return int(highest)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        number = self._highest_received(args)
        if number:
            self.signal = number
            drop_closed_pipes()
            # Checkpoints do not hold the sums since the last log, so log them now.
            control.should_log |= args.logging_strategy != IntervalStrategy.NO
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.signal is not None:
            control.should_save = False
            control.should_evaluate = False
