from __future__ import annotations

import os

import pytest
import torch

from benchmarks.common import memory
from benchmarks.common.problem import Shape, make_problem
from benchmarks.common.providers import PROVIDERS, solve

CPU = torch.device("cpu")
MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    memory.can_measure(CPU) is not None, reason="needs Linux's /proc/self/clear_refs"
)


def transient_64_mib() -> int:
    """Return the peak of a call that uses and frees 64 MiB, which were used and freed before."""
    memory.make_malloc_honest()

    def call() -> None:
        torch.ones(64 * MIB, dtype=torch.uint8)

    call()
    return memory.peak_extra_bytes(call, CPU)


def nothing() -> int:
    memory.make_malloc_honest()
    return memory.peak_extra_bytes(lambda: None, CPU)


def raises() -> None:
    raise ValueError("from the other process")


def unfused_peaks() -> tuple[int, int]:
    """Return the peak of one unfused step: by the resident set, and by torch's profiler."""
    memory.make_malloc_honest()
    logprob = PROVIDERS["unfused"](CPU)
    problem = make_problem(Shape("", n=256, h=256, v=16384), torch.float32, CPU)
    solve(logprob, problem)  # the GEMM library keeps its packing buffers, which torch never sees
    resident = memory.peak_extra_bytes(lambda: solve(logprob, problem), CPU)

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        solution = solve(logprob, problem)
    del solution
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return resident, peak


def test_sees_memory_that_is_freed_again():
    peak = memory.in_fresh_process(transient_64_mib)
    # The kernel counts resident pages in batches per CPU.
    assert peak == pytest.approx(64 * MIB, abs=MIB)


def test_nothing_costs_nothing():
    assert memory.in_fresh_process(nothing) < MIB


def test_resident_set_agrees_with_the_profiler_where_torch_allocates_everything():
    resident, profiled = memory.in_fresh_process(unfused_peaks)
    assert profiled > 32 * MIB
    assert resident == pytest.approx(profiled, abs=4 * MIB)


def test_errors_come_back():
    with pytest.raises(ValueError, match="from the other process"):
        memory.in_fresh_process(raises)


def counted(problem: list[str]) -> tuple[int, list[str]]:
    """Return the process's number and all arguments of its calls."""
    CALLS.append(problem)
    return os.getpid(), CALLS


CALLS: list[list[str]] = []


def test_a_process_of_its_own_measures_something_tiny_first():
    found = memory.measured(counted, ["real"], CPU, tiny=["tiny"], name="name", failures=())
    process, calls = found
    assert process != os.getpid()
    assert calls == [["tiny"], ["real"]]


def fail(problem: str) -> int:
    raise NotImplementedError(f"no kernel for this\n{problem}")


def test_a_failure_is_printed_and_others_are_raised(capsys):
    failures = (NotImplementedError,)
    assert memory.measured(fail, "real", CPU, tiny="tiny", name="name", failures=failures) is None
    said = "name: memory not measured: NotImplementedError: no kernel for this\n"
    assert capsys.readouterr().err == said
    with pytest.raises(NotImplementedError):
        memory.measured(fail, "real", CPU, tiny="tiny", name="name", failures=())
