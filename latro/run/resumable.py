"""`LongRunTrainer`: what Hugging Face's Trainer needs to get through days on shared machines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput

from latro.errors import reading, writing
from latro.run.checkpoints import (
    PARTIAL,
    check_optimizer_state,
    last_whole_checkpoint,
    publish,
    publish_files,
    remove_partial,
    rotate,
)
from latro.run.due import GoingOn, evaluation_due
from latro.run.folder import LOCK_FILE, delete, locked_by_all, raise_in_all, to_replace
from latro.run.identity import Facts, check_identity, settings_of, write_identity
from latro.run.rehearsal import try_saving, try_schedule
from latro.run.signals import Interruption
from latro.terminal import one_line


class _Beginning(TrainerCallback):
    """Calls `begin` when optimiser and schedule are made, and a checkpoint is loaded."""

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


_SHOWN_KEYS = 5


class LongRunTrainer(Trainer):
    """A Trainer whose checkpoints are whole (`checkpoints`) and that signals stop in order.

    It trains alone in its output folder, and writes over nothing there that is not its run's
    (`latro.run.folder`). What would fail at the end is tried at the start (`latro.run.rehearsal`).

    Class attributes:
        run_files: names of what is written into the output folder beside model and checkpoints.

    Attributes:
        interruption: its `signal` tells whether SIGTERM or SIGINT ended `train()` early.
    """

    run_files: ClassVar[tuple[str, ...]] = ("trainer_state.json", "training_args.bin")
    control: TrainerControl

    def __init__(self, *, callbacks: list[TrainerCallback] | None = None, **kwargs: Any) -> None:
        self.interruption = Interruption()
        self._partial: Path | None = None
        self._saved_step: int | None = None
        self._holds_output = False
        self._owns_output = False
        self._model_facts: Facts | None = None
        self._identity: Facts = {}
        self._replaced: list[Path] = []
        self._beginning = _Beginning(self._begin_run)
        callbacks = [self._beginning, *(callbacks or []), self.interruption]
        super().__init__(callbacks=callbacks, **kwargs)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As the Trainer's; True resumes from the newest checkpoint without damage.

        A folder is taken as it is: `latro.run.checkpoints.check_checkpoint` tells whether it is
        whole.

        Raises:
            ValueError: there is no whole checkpoint, or it has no state of the optimiser; the
                output folder is in use, or holds what is not this run's; a setting shows only now
                to be wrong.
            OSError: the output folder cannot be written to.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint:
            check_optimizer_state(resume_from_checkpoint)
        self._identity = self._run_identity()
        if resume_from_checkpoint:
            check_identity(resume_from_checkpoint, self._identity)
        self._saved_step = None
        with self.holding_output(), self.interruption:
            run_dir = Path(self.args.output_dir)
            if (
                resume_from_checkpoint
                and run_dir.resolve() in Path(resume_from_checkpoint).resolve().parents
            ):
                self._owns_output = True
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            if self.interruption.after_training(self.args) and not self._is_saved():
                self._save_checkpoint(self.model_wrapped, trial)
        return output

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The Trainer warns, and goes on with weights that are not the checkpoint's.
        state = self.model.state_dict()
        found = {t.data_ptr() for name, t in state.items() if name not in load_result.missing_keys}
        # Of tied weights a checkpoint has one.
        missing = [name for name in load_result.missing_keys if state[name].data_ptr() not in found]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"resume_from_checkpoint: expected a checkpoint with the weights of "
                f"{type(self.model).__name__}, got {len(missing)} missing "
                f"({', '.join(missing[:_SHOWN_KEYS])}) and {len(load_result.unexpected_keys)} "
                f"unexpected ({', '.join(load_result.unexpected_keys[:_SHOWN_KEYS])})"
            )

    def _run_identity(self) -> Facts:
        """What makes this run the one that it is; see `latro.run.identity`."""
        identity = settings_of(self.args, self.accelerator.num_processes)
        identity["decides"]["trainer"] = type(self).__name__
        return identity

    @contextmanager
    def holding_output(self) -> Iterator[None]:
        """Within, the output folder is this run's alone; `train` by itself sees to that.

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

    def _check_output_together(self) -> None:
        """`_check_output` in the main process, whose error all of them raise."""
        error: ValueError | None = None
        if self.is_world_process_zero():
            try:
                self._check_output()
            except ValueError as refused:
                error = refused
        raise_in_all(error)

    def _check_output(self) -> None:
        """Check that the trained model can be saved, and over nothing that is not this run's.

        Raises:
            ValueError: it cannot.
        """
        names = try_saving(self.model, self.processing_class)
        if not self._owns_output:
            overwrite = getattr(self.args, "overwrite_output_dir", False)
            folder = Path(self.args.output_dir)
            self._replaced = to_replace(folder, {*self.run_files, *names}, overwrite=overwrite)

    def _begin_run(self) -> None:
        """Take the output folder over, now that nothing else can fail before the first update."""
        # A checkpoint's state has the intervals of when it was saved; those asked for now hold.
        self.state.compute_steps(self.args, self.state.max_steps)
        if self.is_world_process_zero():
            delete(self._replaced)
            if self._owns_output:
                remove_partial(Path(self.args.output_dir))
        self._replaced = []
        self._owns_output = True

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer's.

        Raises:
            ValueError: it cannot be made of the settings, or its package is not installed.
        """
        try:
            return super().create_optimizer(*args, **kwargs)
        except (ValueError, TypeError, ImportError) as error:
            raise ValueError(
                f"optim: {self.args.optim.value} with optim_args {self.args.optim_args!r} "
                f"cannot be made: {one_line(str(error))}"
            ) from error

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As the Trainer's, for learning rates that are numbers in every update.

        Raises:
            ValueError: it cannot be made of the settings, or gives a rate that is no number.
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

    def _is_saved(self) -> bool:
        # Where the best checkpoint is loaded at the end, that one is there, and the model is no
        # more what the optimiser's state belongs to.
        return self.args.load_best_model_at_end or self._saved_step == self.state.global_step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """As the Trainer's; no batch after the last update.

        The Trainer looks for the end after an update, and so makes one too many where it resumes
        from the checkpoint of the last.
        """
        if self._is_done():
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _is_done(self) -> bool:
        # An evaluation that was made up for may stop the training before an update.
        return self.state.global_step >= self.state.max_steps or self.control.should_training_stop

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        # By now the Trainer has set the model's special tokens, which are saved with it.
        self._check_output_together()
        going_on = None
        if resume_from_checkpoint is not None:
            # The run's first evaluation is behind it.
            args = copy.copy(args)
            args.eval_on_start = False
            going_on = GoingOn(
                partial(
                    self._make_up_evaluation, resume_from_checkpoint, trial, ignore_keys_for_eval
                )
            )
            self.add_callback(going_on)
        try:
            return super()._inner_training_loop(
                batch_size=batch_size,
                args=args,
                resume_from_checkpoint=resume_from_checkpoint,
                trial=trial,
                ignore_keys_for_eval=ignore_keys_for_eval,
            )
        finally:
            if going_on is not None:
                self.remove_callback(going_on)

    def _make_up_evaluation(
        self, checkpoint: str, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> None:
        """Make the evaluation that the checkpoint's update was due, if it has not had it."""
        due = evaluation_due(self.args, self.state)
        if due is None:
            return
        # As the update left it: what is saved below holds it.
        self._load_rng_state(checkpoint)
        metrics = self._evaluate(trial, ignore_keys_for_eval)
        is_best = self._determine_best_metric(metrics=metrics, trial=trial)
        if is_best if self.args.save_strategy == SaveStrategy.BEST else due.should_save:
            self._save_checkpoint(self.model_wrapped, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _get_output_dir(self, trial: Any) -> str:
        # Where the Trainer makes `checkpoint-N`; it asks once a checkpoint.
        run_dir = super()._get_output_dir(trial)
        return run_dir if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        self._partial = run_dir / PARTIAL
        try:
            with writing(self._partial / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"):
                self._write_checkpoint(model, trial, run_dir)
        except OSError:
            # What a full disk holds of a checkpoint is of no use, and takes its space.
            remove_partial(run_dir)
            raise
        finally:
            self._partial = None
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(
                str(run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            )

    def _write_checkpoint(self, model: nn.Module, trial: Any, run_dir: Path) -> None:
        super()._save_checkpoint(model, trial)
        folder = run_dir / PARTIAL / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        place = run_dir / folder.name
        if self.args.should_save:
            write_identity(folder, self._identity)
        if self.state.best_model_checkpoint == str(folder):
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))
        # On a shared disk all ranks have written into the one folder; a node with a disk of its own
        # has a folder of its own. So process 0 renames first, then each node what it still has.
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self._finish_checkpoint(folder, run_dir)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and folder.exists():
            self._finish_checkpoint(folder, run_dir)
        self.accelerator.wait_for_everyone()

    def _finish_checkpoint(self, folder: Path, run_dir: Path) -> None:
        keep = {publish(folder, run_dir)}
        if self.state.best_model_checkpoint is not None:
            keep.add(Path(self.state.best_model_checkpoint))
        rotate(run_dir, self.args.save_total_limit, keep)
        remove_partial(run_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; a file of before is there until the whole model is written.

        Raises:
            OSError: it cannot be written; the folder is then as it was.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        place = Path(output_dir or self.args.output_dir)
        folder = place / PARTIAL / "model"
        try:
            with writing(place):
                super().save_model(str(folder), _internal_call=True)
                self.accelerator.wait_for_everyone()
                if self.is_local_process_zero() and folder.exists():
                    publish_files(folder, place)
                self.accelerator.wait_for_everyone()
        finally:
            if self.is_local_process_zero():
                remove_partial(place)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with reading("resume_from_checkpoint", resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading("resume_from_checkpoint", checkpoint or ""):
            super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        if isinstance(scheduler, LambdaLR):
            # Where a run goes on for longer, the optimiser's state has the old length's rate.
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            rates = [base * f for base, f in zip(scheduler.base_lrs, factors, strict=True)]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading("resume_from_checkpoint", checkpoint or ""):
            super()._load_rng_state(checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload runs beside the training: it starts when the folder has its last name.
        if self._partial is None:
            super()._push_from_checkpoint(checkpoint_folder)
