"""Load a model, its tokenizer, an engine and a task's problems; errors say what to fix."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import struct
import textwrap
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    cached_file,
    find_adapter_config_file,
    has_file,
)

from latro.config.engine import EngineArguments
from latro.config.model import ModelArguments
from latro.config.training import SMALL_MODEL, DataArguments
from latro.engines.make import make_engine
from latro.engines.vllm import VllmEngine
from latro.model.adapters import require_peft
from latro.model.distribution import whole_on_load
from latro.model.gguf import Place, is_gguf, place_of
from latro.model.quantized import prepare_layers, quantization_config
from latro.rollout.prompts import prompt_text
from latro.rollout.sequences import RolloutEngine
from latro.tasks import TASKS, Task, get_task, read_own_data

if TYPE_CHECKING:
    from peft import PeftModel

_SHOWN_KEYS = 5
_SHOWN_CHARACTERS = 300
# The errors that transformers, PEFT, safetensors and tokenizers raise about a folder's contents or
# a GGUF file's.
_OF_FILES = (
    *(OSError, ImportError, SafetensorError, StrictDataclassError, ValueError, TypeError),
    *(LookupError, ArithmeticError, AttributeError, RuntimeError, struct.error),
)


def load_model(
    args: ModelArguments,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Return the named model and its tokenizer; an adapter is loaded on its base model.

    PEFT saves an adapter of another name than "default" into a folder of that name within the one
    that is named; where there is one such adapter, that one is meant.

    Only safetensors and GGUF files are read, since a pickled checkpoint can run code. Code that
    comes with a model runs only with `trust_remote_code`, without a further question.

    Raises:
        ValueError: there is no such model, its code is not trusted, its tokenizer has more tokens
            than the model, or a package is not installed that reads it (an adapter, a GGUF file) or
            quantises it; or there are several adapters in folders of their own.
    """
    if args.gguf_file is not None and args.model_name_or_path is None:
        raise ValueError(
            "gguf_file: expected model_name_or_path with it, the folder or hub id that has the "
            f"file; got {args.gguf_file!r} alone"
        )
    name, revision = args.model_name_or_path or str(SMALL_MODEL), args.model_revision
    model: PreTrainedModel | PeftModel
    with _Reading(repr(name), args.trust_remote_code):
        # PEFT would take the path of a file for a hub id.
        config = None if is_gguf(name) else find_adapter_config_file(name, revision=revision)
    named = None if config is not None else _named_adapter(name)
    if config is not None or named is not None:
        model, tokenizer = _load_adapter(named or name, args, beside=name)
    else:
        model = _load_weights(name, revision, args)
        tokenizer = _load_tokenizer(name, revision, args)
    check_vocabulary(model, tokenizer, f"model_name_or_path: {name!r}")
    if torch.cuda.is_available():
        model.to("cuda")
    return model, tokenizer


def check_vocabulary(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Check that every token has a row in the model's embedding.

    Raises:
        ValueError: a token has none; the message begins with `name`.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise ValueError(
            f"{name}: the tokenizer has {highest + 1} tokens but the model's embedding has {rows}"
        )


class _Reading:
    """A context manager that turns libraries' errors about a model's files into one line.

    Warnings are not shown, since later checks refuse what matters.

    Args:
        model: the model's name in messages.
        trusted: whether code that comes with a model may run.
        place: where the model is read from.

    Raises:
        ValueError: instead of any error that a library raises about a malformed config, tokenizer
            or weights file.
    """

    def __init__(self, model: str, trusted: bool, place: Place | None = None) -> None:
        self.model = model
        self.trusted = trusted
        self.place = place

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", category=UserWarning)
        # PEFT asks the model for this attribute by its old name.
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._warnings.__exit__(None, None, None)
        if kind is None or issubclass(kind, torch.OutOfMemoryError):
            return
        # tokenizers raises exactly Exception.
        if not issubclass(kind, _OF_FILES) and kind is not Exception:
            return
        if not self.trusted and "trust_remote_code" in str(error):
            raise ValueError(
                f"model_name_or_path: {self.model} comes with code of its own, which would run "
                "with all your rights; if you have read it and trust it, pass --trust_remote_code "
                "true"
            ) from error
        reason = str(error)
        expected = (
            "a hub id or a directory with config.json, safetensors weights and a tokenizer, or "
            "with an adapter of PEFT; or a GGUF file"
        )
        if self.place is not None and self.place.gguf:
            # The folder is a temporary one.
            reason = reason.replace(f"{self.place.name}/", "")
            expected = "a GGUF file that is whole, of a language model that transformers reads"
        reason = textwrap.shorten(reason, _SHOWN_CHARACTERS, placeholder=" …").rstrip(".")
        if not issubclass(kind, (OSError, ValueError)):
            reason = f"{kind.__name__}: {reason}"
        raise ValueError(
            f"model_name_or_path: cannot load {self.model}: {reason}. Expected {expected}"
        ) from error


def _load_weights(
    name: str, revision: str, args: ModelArguments, adapter: str | None = None
) -> PreTrainedModel:
    """Return a whole model; `adapter` names the adapter that it is the base model of."""
    told_name = repr(name) if adapter is None else f"{name!r}, the base model of {adapter!r}"
    with place_of(name, args.gguf_file, revision) as place:
        options = _quantised(args, place)
        with _Reading(told_name, args.trust_remote_code, place), whole_on_load():
            model, told = AutoModelForCausalLM.from_pretrained(
                place.name,
                **options,
                revision=revision,
                dtype=args.dtype,
                attn_implementation=args.attn_implementation or _attention(args.dtype),
                use_safetensors=True,
                trust_remote_code=args.trust_remote_code,
                # Otherwise transformers raises an error with a table of many lines.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            # transformers ignores a damaged generation config, and loses further end tokens in it.
            if has_file(place.name, GENERATION_CONFIG_NAME, revision=revision):
                GenerationConfig.from_pretrained(place.name, revision=revision)
            place.name_model(model)
            # transformers would take weights of an unknown quantisation as they are.
            quantised = getattr(model.config, "quantization_config", None)
            if quantised is not None and getattr(model, "hf_quantizer", None) is None:
                raise ValueError(f"it is quantised in a way that is not known: {quantised}")
    # Older versions saved buffers that are now computed, and show up as unexpected.
    buffers = {buffer for buffer, _ in model.named_buffers()}
    _check_weights(
        told_name,
        type(model).__name__,
        missing=told["missing_keys"],
        unexpected=told["unexpected_keys"] - buffers,
        mismatched=[
            f"{key} {tuple(found)} for {tuple(expected)}"
            for key, found, expected in told["mismatched_keys"]
        ],
    )
    prepare_layers(model)
    return model


def _quantised(args: ModelArguments, place: Place) -> dict[str, Any]:
    """Return the arguments by which weights are quantised as they are loaded, or dequantised."""
    config = quantization_config(args)
    if config is None:
        return place.arguments_of_weights()
    if place.gguf:
        raise ValueError(
            "load_in_4bit and load_in_8bit take no GGUF file, which is quantised in its own way; "
            "load it without them, save it (save_pretrained) and name that folder"
        )
    return {"quantization_config": config}


def _check_weights(
    name: str,
    what: str,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[str] = (),
) -> None:
    """Raise ValueError where weights do not fit the model, which would leave some random."""
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    told = []
    for fault, named in faults.items():
        keys = sorted(named)
        if keys:
            more = ", …" if len(keys) > _SHOWN_KEYS else ""
            told.append(f"{len(keys)} {fault} ({', '.join(keys[:_SHOWN_KEYS])}{more})")
    if told:
        raise ValueError(
            f"model_name_or_path: expected in {name} the weights of {what}, got {'; '.join(told)}"
        )


def _load_tokenizer(name: str, revision: str, args: ModelArguments) -> PreTrainedTokenizerBase:
    with (
        place_of(name, args.gguf_file, revision) as place,
        _Reading(repr(name), args.trust_remote_code, place),
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            place.name, **place.gguf, revision=revision, trust_remote_code=args.trust_remote_code
        )
    if place.gguf:
        tokenizer.name_or_path = place.source
    return tokenizer


def _named_adapter(name: str) -> str | None:
    """Return the folder of the one adapter that has a folder of its own within that of `name`.

    Raises:
        ValueError: there are several.
    """
    folder = Path(name)
    if not folder.is_dir() or (folder / CONFIG_NAME).exists():
        return None
    found = sorted(str(config.parent) for config in folder.glob(f"*/{ADAPTER_CONFIG_NAME}"))
    if len(found) > 1:
        raise ValueError(
            f"model_name_or_path: expected one adapter in {name!r}, got {' and '.join(found)}; "
            "name one of these folders, or merge the adapters before the model is saved"
        )
    return found[0] if found else None


def _load_adapter(
    name: str, args: ModelArguments, beside: str
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Return a trainable adapter on the base model that its config names.

    The tokenizer is that of the adapter's folder, else of `beside`, else of the base model.
    """
    require_peft("model_name_or_path")
    from peft import PeftConfig, PeftModel

    with _Reading(repr(name), args.trust_remote_code):
        config = PeftConfig.from_pretrained(name, revision=args.model_revision)
        # Without this file PEFT itself would read a pickled one.
        cached_file(name, ADAPTER_SAFE_WEIGHTS_NAME, revision=args.model_revision)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"model_name_or_path: the adapter {name!r} does not name its base model")
    base_revision = config.revision or "main"
    weights = _load_weights(base, base_revision, args, adapter=name)
    with _Reading(repr(name), args.trust_remote_code):
        model = PeftModel.from_pretrained(
            weights, name, is_trainable=True, revision=args.model_revision
        )
    _check_adapter_weights(model, name, args.model_revision)
    for place in dict.fromkeys((name, beside)):
        if has_file(place, "tokenizer_config.json", revision=args.model_revision):
            own = dataclasses.replace(args, gguf_file=None)
            return model, _load_tokenizer(place, args.model_revision, own)
    return model, _load_tokenizer(base, base_revision, args)


def _check_adapter_weights(model: PeftModel, name: str, revision: str) -> None:
    """Raise ValueError where the file lacks weights that the adapter's config asks for.

    PEFT only warns of some. So the weights are set to NaN and loaded again: what is still NaN is
    not in the file, whatever names older versions gave to the weights.
    """
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.fill_(math.nan)
    told = model.load_adapter(name, model.active_adapter, is_trainable=True, revision=revision)
    _check_weights(
        repr(name),
        f"a {model.active_peft_config.peft_type.value} adapter",
        missing=[key for key, p in trained.items() if p.isnan().any()],
        unexpected=told.unexpected_keys,
    )


def _attention(dtype: str) -> str | None:
    """Return flash-attn's name where it is installed and can run; else None for the default."""
    half = dtype in ("bfloat16", "float16")
    if half and torch.cuda.is_available() and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return None


def load_engine(
    args: EngineArguments,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path,
    processes: PartialState,
) -> RolloutEngine:
    """Return the engine that the arguments name, with the model's weights loaded into it.

    Args:
        args: the settings.
        model: the model to sample from; a server takes over its weights, whatever it served before.
        tokenizer: the model's tokenizer.
        folder: the output folder.
        processes: the processes of the command, which all call this.

    Raises:
        ValueError: the engine cannot sample for this model, or there is no usable server.
        ConnectionError: the server could not load the weights.
    """
    engine = make_engine(args, model=model, tokenizer=tokenizer, folder=folder)
    if processes.is_main_process or not isinstance(engine, VllmEngine):
        engine.update_weights(model, 0)
    processes.wait_for_everyone()
    return engine


def load_task(args: DataArguments) -> Task:
    """Return the task that the arguments name, or the task of the user's own data.

    Raises:
        ValueError: there is nothing of that name, a row is malformed, or an argument does not apply
            to the task.
    """
    if args.dataset_name in TASKS:
        for name in ("dataset_config", "grader"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"{name}: expected with data of your own only, got {getattr(args, name)!r} "
                    f"with the task {args.dataset_name}"
                )
        task = get_task(args.dataset_name)
    else:
        if args.dataset_path is not None:
            raise ValueError(
                f"dataset_path: expected with one of {', '.join(sorted(TASKS))} only, got "
                f"{args.dataset_path!r} with {args.dataset_name!r}"
            )
        task = read_own_data(args.dataset_name, config=args.dataset_config, grader=args.grader)
    if args.answer_template is not None:
        task.answer_template = args.answer_template
    task.chat = args.chat
    return task


def load_splits(
    task: Task, args: DataArguments, seed: int, eval_split: str, num_eval_examples: int | None
) -> tuple[Dataset, Dataset]:
    """Return the training problems and the held-out ones, which have no prompt in common.

    Raises:
        ValueError: `load_train` or `load_held_out` raises it, or they have a prompt in common.
    """
    train = load_train(task, args, seed)
    held_out = load_held_out(task, split=eval_split, args=args, num_examples=num_eval_examples)
    trained = {prompt_text(prompt) for prompt in train["prompt"]}
    seen = sum(prompt_text(prompt) in trained for prompt in held_out["prompt"])
    if seen:
        raise ValueError(
            f"eval_split: expected problems that are not trained on; {seen} of the "
            f"{len(held_out)} of {eval_split!r} are"
        )
    return train, held_out


def load_train(task: Task, args: DataArguments, seed: int) -> Dataset:
    """Return the training problems that the arguments name, drawn with `seed`.

    Raises:
        ValueError: a file is missing or a row is malformed.
    """
    return _load(task, "train", args, args.num_train_examples, seed)


def load_held_out(task: Task, split: str, args: DataArguments, num_examples: int | None) -> Dataset:
    """Return problems of "validation" or "test", the same for every seed of a run.

    Raises:
        ValueError: a file is missing, a row is malformed, or the split is unknown.
    """
    return _load(task, split, args, num_examples, seed=0)


def _load(
    task: Task, split: str, args: DataArguments, num_examples: int | None, seed: int
) -> Dataset:
    path = args.dataset_path
    try:
        return task.load(split, dataset_path=path, num_examples=num_examples, seed=seed)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
