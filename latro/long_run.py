"""`LongRunTrainer`: what Hugging Face's Trainer needs to get through days on shared machines."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback, TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput

from latro.checkpoints import (
    PARTIAL,
    check_optimizer_state,
    last_whole_checkpoint,
    publish,
    remove_partial,
    rotate,
)
from latro.due import GoingOn, evaluation_due
from latro.interruption import Interruption

_SHOWN_KEYS = 5


class LongRunTrainer(Trainer):
    """A Trainer whose checkpoints are whole (`latro.checkpoints`) and that signals stop in order.

    Attributes:
        interruption: its `signal` tells whether SIGTERM or SIGINT ended `train()` early.
    """

    control: TrainerControl

    def __init__(self, *, callbacks: list[TrainerCallback] | None = None, **kwargs: Any) -> None:
        self.interruption = Interruption()
        self._partial: Path | None = None
        self._saved_step: int | None = None
        super().__init__(callbacks=[*(callbacks or []), self.interruption], **kwargs)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As the Trainer's; True resumes from the newest checkpoint without damage.

        A folder is taken as it is: `latro.checkpoints.check_checkpoint` tells whether it is whole.

        Raises:
            ValueError: there is no whole checkpoint, or it has no state of the optimiser.
        """
        if self.args.should_save:
            remove_partial(Path(self.args.output_dir))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint:
            check_optimizer_state(resume_from_checkpoint)
        self._saved_step = None
        with self.interruption:
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
        self._partial = partial = run_dir / PARTIAL
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._partial = None
        folder = partial / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        place = run_dir / folder.name
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
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))

    def _finish_checkpoint(self, folder: Path, run_dir: Path) -> None:
        keep = {publish(folder, run_dir)}
        if self.state.best_model_checkpoint is not None:
            keep.add(Path(self.state.best_model_checkpoint))
        rotate(run_dir, self.args.save_total_limit, keep)
        remove_partial(run_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload runs beside the training: it starts when the folder has its last name.
        if self._partial is None:
            super()._push_from_checkpoint(checkpoint_folder)
