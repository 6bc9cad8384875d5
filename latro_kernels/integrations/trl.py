"""TRL's trainers, with `linear_logprob` in the place of the function behind TRL's fused head.

    from latro_kernels.integrations.trl import patch_trl

    patch_trl()

RLOO, GRPO, SFT, DPO and KTO add a fused head to their model, which hands hidden states, the head's
weight and targets to one function; that function is replaced, and all around it stays TRL's: the
model's trunk and its images, PEFT, gathering of sharded weights, auxiliary losses, metrics.
TRL's own function does the work where ours cannot: see `_is_ours`.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from importlib import import_module
from types import CodeType
from typing import Any

import torch
import trl
from torch import Tensor

from latro_kernels.head import autocast_dtype
from latro_kernels.integrations.logits import LogitForm, is_shard
from latro_kernels.linear_logprob import linear_logprob

_VERSION = f"TRL {trl.__version__}"
_KNOWN = "that of TRL 1.16, which this version of latro_kernels knows"
try:
    chunked_logprob: Any = import_module("trl.kernels.chunked_logprob")
    seam: Any = import_module("trl.trainer.utils")
except ModuleNotFoundError as error:
    raise ImportError(f"patch_trl: {_VERSION} has another fused head than {_KNOWN}") from error

_PARAMETERS = (
    "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale "
    "outputs"
)
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# What `linear_logprob` calls them.
_STATISTICS = dict(
    zip(_OUTPUTS, ("entropy", "log_sum_p_squared", "mean_logit", "is_top1"), strict=True)
)
# What the last arguments of `apply` are without a value of the caller's: softcap, scale, outputs.
_DEFAULTS: tuple[Any, ...] = (None, 1.0, _OUTPUTS)


class LinearLogprob:
    """Stands where TRL has `ChunkedLogProbFunction`, and takes and returns what that does."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: float,
        chunk_size: int,
        *rest: Any,
    ) -> tuple[Tensor | None, ...]:
        """Return log-probs, entropy, log Σ p², mean logits and whether the target is the largest.

        Each is [N], and None where it was not asked for.
        """
        softcap, scale, outputs = (*rest, *_DEFAULTS[len(rest) :])
        dtype = autocast_dtype(hidden.device) or hidden.dtype
        if not _is_ours(weight, dtype, scale, softcap):
            return chunked_logprob.ChunkedLogProbFunction.apply(
                hidden, weight, bias, target, temperature, chunk_size, softcap, scale, outputs
            )
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        form = LogitForm(1.0, scale, softcap)
        found = linear_logprob(
            hidden,
            weight,
            target,
            bias=bias,
            statistics=[ours for theirs, ours in _STATISTICS.items() if theirs in outputs],
            **form.kernel_settings(temperature),
        )
        squares = found.log_sum_p_squared
        # TRL's has no gradient.
        squares = None if squares is None else squares.detach()
        return found.logp, found.entropy, squares, found.mean_logit, found.is_top1


def patch_trl() -> ExitStack:
    """Let TRL's trainers compute log-probs by `linear_logprob`, from now on.

    As a context manager, until the block's end. A trainer looks the function up whenever it scores,
    so that trainers made before are patched too. Calling it twice is as calling it once.

    Raises:
        RuntimeError: this version of TRL computes them in another way.
    """
    _check_seam()
    seam._ChunkedLogProbFunction = LinearLogprob
    seam._use_triton = _leaves_out_ignored
    block = ExitStack()
    block.callback(unpatch_trl)
    return block


def unpatch_trl() -> None:
    """Let TRL's trainers compute log-probs as TRL does."""
    seam._ChunkedLogProbFunction = chunked_logprob.ChunkedLogProbFunction
    seam._use_triton = chunked_logprob._use_triton


def _leaves_out_ignored(device: torch.device) -> bool:
    """Return whether rows whose label is −100 are left out: TRL does so on GPUs only."""
    return device.type == "cpu" or chunked_logprob._use_triton(device)


def _is_ours(weight: Tensor, dtype: torch.dtype, scale: float, softcap: float | None) -> bool:
    """Return whether we have what TRL asks for.

    We have no other devices than CPUs and CUDA's, no fp64, and no scale or softcap of 0 or less;
    and under ZeRO-3 the backward has to gather the weight again, which TRL's function does.
    """
    return (
        weight.device.type in ("cpu", "cuda")
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not is_shard(weight)
        and scale > 0
        and (softcap is None or softcap > 0)
    )


def _check_seam() -> None:
    """Raise if TRL's fused head does not call what we replace, in the way that we know."""
    found = []
    function = getattr(chunked_logprob, "ChunkedLogProbFunction", None)
    if function is None:
        found.append("no trl.kernels.chunked_logprob.ChunkedLogProbFunction")
    elif " ".join(inspect.signature(function.forward).parameters) != _PARAMETERS:
        found.append(f"its arguments {tuple(inspect.signature(function.forward).parameters)}")
    if getattr(chunked_logprob, "OPTIONAL_OUTPUTS", None) != _OUTPUTS:
        found.append(f"outputs {getattr(chunked_logprob, 'OPTIONAL_OUTPUTS', None)}")
    head = getattr(seam, "add_fused_lm_head", None)
    inner = [code for code in head.__code__.co_consts if isinstance(code, CodeType)] if head else []
    names = {name for code in inner for name in code.co_names}
    for name in ("_ChunkedLogProbFunction", "_use_triton"):
        if name not in names or not hasattr(seam, name):
            found.append(f"no {name} in trl.trainer.utils.add_fused_lm_head")
    if found:
        raise RuntimeError(
            f"patch_trl: {_VERSION} has another fused head than {_KNOWN}: {'; '.join(found)}"
        )
