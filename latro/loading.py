"""Loads a model, its tokenizer and a task's problems, with errors that say what to mend."""

from __future__ import annotations

import importlib.util

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from latro.config import SMALL_MODEL, DataArguments, ModelArguments
from latro.tasks import Task


def load_model(args: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the arguments name, and its tokenizer.

    Only safetensors are read: a pickled checkpoint can run code. Code that comes with a model runs
    where `trust_remote_code` asks for it, and nobody is asked in between.

    Raises:
        ValueError: no such model, one with code that is not trusted, or a tokenizer with more
            tokens than the model has.
    """
    name = args.model_name_or_path or str(SMALL_MODEL)
    options = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation or _attention(args.dtype),
            use_safetensors=True,
            **options,
        )
    except OSError as error:
        raise ValueError(
            f"model_name_or_path: cannot load {name!r}: {error}. Expected a hub id or a directory "
            "with config.json, safetensors weights and a tokenizer"
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


def _attention(dtype: str) -> str | None:
    """flash-attn where it is installed and can run; else what transformers takes by itself."""
    half = dtype in ("bfloat16", "float16")
    if half and torch.cuda.is_available() and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return None


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
