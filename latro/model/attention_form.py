"""What a layer makes of the products of its queries and keys: which it sees, and their weights.

With the scores s_j = q·k_j · scaling, softcapped to c·tanh(s_j / c) where there is a cap, and the
keys j that a query sees,

    weight_j = exp(s_j) / (exp(sink) + Σ_i exp(s_i))

The sink is a logit that each head has learnt: attention that goes to no key. Without one its term
is 0, and this is a softmax. A query at position p sees the keys at positions up to p; with a window
w only the last w of these; in chunks of c positions only those of its own chunk, from c·⌊p / c⌋ on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

_WINDOWED = ("sliding_attention", "hybrid_sliding")
# Hybrid layers carry a state beside their attention.
_KINDS = (None, "full_attention", "chunked_attention", "hybrid", *_WINDOWED)


@dataclass(frozen=True, eq=False)
class AttentionForm:
    """One layer's attention, beside its queries, keys and values."""

    scaling: float
    """The products of queries and keys are multiplied by it."""
    window: float = math.inf
    """Positions that a query sees, its own included."""
    softcap: float | None = None
    """c of c·tanh(scores / c); None for none."""
    sink: Tensor | None = None
    """[heads], a logit that joins each softmax; differentiable. None for none."""
    chunk: float = math.inf
    """Positions of a chunk, within which attention stays."""

    def at_most(self, positions: int) -> AttentionForm:
        """Return the form for sequences of so many positions: a longer chunk cuts none of them."""
        cuts = self.chunk < positions or math.isinf(self.chunk)
        return self if cuts else replace(self, chunk=math.inf)

    @property
    def is_plain(self) -> bool:
        """Whether a fused kernel knows it: windows and caps it does, sinks and chunks not."""
        return self.sink is None and math.isinf(self.chunk)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Return whether queries see keys, by their positions: int64, broadcast to one another."""
        seen = key <= query
        if not math.isinf(self.window):
            seen &= key > query - int(self.window)
        if not math.isinf(self.chunk):
            seen &= key >= query - query % int(self.chunk)
        return seen

    def weights(self, products: Tensor, bias: Tensor) -> Tensor:
        """Return the weights [·, heads, Q, T] of products q·k, in fp32 at least.

        `bias` is added to the scores: 0 where a key is seen, and −∞ elsewhere.
        """
        working = torch.promote_types(products.dtype, torch.float32)
        if self.softcap is None:
            scores = products * self.scaling
        else:
            scores = self.softcap * torch.tanh(products * (self.scaling / self.softcap))
        scores = scores + bias
        if self.sink is None:
            return scores.softmax(dim=-1, dtype=working)
        sink = self.sink.to(working)[:, None, None].expand(*scores.shape[:-1], 1)
        joined = torch.cat([scores.to(working), sink], dim=-1)
        return joined.softmax(dim=-1)[..., :-1]


def attention_form(module: nn.Module, query: Tensor, given: dict[str, Any]) -> AttentionForm:
    """Return the form of a layer that calls its attention with the keywords `given`.

    Args:
        module: the layer.
        query: [B, heads, T, head size].
        given: scaling, sliding_window, softcap, s_aux and the like; others say nothing here.

    Raises:
        NotImplementedError: the layer attends in a way that is not known here.
    """
    kind = layer_type(module)
    if kind not in _KINDS:
        raise NotImplementedError(f"a packed row in a layer of type {kind}")
    if kind in _WINDOWED and not given.get("sliding_window"):
        raise NotImplementedError("a packed row in a layer that does not tell its window")
    chunk: Any = math.inf
    if kind == "chunked_attention":
        chunk = getattr(module.config, "attention_chunk_size", None)
        if not chunk:
            raise NotImplementedError("a packed row in a layer that does not tell its chunk")
    # Of these the last two are the keys that a sparse layer has chosen.
    for name in ("position_bias", "cache", "indices", "block_indices"):
        if given.get(name) is not None:
            raise NotImplementedError(f"a packed row with {name}")
    scaling = given.get("scaling")
    return AttentionForm(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=given.get("sliding_window") or math.inf,
        softcap=given.get("softcap"),
        sink=given.get("s_aux"),
        chunk=chunk,
    )


def counts_along_row(module: nn.Module) -> bool:
    """Return whether a layer's queries depend on their place in the row, not on `position_ids`.

    Llama 4 multiplies the queries of layers without rotary positions by a temperature that grows
    with the position (https://arxiv.org/abs/2501.19399), and counts positions along the row.
    """
    return bool(getattr(module, "attn_temperature_tuning", False)) and not module.use_rope


def at_positions(module: nn.Module, query: Tensor, position_ids: Tensor) -> Tensor:
    """Return the queries of such a layer as at `position_ids`.

    Args:
        module: the layer.
        query: [1, heads, T, head size], as the layer hands them to its attention.
        position_ids: int64 [1, T], each in its own sequence.
    """
    along_row = torch.arange(query.shape[2], device=query.device)
    factor = _temperature(module, position_ids[0]) / _temperature(module, along_row)
    return (query * factor[:, None]).to(query.dtype)


def _temperature(module: Any, position: Tensor) -> Tensor:
    """Return fp32 [T], by which Llama 4 multiplies queries."""
    return 1 + module.attn_scale * torch.log1p(torch.floor((position + 1.0) / module.floor_scale))


def layer_type(module: nn.Module) -> str | None:
    """Return what the config calls the attention of a layer; None where it does not say."""
    types = getattr(module.config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return types[index] if types and index is not None else None
