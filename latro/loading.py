"""Load a model and its tokenizer; errors say what to fix."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import struct
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
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

from latro.config.model import ModelArguments
from latro.config.training import SMALL_MODEL
from latro.model.adapters import check_kind, require_peft, weight_under
from latro.model.distribution import whole_on_load
from latro.model.gguf import Place, is_gguf, place_of
from latro.model.quantized import prepare_layers, quantization_config

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
    with _reading(repr(name), args.trust_remote_code):
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


@contextmanager
def _reading(model: str, trusted: bool, place: Place | None = None) -> Iterator[None]:
    """Turn libraries' errors about a model's files, within the block, into one line.

    Warnings are not shown, since later checks refuse what matters.

    Args:
        model: the model's name in messages.
        trusted: whether code that comes with a model may run.
        place: where the model is read from.

    Raises:
        ValueError: instead of any error that a library raises about a malformed config, tokenizer
            or weights file.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)
            # PEFT asks the model for this attribute by its old name.
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")
            yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # tokenizers raises exactly Exception.
        if not isinstance(error, _OF_FILES) and type(error) is not Exception:
            raise
        if not trusted and "trust_remote_code" in str(error):
            raise ValueError(
                f"model_name_or_path: {model} comes with code of its own, which would run with all "
                "your rights; if you have read it and trust it, pass --trust_remote_code true"
            ) from error
        reason = str(error)
        expected = (
            "a hub id or a directory with config.json, safetensors weights and a tokenizer, or "
            "with an adapter of PEFT; or a GGUF file"
        )
        if place is not None and place.gguf:
            # The folder is a temporary one.
            reason = reason.replace(f"{place.name}/", "")
            expected = "a GGUF file that is whole, of a language model that transformers reads"
        reason = textwrap.shorten(reason, _SHOWN_CHARACTERS, placeholder=" …").rstrip(".")
        if not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(
            f"model_name_or_path: cannot load {model}: {reason}. Expected {expected}"
        ) from error


def _load_weights(
    name: str, revision: str, args: ModelArguments, adapter: str | None = None
) -> PreTrainedModel:
    """Return a whole model; `adapter` names the adapter that it is the base model of."""
    told_name = repr(name) if adapter is None else f"{name!r}, the base model of {adapter!r}"
    with place_of(name, args.gguf_file, revision) as place:
        options = _quantised(args, place)
        with _reading(told_name, args.trust_remote_code, place), whole_on_load():
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
            # Some old configs ask for tuples, in which nothing has a name.
            for config in (model.config, model.config.get_text_config()):
                config.return_dict = True
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
    prepare_layers(model, model.dtype)
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
        _reading(repr(name), args.trust_remote_code, place),
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            place.name,
            **place.gguf,
            revision=revision,
            trust_remote_code=args.trust_remote_code,
            mistral_format=False,
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

    with _reading(repr(name), args.trust_remote_code):
        config = PeftConfig.from_pretrained(name, revision=args.model_revision)
        # Without this file PEFT itself would read a pickled one.
        file = cached_file(name, ADAPTER_SAFE_WEIGHTS_NAME, revision=args.model_revision)
    check_kind(config, f"model_name_or_path: the adapter {name!r}")
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"model_name_or_path: the adapter {name!r} does not name its base model")
    base_revision = config.revision or "main"
    weights = _load_weights(base, base_revision, args, adapter=name)
    with _reading(repr(name), args.trust_remote_code):
        _resize_vocabulary(weights, file)
        model = PeftModel.from_pretrained(
            weights, name, is_trainable=True, revision=args.model_revision
        )
    _check_adapter_weights(model, name, args.model_revision)
    for place in dict.fromkeys((name, beside)):
        if has_file(place, "tokenizer_config.json", revision=args.model_revision):
            own = dataclasses.replace(args, gguf_file=None)
            return model, _load_tokenizer(place, args.model_revision, own)
    return model, _load_tokenizer(base, base_revision, args)


def _resize_vocabulary(model: PreTrainedModel, file: str) -> None:
    """Give a base model the rows that its vocabulary had when the adapter in `file` was trained.

    Where a vocabulary was resized, PEFT saves embedding and head beside the adapter. New rows are
    NaN until they are loaded.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    whole = [
        weight_under(f"base_model.model.{name}")
        for name, module in model.named_modules()
        if any(module is layer for layer in layers)
    ]
    with safe_open(file, "pt") as saved:
        names = [n for n in saved.keys() if any(of.fullmatch(n) for of in whole)]  # noqa: SIM118
        rows = {saved.get_slice(name).get_shape()[0] for name in names}
    before = layers[0].weight.shape[0]
    if not rows or rows == {before}:
        return
    model.resize_token_embeddings(max(rows), mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in layer.parameters():
            parameter.data[before:] = math.nan


def _check_adapter_weights(model: PeftModel, name: str, revision: str) -> None:
    """Raise ValueError where the file lacks weights that the adapter's config asks for.

    PEFT only warns of some. So the weights are set to NaN and loaded again: what is still NaN is
    not in the file, whatever names older versions gave to the weights. So are the new rows of a
    vocabulary that was resized.
    """
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.fill_(math.nan)
    told = model.load_adapter(name, model.active_adapter, is_trainable=True, revision=revision)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    of_layers = {id(p) for layer in layers if layer is not None for p in layer.parameters()}
    needed = {k: p for k, p in model.named_parameters() if k in trained or id(p) in of_layers}
    _check_weights(
        repr(name),
        f"a {model.active_peft_config.peft_type.value} adapter",
        missing=[key for key, p in needed.items() if p.isnan().any()],
        # Of a whole copy in a resized vocabulary PEFT saves the same weight by two names.
        unexpected=(
            key
            for key in told.unexpected_keys
            if key.replace(".modules_to_save.", ".") in told.unexpected_keys
        ),
    )


def _attention(dtype: str) -> str | None:
    """Return flash-attn's name where it is installed and can run; else None for the default."""
    half = dtype in ("bfloat16", "float16")
    if half and torch.cuda.is_available() and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return None
