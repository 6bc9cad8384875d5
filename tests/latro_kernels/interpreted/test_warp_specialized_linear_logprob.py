"""The warp-specialised kernels behind the public op; what is not Gluon runs in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from latro_kernels.head import Head
from latro_kernels.linear_logprob.triton import blocks, fused, tuning, warp_specialized
from tests.latro_kernels.gluon_simulator import Simulator
from tests.latro_kernels.ops.linear_logprob import problem
from tests.latro_kernels.ops.op import assert_same, check

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("small_tiles")]


FORWARD, GRAD = "warp_specialized_kernel", "warp_specialized_grad_kernel"
BLOCK = blocks.Config(16, 32, 16, warps=8, stages=4, warp_specialized=True)


@pytest.fixture(params=[90, 100], ids="sm_{}".format)
def simulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Simulator:
    simulator = Simulator(0, capability=request.param)
    monkeypatch.setattr(blocks, "_INTERPRETED", BLOCK)
    monkeypatch.setattr(blocks, "has_descriptors", lambda device: True)
    monkeypatch.setattr(warp_specialized, "launch", simulator.launch)
    return simulator


@pytest.mark.parametrize(
    ("more", "options", "launched"),
    [
        (
            {"bias": True, "entropy": True, "temperature": 1.3, "softcap": 5.0},
            {"memory_budget": 0},
            {FORWARD, GRAD},
        ),
        ({"temperature": 0.7}, {"memory_budget": 2**30}, {FORWARD}),
        ({"bias": True}, {"grad_filter": 1e-20, "memory_budget": 0}, {FORWARD}),
        ({"frozen": True, "bias": True}, {"memory_budget": 0}, set()),
        ({"batch": True}, {"memory_budget": 0}, {FORWARD, GRAD}),
        ({"rows": "peaked", "entropy": True}, {"memory_budget": 0}, {FORWARD, GRAD}),
    ],
    ids=["all", "kept", "filtered", "frozen", "ignored", "peaked"],
)
def test_every_form_passes_the_gate(
    more: dict[str, Any], options: dict[str, Any], launched: set[str], simulator: Simulator
) -> None:
    """And what the warp-specialised kernels are not for is made by the usual ones."""
    check(problem((20, 24, 150), torch.float16, **more), "triton", **options)
    assert {name for name, _ in simulator.launched} == launched


def test_rows_without_a_gradient_are_left_out(simulator: Simulator) -> None:
    given = problem((40, 24, 150), torch.float16, bias=True)
    given.upstream["logp"][::3] = 0
    check(given, "triton", memory_budget=0)
    of_first_columns = (of for name, of in simulator.launched if name == GRAD and of["begin"] == 0)
    assert sum(of["M"] for of in of_first_columns) == 26


def test_what_tuning_checks_is_right(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_REPEATS", 1)
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 24, generator=random).half() / 2 for n in (20, 150))
    head = Head(hidden, weight, bias=None, temperature=1.0, softcap=0.0, backend="triton")
    target = torch.randint(150, (20,), generator=random)
    usual = replace(BLOCK, warp_specialized=False)
    assert tuning.is_right(head, target, BLOCK, trusted=usual)
    assert {name for name, _ in simulator.launched} == {FORWARD, GRAD}


def test_no_bit_of_a_log_prob_depends_on_the_memory_budget(simulator: Simulator) -> None:
    given = problem((20, 24, 150), torch.float16, bias=True)
    # None, products of some columns, all.
    columns = (0, fused.TILE_COLUMNS, 150)
    # The gradients' products are made here by torch, or by NumPy in the interpreter.
    logp = [{"logp": given.solve("triton", memory_budget=4 * 20 * c)["logp"]} for c in columns]
    launched = [given for name, given in simulator.launched if name == FORWARD]
    assert [given["cached_end"] for given in launched] == list(columns)
    for other in logp[1:]:
        assert_same(logp[0], other)
