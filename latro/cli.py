"""Run a training command, from its arguments to the files that the run leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from latro.base_trainer import RESULTS_FILE, AnswerTrainer
from latro.config.command_line import parse_arguments
from latro.config.data import DataArguments
from latro.config.model import ModelArguments, PeftArguments
from latro.config.training import AnswerConfig
from latro.errors import TrainingInterrupted
from latro.files import finite, write_json
from latro.loading import load_model
from latro.model.adapters import lora_config
from latro.problems import load_splits, load_task
from latro.reporting.callbacks import METRICS_FILE, PLOT_FILE
from latro.reporting.model_card import CARD_FILE
from latro.reporting.trackers import telling_trackers
from latro.run.checkpoints import (
    AUTO,
    check_checkpoint,
    last_whole_checkpoint,
    of_all_processes,
)
from latro.run.folder import check_apart
from latro.terminal import Terminal

_SHOWN = (
    ("greedy accuracy", "eval_accuracy_greedy", "{:.1%}"),
    ("sampled accuracy", "eval_accuracy_sampled", "{:.1%}"),
    ("rationale length, tokens", "eval_rationale_length", "{:.1f}"),
    ("mean log π(y|x⊕z), nats", "eval_answer_logp", "{:.2f}"),
    ("its gain over log π(y|x), nats", "eval_rationale_gain", "{:+.2f}"),
)


def run_training(
    trainer_class: Callable[..., AnswerTrainer],
    config_class: type[AnswerConfig],
    argv: Sequence[str] | None,
    *,
    prog: str,
    small_settings: str = "default.yaml",
) -> dict[str, dict[str, float]]:
    """Run a training command, and return the metrics before ("base") and after it ("final").

    There is no "base" where `eval_on_start` is false.

    Args:
        trainer_class: takes a model, settings, a dataset, a tokenizer and a task, as
            `AnswerTrainer` does.
        config_class: the class of its settings.
        argv: the command line; None: the process's own.
        prog: the name of the command, "latro.train".
        small_settings: the file in `latro/assets` with settings for the model that ships.

    Raises:
        ValueError: settings, model or data are bad; the output folder is then unchanged.
        TrainingInterrupted: a signal ended the training, SIGTERM for example; there is a
            checkpoint.
    """
    classes = (ModelArguments, PeftArguments, DataArguments, config_class)
    model_args, peft_args, data_args, args = parse_arguments(
        classes, argv, prog=f"python -m {prog}", small_settings=small_settings
    )
    # Do not show the library's remarks on its own defaults and its progress bars for files.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    check_apart(
        args.output_dir,
        (
            ("model_name_or_path", model_args.model_name_or_path),
            ("dataset_name", data_args.dataset_name),
            ("dataset_path", data_args.dataset_path),
        ),
    )
    resume = _checkpoint(args)
    task = load_task(data_args)
    train_dataset, eval_dataset = load_splits(
        task,
        args=data_args,
        seed=args.seed,
        eval_split=args.eval_split,
        num_eval_examples=args.num_eval_examples,
    )
    peft_config = lora_config(peft_args, model_args.model_revision)
    model, tokenizer = load_model(model_args)
    if args.eval_on_start is None:
        args.eval_on_start = True
    trainer = trainer_class(
        model,
        args,
        train_dataset,
        tokenizer,
        task,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )
    trainer.data = data_args
    whole, trained = (trainer.model.num_parameters(only_trainable=t) for t in (False, True))
    share = "" if whole == trained else f", {trained:,} of them trained"
    console = Terminal(quiet=not trainer.is_world_process_zero())
    console.print(
        f"{whole:,} parameters{share}; {len(train_dataset):,} prompts of "
        f"{task.description}, {trainer.targets}, into {args.output_dir}"
    )
    with trainer.holding_output():
        results = _train(trainer, resume, console)
    if args.push_to_hub:
        # With the card and the results; a hub that is not there takes none of them away.
        trainer.push_to_hub()
    return results


def _train(
    trainer: AnswerTrainer, resume: str | None, console: Terminal
) -> dict[str, dict[str, float]]:
    """Train, evaluate and save, and return the metrics before and after."""
    args = trainer.args
    # Before the trackers' callbacks, which end their runs at the end of a training.
    trainer.callback_handler.callbacks.insert(0, _AtTheEnd(trainer))
    with telling_trackers():
        trainer.train(resume_from_checkpoint=resume)
    if trainer.interruption.signal is not None:
        raise TrainingInterrupted(
            trainer.interruption.signal, trainer.state.global_step, args.output_dir
        )
    best = _best_step(args, trainer.state)
    trainer.save_state()
    base = _evaluations(trainer.state, 0)
    results = {"base": base[0]} if base else {}
    results["final"] = _evaluations(trainer.state, best or trainer.state.global_step)[-1]
    if trainer.is_world_process_zero():
        write_json(Path(args.output_dir) / RESULTS_FILE, finite(results))
    # Write the card again, now that the last evaluation is known.
    trainer.create_model_card()
    console.print(_table(results, len(trainer.eval_dataset)))
    if best is not None:
        console.print(
            f"the best by {args.metric_for_best_model} is taken, of update {best} of "
            f"{trainer.state.global_step}"
        )
    console.print(
        f"model, {CARD_FILE}, {METRICS_FILE}, {PLOT_FILE} and {RESULTS_FILE}: {args.output_dir}"
    )
    return results


class _AtTheEnd(TrainerCallback):
    """Saves the trained model and evaluates it, if it is not evaluated yet."""

    def __init__(self, trainer: AnswerTrainer) -> None:
        self.trainer = trainer

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.trainer.interruption.signal is not None:
            return  # The run goes on another time.
        self.trainer.write_model()
        step = _best_step(self.trainer.args, state) or state.global_step
        if not _evaluations(state, step):
            self.trainer.evaluate()


def _evaluations(state: TrainerState, step: int) -> list[dict[str, float]]:
    """Return the evaluations of the model after an update."""
    return [e for e in state.log_history if "eval_accuracy_greedy" in e and e["step"] == step]


def _best_step(args: AnswerConfig, state: TrainerState) -> int | None:
    """Return the update of the best checkpoint that was loaded at the end; None: none was."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    return int(state.best_model_checkpoint.rpartition("-")[2])


def _checkpoint(args: AnswerConfig) -> str | None:
    """Return the checkpoint folder to resume from, or None.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or the output folder has checkpoints
            of another run.
    """
    asked = args.resume_from_checkpoint or "false"
    there = Path(args.output_dir).is_dir() and get_last_checkpoint(args.output_dir) is not None
    # Processes may have disks of their own.
    if asked.lower() == AUTO and not any(of_all_processes(there)):
        return None
    if asked.lower() in (AUTO, "true", "latest"):
        return last_whole_checkpoint(args.output_dir)
    if asked.lower() != "false":
        check_checkpoint(asked)
        return asked
    if there and not args.overwrite_output_dir:
        raise ValueError(
            f"output_dir: {args.output_dir} has the checkpoints of an earlier run; resume it with "
            "--resume_from_checkpoint true, name another folder, or delete them by "
            "--overwrite_output_dir true"
        )
    return None


def _table(results: dict[str, dict[str, float]], problems: int) -> Table:
    table = Table(title=f"{problems} held-out problems")
    for column in ("", *results):
        table.add_column(column, justify="right" if column else "left")
    for title, key, form in _SHOWN:
        # An evaluation that an earlier version logged may lack one.
        if all(key in metrics for metrics in results.values()):
            table.add_row(title, *(form.format(metrics[key]) for metrics in results.values()))
    return table
