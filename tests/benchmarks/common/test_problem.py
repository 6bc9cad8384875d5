from __future__ import annotations

import math

import pytest
import torch

from benchmarks.common import problem as problems
from benchmarks.common.problem import (
    Shape,
    Solution,
    errors,
    make_problem,
    relative_error,
    solve_fp64,
)

CPU = torch.device("cpu")
SHAPE = Shape("test", n=96, h=256, v=1111)


def autograd_fp64(problem: problems.Problem) -> Solution:
    hidden = problem.hidden.detach().double().requires_grad_()
    weight = problem.weight.detach().double().requires_grad_()
    logp = torch.log_softmax(hidden @ weight.T, 1).gather(1, problem.target[:, None])[:, 0]
    dx, dw = torch.autograd.grad(logp, (hidden, weight), problem.grad.double())
    return Solution(logp.detach(), dx, dw)


def test_inputs_are_realistic():
    problem = make_problem(Shape("wide", n=SHAPE.n, h=1024, v=SHAPE.v), torch.float32, CPU)
    logits = (problem.hidden @ problem.weight.T).detach()
    peaked = slice(0, None, problems.PEAKED_EVERY)
    plain = torch.arange(SHAPE.n) % problems.PEAKED_EVERY != 0
    assert 2 < logits[plain].std() < 4
    p = logits[peaked].softmax(1).amax(1)
    assert (p > 0.999).all()
    assert (p < 1).any()
    on_peak = logits[peaked].argmax(1) == problem.target[peaked]
    assert on_peak[::2].all()
    assert not on_peak[1::2].any()
    assert (problem.grad != 0).all()
    assert len(problem.grad.unique()) > SHAPE.n // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [1, 8 * SHAPE.v * 7, 1 << 30])
def test_truth_is_autograd_in_fp64(dtype, chunk_bytes, monkeypatch):
    monkeypatch.setattr(problems, "_TRUTH_CHUNK_BYTES", chunk_bytes)
    problem = make_problem(SHAPE, dtype, CPU)
    got = errors(solve_fp64(problem), autograd_fp64(problem))
    assert got.keys() == {"logp", "dx", "dw", "dx_peaked"}
    # dx_peaked is the difference of terms ten thousand times its size.
    assert all(error < 1e-9 for error in got.values())


def test_relative_error_is_over_the_largest_true_element():
    truth = torch.tensor([0.0, -4.0, 1.0], dtype=torch.float64)
    assert relative_error(torch.tensor([0.5, -4.0, 1.25]), truth) == 0.125
    assert math.isnan(relative_error(torch.tensor([0.0, float("nan"), 1.0]), truth))


def test_relative_error_refuses_to_broadcast():
    with pytest.raises(ValueError, match="shape"):
        relative_error(torch.zeros(3, 1), torch.zeros(3))


def test_peaked_error_shows_what_the_whole_hides():
    truth = solve_fp64(make_problem(SHAPE, torch.float32, CPU))
    dx = truth.dx.clone()
    dx[:: 2 * problems.PEAKED_EVERY] = 0
    got = errors(Solution(truth.logp, dx, truth.dw), truth)
    assert got["dx_peaked"] == 1.0
    assert got["dx"] < 0.01


def test_first_rows_are_a_problem_of_their_own():
    problem = make_problem(SHAPE, torch.float32, CPU).rows(10)
    truth = solve_fp64(problem)
    assert truth.logp.shape == (10,)
    assert truth.dx.shape == (10, SHAPE.h)
    assert problem.hidden.is_leaf
    assert problem.hidden.requires_grad


def test_frozen_head_is_the_same_problem_without_its_gradient():
    frozen = make_problem(SHAPE, torch.float32, CPU, frozen=True)
    trainable = make_problem(SHAPE, torch.float32, CPU)
    assert [tensor.shape for tensor in frozen.differentiable] == [(SHAPE.n, SHAPE.h)]
    assert len(trainable.differentiable) == 2
    got, truth = solve_fp64(frozen), solve_fp64(trainable)
    assert got.dw is None
    assert torch.equal(got.dx, truth.dx)
    assert errors(got, truth)["dw"] is None
