"""A decoding step's attention in one layer: `decode_attention` beside torch's fused attention.

    python benchmarks/decode_attention.py --out benchmarks/results/ops

Four prompts have eight rows each, which have read up to as many tokens of their own. Torch attends
to a copy of the prompt's keys for each row, padded to the longest, as transformers' `generate` has
them; making the copies is not counted. `common.ops` says what the columns hold: what has to be read
are the keys and values of each prompt once, and each row's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common.ops import Op, Sizes, run
from latro_kernels import DecodedRows, KeptKeys, decode_attention

_PROMPTS, _K = 4, 8
_HEADS, _KEY_HEADS, _SIZE = 9, 3, 64  # SmolLM2-135M's
_SCALING = _SIZE**-0.5


def _drawn(sizes: Sizes) -> tuple[tuple[Tensor, Tensor, Tensor], KeptKeys, DecodedRows]:
    """Return query, key and value, the room of all others, and the rows, in fp32."""
    generator = torch.Generator().manual_seed(0)
    R, room = _PROMPTS * _K, sizes.N // 4
    shapes = ((_HEADS, _SIZE), (_KEY_HEADS, _SIZE), (_KEY_HEADS, _SIZE))
    q, k, v = (torch.randn(R, *shape, generator=generator) for shape in shapes)
    kept = KeptKeys(
        torch.randn(_PROMPTS, _KEY_HEADS, _SIZE, room, generator=generator),
        torch.randn(_PROMPTS, _KEY_HEADS, room, _SIZE, generator=generator),
        torch.randn(R, _KEY_HEADS, _SIZE, room, generator=generator),
        torch.randn(R, _KEY_HEADS, room, _SIZE, generator=generator),
    )
    rows = DecodedRows(
        torch.arange(_PROMPTS).repeat_interleave(_K),
        torch.full((R,), room),
        torch.randint(room, (R,), generator=generator),
    )
    return (q, k, v), kept, rows


def _copied(new: Sequence[Tensor], kept: KeptKeys, rows: DecodedRows) -> tuple[Tensor, ...]:
    """Return query, keys, values and mask of torch's attention, each row with all of its keys."""
    q, k, v = new
    R, P = len(q), kept.prompt_keys.shape[3]
    own_keys, own_values = kept.own_keys.clone(), kept.own_values.clone()
    at = torch.arange(R)
    own_keys[at, :, :, rows.length] = k
    own_values[at, :, rows.length] = v
    keys = torch.cat([kept.prompt_keys[rows.prompt], own_keys], dim=3).transpose(2, 3)
    values = torch.cat([kept.prompt_values[rows.prompt], own_values], dim=2)
    longest = P + int(rows.length.max()) + 1
    seen = torch.arange(longest) <= P + rows.length[:, None]
    keys, values = (t[:, :, :longest].contiguous() for t in (keys, values))
    return q[:, :, None], keys, values, seen[:, None, None]


def ops(sizes: Sizes, device: torch.device) -> Iterator[Op]:
    """Make the op in each dtype.

    Raises:
        SystemExit: on another device than the CPU, which it is for.
    """
    if device.type != "cpu":
        sys.exit("decode_attention runs on the CPU: --device cpu")
    new, kept, rows = _drawn(sizes)
    q, keys, values, seen = (
        t.double() if t.is_floating_point() else t for t in _copied(new, kept, rows)
    )
    truth = scaled_dot_product_attention(
        q, keys, values, attn_mask=seen, scale=_SCALING, enable_gqa=True
    )[:, :, 0]
    tokens = _PROMPTS * kept.prompt_keys.shape[3] + int(rows.length.sum() + len(rows.length))
    rooms = (kept.prompt_keys, kept.prompt_values, kept.own_keys, kept.own_values)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        inputs = [t.to(dtype) for t in new]
        room = KeptKeys(*(t.to(dtype) for t in rooms))
        copies = [t.to(dtype) if t.is_floating_point() else t for t in _copied(inputs, room, rows)]

        def latro(inputs: Sequence[Tensor] = inputs, room: KeptKeys = room) -> Tensor:
            q, k, v = inputs
            return decode_attention(q, k, v, room, rows, scaling=_SCALING)

        def torchs(copies: Sequence[Tensor] = copies) -> Tensor:
            q, keys, values, seen = copies
            out = scaled_dot_product_attention(
                q, keys, values, attn_mask=seen, scale=_SCALING, enable_gqa=True
            )
            return out[:, :, 0]

        yield Op(
            name="decode_attention",
            dtype=name,
            ways={"latro": {"forward": latro}, "torch, copies": {"forward": torchs}},
            moved={"forward": tokens * 2 * _KEY_HEADS * _SIZE * dtype.itemsize},
            truth=truth,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the op, print its table, and put its rows into ops.json."""
    run("decode_attention", ops, __doc__, argv=argv)


if __name__ == "__main__":
    main()
