"""Attention in decoding: rows read a token each, and rows of one prompt share its keys.

With q a row's query in one head, and (k_j, v_j) the keys and values of the prompt's tokens and of
the row's own, the one that is read included, of which it sees the last `window`,

    s_j = scaling·q·k_j, or c·tanh(scaling·q·k_j / c)        out = Σ_j softmax(s)_j · v_j

Keys and values of prompts and rows lie in room that is there already, where the new ones are
written: nothing is copied, be it for a row of its prompt or because there is one token more. A
row's result does not depend on the rows beside it. There is no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latro_kernels.checks import (
    as_count,
    check_device,
    check_float_dtype,
    check_number,
    check_positive,
    check_same_dtype,
    check_tensor,
    check_vector,
    dense,
)
from latro_kernels.decode_attention import ops


@dataclass(frozen=True, eq=False)
class KeptKeys:
    """Room for the keys and values of one layer, contiguous; what has not been written is not read.

    Args:
        prompt_keys: [prompts, heads of keys, size, tokens].
        prompt_values: [prompts, heads of keys, tokens, size of values].
        own_keys: [rows or more, heads of keys, size, tokens].
        own_values: [rows or more, heads of keys, tokens, size of values].

    Raises:
        TypeError: an argument that is no tensor, or dtypes that differ.
        ValueError: shapes or devices that do not fit together, or a tensor with gaps.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    own_keys: Tensor
    own_values: Tensor

    def __post_init__(self) -> None:
        # Here, and not for each call: a layer's room is the same for many steps.
        for name, tensor in vars(self).items():
            check_tensor(name, tensor, 4)
            check_same_dtype(name, tensor, "prompt_keys", self.prompt_keys)
            check_device(name, tensor, "prompt_keys", self.prompt_keys)
            if not tensor.is_contiguous():
                raise ValueError(
                    f"{name}: expected a contiguous tensor, got strides {tensor.stride()}"
                )
        prompts, key_heads, size, tokens = self.prompt_keys.shape
        own, _, _, own_tokens = self.own_keys.shape
        value_size = self.prompt_values.shape[3]
        for name, shape in (
            ("prompt_values", (prompts, key_heads, tokens, value_size)),
            ("own_keys", (own, key_heads, size, own_tokens)),
            ("own_values", (own, key_heads, own_tokens, value_size)),
        ):
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(found)}")


@dataclass(frozen=True, eq=False)
class DecodedRows:
    """What each of R rows attends to; its own keys are in place i for row i.

    Args:
        prompt: int64 [R], the place of its prompt.
        prompt_length: int64 [R], tokens of the prompt.
        length: int64 [R], tokens of its own that were read before.

    Raises:
        TypeError: an argument that is no tensor, or of another dtype.
        ValueError: an argument of another number of dimensions, with gaps, or on another device.
    """

    prompt: Tensor
    prompt_length: Tensor
    length: Tensor

    def __post_init__(self) -> None:
        for name, index in vars(self).items():
            check_vector(name, index, torch.int64)
            check_device(name, index, "prompt", self.prompt)
            if not index.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor, got {index.stride()}")


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: KeptKeys,
    rows: DecodedRows,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return what `decode_attention` does by plain PyTorch, in fp32 or fp64, without any checks."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    out = query.new_empty(*query.shape[:2], value.shape[2])
    for row in range(len(query)):
        prompt, P, n = (int(t[row]) for t in (rows.prompt, rows.prompt_length, rows.length))
        kept.own_keys[row, :, :, n] = key[row]
        kept.own_values[row, :, n] = value[row]
        k = torch.cat(
            [kept.prompt_keys[prompt, :, :, :P], kept.own_keys[row, :, :, : n + 1]], dim=2
        )
        v = torch.cat([kept.prompt_values[prompt, :, :P], kept.own_values[row, :, : n + 1]], dim=1)
        k, v = (t.to(dtype).repeat_interleave(groups, dim=0) for t in (k, v))
        scores = (query[row].to(dtype)[:, None] @ k) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if window is not None:
            scores[:, :, : max(0, P + n + 1 - window)] = -torch.inf
        out[row] = (scores.softmax(dim=2) @ v)[:, 0].to(out.dtype)
    return out


@torch.no_grad()
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: KeptKeys,
    rows: DecodedRows,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend from R rows that read a token each, and keep its key and value.

    For a row alone, this is

        k, v = torch.cat([prompt_k, own_k, new_k]), torch.cat([prompt_v, own_v, new_v])
        out = torch.softmax(scaling * q @ k.T, dim=-1) @ v

    in each head, with heads of keys repeated for the heads of queries that share them. It runs on
    the CPU, where sums are made in fp32.

    Args:
        query: [R, heads, size] fp32, bf16 or fp16; any strides.
        key: [R, heads of keys, size], dtype of query; any strides. Heads are a multiple of these.
        value: [R, heads of keys, size of values], dtype of query; any strides.
        kept: room for all keys and values, dtype of query; key and value are written to it.
        rows: what each row attends to.
        scaling: the scores are multiplied by it.
        window: the last tokens that a row sees, the one that it reads included; None for all.
        softcap: c of c·tanh(scores / c), above 0, and in fp32's normal range; None for none.

    Returns:
        [R, heads, size of values], dtype of query.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value; rows that attend to more than
            there is room for.
    """
    _check(query, key, value, kept, rows)
    check_number("scaling", scaling)
    if softcap is not None:
        check_positive("softcap", softcap)
    try:
        return ops.attend(
            query,
            key,
            value,
            kept.prompt_keys,
            kept.prompt_values,
            kept.own_keys,
            kept.own_values,
            rows.prompt,
            rows.prompt_length,
            rows.length,
            0 if window is None else as_count("window", window, 1),
            float(scaling),
            float(softcap or 0.0),
        )
    except RuntimeError:
        # The kernel has written nothing where a row is out of range.
        _check_range(kept, rows)
        raise


def _check(query: Tensor, key: Tensor, value: Tensor, kept: KeptKeys, rows: DecodedRows) -> None:
    check_tensor("query", query, 3)
    check_float_dtype("query", query, "cpu")
    if not query.is_cpu:
        raise ValueError(f"query: expected the device cpu, got {query.device}")
    R, heads, _ = query.shape
    own, key_heads, size, _ = kept.own_keys.shape
    if key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"query: expected a multiple of the {key_heads} heads of keys, got {heads}"
        )
    for name, tensor, shape in (
        ("query", query, (R, heads, size)),
        ("key", key, (R, key_heads, size)),
        ("value", value, (R, key_heads, kept.own_values.shape[3])),
    ):
        dense(name, tensor)
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        check_same_dtype(name, tensor, "query", query)
        check_device(name, tensor, "query", query)
    check_same_dtype("own_keys", kept.own_keys, "query", query)
    check_device("own_keys", kept.own_keys, "query", query)
    check_device("prompt", rows.prompt, "query", query)
    if own < R:
        raise ValueError(f"own_keys: expected room for {R} rows, got {own}")
    for name, index in vars(rows).items():
        if len(index) != R:
            raise ValueError(f"{name}: expected shape ({R},), as query has rows, got {len(index)}")


def _check_range(kept: KeptKeys, rows: DecodedRows) -> None:
    for name, most in (
        ("prompt", len(kept.prompt_keys) - 1),
        ("prompt_length", kept.prompt_keys.shape[3]),
        ("length", kept.own_keys.shape[3] - 1),
    ):
        lowest, highest = (int(end) for end in getattr(rows, name).aminmax())
        if lowest < 0 or highest > most:
            raise ValueError(f"{name}: expected 0 to {most}, got {lowest} to {highest}")
