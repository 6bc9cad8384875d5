from __future__ import annotations

import pytest
import torch

from benchmarks import linear_logprob
from benchmarks.common.problem import Shape, make_problem
from benchmarks.common.providers import PROVIDERS, solve
from benchmarks.linear_logprob import BARE_GEMMS, BareGemms, Limits, bench, laps_of, train_step

CPU = torch.device("cpu")
SHAPE = Shape("test", n=8, h=16, v=32)
ONE_REP = Limits(reps=1, seconds=1.0, truth_flop=1e9)


def unfused():
    return PROVIDERS["unfused"](CPU)


def measured(found=None, shape=SHAPE, limits=ONE_REP, **options):
    """Return rows and reasons of `bench` in fp32 on the CPU, by default for the unfused loss."""
    found = found or {"unfused": unfused()}
    return bench(shape, "fp32", found, device=CPU, limits=limits, **options)


def test_full_is_the_sum_of_its_laps():
    laps = {"forward": [9.0, 9.0], "forward_grad": [1.0, 2.0], "backward": [10.0, 30.0]}
    full = linear_logprob.summaries(laps)["full"]
    assert (full.low, full.median, full.high) == (11.0, 21.5, 32.0)


def test_only_the_laps_of_the_phases_are_run():
    problem = make_problem(SHAPE, torch.float32, CPU)
    for phases, laps in (
        (("forward",), {"forward"}),
        (("full",), {"forward_grad", "backward"}),
        (("forward", "backward"), {"forward", "forward_grad", "backward"}),
    ):
        assert laps_of(train_step(unfused(), problem), phases).keys() == laps
        assert laps_of(BareGemms(problem), phases).keys() == laps


@pytest.mark.parametrize("frozen", [False, True])
def test_bare_gemms_leave_out_the_gradient_of_a_frozen_head(frozen):
    problem = make_problem(SHAPE, torch.float32, CPU, frozen=frozen)
    backward = BareGemms(problem).backward
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        backward()
    products = sum(event.count for event in profiler.key_averages() if event.key == "aten::mm")
    assert products == (1 if frozen else 2)


def test_frozen_head_has_no_gradient_to_be_wrong():
    for frozen in (False, True):
        rows, _ = measured(phases=("full",), frozen=frozen)
        assert [row.provider for row in rows] == [BARE_GEMMS, "unfused"]
        assert rows[1].times.keys() == rows[1].multiples.keys() == rows[1].memory.keys() == {"full"}
        assert rows[1].error["dx"] is not None
        assert (rows[1].error["dw"] is None) == frozen


def test_without_phases_only_errors_are_measured():
    rows, _ = measured(phases=())
    assert [(row.provider, dict(row.times), dict(row.memory)) for row in rows] == [
        ("unfused", {}, {})
    ]
    assert 0 <= rows[0].error["dw"] < 1e-5


def test_long_truth_is_of_the_first_rows():
    shape = Shape("test", n=64, h=32, v=128)
    limits = Limits(reps=1, seconds=1.0, truth_flop=shape.step_flop / 4)
    rows, reasons = measured(shape=shape, limits=limits)
    assert not reasons
    assert [row.error_rows for row in rows] == [None, 16]


def test_provider_that_fails_on_the_shape_is_dropped_with_its_reason():
    def broken(hidden, weight, target):
        raise RuntimeError("out of memory")

    rows, reasons = bench(
        Shape("test", n=8, h=16, v=32), "fp32", {"broken": broken}, device=CPU, limits=ONE_REP
    )
    assert [row.provider for row in rows] == [BARE_GEMMS]
    assert reasons == {"broken": "RuntimeError: out of memory"}


def test_solutions_are_equal_to_the_bit():
    problem = make_problem(SHAPE, torch.float32, CPU, frozen=True)
    one, two = (solve(unfused(), problem) for _ in range(2))
    assert one.dw is None
    assert one.equals(two)
    two.dx[0, 0] += 1e-3
    assert not one.equals(two)
