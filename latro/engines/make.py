"""Make the engine that the settings name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.config.engine import EngineArguments
from latro.engines.transformers import TransformersEngine
from latro.engines.vllm import VllmEngine
from latro.model.adapters import check_ties
from latro.rollout.sequences import RolloutEngine, eos_token_ids

if TYPE_CHECKING:
    from peft import PeftModel


def make_engine(
    args: EngineArguments,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
) -> RolloutEngine:
    """Return the engine that `args` name; a server still needs `update_weights` with the model.

    Args:
        args: the settings.
        model: the policy.
        tokenizer: the model's tokenizer.
        folder: the output folder; a server reads weights from `vllm_weights` in it, unless
            `args.vllm_weights_dir` names another folder.

    Raises:
        ValueError: the engine cannot sample for this model, or there is no usable server.
    """
    if args.rollout_engine == "transformers":
        return TransformersEngine(model, tokenizer)
    check_ties(model)
    return VllmEngine(
        args.vllm_url,
        tokenizer,
        eos_token_ids=eos_token_ids(model, tokenizer),
        vocab_size=model.config.get_text_config().vocab_size,
        weights_dir=args.vllm_weights_dir or Path(folder) / "vllm_weights",
    )
