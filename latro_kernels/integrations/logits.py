"""What a model does to its hidden states before its head, and to the head's logits behind it.

Cohere and HyperCLOVA X multiply logits by a constant, Granite divides by one, MiniCPM3 divides the
hidden states, Gemma caps: each has another name for it. So nothing is read from a config. The
model's own forward is run with known numbers in the place of the trunk's output and of the head's,
and what comes of them tells the rest:

    logits = c · tanh(s · head(t · trunk(x)) / c)       without softcap: s · head(t · trunk(x))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, is_peft_available

# So small that a softcap leaves it as it is, and so large that nothing but the softcap is left. The
# others are checked with what these two tell. Powers of 2 come out of a product without rounding.
_SMALL, _LARGE = 2.0**-30, 2.0**60
_KNOWN = (_SMALL, _LARGE, -_SMALL, -_LARGE, 0.5, -1.0, 3.0, -7.0, 40.0)
_NUM_TOKENS = 8


@dataclass(frozen=True)
class LogitForm:
    """How a model comes from its trunk's output to its logits."""

    hidden_scale: float
    """t: the hidden states are multiplied by it before the head."""
    scale: float
    """s: the head's output is multiplied by it."""
    softcap: float | None
    """c, of the scaled output."""

    def kernel_settings(self, temperature: float) -> dict[str, Any]:
        """Return the temperature and softcap by which the kernels compute these logits.

        With temperature T, the logits are c·tanh(s·a/c)/T = (c/s)·tanh(a/(c/s)) / (T/s).
        """
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": temperature / self.scale, "softcap": softcap}


def trunk_of(causal: PreTrainedModel) -> nn.Module:
    """Return the part of a causal language model that comes before its head.

    Raises:
        ValueError: the model does not name it.
    """
    named = causal.base_model
    # Llama4's text model has another name for its trunk than it says.
    trunk = named if named is not causal else getattr(causal, "model", None)
    if trunk is None:
        raise ValueError(
            f"model: expected a causal language model that is a trunk and a head, got "
            f"{type(causal).__name__}, which names no trunk"
        )
    return trunk


def logit_form(causal: PreTrainedModel) -> LogitForm:
    """Return how `causal`, in evaluation mode, comes from its trunk's output to its logits.

    Raises:
        ValueError: in another way than this module's formula, or with a constant that is trained.
    """
    formula = (
        f"model: {type(causal).__name__} does not compute its logits as "
        "softcap(head(trunk(x))·scale), with a scale and a softcap that stay as they are"
    )
    head = causal.get_output_embeddings()
    plain = _without_adapter(head)
    own = {id(parameter) for parameter in (plain.weight, getattr(plain, "bias", None))}
    if any(id(parameter) not in own for parameter in plain.parameters()):
        raise ValueError(formula)
    try:
        hidden, logits, known_hidden, known_logits = _run_with_known_numbers(causal, head)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # A layer between trunk and head has no weights in fp64, and says so.
        reason = " ".join(str(error).split())
        raise ValueError(f"{formula}: {reason}") from error
    if hidden is None or hidden.shape != known_hidden.shape or logits.shape != known_logits.shape:
        raise ValueError(formula)
    if hidden.requires_grad or logits.requires_grad:
        raise ValueError(formula)
    small, large = logits.flatten()[:2].tolist()
    hidden_scale = (hidden.flatten()[0] / known_hidden.flatten()[0]).item()
    scale, softcap = small / _SMALL, large
    if scale <= 0 or not _close(hidden, hidden_scale * known_hidden):
        raise ValueError(formula)
    if _close(logits, scale * known_logits):
        return LogitForm(hidden_scale, scale, None)
    if not _close(logits, softcap * torch.tanh(scale * known_logits / softcap)):
        raise ValueError(formula)
    return LogitForm(hidden_scale, scale, softcap)


def is_shard(weight: Tensor) -> bool:
    """Return whether ZeRO-3 has a weight in shards, by the attribute that it marks those with."""
    return hasattr(weight, "ds_id")


def whole_shape(weight: Tensor) -> torch.Size:
    """Return the shape of a weight, which ZeRO-3 may have sharded as it was loaded."""
    return getattr(weight, "ds_shape", weight.shape)


@contextlib.contextmanager
def layers_gathered(model: nn.Module) -> Iterator[None]:
    """Let the layers of a model that ZeRO-3 sharded as it was loaded be called within.

    transformers loads models so after a config with ZeRO-3 was made. Until DeepSpeed's engine takes
    the model over nothing gathers its weights; here each layer's are, while its forward runs. All
    processes must call the same layers.
    """
    with contextlib.ExitStack() as stack:
        modules: Iterator[nn.Module] = model.modules()
        for module in modules:
            sharded = [p for p in module.parameters(recurse=False) if is_shard(p)]
            if not sharded:
                continue
            import deepspeed

            gather = deepspeed.zero.GatheredParameters(sharded)

            def before(*_: Any, gather: Any = gather) -> None:
                gather.__enter__()

            def behind(*_: Any, gather: Any = gather) -> None:
                gather.__exit__(None, None, None)

            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(behind, always_call=True).remove)
        yield


def adds_to(layer: nn.Module) -> bool:
    """Return whether an adapter of PEFT's adds something to a layer's weights, or to rows of them.

    Of such a layer `weight` is what lies under the adapter. A copy that is trained whole
    (`modules_to_save`) adds nothing: `weight` is the copy's.
    """
    if not is_peft_available():
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    adapted = isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    return adapted and not isinstance(layer, ModulesToSaveWrapper)


def _without_adapter(head: Any) -> Any:
    """Return the head that an adapter lies on, or the head itself."""
    if not is_peft_available():
        return head
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    if isinstance(head, AuxiliaryTrainingWrapper):
        return head.original_module
    return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head


def _run_with_known_numbers(
    causal: PreTrainedModel, head: Any
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return the head's input, the logits, and the known numbers that both were made of, fp64.

    The head's input is None where the model does not call its head.
    """
    V, H = whole_shape(head.weight)
    device = causal.device
    ids = torch.arange(_NUM_TOKENS, device=device)[None] % V
    # No two rows are of one length, so that a norm between trunk and head would show.
    known_hidden = torch.arange(1.0, 1 + _NUM_TOKENS * H, dtype=torch.float64, device=device)
    known_hidden = known_hidden.view(1, _NUM_TOKENS, H)
    known = torch.tensor(_KNOWN, dtype=torch.float64, device=device)
    known_logits = known.repeat(-(-_NUM_TOKENS * V // len(known)))[: _NUM_TOKENS * V]
    known_logits = known_logits.view(1, _NUM_TOKENS, V)
    inputs: list[Tensor] = []

    def before_head(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0])
        # What the head makes of them is not read, but it has to be able to.
        return (args[0].to(head.weight.dtype), *args[1:])

    def behind_head(_module: nn.Module, _args: Any, _output: Any) -> Tensor:
        return known_logits

    inside: list[nn.Module] = []

    def before_trunk(module: nn.Module, _args: Any) -> None:
        inside.append(module)

    def behind_trunk(_module: nn.Module, _args: Any, output: Any) -> Any:
        inside.pop()
        if not inside and isinstance(output, ModelOutput) and "last_hidden_state" in output:
            output["last_hidden_state"] = known_hidden
        return output

    with contextlib.ExitStack() as stack:
        modules: Iterator[nn.Module] = trunk_of(causal).modules()
        for module in modules:
            # OPT calls the decoder inside of its trunk, and not its trunk: the outermost call.
            if isinstance(module, PreTrainedModel):
                stack.callback(module.register_forward_pre_hook(before_trunk).remove)
                stack.callback(module.register_forward_hook(behind_trunk).remove)
        stack.callback(head.register_forward_pre_hook(before_head).remove)
        stack.callback(head.register_forward_hook(behind_head).remove)
        stack.enter_context(torch.enable_grad())
        # Without hooks, which run around our own calls too.
        logits = causal.forward(input_ids=ids, use_cache=False).logits
    return (inputs[0] if inputs else None), logits, known_hidden, known_logits


def _close(ours: Tensor, expected: Tensor) -> bool:
    """Return whether half the digits agree: rounding takes fewer, and another formula more."""
    rtol = torch.finfo(ours.dtype).eps ** 0.5
    return torch.allclose(ours.double(), expected, rtol=rtol, atol=0.0)
