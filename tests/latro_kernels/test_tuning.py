"""Which shape of a block of products is used where; what it costs is measured on a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from latro_kernels.head import Head
from latro_kernels.linear_logprob.state import State
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


def test_without_gluon_the_usual_form_of_a_saved_shape(
    saved: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"device": "A", "dtype": "bf16", "H": 4096, "V": 128256}
    tuning.save(key, key | {"config": vars(blocks.WARP_SPECIALIZED)})
    blocks.saved.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A")
    head = (torch.device("cuda"), torch.bfloat16, 4096, 128256)
    assert blocks.config(*head) == blocks.WARP_SPECIALIZED
    monkeypatch.setattr(blocks, "has_gluon", lambda: False)
    assert blocks.config(*head) == replace(blocks.WARP_SPECIALIZED, warp_specialized=False)


@pytest.mark.parametrize(
    ("capability", "dtype", "is_timed"),
    [
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float16, True),
        ((9, 0), torch.float32, False),
        ((8, 0), torch.bfloat16, False),
        ((10, 0), torch.bfloat16, False),
    ],
    ids=str,
)
def test_where_the_warp_specialised_form_is_timed(
    capability: tuple[int, int],
    dtype: torch.dtype,
    is_timed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is what nothing starts with."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert blocks.can_warp_specialize(torch.device("cuda"), dtype) is is_timed
    assert not blocks.start(capability[0], dtype).warp_specialized


@pytest.mark.parametrize(
    ("errors", "is_right"),
    [
        # Of each run of the trusted shape, then of the other's.
        ([1e-4, *[1e-4] * 21] * 2, True),
        ([1e-4, *[1e-3] * 21] * 2, False),
        ([1e-4, *[torch.nan] * 21] * 2, False),
        ([1e-4, *[1e-4] * 20, 1.1e-4] * 2, False),
        ([1e-4, *[1e-4] * 21, 1e-4, *[1e-3] * 21], False),
    ],
    ids=["right", "far off", "not a number", "another each time", "wrong entropy"],
)
def test_what_is_wrong_is_not_timed(
    errors: list[float], is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = Head(torch.randn(5, 8), torch.randn(7, 8), None, 1.0, 0.0, "triton")
    target = torch.randint(7, (5,))
    z = head.hidden.double() @ head.weight.double().T

    def forward(head: Head, state: State, config: Config) -> None:
        z_max = z.amax(1)
        below = z - z_max[:, None]
        state.row_max.copy_(z_max)
        state.sum_exp.copy_(below.exp().sum(1))
        state.target_logit.copy_(z.gather(1, target[:, None])[:, 0] + errors.pop(0))
        if state.weighted_sum is not None:
            state.weighted_sum.copy_((below.exp() * below).sum(1))

    monkeypatch.setattr(tuning.fused, "forward", forward)
    assert tuning.is_right(head, target, blocks.WARP_SPECIALIZED, trusted=WIDE) is is_right


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
