"""Layers that carry a state along the row, in a packed row.

Convolutions, state-space layers (Mamba) and linear attention (gated delta rule) read what stands
before a token in the row, which in a packed row may be another branch. Such a layer is handed every
sequence whole instead, each in a row of its own:

    packed      x x x │ z1 z1 z1 y1 │ z2 y2
    rows        x x x z1 z1 z1 y1
                x x x z2 y2 ·  ·

and what it makes of them goes back to where it belongs in the packed row. So it computes what it
does without packing, with its own kernels and in training too, while all other layers, which are
most of the work, have each prompt once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from latro.model.forwards import replace_forward
from latro.model.shared_prefix import SharedPrefix, gather


def allow_packed_rows(model: PreTrainedModel) -> None:
    """Let the layers of `model` that carry a state take a `shared_prefix`, once.

    They are those with a convolution along the row (`nn.Conv1d`), as nearly all in transformers
    5.24 have one. A layer that is not handed the keyword by the one around it, as Jamba's are not,
    cannot know of the packed row, and whoever packs finds that out by trying
    (`latro.model.scoring`).
    """
    for module in model.modules():
        if _has_convolution(module):
            replace_forward(module, forward, own="_forward_in_a_row")


def _has_convolution(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleDict) or hasattr(module, "base_layer"):
        return False  # PEFT's adapter of a convolution
    children = (getattr(child, "base_layer", child) for child in module.children())
    return any(isinstance(child, nn.Conv1d) for child in children)


# Pickle writes a bound method as the name of its function, to be read from the module.
def forward(
    self: Any,
    *args: Any,
    shared_prefix: SharedPrefix | None = None,
    decoding: Any = None,
    **kwargs: Any,
) -> Any:
    """Take a packed row, or whatever else the layer's own forward takes."""
    if shared_prefix is None:
        if decoding is not None:
            raise NotImplementedError("decoding in a layer that carries a state")
        return self._forward_in_a_row(*args, **kwargs)
    args = tuple(_unpacked(value, shared_prefix) for value in args)
    kwargs = {name: _unpacked(value, shared_prefix) for name, value in kwargs.items()}
    output = self._forward_in_a_row(*args, **kwargs)
    if isinstance(output, tuple):
        return _packed(output[0], shared_prefix), *output[1:]
    return _packed(output, shared_prefix)


def _unpacked(value: Any, row: SharedPrefix) -> Any:
    """Make of what has a place for each of the T tokens, [1, T, ...], one of [S, W, ...]."""
    if not isinstance(value, Tensor) or value.shape[:2] != (1, sum(row.lengths)):
        return value
    index = row.whole_sequences
    return gather(value[0], 0, index.flatten()).unflatten(0, index.shape)


def _packed(hidden: Tensor, row: SharedPrefix) -> Tensor:
    """Make of hidden states [S, W, H] those of the packed row, [1, T, H]."""
    return hidden.flatten(0, 1).index_select(0, row.place_in_sequence)[None]
