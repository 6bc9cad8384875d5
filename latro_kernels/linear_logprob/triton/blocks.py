"""The shape of a block of products, by chip, dtype, H and V, never by N.

It is one that `tuning` has measured and saved, or else a start that compiles for the chip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Config:
    """The rows, columns and depth of a block of products, and the compiler's options.

    warp_specialized: whether to use the kernels for sm_90 and sm_100: that of
    `warp_specialized_forward`, but with a frozen head or where log Σ p² or the mean logit is asked
    for; that of `warp_specialized_gradient`, but for products that were kept, with a filter, or
    where log Σ p² has an upstream gradient.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    warp_specialized: bool = False


# A block's operands pass through shared memory `stages` times over; its sums stand in registers, 64
# or 128 a thread. Unmeasured: they compile for the chip as the tests say, and that is all. From
# sm_90 on 256 columns, because what 128 ask of the second-level cache is more than it gives.
_START = {
    8: Config(rows=128, columns=128, depth=32, warps=8, stages=4),
    9: Config(rows=128, columns=256, depth=64, warps=8, stages=4),
    10: Config(rows=128, columns=256, depth=64, warps=8, stages=4),
}
_FP32 = Config(rows=64, columns=64, depth=32, warps=8, stages=3)
# The one shape of the warp-specialised kernels; what they do not make is made by the same blocks.
WARP_SPECIALIZED = Config(128, 256, 64, 8, 4, warp_specialized=True)
# For Triton's interpreter, which has no chip.
_INTERPRETED = Config(rows=32, columns=64, depth=64, warps=4, stages=1)


def config(device: torch.device, dtype: torch.dtype, H: int, V: int) -> Config:
    """Return the shape to use for a head of [V, H] on `device`."""
    if device.type != "cuda":
        return _INTERPRETED
    name = torch.cuda.get_device_name(device)
    found = _nearest(name, next(key for key, of in DTYPES.items() if of == dtype), H, V)
    if found and found.warp_specialized and not has_gluon():
        found = replace(found, warp_specialized=False)
    return found or start(torch.cuda.get_device_capability(device)[0], dtype)


def start(generation: int, dtype: torch.dtype) -> Config:
    """Return the shape for a chip without an entry, by its compute capability's first number."""
    if dtype == torch.float32:
        return _FP32
    return _START[max(known for known in _START if known <= max(generation, min(_START)))]


def has_descriptors(device: torch.device) -> bool:
    """Return whether the chip copies blocks of a tensor by itself (TMA)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@cache
def has_gluon() -> bool:
    """Return whether this Triton has what the warp-specialised kernels need of Gluon."""
    try:
        from latro_kernels.linear_logprob.triton import (  # noqa: F401
            warp_specialized_forward,
            warp_specialized_gradient,
        )
    except (ImportError, AttributeError):
        return False
    return True


def saved_path() -> Path:
    """Return the file of measured shapes: in Triton's cache, as Triton's own autotuner has it."""
    return Path(triton.knobs.cache.dir) / "latro_kernels" / "tuned.json"


@cache
def saved(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a file of measured shapes; none where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else []


def _nearest(name: str, dtype: str, H: int, V: int) -> Config | None:
    """Return the saved shape of the chip and dtype for the head most like [V, H]."""
    entries = [e for e in saved(saved_path()) if e["device"] == name and e["dtype"] == dtype]
    if not entries:
        return None
    entry = min(entries, key=lambda e: (abs(e["H"] - H), abs(e["V"] - V)))
    return Config(**entry["config"])


def candidates(dtype: torch.dtype) -> list[Config]:
    """Return the shapes to time; a chip that has no room for one leaves it out."""
    if dtype == torch.float32:
        return [_FP32, Config(128, 64, 32, 8, 3), Config(64, 128, 32, 8, 3)]
    return [
        Config(128, columns, depth, 8, stages)
        for columns, depth, stages in product((128, 256), (32, 64), (3, 4))
    ]


def can_warp_specialize(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `WARP_SPECIALIZED` can be timed beside the candidates."""
    return (
        torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))
        and dtype != torch.float32
        and has_gluon()
    )
