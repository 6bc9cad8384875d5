"""Make the engine that the settings name, or load the weights into it too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.config.engine import EngineArguments
from latro.engines.cast import CastEngine, rollout_dtype
from latro.engines.transformers import TransformersEngine
from latro.engines.vllm import VllmEngine
from latro.model.adapters import check_ties, has_adapter
from latro.model.quantized import check_servable
from latro.rollout.sequences import RolloutEngine, eos_token_ids

if TYPE_CHECKING:
    from peft import PeftModel


def make_engine(
    args: EngineArguments,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    sharded: bool = False,
) -> RolloutEngine:
    """Return the engine that `args` name; it still needs `update_weights` with the model.

    Args:
        args: the settings.
        model: the policy.
        tokenizer: the model's tokenizer.
        folder: the output folder; a server reads weights from `vllm_weights` in it, unless
            `args.vllm_weights_dir` names another folder.
        sharded: whether this process holds a part of each of the model's weights only.

    Raises:
        ValueError: the engine cannot sample for this model, or there is no usable server.
    """
    if args.rollout_engine == "transformers":
        dtype = rollout_dtype(args.rollout_dtype, model, sharded)
        if args.rollout_compile and sharded:
            raise ValueError(
                "rollout_compile: expected it left out where the weights are in shards, which are "
                "gathered by what torch would compile; got true"
            )
        if dtype is None:
            return TransformersEngine(model, tokenizer, compiles=args.rollout_compile)
        return CastEngine(model, tokenizer, dtype, compiles=args.rollout_compile)
    if sharded and has_adapter(model):
        raise ValueError(
            "rollout_engine: expected transformers where a model with an adapter is in shards, "
            "got vllm, which is handed whole weights with the adapter merged into them"
        )
    check_ties(model)
    check_servable(model)
    if args.vllm_mode == "colocate":
        if sharded:
            raise ValueError(
                "vllm_mode: expected server where the model's weights are in shards, since every "
                "process's vLLM takes whole weights; got colocate"
            )
        # Needs the package vllm.
        from latro.engines.vllm_colocated import ColocatedVllm

        return ColocatedVllm(
            model,
            tokenizer,
            eos_token_ids=eos_token_ids(model, tokenizer),
            dtype=rollout_dtype(args.rollout_dtype, model, sharded) or model.dtype,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
        )
    if args.rollout_dtype is not None:
        raise ValueError(
            "rollout_dtype: expected rollout_engine='transformers' or vllm_mode='colocate' with "
            "it, since a server has a dtype of its own (vllm serve --dtype); got "
            f"{args.rollout_engine!r} and {args.vllm_mode!r}"
        )
    written = args.vllm_weights_dir or Path(folder) / "vllm_weights"
    return VllmEngine(
        args.vllm_url,
        tokenizer,
        eos_token_ids=eos_token_ids(model, tokenizer),
        vocab_size=model.config.get_text_config().vocab_size,
        weights_dir=written if args.vllm_sync == "files" else None,
    )


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
