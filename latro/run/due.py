"""What a run that goes on from a checkpoint makes up for before its next update.

A signal stops a run after its update, without the evaluation that this update was due; and a kill
may come between a checkpoint at the end of an epoch and the evaluation that follows it. The
evaluation is then not in the checkpoint's history, so whoever goes on from it knows.
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
    """Tell what the last update was due, where that is an evaluation which it has not had.

    Returns:
        What the Trainer's own callback asks for where it asks for the evaluation, the saving that
        goes with it included; None: it asks for none, or there was one.
    """
    if any(
        entry.get("step") == state.global_step and any(name.startswith("eval_") for name in entry)
        for entry in state.log_history
    ):
        return None
    flow = DefaultFlowCallback()
    control = flow.on_step_end(args, state, TrainerControl())
    # The Trainer ends the epoch at the last update, wherever in the epoch that is.
    ends = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
    if ends and not control.should_evaluate:
        control = flow.on_epoch_end(args, state, TrainerControl())
    return control if control.should_evaluate else None


class GoingOn(TrainerCallback):
    """Has a run that goes on make up for what is due, and not do again what was done.

    Args:
        make_up: called when all callbacks that were added before have begun.
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
            # No update was left to make: this end of the epoch was before the checkpoint.
            control.should_evaluate = False
            control.should_save = False
