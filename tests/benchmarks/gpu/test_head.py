"""What `linear_logprob`'s benchmark does on a GPU alone."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.problem import Shape
from benchmarks.common.providers import discover
from benchmarks.linear_logprob import BARE_GEMMS, Limits, bench


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_run_is_compared_to_the_bit(frozen):
    device = torch.device("cuda")
    found, reasons = discover(["latro-triton-3gib", "unfused"], device, torch.bfloat16)
    assert not reasons
    limits = Limits(reps=1, seconds=1.0, truth_flop=1e12)
    shape = Shape("small", n=96, h=128, v=3001)
    rows, _ = bench(
        shape, "bf16", found, device=device, limits=limits, phases=("full",), frozen=frozen
    )
    more = {row.provider: row.more for row in rows}
    assert more[BARE_GEMMS] == {}
    assert more["latro-triton-3gib"] == {"same bits": 1.0}
    assert more["unfused"].keys() == {"same bits"}
    assert rows[1].memory["full"] >= 0
