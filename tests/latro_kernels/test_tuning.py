"""Which shape of a block of products is used where; what it costs is measured on a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from latro_kernels.head import Head
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
        ((10, 0), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, False),
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


@pytest.mark.parametrize("name", ["logp", "entropy", "dx", "dw"])
@pytest.mark.parametrize(
    ("errors", "is_right"),
    [
        # Of the run of the trusted shape, then of those of the other.
        ([1e-4, *[1e-4] * 21], True),
        ([1e-4, *[1e-3] * 21], False),
        ([1e-4, *[torch.nan] * 21], False),
        ([1e-4, *[1e-4] * 20, 1.1e-4], False),
    ],
    ids=["right", "far off", "not a number", "another each time"],
)
def test_what_is_wrong_is_not_timed(
    errors: list[float], is_right: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever result is wrong, be it only in the runs with an entropy."""
    head = Head(torch.randn(5, 8), torch.randn(7, 8), None, 1.0, 0.0, "triton")
    target = torch.randint(7, (5,))
    exact, left = tuning.truth(head, target, with_entropy=True), list(errors)
    z = head.hidden.double() @ head.weight.double().T
    p = z.softmax(1)
    entropy = -(p * p.log()).sum(1)
    dz = torch.nn.functional.one_hot(target, 7) - p - p * (p.log() + entropy[:, None])
    torch.testing.assert_close(exact["dw"], dz.T @ head.hidden.double())
    torch.testing.assert_close(exact["dx"], dz @ head.weight.double())
    torch.testing.assert_close(exact["entropy"], entropy)

    def solve(
        head: Head, target: Tensor, config: Config, *, with_entropy: bool
    ) -> dict[str, Tensor]:
        found = tuning.truth(head, target, with_entropy=with_entropy)
        if with_entropy:
            found[name] = found[name] + left.pop(0)
        return found

    monkeypatch.setattr(tuning, "solve", solve)
    assert tuning.is_right(head, target, blocks.WARP_SPECIALIZED, trusted=WIDE) is is_right
    assert is_right is False or not left


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
