"""The warp-specialised forward behind the public op; what is not Gluon runs in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latro_kernels.linear_logprob.triton import blocks, fused, warp_specialized
from tests.latro_kernels.gluon_simulator import Simulator
from tests.latro_kernels.ops.linear_logprob import problem
from tests.latro_kernels.ops.op import assert_same, check

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("small_tiles")]


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Simulator:
    simulator = Simulator(0)
    block = blocks.Config(16, 32, 16, warps=8, stages=4, warp_specialized=True)
    monkeypatch.setattr(blocks, "_INTERPRETED", block)
    monkeypatch.setattr(blocks, "has_descriptors", lambda device: True)
    monkeypatch.setattr(warp_specialized, "launch", simulator.launch)
    return simulator


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({"bias": True, "entropy": True, "temperature": 1.3, "softcap": 5.0}, {}),
        ({"temperature": 0.7}, {"memory_budget": 2**30}),
        ({"bias": True}, {"grad_filter": 1e-20}),
        ({"frozen": True, "bias": True}, {}),
        ({"batch": True}, {}),
        ({"rows": "peaked", "entropy": True}, {}),
    ],
    ids=["all", "kept", "filtered", "frozen", "ignored", "peaked"],
)
def test_every_form_passes_the_gate(
    more: dict[str, Any], options: dict[str, Any], simulator: Simulator
) -> None:
    check(problem((20, 24, 150), torch.float16, **more), "triton", **options)
    # Exponentials for the sum of a frozen head are the other form's alone.
    assert bool(simulator.launched) is not more.get("frozen", False)


def test_no_bit_of_a_log_prob_depends_on_the_memory_budget(simulator: Simulator) -> None:
    given = problem((20, 24, 150), torch.float16, bias=True)
    # None, products of some columns, all.
    columns = (0, fused.TILE_COLUMNS, 150)
    # The gradients' products are made here by torch, or by NumPy in the interpreter.
    logp = [{"logp": given.solve("triton", memory_budget=4 * 20 * c)["logp"]} for c in columns]
    assert [launched["cached_end"] for launched in simulator.launched] == list(columns)
    for other in logp[1:]:
        assert_same(logp[0], other)
