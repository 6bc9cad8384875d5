"""`LongRunTrainer`: Hugging Face's Trainer, made fit for days on shared machines."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import distributed
from torch.utils.data import DataLoader
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy, TrainOutput

from latro.run.checkpoints import (
    AUTO,
    PARTIAL,
    SUPERSEDED,
    check_optimizer_state,
    is_there,
    last_whole_checkpoint,
    later_than,
    of_all_processes,
    remove_partial,
    set_aside_later,
)
from latro.run.due import GoingOn, evaluation_due
from latro.run.folder import LOCK_FILE, delete, in_main_process, locked_by_all, to_replace
from latro.run.identity import Facts, check_identity, settings_of
from latro.run.rehearsal import check_optimizer_settings, try_disks, try_saving, try_schedule
from latro.run.restoring import RestoringTrainer
from latro.run.signals import Interruption, keep_workers
from latro.terminal import one_line


class _Beginning(TrainerCallback):
    """Calls `begin` once optimiser and schedule exist and any checkpoint is loaded."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.begin()


# What callbacks ask of the Trainer after an update.
_ASKED = (
    "should_log",
    "should_evaluate",
    "should_save",
    "should_epoch_stop",
    "should_training_stop",
)

_logger = logging.getLogger(__name__)


class LongRunTrainer(RestoringTrainer):
    """A Trainer whose checkpoints are never half written, and which stops cleanly at signals.

    It trains alone in its output folder and overwrites only files of its own run
    (`latro.run.folder`). What could fail at the end is tried at the start (`latro.run.rehearsal`).

    Class attributes:
        run_files: names of the files in the output folder besides model and checkpoints.
        early_files: those of them that a run writes before its first checkpoint.

    Attributes:
        interruption: its `signal` tells which signal ended `train()` early, SIGTERM for example.
    """

    run_files: ClassVar[tuple[str, ...]] = ("trainer_state.json", "training_args.bin")
    early_files: ClassVar[tuple[str, ...]] = (PARTIAL,)
    control: TrainerControl

    def __init__(
        self, *, callbacks: Sequence[TrainerCallback] | None = None, **kwargs: Any
    ) -> None:
        self.interruption = Interruption()
        self._first_step: int | None = None
        self._resumed_from: Path | None = None
        self._holds_output = False
        self._owns_output = False
        self._has_checkpoint = False  # of this call of train
        self._model_facts: Facts | None = None
        self._replaced: list[Path] = []
        self._beginning = _Beginning(self._begin_run)
        all_callbacks = [self._beginning, *(callbacks or ()), self.interruption]
        super().__init__(callbacks=all_callbacks, **kwargs)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as the Trainer does; with True, resume from the newest undamaged checkpoint.

        A folder is not checked here for damage: `latro.run.checkpoints.check_checkpoint` does that.

        Raises:
            ValueError: there is no undamaged checkpoint, or it lacks the optimiser's state; the
                output folder is in use or holds files of another run; or a setting turns out to be
                wrong only now.
            OSError: the output folder cannot be written to.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint:
            check_optimizer_state(resume_from_checkpoint)
        self._identity = self._run_identity()
        if resume_from_checkpoint:
            warns = self.is_world_process_zero()
            check_identity(resume_from_checkpoint, self._identity, warns=warns)
        self._saved_step = None
        self._best_is_loaded = False
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        with self.holding_output(), self.interruption:
            run_dir = Path(self.args.output_dir)
            if (
                resume_from_checkpoint
                and run_dir.resolve() in Path(resume_from_checkpoint).resolve().parents
            ):
                self._owns_output = True
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            self.interruption.after_training(self.args)
            if self.interruption.signal is not None and not self._is_saved():
                self._save_checkpoint(self.model_wrapped, trial)
        return output

    def _run_identity(self) -> Facts:
        """Return the facts that identify this run; see `latro.run.identity`."""
        identity = settings_of(self.args, self.accelerator.num_processes)
        identity["decides"]["trainer"] = type(self).__name__
        return identity

    @contextmanager
    def holding_output(self) -> Iterator[None]:
        """Hold the output folder for this run alone within the block; `train` does so by itself.

        Raises:
            ValueError: another run holds it.
        """
        if self._holds_output:
            yield
            return
        folder = self.args.output_dir
        with locked_by_all(Path(folder) / LOCK_FILE, f"output_dir: {folder}"):
            self._holds_output = True
            try:
                yield
            finally:
                self._holds_output = False

    def _check_output(self) -> None:
        """Check that the trained model can be saved, without overwriting files of another run.

        Raises:
            ValueError: it cannot.
        """
        names = try_saving(self.model, self.processing_class)
        if not self._owns_output:
            folder = Path(self.args.output_dir)
            overwrite: bool | tuple[str, ...] = getattr(self.args, "overwrite_output_dir", False)
            if not overwrite and (self.args.resume_from_checkpoint or "").lower() == AUTO:
                # What an earlier start of this run has left, which a checkpoint would have.
                overwrite = self.early_files
            self._replaced = to_replace(folder, {*self.run_files, *names}, overwrite=overwrite)

    def _begin_run(self) -> None:
        """Clear the output folder, now that nothing else can fail before the first update."""
        # The checkpoint's state has the intervals of its own run; those of the arguments hold now.
        self.state.compute_steps(self.args, self.state.max_steps)
        self._first_step = self.state.global_step
        self._has_checkpoint = False
        # The Trainer saves the states of those callbacks only that the checkpoint knows.
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                self.state.stateful_callbacks.setdefault(name, callback.state())
        if self._resumed_from is not None:
            self._find_best_checkpoint(self._resumed_from)
        if self.is_world_process_zero():
            delete(self._replaced)
            if self._owns_output:
                remove_partial(Path(self.args.output_dir))
                self._warn_of_later()
        self._replaced = []
        self._owns_output = True

    def _warn_of_later(self) -> None:
        """Tell that the run goes back, and to what end of the later checkpoints."""
        later = later_than(Path(self.args.output_dir), self.state.global_step)
        if later:
            _logger.warning(
                "resume_from_checkpoint: the run goes back to update %d; with its first checkpoint "
                "from here on, %s are set aside, as %s*",
                self.state.global_step,
                ", ".join(folder.name for folder in reversed(later)),
                SUPERSEDED,
            )

    def _finish_checkpoint(self, folder: Path, run_dir: Path) -> None:
        if self._owns_output and not self._has_checkpoint:
            set_aside_later(run_dir, self._first_step or 0)
            self._has_checkpoint = True
        super()._finish_checkpoint(folder, run_dir)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimiser as the Trainer does.

        Raises:
            ValueError: the settings do not fit it, one of them would have no effect, or its package
                is not installed.
        """
        try:
            # One that is there already was made by other hands, and these settings are not of it.
            if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
                check_optimizer_settings(self.args, self.model, self.get_optimizer_cls_and_kwargs)
            return super().create_optimizer(*args, **kwargs)
        except (ValueError, TypeError, ImportError) as error:
            raise ValueError(
                f"optim: {self.args.optim.value} with optim_args {self.args.optim_args!r} "
                f"cannot be made: {one_line(str(error))}"
            ) from error

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule as the Trainer does, and try its learning rate of every update.

        Raises:
            ValueError: the settings do not fit it, or it gives an invalid learning rate.
        """
        name = self.args.lr_scheduler_type.value
        try:
            scheduler = super().create_scheduler(num_training_steps, optimizer)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise ValueError(
                f"lr_scheduler_type: {name} with lr_scheduler_kwargs "
                f"{self.args.lr_scheduler_kwargs!r} cannot be made: {one_line(str(error))}"
            ) from error
        try_schedule(scheduler, num_training_steps, name)
        return scheduler

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        loader = super()._get_dataloader(*args, **kwargs)
        keep_workers(loader)
        return loader

    def _is_saved(self) -> bool:
        # Where the best checkpoint was loaded at the end, it exists already, and the optimiser's
        # state belongs to the weights of another update.
        return self._best_is_loaded or self._saved_step == self.state.global_step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Return batches as the Trainer does, but none after the last update.

        The Trainer checks for the end only after an update, so it would do one too many when it
        resumes from the checkpoint of the last update.
        """
        if self._is_done():
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # A callback may decide by its process's own clock or files. What one is to do all do, since
        # each of these waits for the others.
        if self.args.world_size > 1:
            asked = torch.tensor(
                [getattr(self.control, name) for name in _ASKED], device=self.args.device
            )
            asked = asked.to(torch.int32)
            distributed.all_reduce(asked, distributed.ReduceOp.MAX)
            for name, value in zip(_ASKED, asked.tolist(), strict=True):
                setattr(self.control, name, bool(value))
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _is_done(self) -> bool:
        # An evaluation that was made up for may have stopped the training before any update.
        return self.state.global_step >= self.state.max_steps or self.control.should_training_stop

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        # Checked now, as the Trainer has set the model's special tokens, which are saved with it.
        in_main_process(self._check_output)
        try_disks(self.args)
        going_on = None
        if resume_from_checkpoint is not None:
            # The run has had its first evaluation.
            args = copy.copy(args)
            args.eval_on_start = False
            going_on = GoingOn(
                partial(
                    self._make_up_evaluation, resume_from_checkpoint, trial, ignore_keys_for_eval
                )
            )
            self.add_callback(going_on)
        self._first_step = None
        try:
            return super()._inner_training_loop(
                batch_size=batch_size,
                args=args,
                resume_from_checkpoint=resume_from_checkpoint,
                trial=trial,
                ignore_keys_for_eval=ignore_keys_for_eval,
            )
        except RuntimeError as error:
            if not (self.args.auto_find_batch_size and should_reduce_batch_size(error)):
                raise
            if self._first_step is not None and self.state.global_step > self._first_step:
                # The Trainer would begin again at the first update, with weights trained by then.
                raise ValueError(
                    "auto_find_batch_size: expected a batch that does not fit to show in the "
                    f"first update, got out of memory after update {self.state.global_step}; "
                    "resume from a checkpoint, or begin again, with a smaller "
                    "per_device_train_batch_size"
                ) from error
            if batch_size == 1:
                raise ValueError(
                    "auto_find_batch_size: expected a batch that fits, got out of memory with "
                    f"per_device_train_batch_size 1 too: {one_line(str(error))}"
                ) from error
            raise
        finally:
            if going_on is not None:
                self.remove_callback(going_on)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # A run that a signal stopped is not at its end, where the Trainer loads the best model and,
        # with save_total_limit 1, deletes the checkpoint that the run goes on from.
        self.interruption.after_training(self.args)
        best = self.state.best_model_checkpoint
        # Processes with different models would evaluate and save a mixture of them.
        there = all(of_all_processes(best is not None and is_there(Path(best))))
        if self.interruption.signal is not None:
            self.state.best_model_checkpoint = None
        elif best is not None and not there:
            _logger.warning("the best checkpoint, %s, is gone; the last model is kept", best)
            self.state.best_model_checkpoint = best = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.state.best_model_checkpoint = best

    def _make_up_evaluation(
        self, checkpoint: str, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> None:
        """Make the evaluation that was due after the checkpoint's update, if it is missing."""
        due = evaluation_due(self.args, self.state)
        if due is None:
            return
        # The random state as the update left it, since it is saved below.
        self._load_rng_state(checkpoint)
        metrics = self._evaluate(trial, ignore_keys_for_eval)
        is_best = self._determine_best_metric(metrics=metrics, trial=trial)
        if is_best if self.args.save_strategy == SaveStrategy.BEST else due.should_save:
            self._save_checkpoint(self.model_wrapped, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
