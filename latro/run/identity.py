"""Record which run a checkpoint belongs to, so that no other run resumes from it.

`checkpoint_run.json` in a checkpoint holds every setting that decides what is learnt, with
fingerprints of data, tokenizer and initial weights. A run that resumes is compared with it. A
difference that changes results is refused by name. A difference that does not, such as another
number of processes with as many prompts per update, is only reported, as is a longer or shorter
run, which trains from the checkpoint on by the schedule of its new length. Settings of paths,
logging, saving, pushing and data loading may differ freely.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, TrainingArguments

from latro.files import write_json
from latro.model.adapters import has_adapter, without_wrapper
from latro.rollout.dataset_rows import batches_of
from latro.rollout.frame import Chat

RUN_FILE = "checkpoint_run.json"

Facts = dict[str, dict[str, Any]]
"""Values by name in two sections: "decides" (must be equal), and "told" (reported if changed)."""

# Settings without an effect on what is learnt.
_FREE = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "project"),
    *("report_to", "disable_tqdm", "enable_jit_checkpoint", "push_to_hub", "debug"),
    *("do_train", "do_eval", "do_predict", "skip_memory_metrics", "local_rank"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("eval_on_start", "per_device_eval_batch_size", "use_cache", "remove_unused_columns"),
    *("log_completions", "num_completions_to_print", "max_skipped_updates"),
    *("vllm_url", "vllm_weights_dir", "vllm_sync", "vllm_gpu_memory_utilization"),
    *("vllm_max_model_length", "restore_callback_states_from_checkpoint"),
    # Other names of the settings for activation checkpointing.
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
}
_FREE_PREFIXES = ("logging_", "log_", "save_", "hub_", "ddp_", "trackio_")
# Settings that change only rounding, the length of a run, or how a run resumes.
_TOLD = {
    *("max_steps", "num_train_epochs", "ignore_data_skip"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "token_budget", "backend"),
    "vllm_mode",
    *("activation_checkpointing", "activation_checkpointing_kwargs", "tf32", "use_cpu"),
    *("fsdp", "fsdp_config", "deepspeed"),
}
# Settings of evaluations; they decide where the best model or the learning rate depends on them.
_EVALUATION = {
    *("eval_strategy", "eval_steps", "eval_delay", "eval_split", "num_eval_examples"),
    *("metric_for_best_model", "greater_is_better"),
}
_HELD_OUT = "held-out data"
_CONFIG_APART = {
    # Where the model is stored, which version wrote it, and how it is run.
    *("_name_or_path", "transformers_version", "use_cache", "dtype", "architectures"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
}
# A tensor's fingerprint covers at most so many of its values, since training changes nearly all.
_VALUES = 1000
_ROWS_AT_ONCE = 100

_logger = logging.getLogger(__name__)


def settings_of(args: TrainingArguments, num_processes: int) -> Facts:
    """Return the settings that are compared."""
    decides: dict[str, Any] = {}
    told: dict[str, Any] = {"processes": num_processes}
    by_evaluation = args.load_best_model_at_end or args.lr_scheduler_type in (
        "reduce_lr_on_plateau",
        "greedy",
    )
    for name, value in args.to_dict().items():
        if name in _FREE or name.startswith(_FREE_PREFIXES):
            continue
        apart = name in _TOLD or (name in _EVALUATION and not by_evaluation)
        (told if apart else decides)[name] = value
    decides["prompts an update"] = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes
    )
    if args.dataloader_drop_last:
        # The number of prompts that an epoch leaves out depends on the batch size itself.
        decides["prompts a batch"] = args.per_device_train_batch_size * num_processes
    told["torch"], told["transformers"] = torch.__version__, transformers.__version__
    told["device"] = args.device.type
    return {"decides": decides, "told": told}


def model_facts(model: Any, tokenizer: PreTrainedTokenizerBase) -> Facts:
    """Return the facts of an untrained model, its adapter and its tokenizer."""
    base = without_wrapper(model)
    decides = config_facts(base)
    decides["initial weights"] = weights_fingerprint(model)
    if has_adapter(model):
        adapter = model.active_peft_config.to_dict()
        apart = ("base_model_name_or_path", "inference_mode", "revision")
        decides |= {f"adapter: {k}": _ordered(v) for k, v in adapter.items() if k not in apart}
    decides["vocabulary"] = _crc32(sorted(tokenizer.get_vocab().items()))
    decides["special tokens"] = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    decides["chat template"] = _crc32(tokenizer.chat_template)
    return {"decides": decides, "told": {"model": base.config.name_or_path}}


def config_facts(model: Any) -> dict[str, Any]:
    """Return what a model's config says of how it computes, by names to be shown."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _CONFIG_APART}
    return {f"model config: {name}": value for name, value in config.items()}


def data_facts(
    train: Dataset | None, held_out: Dataset | None, answer_template: str, chat: Chat
) -> Facts:
    """Return the facts of the training data and the held-out data, and of how they are asked."""
    return {
        "decides": {
            "answer template": answer_template,
            "system_prompt": chat.system_prompt,
            "chat_template_kwargs": dict(chat.template_kwargs),
            "training data": None if train is None else rows_fingerprint(train),
        },
        "told": {_HELD_OUT: None if held_out is None else rows_fingerprint(held_out)},
    }


def merged(settings: Facts, *others: Facts) -> Facts:
    """Return all facts of a run; held-out data decides only where settings of evaluations do."""
    facts = {
        section: {
            name: value for part in (settings, *others) for name, value in part[section].items()
        }
        for section in ("decides", "told")
    }
    if facts["decides"].keys() >= _EVALUATION:
        facts["decides"][_HELD_OUT] = facts["told"].pop(_HELD_OUT)
    return facts


def rows_fingerprint(dataset: Dataset) -> dict[str, Any]:
    """Return the number of rows and a checksum of what is learnt from them."""
    columns = [c for c in ("prompt", "answer", "rationale") if c in dataset.column_names]
    checksum = 0
    for batch in batches_of(dataset, columns, _ROWS_AT_ONCE):
        for values in batch:
            checksum = zlib.crc32(json.dumps(values, default=str).encode(), checksum)
    return {"rows": len(dataset), "crc32": f"{checksum:08x}"}


def weights_fingerprint(model: nn.Module) -> str:
    """Return a checksum over a sample of values of every tensor.

    For a model with an adapter, only frozen tensors count: a checkpoint holds all others.
    """
    checksum = 0
    adapter = has_adapter(model)
    for name, parameter in model.named_parameters():
        if adapter and parameter.requires_grad:
            continue
        values = parameter.detach()
        if isinstance(values, DTensor):
            values = values.full_tensor()
        values = values.reshape(-1)[:: max(1, parameter.numel() // _VALUES)]
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(values.float().cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"


def write_identity(folder: Path, identity: Facts) -> None:
    """Write into a checkpoint which run it belongs to."""
    write_json(folder / RUN_FILE, as_json(identity))


def check_identity(folder: str, identity: Facts, *, warns: bool = True) -> None:
    """Compare a run with a checkpoint's run, and warn of differences that do not matter.

    Args:
        folder: the checkpoint.
        identity: the facts of the run that is to go on from it.
        warns: whether this process is the one of several that warns.

    Raises:
        ValueError: it is another run, or the file with its facts is damaged.
    """
    path = Path(folder) / RUN_FILE
    try:
        there = json.loads(path.read_bytes())
        sections = {name: dict(there[name]) for name in ("decides", "told")}
    except FileNotFoundError:
        if warns:
            _logger.warning(
                "resume_from_checkpoint: %s has no %s, as checkpoints of before and of other "
                "trainers; nobody checks that it is of this run",
                folder,
                RUN_FILE,
            )
        return
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"resume_from_checkpoint: {path} cannot be read: {error!r}") from error
    here = as_json(identity)
    refused = _differences(sections["decides"], here["decides"])
    told = _differences(sections["told"], here["told"])
    if refused:
        raise ValueError(
            f"resume_from_checkpoint: {folder} is of another run: {'; '.join(refused + told)}. "
            "Resume with that run's settings, or begin another run in another folder"
        )
    unknown = [
        f"{name} {value!r}, unknown to the checkpoint"
        for name, value in here["decides"].items()
        if name not in sections["decides"]
    ]
    if warns and (told or unknown):
        _logger.warning("going on from %s otherwise: %s", folder, "; ".join(told + unknown))


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {there[name]!r}, now {here[name]!r}"
        for name in there
        if name in here and there[name] != here[name]
    ]


def as_json(identity: Mapping[str, Mapping[str, Any]]) -> Facts:
    """Return facts as they are read back from JSON: lists for tuples, and strings as keys.

    Numbers that JSON lacks are strings too, as the infinite `time_step_limit` of hybrid models.
    """
    return json.loads(json.dumps(identity, default=str), parse_constant=str)


def _ordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _crc32(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(value, default=str).encode()):08x}"
