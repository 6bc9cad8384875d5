"""The engines of several processes, as tests start them on a CPU."""

from __future__ import annotations

import importlib.util

import pytest

MODULES = {
    "ddp": "latro.train",
    # accelerate refuses to shard weights on a CPU.
    "fsdp2": "tests.latro.fsdp_on_cpu",
    "zero3": "tests.latro.zero3_on_cpu",
}
"""The module to start instead of `latro.train`, by engine."""
ZERO3 = pytest.param(
    "zero3",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed, and no dependency of the tests",
    ),
)
engines = pytest.mark.parametrize("engine", ["ddp", "fsdp2", ZERO3])
sharded = pytest.mark.parametrize("engine", ["fsdp2", ZERO3])
