from __future__ import annotations

import pytest
import torch

from benchmarks import filter_study
from benchmarks.logprob_report import BARE_GEMMS
from benchmarks.measure import Limits
from benchmarks.problem import Problem

CPU = torch.device("cpu")


def problem_of(logits: torch.Tensor, target: list[int], grad: list[float]) -> Problem:
    """Return the head whose logits are given: the hidden states are the unit vectors."""
    return Problem(
        torch.eye(len(logits)).requires_grad_(),
        logits.T.contiguous().requires_grad_(),
        torch.tensor(target),
        torch.tensor(grad),
    )


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_evidence_of_a_case_made_by_hand(chunk_bytes, monkeypatch):
    monkeypatch.setattr(filter_study, "_CHUNK_BYTES", chunk_bytes)
    p = torch.tensor(
        [
            [0.50, 0.25, 0.125, 0.0625, 0.0625],
            [0.25, 0.25, 0.25, 0.125, 0.125],
            [0.0625, 0.0625, 0.125, 0.25, 0.50],
        ]
    )
    problem = problem_of(p.log(), target=[0, 1, 4], grad=[1.0, -2.0, 0.5])
    bound, hit = filter_study.evidence(problem, columns=2)
    # Three blocks of columns, the last of one.
    torch.testing.assert_close(
        bound,
        torch.tensor([[0.5, 0.125, 0.0625], [0.5, 0.5, 0.25], [0.03125, 0.125, 0.25]]),
    )
    assert hit.tolist() == [[True, False, False], [True, False, False], [False, False, True]]


def test_skipped_puts_rows_together_that_need_as_much():
    bound = torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.0, 0.0], [0.9, 0.9, 0.9], [0.9, 0.0, 0.0]])
    hit = torch.zeros(4, 3, dtype=torch.bool)
    # Rows 1 and 3 make a block of rows, and two of its three blocks of columns are skipped.
    assert filter_study.skipped(bound, hit, 2, 0.5) == pytest.approx(2 / 6)
    hit[1, 2] = True
    assert filter_study.skipped(bound, hit, 2, 0.5) == pytest.approx(1 / 6)


def test_bounds_are_sums_of_magnitudes():
    problem = Problem(
        torch.tensor([[1.0, -3.0], [2.0, 1.0]]),
        torch.tensor([[1.0, 0.5], [-1.0, 0.5], [4.0, -8.0]]),
        torch.tensor([0, 1]),
        torch.ones(2),
    )
    assert filter_study.bounds(problem, 0.5) == (0.5 * 9, 0.5 * 4)


def test_filter_skips_what_is_improbable_within_the_bound():
    generator = torch.Generator().manual_seed(0)
    hidden = 0.25 * torch.randn(48, 16, generator=generator)
    # Of 960 tokens the first 96 are probable, and the targets are among them.
    weight = torch.randn(960, 16, generator=generator)
    weight[:96] *= 4
    target = torch.randint(96, (48,), generator=generator)
    grad = torch.randn(48, generator=generator)
    problem = Problem(hidden.requires_grad_(), weight.requires_grad_(), target, grad)

    limits = Limits(reps=1, seconds=1.0, truth_flop=1e9)
    rows = filter_study.measure(problem, "test", "fp32", "latro-cpu", limits)
    assert rows[0].provider == BARE_GEMMS
    exact, *filtered = rows[1:]
    assert exact.more["skipped %"] == 0
    shares = [row.more["skipped %"] for row in filtered]
    assert shares == sorted(shares)
    assert 0 < shares[-1] < 100
    for row in filtered:
        for gradient in ("dX", "dW"):
            error = row.more[f"{gradient} error"]
            assert error <= row.more[f"{gradient} bound"] + 2 * exact.more[f"{gradient} error"]
    assert filtered[-1].more["dX error"] > 10 * exact.more["dX error"]
