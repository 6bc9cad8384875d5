"""Memory that is not zero by chance, and the one gate of numerical tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    """`torch.empty` gives NaN (integers: their maximum), so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def gate() -> Callable[[str, Tensor, Tensor, Tensor], None]:
    """`gate(name, got, truth, unfused)`: got is as good as unfused torch in the same dtype.

    The largest error against the fp64 truth may be twice that of the unfused computation, plus 1e-5
    of the truth's largest entry; absolute, not relative, where that entry is above 1.
    """

    def check(name: str, got: Tensor, truth: Tensor, unfused: Tensor) -> None:
        assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}"
        assert got.isfinite().all(), f"{name}: not finite"
        if truth.numel() == 0:
            return
        error, of_unfused = ((x.double() - truth).abs().max() for x in (got, unfused))
        bound = 2 * of_unfused + 1e-5 * truth.abs().max().clamp(max=1)
        assert error <= bound, f"{name}: error {error:.3g}, of unfused torch {of_unfused:.3g}"

    return check


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a test's problem has several blocks of rows and slices of vocabulary."""
    from latro_kernels.head import Head
    from latro_kernels.linear_kl import tiles as kl_tiles
    from latro_kernels.linear_logprob import tiles

    def shape(head: Head, *, tiles: int = 1) -> tuple[int, int]:
        return max(1, min(24, len(head.hidden))), min(192, len(head.weight))

    monkeypatch.setattr(tiles, "tile_shape", shape)
    monkeypatch.setattr(kl_tiles, "tile_shape", shape)
