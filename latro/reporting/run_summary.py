"""Collect from a trainer what the model card shows of its run."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from datasets import Dataset
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from latro.config.data import DataArguments
from latro.config.training import SMALL_MODEL, AnswerConfig, LatroConfig
from latro.evaluation.accuracy import EvaluationSettings
from latro.model.adapters import has_adapter
from latro.model.quantized import loading_options
from latro.reporting.callbacks import PLOT_FILE
from latro.reporting.held_out_samples import SAMPLES_FILE, read_samples
from latro.reporting.model_card import Evaluation, HeldOut, Run, Setting
from latro.tasks import TASKS, OwnData, Task, arc_challenge, gsm8k

if TYPE_CHECKING:
    from peft import PeftModel

_HUB_DATASETS = {"gsm8k": gsm8k.HUB_DATASET[0], "arc_challenge": arc_challenge.HUB_DATASET[0]}

# The Trainer's settings that decide what is learnt, and none that names a machine or a person.
_TRAINERS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "seed"),
)
# Our own settings that do not decide it, or that stand elsewhere in the card.
_LEFT_OUT = {
    *("eval_split", "num_eval_examples", "token_budget", "max_skipped_updates", "backend"),
    *("rollout_engine", "vllm_mode", "vllm_url", "vllm_weights_dir", "vllm_sync"),
    *("vllm_gpu_memory_utilization", "vllm_max_model_length"),
    *("log_completions", "num_completions_to_print", "overwrite_output_dir"),
}


class TrainedRun(Protocol):
    """The attributes of a trainer that the card reads."""

    args: AnswerConfig
    state: TrainerState
    task: Task
    model: PreTrainedModel | PeftModel
    train_dataset: Dataset | None
    eval_dataset: Dataset | None
    data: DataArguments | None
    hub_model_id: str | None

    @property
    def targets(self) -> str: ...

    @property
    def evaluation_settings(self) -> EvaluationSettings: ...


def run_of(trainer: TrainedRun, folder: Path) -> Run:
    """Return the facts of a trainer's run up to now; its model is saved in `folder`."""
    args, state, task = trainer.args, trainer.state, trainer.task
    best = state.best_global_step if args.load_best_model_at_end else None
    update = best or state.global_step
    evaluations = [e for e in state.log_history if "eval_accuracy_greedy" in e]
    before = evaluations[0] if evaluations else None
    after = _at(update, evaluations)
    samples = read_samples(Path(args.output_dir) / SAMPLES_FILE)
    base, base_model = _base(trainer.model)
    return Run(
        name=(args.hub_model_id or Path(args.output_dir).resolve().name).rpartition("/")[2],
        method=args.objective if isinstance(args, LatroConfig) else "supervised",
        task=task.description,
        prompts=0 if trainer.train_dataset is None else len(trainer.train_dataset),
        update=update,
        base=base,
        base_model=base_model,
        dataset=_dataset(task),
        settings=list(_settings(args)),
        adapter=_adapter(trainer.model),
        held_out=_held_out(trainer),
        before=before,
        after=after,
        samples_before=samples.get(int(before["step"]), ()) if before not in (None, after) else (),
        samples_after=samples.get(int(after["step"]), ()) if after else (),
        picture=PLOT_FILE if (folder / PLOT_FILE).is_file() else None,
        device=_device(args),
        tags=getattr(trainer.model, "model_tags", None) or (),
    )


def _at(update: int, evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Return the last evaluation of the model after an update; without one, the last of all."""
    exact = [e for e in evaluations if e["step"] == update]
    shown = exact or evaluations
    return shown[-1] if shown else None


def _base(model: PreTrainedModel | PeftModel) -> tuple[str, str | None]:
    """Return where the weights came from, as a description and as a hub id, if they have one."""
    name = (model.get_base_model() if has_adapter(model) else model).config.name_or_path
    if name == str(SMALL_MODEL):
        return "the small model that comes with latro-kernels", None
    return (name, name) if _is_hub_id(name) else ("a model that is not on the hub", None)


def _dataset(task: Task) -> str | None:
    """Return the data set's hub id, if it has one."""
    if isinstance(task, OwnData):
        return task.name if _is_hub_id(task.name) else None
    return _HUB_DATASETS.get(task.name)


def _is_hub_id(name: str) -> bool:
    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _adapter(model: PreTrainedModel | PeftModel) -> str | None:
    if not has_adapter(model):
        return None
    config = model.active_peft_config
    # Only LoRA and similar adapters have a rank.
    rank = config.to_dict().get("r")
    told = f"a {config.peft_type.value} adapter{f' of rank {rank}' if rank else ''}"
    options = loading_options(model)
    if "load_in_8bit" in options:
        return f"{told} for weights in 8 bits"
    if options:
        return f"{told} for weights in 4 bits ({options['bnb_4bit_quant_type']})"
    return told


def _settings(args: AnswerConfig) -> Iterator[Setting]:
    unused = {"num_train_epochs" if args.max_steps > 0 else "max_steps"}
    if not isinstance(args, LatroConfig) or args.objective != "rlpr":
        unused.add("rlpr_min_std")
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    for f in dataclasses.fields(args):
        own = f.name not in inherited and f.name not in _LEFT_OUT
        value = getattr(args, f.name)
        if (own or f.name in _TRAINERS) and f.name not in unused and value is not None:
            yield Setting(f.name, value, f.default)


def _held_out(trainer: TrainedRun) -> HeldOut | None:
    if trainer.eval_dataset is None:
        return None
    settings = trainer.evaluation_settings
    return HeldOut(
        problems=len(trainer.eval_dataset),
        split=trainer.args.eval_split,
        grader=f"{type(trainer.task).__module__}.{type(trainer.task).__qualname__}",
        max_completion_length=settings.max_completion_length,
        temperature=settings.temperature,
        num_samples=settings.num_samples,
        command=_command(trainer, trainer.data or _data_of(trainer.task), settings),
    )


def _data_of(task: Task) -> DataArguments | None:
    return DataArguments(dataset_name=task.name) if task.name in TASKS else None


def _command(
    trainer: TrainedRun, data: DataArguments | None, settings: EvaluationSettings
) -> str | None:
    if data is None:
        return None
    args = trainer.args
    # When pushing, the Trainer completes the hub id, which the arguments may lack.
    pushed = trainer.hub_model_id if args.push_to_hub else None
    options: dict[str, Any] = {
        "model_name_or_path": pushed or args.output_dir,
        **loading_options(trainer.model),
        "dataset_name": data.dataset_name,
        **_changed(data),
        "eval_split": args.eval_split,
        "num_eval_examples": args.num_eval_examples,
        "num_samples": settings.num_samples,
        "majority": settings.num_samples,
        "max_completion_length": settings.max_completion_length,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }
    words = ["python", "-m", "latro.evaluate"]
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def _changed(data: DataArguments) -> Mapping[str, Any]:
    changed = {
        f.name: getattr(data, f.name)
        for f in dataclasses.fields(data)
        if f.name != "num_train_examples" and getattr(data, f.name) != f.default
    }
    return {k: json.dumps(v) if isinstance(v, dict) else v for k, v in changed.items()}


def _device(args: AnswerConfig) -> str:
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    return f"{args.world_size} × {name}"
