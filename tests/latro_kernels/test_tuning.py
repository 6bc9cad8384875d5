"""Which shape of a block of products is used where; what it costs is measured on a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from latro_kernels.linear_logprob.triton import blocks, tuning
from latro_kernels.linear_logprob.triton.blocks import Config

SMALL, WIDE = Config(64, 64, 32, 4, 2), Config(128, 256, 64, 8, 3)


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[None]:
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        for H, V, shape in ((1024, 32000, SMALL), (4096, 128256, WIDE), (1024, 32000, SMALL)):
            key = {"device": "A", "dtype": "bf16", "H": H, "V": V}
            tuning.save(key, key | {"config": vars(shape)})
            blocks.saved.cache_clear()
        yield
    blocks.saved.cache_clear()


def test_a_shape_is_saved_once_and_outside_of_the_package(saved: None, tmp_path: Path) -> None:
    (path,) = tmp_path.rglob("*.json")
    assert path == blocks.saved_path()
    assert [entry["H"] for entry in blocks.saved(path)] == [4096, 1024]


def test_the_saved_shape_of_the_head_most_alike(saved: None) -> None:
    assert blocks._nearest("A", "bf16", 1024, 50257) == SMALL
    assert blocks._nearest("A", "bf16", 3584, 152064) == WIDE
    assert blocks._nearest("A", "bf16", 4096, 32768) == WIDE


def test_nothing_saved_for_a_chip_or_a_dtype(saved: None) -> None:
    assert blocks._nearest("B", "bf16", 4096, 128256) is None
    assert blocks._nearest("A", "fp16", 4096, 128256) is None


@pytest.mark.parametrize(("generation", "known"), [(7, 8), (8, 8), (9, 9), (10, 10), (12, 10)])
def test_a_start_for_every_chip(generation: int, known: int) -> None:
    assert blocks.start(generation, torch.bfloat16) == blocks.start(known, torch.bfloat16)
    assert blocks.start(generation, torch.float32) == blocks.start(known, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_start_is_among_what_is_timed(dtype: torch.dtype) -> None:
    assert {blocks.start(g, dtype) for g in (8, 9, 10)} <= set(blocks.candidates(dtype))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    command = [
        sys.executable,
        "-m",
        "latro_kernels.linear_logprob.triton.tuning",
        "--hidden",
        "8",
        "--vocab",
        "9",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "no CUDA GPU to measure on" in result.stderr
