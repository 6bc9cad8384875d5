"""Memory that is never zero by chance, tiles that divide small problems, Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.latro_kernels.ops.op import INTERPRETED

collect_ignore = [] if INTERPRETED else ["interpreted"]


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    """`torch.empty` gives NaN (integers: their maximum), so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True, scope="session")
def the_interpreter_is_quick() -> Iterator[None]:
    """Leave out what Triton's interpreter does again and again, where it runs."""
    if not INTERPRETED:
        yield
        return
    from tests.latro_kernels.quick_interpreter import make_quick

    with pytest.MonkeyPatch.context() as context:
        make_quick(context)
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a test's problem has several blocks of rows and slices of vocabulary.

    In the interpreter, where 10 rows of 70 columns are a large problem, the blocks of programs are
    small as well.
    """
    from latro_kernels.linear_kl import tiles as kl_tiles
    from latro_kernels.linear_logprob import tiles

    rows, columns = (6, 64) if INTERPRETED else (24, 192)

    def shape(head: Any, *, count: int = 1) -> tuple[int, int]:
        return max(1, min(rows, len(head.hidden))), min(columns, len(head.weight))

    monkeypatch.setattr(tiles, "tile_shape", shape)
    monkeypatch.setattr(kl_tiles, "tile_shape", shape)
    if not INTERPRETED:
        return
    from latro_kernels.gather_logprob import triton as of_gather
    from latro_kernels.linear_kl import triton as of_kl
    from latro_kernels.linear_logprob.triton import blocks, fused
    from latro_kernels.linear_logprob.triton import tiles as of_tiles
    from latro_kernels.linear_sample.triton import tiles as of_samples

    for kernels in (of_gather, of_tiles, of_kl, of_samples):
        monkeypatch.setattr(kernels, "BLOCK_V", 32)
    monkeypatch.setattr(of_samples, "PART", 64)
    block = blocks.Config(rows=4, columns=32, depth=32, warps=4, stages=1)
    monkeypatch.setattr(blocks, "_INTERPRETED", block)
    sizes = {"TILE_ROWS": 6, "TILE_COLUMNS": 64, "TILES": 2, "GROUP": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(fused, name, size)
