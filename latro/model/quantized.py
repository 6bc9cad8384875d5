"""Models whose weights bitsandbytes keeps in 4 or 8 bits (QLoRA, arXiv 2305.14314).

The weights of the blocks' matrices are quantised as they are loaded, and stay so: an adapter on
them is trained, and with it off the model is π_0, as with any frozen model
(`latro.model.adapters`). Embedding, norms and head keep their dtype. A product takes one layer's
weights back to the dtype of the activations, which are never quantised: so a rationale is scored by
the policy that sampled it, whatever stands beside it in a batch.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from transformers import BitsAndBytesConfig, PreTrainedModel

from latro.model.adapters import has_adapter, without_wrapper

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from latro.config.model import ModelArguments


def quantization_config(args: ModelArguments) -> BitsAndBytesConfig | None:
    """Return transformers' own settings, from the command line's; None: nothing is quantised.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if not (args.load_in_4bit or args.load_in_8bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{'load_in_4bit' if args.load_in_4bit else 'load_in_8bit'}: needs the package "
            "bitsandbytes, which is not installed: pip install 'latro-kernels[quantization]'"
        )
    if args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
    )


def is_quantized(model: Any) -> bool:
    """Return whether the weights are quantised of a model, or of the one under PEFT's wrapper."""
    return getattr(without_wrapper(model), "hf_quantizer", None) is not None


def prepare_layers(model: PreTrainedModel, compute_dtype: torch.dtype | None = None) -> None:
    """Set the layers of bitsandbytes, once the weights are loaded, to compute as others do.

    Args:
        model: without PEFT's wrapper; adapters may be on it.
        compute_dtype: of layers of 4 bits, whose default is fp32 whatever the model's dtype; None
            leaves it as it is.

    Raises:
        ValueError: a layer is too narrow for 4 bits on a CPU.
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, BitsAndBytesConfig):
        return
    if config.load_in_8bit:
        from bitsandbytes.nn import Linear8bitLt

        from latro.model.weights_in_8_bits import WeightsIn8Bits

        for module in model.modules():
            if type(module) is Linear8bitLt:
                # The layer stays one of bitsandbytes, on which PEFT knows how to put an adapter.
                module.__class__ = WeightsIn8Bits
        return
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        weight: Any = module.weight
        block = weight.quant_state.blocksize
        if weight.device.type == "cpu" and module.in_features % block:
            # Its blocks run on from row to row, and its CPU code reads them row by row.
            raise ValueError(
                f"load_in_4bit: expected layers of a width that {block} divides on a CPU, where "
                f"bitsandbytes reads others wrongly; {name} has {module.in_features}"
            )
        if compute_dtype is not None:
            module.compute_dtype = compute_dtype
        # In eval mode it would pack the weights anew for such a CPU, which rounds their scales and
        # leaves them without a gradient, in training too.
        module.support_avx512bf16_for_cpu = False


def check_trainable(model: PreTrainedModel | PeftModel) -> None:
    """Check that a model has an adapter to train if its weights are quantised.

    Raises:
        ValueError: it has none.
    """
    if is_quantized(model) and not has_adapter(model):
        raise ValueError(
            "model: expected an adapter on weights that are quantised, which cannot be trained "
            "themselves, got none; pass --use_peft true"
        )


def check_shardable(model: PreTrainedModel | PeftModel) -> None:
    """Check that an engine can keep a part of each weight in each process.

    Raises:
        ValueError: the weights are quantised.
    """
    if is_quantized(model):
        raise ValueError(
            "model: expected weights that are not quantised with FSDP or DeepSpeed's ZeRO-3, which "
            "would cut them into shards; train by several processes without these (DDP)"
        )


def check_servable(model: PreTrainedModel | PeftModel) -> None:
    """Check that a server can be handed the weights of a model.

    Raises:
        ValueError: they are quantised. Merging an adapter into them would round it to 4 or 8 bits.
    """
    if is_quantized(model):
        raise ValueError(
            "rollout_engine: expected transformers with weights that are quantised, got vllm, "
            "which is handed whole weights with the adapter merged into them; merged into 4 or 8 "
            "bits it would be lost in their rounding"
        )


def loading_options(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    """Return the arguments of a command that load a model's base quantised as it is."""
    config = getattr(without_wrapper(model).config, "quantization_config", None)
    if not isinstance(config, BitsAndBytesConfig):
        return {}
    if config.load_in_8bit:
        return {"load_in_8bit": "true"}
    options = {"load_in_4bit": "true", "bnb_4bit_quant_type": config.bnb_4bit_quant_type}
    if config.bnb_4bit_use_double_quant:
        options["use_bnb_nested_quant"] = "true"
    return options
