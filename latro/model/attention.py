"""Attention over packed groups: every prompt once, and after it the branches that continue it.

A packed row holds segments of tokens. A prompt attends causally to itself; a branch (a rationale
and its answer) attends to its whole prompt and causally to itself, and to no other branch:

    tokens      x x x │ z1 z1 z1 y1 │ z2 y2 │ x' x' │ z1' ...
    z1 sees     x x x   z1 (causal)
    z2 sees     x x x               z2 (causal)

`allow_shared_prefix` registers this with transformers' `AttentionInterface`. Handed a
`shared_prefix` among its keyword arguments, a model attends so; handed `decoding`, its tokens also
attend to what went through before (`latro.model.decoding`). Without either its attention is the one
it was loaded with, so that `generate` and everything else are untouched.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from latro.model.attention_form import (
    AttentionForm,
    at_positions,
    attention_form,
    counts_along_row,
)
from latro.model.decoding import DecodingKeys, as_products_take, attend_in_graph
from latro.model.shared_prefix import SharedPrefix, gather
from latro.model.stateful import allow_packed_rows

_PREFIX = "latro_"


def allow_shared_prefix(model: PreTrainedModel) -> bool:
    """Let `model` take a `shared_prefix`; return False where its attention cannot be replaced.

    Its attention becomes "latro_" + the name that it had. Nothing is changed where this returns
    False, and nothing is changed twice.
    """
    config = model.config.get_text_config()
    own = config._attn_implementation or "eager"
    if not own.startswith(_PREFIX):
        if own == "flex_attention" or not model._can_set_attn_implementation():
            # Flex attention's own masks are block masks, made where this function has no say.
            return False
        name = _PREFIX + own
        AttentionInterface.register(name, functools.partial(attention, own=own))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
        model.set_attn_implementation(name)
        if config._attn_implementation != name:
            return False
    # Of another model with the same config only the attention may have been replaced.
    allow_packed_rows(model)
    return True


def shares_prefix(model: PreTrainedModel) -> bool:
    """Return whether `allow_shared_prefix` has replaced the attention of `model`."""
    return (model.config.get_text_config()._attn_implementation or "").startswith(_PREFIX)


def give_attention_back(model: PreTrainedModel) -> None:
    """Undo `allow_shared_prefix` where a model turns out to make nothing of it.

    Some layers ask what their attention is called: those of DeepSeek-V3.2 put the keys that they
    choose into the mask for "eager" and "sdpa" alone.
    """
    if shares_prefix(model):
        name = model.config.get_text_config()._attn_implementation
        model.set_attn_implementation(name.removeprefix(_PREFIX))


def row_arguments(
    shared_prefix: SharedPrefix | None, decoding: DecodingKeys | None = None
) -> dict[str, Any]:
    """Return the keywords with which a trunk attends by `shared_prefix`, `decoding` or both.

    Among them are the tokens' positions, each in its own sequence, and a mask without elements,
    which keeps the trunk from making one of [T, T]: transformers takes a mask of four dimensions as
    it is. Some models' layers, such as StableLM's and Nemotron's, hand their attention the mask but
    no further keywords. So the mask has them too.
    """
    both = {"shared_prefix": shared_prefix, "decoding": decoding}
    given = {name: row for name, row in both.items() if row is not None}
    row: Any = decoding if shared_prefix is None else shared_prefix
    mask: Any = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=row.device)
    mask.latro_row = given
    return {"attention_mask": mask, "position_ids": row.position_ids, **given}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    own: str,
    shared_prefix: SharedPrefix | None = None,
    decoding: DecodingKeys | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return one layer's attention; transformers calls it with these arguments.

    Args:
        module: the attention layer.
        query: [B, heads, T, head size]; B is 1 with a shared prefix and in decoding.
        key: [B, heads of keys, T, head size].
        value: like key.
        attention_mask: for the model's own attention, or that of `row_arguments`.
        own: name of the attention that the model was loaded with.
        shared_prefix: the packed row's segments.
        decoding: keeps keys and values: with a shared prefix those of its prompts, which attend to
            nothing else; without one those of a decoding step's tokens, which attend to it.
        kwargs: as for any attention function: scaling, sliding_window, softcap, s_aux and the like.

    Raises:
        NotImplementedError: a packed row for a layer whose kind of attention is not known here.

    Returns:
        [B, T, heads, head size], and the attention's weights where its own attention gives them.
    """
    if shared_prefix is None and decoding is None:
        told = getattr(attention_mask, "latro_row", {})
        shared_prefix, decoding = told.get("shared_prefix"), told.get("decoding")
    if shared_prefix is None and decoding is None:
        return _own(own, module)(module, query, key, value, attention_mask, **kwargs)
    layer = getattr(module, "layer_idx", None)
    if shared_prefix is None and torch.compiler.is_compiling():
        # The graph would hold this step's rows; what runs in its place looks up those of each.
        return attend_in_graph(*as_products_take(query, key, value), layer), None
    form = attention_form(module, query, kwargs)
    if counts_along_row(module):
        row: Any = decoding if shared_prefix is None else shared_prefix
        query = at_positions(module, query, row.position_ids)
    if decoding is not None:
        if layer is None:
            raise NotImplementedError("decoding in a layer that does not tell its index")
        if shared_prefix is None:
            return decoding.attend(layer, query, key, value, form), None
        decoding.keep_prompts(layer, key, value, module, form)
    assert shared_prefix is not None
    # Every segment has its own copy of its keys: its prefix's and its own, one after the other.
    key, value = (gather(t, 2, shared_prefix.key_index) for t in (key, value))
    form = form.at_most(max(shared_prefix.key_lengths))
    way = _fused if _has_fused(query, value, form) else _by_segment
    return way(query, key, value, shared_prefix, form), None


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, shared_prefix: SharedPrefix, form: AttentionForm
) -> Tensor:
    """Attend segment after segment, on any device and in any dtype."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    # Split, and not sliced: the backward of a slice writes zeros for the whole row.
    queries = query.split(list(shared_prefix.lengths), dim=2)
    keys, values = (t.split(shared_prefix.key_lengths, dim=2) for t in (key, value))
    spans = [
        (e - n, e) for n, e in zip(shared_prefix.lengths, shared_prefix.key_lengths, strict=True)
    ]
    masked = {span for span in spans if not _is_causal(form, *span)}
    # What the queries of many small segments see is cut from one table.
    first = min((start for start, _ in masked), default=0)
    bias = _bias(form, first, max((end for _, end in masked), default=0), like=query)
    outputs = []
    for q, k, v, (start, end) in zip(queries, keys, values, spans, strict=True):
        own = bias[start - first : end - first, :end] if (start, end) in masked else None
        outputs.append(_one_segment(q, k, v, form, own))
    # Contiguous, as the functions of transformers return it: some layers take a view of it.
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _is_causal(form: AttentionForm, start: int, end: int) -> bool:
    """Return whether torch's causal attention is that of queries at these positions."""
    of_torch = form.softcap is None and form.sink is None
    return of_torch and start == 0 and end <= min(form.window, form.chunk)


def _bias(form: AttentionForm, first: int, end: int, like: Tensor) -> Tensor:
    """Return what is added to scores: 0 where a key is seen, and −∞ elsewhere.

    Of shape [end − first, end]: a row for each position from `first` on, a column for each key.
    """
    position = torch.arange(end, device=like.device)
    seen = form.sees(position[first:, None], position)
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -math.inf)


def _one_segment(
    query: Tensor, key: Tensor, value: Tensor, form: AttentionForm, bias: Tensor | None
) -> Tensor:
    """Attend from a sequence's last queries, [1, heads, Q, size], to its keys, [1, heads, T, size].

    Query i stands at position T − Q + i, key j at position j. `bias` is [Q, T]; None: all is seen
    that stands at or before a query, and Q is T.
    """
    if form.softcap is None and form.sink is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=bias is None, scale=form.scaling
        )
    assert bias is not None
    return form.weights(query @ key.transpose(2, 3), bias).to(query.dtype) @ value


def _has_fused(query: Tensor, value: Tensor, form: AttentionForm) -> bool:
    """Return whether a fused kernel for segments of many lengths runs here."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256 or not form.is_plain:
        return False
    return _flash_attention() is not None or form.softcap is None


def _fused(
    query: Tensor, key: Tensor, value: Tensor, shared_prefix: SharedPrefix, form: AttentionForm
) -> Tensor:
    """Attend in all segments by one call of flash-attn's or torch's kernel."""
    if flash := _flash_attention():
        # Causal from the lower right since flash-attn 2.1: the last query sees the last key.
        kernel = functools.partial(
            flash, softmax_scale=form.scaling, causal=True, softcap=form.softcap or 0.0
        )
    else:
        from torch.nn.attention.varlen import varlen_attn

        kernel = functools.partial(
            varlen_attn, scale=form.scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    # [1, heads, T, size] to [T, heads, size].
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out = kernel(
        q,
        k,
        v,
        shared_prefix.query_starts,
        shared_prefix.key_starts,
        max(shared_prefix.lengths),
        max(shared_prefix.key_lengths),
        # Positions to the left of a query's own, and to the right.
        window_size=(-1 if math.isinf(form.window) else int(form.window) - 1, 0),
    )
    return out[None]


@functools.cache
def _flash_attention() -> Callable | None:
    """Return flash-attn's kernel; None where the package is not installed.

    Raises:
        ImportError: it is installed, and built for another torch.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ModuleNotFoundError as error:
        if error.name != "flash_attn":
            raise
        return None
    return flash_attn_varlen_func


def _own(name: str, module: nn.Module) -> Callable:
    """Return the attention function that the model was loaded with."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    function = ALL_ATTENTION_FUNCTIONS[name]
    if "flash" not in name:
        return function

    def with_own_name(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        # It reads from the config which of the flash kernels it is to load.
        config: Any = module.config
        given = config._attn_implementation
        config._attn_implementation = name
        try:
            return function(module, *args, **kwargs)
        finally:
            config._attn_implementation = given

    return with_own_name
