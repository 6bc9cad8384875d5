"""Make up for an evaluation that was due when a run stopped, before the next update.

A signal stops a run after an update, without the evaluation that was due after it; and a kill may
come between a checkpoint at the end of an epoch and the evaluation that follows. The evaluation is
then missing from the checkpoint's history, so a run that resumes can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.trainer_callback import (
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


def evaluation_due(args: TrainingArguments, state: TrainerState) -> TrainerControl | None:
    """Return what was due after the last update if an evaluation is missing.

    Returns:
        The control flags of the Trainer's own callback, with the saving that goes with the
        evaluation; None: no evaluation was due, or it was made.
    """
    if any(
        entry.get("step") == state.global_step and any(name.startswith("eval_") for name in entry)
        for entry in state.log_history
    ):
        return None
    flow = DefaultFlowCallback()
    control = flow.on_step_end(args, state, TrainerControl())
    # The Trainer ends the epoch at the last update, even in the middle of an epoch.
    ends = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
    if ends and not control.should_evaluate:
        control = flow.on_epoch_end(args, state, TrainerControl())
    return control if control.should_evaluate else None


class GoingOn(TrainerCallback):
    """Makes a resumed run make up for what is due, and not repeat what was done.

    Args:
        make_up: called after `on_train_begin` of all callbacks that were added before.
    """

    def __init__(self, make_up: Callable[[], None]) -> None:
        self.make_up = make_up
        self.first_step = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.first_step = state.global_step
        self.make_up()

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step == self.first_step:
            # No update was left to do: this end of an epoch lies before the checkpoint.
            control.should_evaluate = False
            control.should_save = False
