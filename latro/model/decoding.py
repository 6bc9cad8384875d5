"""Keys and values while rows are decoded: each prompt's once, and those of the rows behind it.

A decoding step is a packed row (`latro.model.attention`) whose branches have one token each, and
whose prompts went through the trunk before. `DecodingKeys` keeps what they left in each layer, and
handed to a model as the keyword `decoding` it is what the layers attend to:

    prompts     x x x x          x' x'                 a place each, written by the prefill
    rows        z1 z1 z1   z2    z1' z1' z1'  z2' z2'  a place each, one token longer every step

A row attends to its prompt, to its own tokens so far and to the token that it reads. New keys are
written into room that is there already; where it is too small, it doubles. A prompt's keys are read
where they lie: on a CPU by `decode_attention`, where a row's result has the same bits whatever rows
there are, and else for all of its rows by one product.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from latro.model.attention_form import AttentionForm, at_positions, counts_along_row
from latro_kernels import DecodedRows, KeptKeys, decode_attention

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FIRST_ROOM = 64
"""Tokens of each row for which there is room at first."""


class DecodingKeys:
    """The keys and values of prompts and rows in every layer, and what each row attends to.

    A prefill is handed `decoding` beside its `shared_prefix`, which has prompts alone, after
    `place_prompts`; a step is handed `decoding` without one, after `set_rows` or `advance`.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._layers: dict[int, KeptKeys] = {}
        self._attention: dict[int, tuple[nn.Module, AttentionForm]] = {}
        self._prompts: list[tuple[int, int]] = []
        self._rows: _Rows | None = None

    @property
    def bytes_per_token(self) -> int:
        """The bytes that a token takes in all layers together."""
        return sum(
            t[0].numel() // tokens * t.element_size()
            for layer in self._layers.values()
            for t, tokens in (
                (layer.prompt_keys, layer.prompt_keys.shape[3]),
                (layer.prompt_values, layer.prompt_values.shape[2]),
            )
        )

    def place_prompts(self, places: Sequence[int], lengths: Sequence[int]) -> None:
        """Say where the next prefill's prompts go, and how many tokens each has."""
        self._prompts = list(zip(places, lengths, strict=True))

    def keep_prompts(
        self, layer: int, key: Tensor, value: Tensor, module: nn.Module, form: AttentionForm
    ) -> None:
        """Keep a layer's keys and values [1, heads of keys, T, size] of a prefill, and its form."""
        self._attention[layer] = module, form
        key, value = as_products_take(key, value)
        kept = self._layers.get(layer) or _without_room(key, value)
        places = 1 + max(place for place, _ in self._prompts)
        longest = max(length for _, length in self._prompts)
        kept = self._layers[layer] = _with_room(kept, "prompt", places, longest)
        start = 0
        for place, length in self._prompts:
            end = start + length
            kept.prompt_keys[place, :, :, :length] = key[0, :, start:end].transpose(1, 2)
            kept.prompt_values[place, :, :length] = value[0, :, start:end]
            start = end

    def set_rows(
        self, prompts: Sequence[int], prompt_lengths: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Say for the next step, row by row in the order of their places, what each attends to.

        Args:
            prompts: the place of its prompt.
            prompt_lengths: tokens of the prompt.
            lengths: tokens of its own that it has read before this step.
        """
        self._rows = _Rows(prompts, prompt_lengths, lengths, self.device)

    def advance(self) -> None:
        """Say that all rows have read one token more than before."""
        assert self._rows is not None
        self._rows = self._rows.advanced()

    @property
    def position_ids(self) -> Tensor:
        """int64 [1, rows], of the tokens that the rows read in this step."""
        assert self._rows is not None
        return (self._rows.prompt_length + self._rows.length)[None]

    @property
    def own_lengths(self) -> Tensor:
        """int64 [rows], the tokens of its own that each row has read before this step."""
        assert self._rows is not None
        return self._rows.length

    def move_row(self, place: int, to: int, length: int) -> None:
        """Copy the `length` tokens of one row to another place."""
        for layer in self._layers.values():
            layer.own_keys[to, :, :, :length] = layer.own_keys[place, :, :, :length]
            layer.own_values[to, :, :length] = layer.own_values[place, :, :length]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: AttentionForm
    ) -> Tensor:
        """Keep a step's keys and values in a layer, and return what its R queries attend to.

        Args:
            layer: its index.
            query: [1, heads, R, size].
            key: [1, heads of keys, R, size].
            value: like key.
            form: what the layer makes of their products.

        Returns:
            [1, R, heads, size of values]
        """
        rows = self._rows
        assert rows is not None
        query, key, value = as_products_take(query, key, value)
        kept = _with_room(self._layers[layer], "own", rows.count, rows.longest + 1)
        self._layers[layer] = kept
        # [1, heads, R, size] to [R, heads, size].
        query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        form = form.at_most(rows.longest_prompt + rows.longest + 1)
        if query.is_cpu and query.dtype in _KERNEL_DTYPES and form.is_plain:
            out = decode_attention(
                query,
                key,
                value,
                kept,
                rows.decoded,
                scaling=form.scaling,
                window=None if math.isinf(form.window) else int(form.window),
                softcap=form.softcap,
            )
            return out[None]
        kept.own_keys[rows.index, :, :, rows.length] = key
        kept.own_values[rows.index, :, rows.length] = value
        return _attend(query, kept, rows, form)[None]

    @contextlib.contextmanager
    def in_graph(self) -> Iterator[None]:
        """Let what `attend_in_graph` calls in a compiled step be of these keys."""
        _IN_GRAPH.append(self)
        try:
            yield
        finally:
            _IN_GRAPH.pop()

    def attend_known(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return what `attend` does, in the layer's form in the prefill.

        Tokens behind those of the rows are left out, and have zeros in the result.
        """
        assert self._rows is not None
        count = self._rows.count
        module, form = self._attention[layer]
        missing = query.shape[2] - count
        query, key, value = (t[:, :, :count] for t in (query, key, value))
        if counts_along_row(module):
            query = at_positions(module, query, self.position_ids)
        out = self.attend(layer, query, key, value, form)
        return pad(out, (0, 0, 0, 0, 0, missing)) if missing else out


# The keys of the compiled steps that run, the innermost last.
_IN_GRAPH: list[DecodingKeys] = []

torch.library.define(
    "latro::attend_in_graph", "(Tensor query, Tensor key, Tensor value, int layer) -> Tensor"
)


@torch.library.impl("latro::attend_in_graph", "CompositeExplicitAutograd")
def _attend_in_graph(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
    return _IN_GRAPH[-1].attend_known(layer, query, key, value)


@torch.library.register_fake("latro::attend_in_graph")
def _(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


attend_in_graph = torch.ops.latro.attend_in_graph.default


def as_products_take(*states: Tensor) -> list[Tensor]:
    """Return queries, keys and values in one dtype: under autocast rotary positions make fp32."""
    kind = states[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(states)
    return [t.to(torch.get_autocast_dtype(kind)) for t in states]


def _without_room(key: Tensor, value: Tensor) -> KeptKeys:
    """Return no room yet, for a layer's keys and values like these [1, heads of keys, T, size]."""
    k = key.new_zeros(0, key.shape[1], key.shape[3], 0)
    v = value.new_zeros(0, value.shape[1], 0, value.shape[3])
    return KeptKeys(prompt_keys=k, prompt_values=v, own_keys=k, own_values=v)


def _with_room(kept: KeptKeys, whose: str, places: int, tokens: int) -> KeptKeys:
    """Return `kept`, or a copy with room for so many places and tokens of "prompt" or "own"."""
    keys, values = getattr(kept, f"{whose}_keys"), getattr(kept, f"{whose}_values")
    if places <= len(keys) and tokens <= keys.shape[3]:
        return kept
    wider = {
        f"{whose}_keys": _wider(keys, places, tokens, dim=3),
        f"{whose}_values": _wider(values, places, tokens, dim=2),
    }
    return replace(kept, **wider)


def _wider(kept: Tensor, places: int, tokens: int, dim: int) -> Tensor:
    """Return a copy of `kept` with room for so many places and tokens, and for more to come.

    `dim` is where the tokens are.
    """
    had = kept.shape[0], kept.shape[dim]
    shape = list(kept.shape)
    shape[0] = had[0] if places <= had[0] else max(places, 2 * had[0])
    shape[dim] = had[1] if tokens <= had[1] else max(tokens, 2 * had[1], _FIRST_ROOM)
    # Zeros, since what no row sees is multiplied by a probability of 0.
    wider = kept.new_zeros(shape)
    wider[: had[0]].narrow(dim, 0, had[1]).copy_(kept)
    return wider


class _Rows:
    """What each of R rows attends to in a step: see `DecodingKeys.set_rows`."""

    def __init__(
        self,
        prompts: Sequence[int],
        prompt_lengths: Sequence[int],
        lengths: Sequence[int],
        device: torch.device,
    ) -> None:
        self.count = len(prompts)
        self.longest_prompt, self.longest = max(prompt_lengths), max(lengths)
        self.prompt = torch.tensor(prompts, device=device)
        self.prompt_length = torch.tensor(prompt_lengths, device=device)
        self.length = torch.tensor(lengths, device=device)
        self.index = torch.arange(self.count, device=device)
        self._prompts = prompts
        self._biases: dict[tuple[float, float], Tensor] = {}
        self.decoded = DecodedRows(self.prompt, self.prompt_length, self.length)

    @functools.cached_property
    def grid(self) -> tuple[Tensor, Tensor]:
        """int64 [prompts, most], the rows of each prompt; int64 [R], where each stands in it."""
        rows_of: list[list[int]] = [[] for _ in range(1 + max(self._prompts))]
        place: list[int] = []
        for row, prompt in enumerate(self._prompts):
            place.append(len(rows_of[prompt]))
            rows_of[prompt].append(row)
        most = max(map(len, rows_of))
        # Prompts with fewer rows than others are filled up with row 0, and what comes of it is
        # left out.
        grid = [rows + [0] * (most - len(rows)) for rows in rows_of]
        cell = [prompt * most + at for prompt, at in zip(self._prompts, place, strict=True)]
        device = self.length.device
        return torch.tensor(grid, device=device), torch.tensor(cell, device=device)

    def advanced(self) -> _Rows:
        """Return the same rows, each with one more token."""
        following = object.__new__(_Rows)
        following.__dict__ |= self.__dict__
        following.length = self.length + 1
        following.longest = self.longest + 1
        following._biases = {}
        following.decoded = DecodedRows(self.prompt, self.prompt_length, following.length)
        return following

    def bias(self, form: AttentionForm, dtype: torch.dtype) -> Tensor:
        """Return [R, 1, 1, keys], 0 where a row sees a key and −∞ elsewhere."""
        kind = form.window, form.chunk
        if kind not in self._biases:
            prompt_length, length = self.prompt_length[:, None], self.length[:, None]
            device = self.length.device
            of_prompt = torch.arange(self.longest_prompt, device=device).expand(self.count, -1)
            own = prompt_length + torch.arange(self.longest + 1, device=device)
            position = torch.cat([of_prompt, own], dim=1)
            seen = form.sees(prompt_length + length, position)
            # What lies behind a shorter prompt is no token.
            seen[:, : self.longest_prompt] &= of_prompt < prompt_length
            bias = torch.zeros(seen.shape, dtype=dtype, device=device)
            self._biases[kind] = bias.masked_fill_(~seen, -math.inf)[:, None, None]
        return self._biases[kind]


def _attend(query: Tensor, kept: KeptKeys, rows: _Rows, form: AttentionForm) -> Tensor:
    """Return [R, heads, size of values]: one softmax over a row's prompt and its own tokens."""
    R, heads, kv = rows.count, query.shape[1], kept.own_keys.shape[1]
    P, T = rows.longest_prompt, rows.longest + 1
    q = query.reshape(R, kv, heads // kv, -1)
    of_prompt = _of_prompts(q, kept.prompt_keys[..., :P], rows)
    own = q @ kept.own_keys[:R, :, :, :T]
    working = torch.promote_types(query.dtype, torch.float32)
    products = torch.cat([of_prompt, own], dim=3).to(working)
    weights = form.weights(products.view(R, heads, 1, P + T), rows.bias(form, working))
    weights = weights.to(query.dtype).view(R, kv, heads // kv, P + T)
    seen_prompt, seen_own = weights.split([P, T], dim=3)
    out = _of_prompts(seen_prompt, kept.prompt_values[:, :, :P], rows)
    return (out + seen_own @ kept.own_values[:R, :, :T]).reshape(R, heads, -1)


def _of_prompts(x: Tensor, of_prompts: Tensor, rows: _Rows) -> Tensor:
    """Return [R, kv, g, n], `x` [R, kv, g, m] times what each row's prompt has, [·, kv, m, n].

    The rows of a prompt go through one product with it.
    """
    kv, g, m = x.shape[1:]
    grid, cell = rows.grid
    prompts, most = grid.shape
    # [prompts, most, kv, g, m] to [prompts, kv, most·g, m].
    gathered = x[grid].transpose(1, 2).reshape(prompts, kv, most * g, m)
    product = gathered @ of_prompts[:prompts]
    return product.view(prompts, kv, most, g, -1).transpose(1, 2).flatten(0, 1)[cell]
