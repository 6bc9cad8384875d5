"""Importance ratios and weights against their formula in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latro.update.importance import importance


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """Log-probs of 40 rows by policy and engine, near and far from each other; 8 are answers'."""
    numbers = torch.Generator().manual_seed(0)
    logp = -6 * torch.rand(40, generator=numbers)
    engine_logp = logp + torch.randn(40, generator=numbers)
    engine_logp[torch.randperm(40, generator=numbers)[:8]] = math.nan
    return logp, engine_logp


@pytest.mark.parametrize("cap", [0.5, 1.0, 2.0, 1e9])
def test_weight_is_the_ratio_up_to_the_cap(rows: tuple[Tensor, Tensor], cap: float) -> None:
    ratio, weight = importance(*rows, cap)
    capped = 0
    for row, (ours, engine) in enumerate(zip(*(r.tolist() for r in rows), strict=True)):
        if math.isnan(engine):
            assert math.isnan(ratio[row])
            assert weight[row] == 1
            continue
        truth = math.exp(ours - engine)
        unfused = (torch.tensor(ours).exp() / torch.tensor(engine).exp()).item()
        allowed = 2 * abs(unfused - truth) + 1e-5
        assert abs(ratio[row].item() - truth) <= allowed
        assert abs(weight[row].item() - min(truth, cap)) <= allowed
        capped += truth > cap
    assert capped == 0 if cap == 1e9 else 0 < capped < 32


def test_without_cap_weights_are_1(rows: tuple[Tensor, Tensor]) -> None:
    ratio, weight = importance(*rows, None)
    assert torch.equal(weight, torch.ones(40))
    assert torch.equal(ratio.nan_to_num(-1), importance(*rows, 1.0)[0].nan_to_num(-1))


def test_no_gradient_flows_through_the_weights(rows: tuple[Tensor, Tensor]) -> None:
    logp, engine_logp = rows
    ratio, weight = importance(logp.requires_grad_(), engine_logp, 2.0)
    assert not ratio.requires_grad
    assert not weight.requires_grad


def test_no_rows() -> None:
    ratio, weight = importance(torch.empty(0), torch.empty(0), 1.0)
    assert ratio.shape == weight.shape == (0,)
