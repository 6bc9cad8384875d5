"""No dropout: a rationale must be scored by the policy that sampled it.

Models keep their rates in `nn.Dropout`, in floats that they hand to a function, and in configs that
some read in every forward. What no name reveals is found by trying.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from latro.model.adapters import has_adapter, without_wrapper
from latro.model.forwards import allowed_difference, evaluation_mode
from latro_kernels.integrations.logits import trunk_of

if TYPE_CHECKING:
    from peft import PeftModel

_SIGNS = ("drop", "jitter")
# Phi-MoE has one by this name that tells which experts are tied, in evaluation too. Where it is a
# rate, routers keep a copy by another name.
_NO_RATE = "router_jitter_noise"
# Enough for a layer that draws at some tokens alone.
_NUM_TOKENS = 64
# How far an adapter's weights are moved: to where its share shows in half precision too.
_MOVED = 0.05


@torch.no_grad()
def disable_dropout(model: PreTrainedModel | PeftModel) -> None:
    """Set every rate of dropout, LayerDrop and routers' noise to 0, in the model's configs too.

    Call this before an engine takes the model over. Mode and random state stay as they are.

    Raises:
        ValueError: with all that it computes something else in training than in evaluation; or it
            names no trunk.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _NUM_TOKENS
    ids = torch.arange(1, min(limit, _NUM_TOKENS) + 1, device=model.device)[None]
    ids %= model.get_input_embeddings().weight.shape[0]

    def hidden() -> Tensor:
        trunk = trunk_of(without_wrapper(model))
        return trunk(input_ids=ids, use_cache=False).last_hidden_state.float()

    with evaluation_mode(model), _random_state_kept(model.device), _adapters_moved(model):
        evaluated = hidden()
        for module in model.modules():
            _set_rates_to_zero(module)
        model.train()
        before = _random_state(model.device)
        trained = hidden()
        draws = not torch.equal(_random_state(model.device), before)
    # Training may take another path through the same layers, and round differently. What is drawn
    # has to change nothing.
    allowed = 0.0 if draws else allowed_difference(evaluated, model.dtype)
    if (trained - evaluated).abs().max() > allowed:
        does = "draws random numbers" if draws else "computes something else"
        raise ValueError(
            f"model: {type(without_wrapper(model)).__name__} {does} in training mode, though every "
            "dropout is set to 0; a rationale has to be scored by the policy that sampled it"
        )


def _set_rates_to_zero(module: nn.Module) -> None:
    # PEFT's MultiplicativeDropoutLayer is no nn.Dropout, and shows only in a trained adapter.
    if isinstance(module, nn.Dropout) or "Dropout" in type(module).__name__:
        vars(module)["p"] = 0.0
    for holder in (module, getattr(module, "config", None)):
        if not isinstance(holder, (nn.Module, PreTrainedConfig)):
            continue
        for name, value in list(vars(holder).items()):
            if name == _NO_RATE or not any(sign in name for sign in _SIGNS):
                continue
            if _is_rate(value):
                setattr(holder, name, 0.0)
            elif type(value) is dict:
                # PEFT's layers have a rate for each adapter.
                value.update({key: 0.0 for key, rate in value.items() if _is_rate(rate)})


def _is_rate(value: object) -> bool:
    return isinstance(value, float) and 0 < value <= 1


@contextmanager
def _adapters_moved(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Give what is trained of adapters other values: a new one adds nothing, whatever it draws."""
    trained = [p for p in model.parameters() if p.requires_grad] if has_adapter(model) else []
    # All are read before one is written to: PEFT's tied adapters share their memory.
    given = [parameter.clone() for parameter in trained]
    try:
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter), alpha=_MOVED)
        yield
    finally:
        for parameter, values in zip(trained, given, strict=True):
            parameter.copy_(values)


def _random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _random_state(device: torch.device) -> Tensor:
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state
