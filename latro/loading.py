"""Loads a model, its tokenizer and a task's problems, with errors that say what to mend."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
    has_file,
)

from latro.config import SMALL_MODEL, DataArguments, ModelArguments
from latro.distribution import whole_on_load
from latro.peft import require_peft
from latro.prompts import prompt_text
from latro.tasks import TASKS, Task, get_task, read_own_data

if TYPE_CHECKING:
    from peft import PeftModel


def load_model(
    args: ModelArguments,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model that the arguments name, and its tokenizer; an adapter comes on its base model.

    Only safetensors are read: a pickled checkpoint can run code. Code that comes with a model runs
    where `trust_remote_code` asks for it, and nobody is asked in between.

    Raises:
        ValueError: no such model, one with code that is not trusted, a tokenizer with more tokens
            than the model has, or an adapter where PEFT is not installed.
    """
    name = args.model_name_or_path or str(SMALL_MODEL)
    model: PreTrainedModel | PeftModel
    try:
        if find_adapter_config_file(name, revision=args.model_revision) is not None:
            model, tokenizer = _load_adapter(name, args)
        else:
            model = _load_weights(name, args.model_revision, args)
            tokenizer = _load_tokenizer(name, args.model_revision, args)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path: cannot load {name!r}: {error}. Expected a hub id or a directory "
            "with config.json, safetensors weights and a tokenizer, or with an adapter of PEFT"
        ) from error
    except ValueError as error:
        if args.trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"model_name_or_path: {name!r} comes with code of its own, which would run with all "
            "your rights; if you have read it and trust it, pass --trust_remote_code true"
        ) from error
    vocab = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocab:
        raise ValueError(
            f"model_name_or_path: {name!r}: the tokenizer has {len(tokenizer)} tokens but the "
            f"model's embedding has {vocab}"
        )
    if torch.cuda.is_available():
        model.to("cuda")
    return model, tokenizer


def _load_weights(name: str, revision: str, args: ModelArguments) -> PreTrainedModel:
    with whole_on_load():
        return AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation or _attention(args.dtype),
            use_safetensors=True,
            trust_remote_code=args.trust_remote_code,
        )


def _load_tokenizer(name: str, revision: str, args: ModelArguments) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        name, revision=revision, trust_remote_code=args.trust_remote_code
    )


def _load_adapter(name: str, args: ModelArguments) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """An adapter on the base model that its config names; trainable."""
    require_peft("model_name_or_path")
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(name, revision=args.model_revision)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"model_name_or_path: the adapter {name!r} does not name its base model")
    # PEFT itself would go on to a pickled file.
    cached_file(name, ADAPTER_SAFE_WEIGHTS_NAME, revision=args.model_revision)
    base_revision = config.revision or "main"
    model = PeftModel.from_pretrained(
        _load_weights(base, base_revision, args),
        name,
        is_trainable=True,
        revision=args.model_revision,
    )
    if has_file(name, "tokenizer_config.json", revision=args.model_revision):
        return model, _load_tokenizer(name, args.model_revision, args)
    return model, _load_tokenizer(base, base_revision, args)


def _attention(dtype: str) -> str | None:
    """flash-attn where it is installed and can run; else what transformers takes by itself."""
    half = dtype in ("bfloat16", "float16")
    if half and torch.cuda.is_available() and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return None


def load_task(args: DataArguments) -> Task:
    """The task that the arguments name, or that of the user's own data.

    Raises:
        ValueError: there is nothing of that name, a malformed row, or an argument that the one or
            the other does not take.
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
    return task


def load_splits(
    task: Task, args: DataArguments, seed: int, eval_split: str, num_eval_examples: int | None
) -> tuple[Dataset, Dataset]:
    """The training problems and the held-out ones, no prompt of which is trained on.

    Raises:
        ValueError: as `load_train` and `load_held_out`; or the two have a prompt in common.
    """
    train = load_train(task, args, seed)
    held_out = load_held_out(task, eval_split, args, num_eval_examples)
    trained = {prompt_text(prompt) for prompt in train["prompt"]}
    seen = sum(prompt_text(prompt) in trained for prompt in held_out["prompt"])
    if seen:
        raise ValueError(
            f"eval_split: expected problems that are not trained on; {seen} of the "
            f"{len(held_out)} of {eval_split!r} are"
        )
    return train, held_out


def load_train(task: Task, args: DataArguments, seed: int) -> Dataset:
    """The training problems that the arguments name; `seed` draws them.

    Raises:
        ValueError: a missing file or a malformed row.
    """
    return _load(task, "train", args, args.num_train_examples, seed)


def load_held_out(task: Task, split: str, args: DataArguments, num_examples: int | None) -> Dataset:
    """Held-out problems, of "validation" or "test", the same ones for every seed of a run.

    Raises:
        ValueError: a missing file, a malformed row or an unknown split.
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
