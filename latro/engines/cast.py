"""Sample from a copy of the policy's weights in another dtype.

A decoding step reads all weights to make one token per row, so that weights of half the bytes take
about half the time where memory is the limit. The copy is made once, and each update is written
into it in place. It differs from the policy by the rounding of its weights and products, so the
samples are of a distribution μ beside the policy's π: they are scored by the policy in the training
precision, and `latro.update.importance` has the ratio π/μ.

Memory: the copy has the bytes of the weights in its dtype, 2 per parameter in half precision. A
tensor that has the dtype already is the policy's own, so the frozen bf16 model under an adapter
costs nothing and the adapter's weights are all that is copied. Buffers, such as the frequencies of
rotary positions, keep their dtype, but for the factors that some adapters have as buffers, and
tables of positions that are added to hidden states. An adapter stays an adapter: merged into frozen
weights in half precision, a small one would be lost in their rounding.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.engines.transformers import TransformersEngine
from latro.model.adapters import adapter_buffers, without_wrapper
from latro.model.quantized import is_quantized
from latro.rollout.sequences import Sample

if TYPE_CHECKING:
    from peft import PeftModel

# What `torch.cpu.get_capabilities` calls products of bf16 numbers: of x86 processors, and of ARM's.
_CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")


class CastEngine(TransformersEngine):
    """Samples in this process from a copy of the policy in another dtype.

    Autocast is off while it samples, since the copy's dtype is asked for.

    Args:
        model: the policy, all of whose weights are in this process.
        tokenizer: decodes the text that is searched for the template.
        dtype: of the copy's weights.
        compiles: whether torch compiles the decoding step.

    Attributes:
        model: the copy.

    Raises:
        ValueError: as `TransformersEngine` does, or the model's weights are quantised.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        *,
        compiles: bool = False,
    ) -> None:
        super().__init__(cast_copy(model, dtype), tokenizer, compiles=compiles)

    def generate(self, *args: Any, **options: Any) -> list[list[Sample]]:
        """Return samples as `TransformersEngine.generate` does."""
        with torch.autocast(self.model.device.type, enabled=False):
            return super().generate(*args, **options)

    @torch.no_grad()
    def update_weights(
        self, model: PreTrainedModel, step: int, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the policy's weights into the copy; no memory is allocated for it."""
        # An engine for many devices may have moved the policy after the copy was made.
        if self.model.device != model.device:
            self.model.to(model.device)
        policys = model.state_dict()
        for name, own in self.model.state_dict().items():
            # Tensors of the copy's dtype are the policy's own.
            if own.data_ptr() != policys[name].data_ptr():
                own.copy_(policys[name])
        super().update_weights(model, step, weights)


def rollout_dtype(
    asked: str | None, model: PreTrainedModel | PeftModel, sharded: bool
) -> torch.dtype | None:
    """Return the dtype of the copy to sample from; None: no copy, the policy itself samples.

    Args:
        asked: the name of a dtype; None; or "auto", which is bf16 where the weights are fp32,
            whole and not quantised, and their device multiplies bf16 numbers itself.
        model: the policy.
        sharded: whether this process holds a part of each weight only.

    Raises:
        ValueError: a dtype is asked for, but the weights are in shards.
    """
    if asked is None:
        return None
    if asked != "auto":
        if sharded:
            raise ValueError(
                "rollout_dtype: expected it left out where the weights are in shards, since every "
                "process would hold a whole copy; mixed precision gathers them in its own dtype "
                f"for a rollout (--bf16 true); got {asked!r}"
            )
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    weight = model.get_input_embeddings().weight
    plain = weight.dtype == torch.float32 and not sharded and not is_quantized(model)
    fits = plain and multiplies_bf16(weight.device)
    return torch.bfloat16 if fits else None


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether a device has instructions for products of bf16 numbers."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(capabilities.get(name) for name in _CPU_BF16)


def cast_copy(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a copy of `model` whose floating-point weights are in `dtype`, in eval mode.

    Tensors that need no cast are the model's own, and so are its buffers but an adapter's factors
    and tables of positions. What transformers keeps in fp32 when it loads a model in `dtype` stays
    as it is.

    Raises:
        ValueError: the weights are quantised.
    """
    base = without_wrapper(model)
    if is_quantized(model):
        raise ValueError(
            "rollout_dtype: expected it left out for a model whose weights are quantised, got "
            f"{str(dtype).removeprefix('torch.')} with {type(base).__name__}"
        )
    # Such as a router's bias; a star stands for any characters.
    kept = "|".join(name.replace("*", ".*") for name in base._get_dtype_plan(dtype))
    # What `deepcopy` finds in its memo it takes for the copy that it would make. So nothing is
    # copied only to be cast afterwards, and a head that is tied to the embedding stays tied.
    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    H = base.get_input_embeddings().weight.shape[-1]
    # XGLM's table is no weight; in fp32 it would make hidden states fp32 too.
    tables = (b for b in model.buffers() if b.is_floating_point() and b.shape[1:] == (H,))
    for buffer in (*adapter_buffers(model), *tables):
        memo[id(buffer)] = buffer.to(dtype)
    for name, parameter in model.named_parameters():
        casts = parameter.is_floating_point() and parameter.dtype != dtype
        if casts and not (kept and re.search(kept, name)):
            cast = parameter.detach().to(dtype)
            memo[id(parameter)] = nn.Parameter(cast, requires_grad=False)
        else:
            memo[id(parameter)] = parameter
    return copy.deepcopy(model, memo).eval()
