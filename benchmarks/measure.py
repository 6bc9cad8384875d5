"""Time, memory and error of a provider's forward and backward, beside the bare GEMMs.

The log-prob benchmark and its studies are tables of what is measured here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import memory, timing
from benchmarks.logprob_report import BARE_GEMMS, ERRORS, MEMORY_PHASES, PHASES, Row
from benchmarks.problem import Problem, Shape, errors, make_problem, solve_fp64
from benchmarks.providers import CANNOT_RUN, PROVIDERS, TINY, LogprobFn, reason, solve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEER_PACKAGES = ("triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
TRUTH_FLOP = {"cpu": 3e11, "cuda": 4e13}


@dataclass(frozen=True)
class Limits:
    """Repetitions at most, seconds a provider after `timing.MIN_REPS` of them, and FLOP of fp64
    work: a truth that would take more is computed for the first rows only."""

    reps: int
    seconds: float
    truth_flop: float


class TrainStep:
    """One provider's laps on one problem; the graph of `forward_grad` waits for `backward`."""

    def __init__(self, logprob: LogprobFn, problem: Problem) -> None:
        self._logprob = logprob
        self._problem = problem
        self._logp: Tensor | None = None

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self._logprob(self._problem.hidden, self._problem.weight, self._problem.target)

    def forward_grad(self) -> None:
        self._logp = self._logprob(self._problem.hidden, self._problem.weight, self._problem.target)

    def backward(self) -> tuple[Tensor, ...]:
        logp, self._logp = self._logp, None
        assert logp is not None, "forward_grad runs first"
        return torch.autograd.grad(
            logp, self._problem.differentiable, self._problem.grad.to(logp.dtype)
        )

    def candidate(self, name: str, phases: Sequence[str]) -> timing.Candidate:
        laps = {
            "forward": self.forward,
            "forward_grad": self.forward_grad,
            "backward": self.backward,
        }
        return timing.Candidate(name, {lap: laps[lap] for lap in _laps_of(phases)})


def _laps_of(phases: Sequence[str]) -> list[str]:
    laps = ["forward"] * ("forward" in phases)
    return laps + ["forward_grad", "backward"] * ("backward" in phases or "full" in phases)


def bare_gemms(problem: Problem, phases: Sequence[str]) -> timing.Candidate:
    """The three GEMMs into outputs made here: logits = X·Wᵀ, dX = dZ·W, dW = dZᵀ·X; two, without
    dW, where the head is frozen.

    dZ is a true gradient of the logits, as a GPU's clocks depend on the numbers it multiplies.
    """
    x, w = problem.hidden.detach(), problem.weight.detach()
    logits = torch.mm(x, w.T)
    dz = logits.float().softmax(1).neg_()
    dz.scatter_add_(1, problem.target[:, None], torch.ones_like(dz[:, :1]))
    dz = dz.mul_(problem.grad[:, None]).to(x.dtype)
    dx, dw = torch.empty_like(x), torch.empty_like(w)

    def forward() -> None:
        torch.mm(x, w.T, out=logits)

    def backward() -> None:
        torch.mm(dz, w, out=dx)
        if problem.weight.requires_grad:
            torch.mm(dz.T, x, out=dw)

    laps = {"forward": forward, "forward_grad": forward, "backward": backward}
    return timing.Candidate(BARE_GEMMS, {lap: laps[lap] for lap in _laps_of(phases)})


def summaries(
    laps: Mapping[str, list[float]], phases: Sequence[str] = PHASES
) -> dict[str, timing.Summary]:
    """A summary of each of `phases`; full is added up repetition by repetition."""
    times = dict(laps)
    if "full" in phases:
        steps = zip(laps["forward_grad"], laps["backward"], strict=True)
        times["full"] = [a + b for a, b in steps]
    return {phase: timing.summarize(times[phase]) for phase in phases}


def time_all(
    problem: Problem,
    found: Mapping[str, LogprobFn],
    limits: Limits,
    phases: Sequence[str] = PHASES,
) -> dict[str, dict[str, timing.Summary]]:
    """Times by provider and phase, the bare GEMMs' first; all take turns."""
    candidates = [bare_gemms(problem, phases)]
    candidates += [TrainStep(found[name], problem).candidate(name, phases) for name in found]
    clock = timing.clock_for(problem.hidden.device)
    samples = timing.interleave(candidates, clock, reps=limits.reps, budget_s=limits.seconds)
    return {name: summaries(laps, phases) for name, laps in samples.items()}


def multiples(
    of: Mapping[str, timing.Summary], bare: Mapping[str, timing.Summary]
) -> dict[str, float]:
    """Each phase's median over that of the bare GEMMs."""
    return {phase: summary.median / bare[phase].median for phase, summary in of.items()}


def peak_memory(
    logprob: LogprobFn, problem: Problem, phases: Sequence[str] = MEMORY_PHASES
) -> dict[str, int]:
    """Peak bytes of forward and full (those in `phases`) beyond inputs and results.

    Results that did not exist yet at the peak are subtracted all the same (never below 0): they
    have to fit in memory in any case.
    """
    step = TrainStep(logprob, problem)

    def full() -> object:
        step.forward_grad()
        return step.backward()

    logp_bytes = 4 * len(problem.hidden)
    results = {
        "forward": logp_bytes,
        "full": logp_bytes + sum(tensor.nbytes for tensor in problem.differentiable),
    }
    calls = {"forward": step.forward, "full": full}
    device = problem.hidden.device
    return {
        phase: max(0, memory.peak_extra_bytes(calls[phase], device) - results[phase])
        for phase in MEMORY_PHASES
        if phase in phases
    }


def peak_memory_of(
    name: str, shape: Shape, dtype: torch.dtype, frozen: bool, phases: Sequence[str], threads: int
) -> dict[str, int]:
    """`peak_memory` of a provider on CPU. Runs in a process of its own."""
    memory.make_malloc_honest()
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    logprob = PROVIDERS[name].find(device)
    peak_memory(logprob, make_problem(TINY, dtype, device, frozen=frozen), phases)
    return peak_memory(logprob, make_problem(shape, dtype, device, frozen=frozen), phases)


def measure_memory(
    name: str,
    logprob: LogprobFn,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    frozen: bool = False,
    phases: Sequence[str] = MEMORY_PHASES,
) -> dict[str, int | None]:
    """`peak_memory` in the way that is honest on `device`; a failure is printed, and `None`."""
    why = memory.can_measure(device)
    if why is None:
        try:
            if device.type == "cuda":
                problem = make_problem(shape, dtype, device, frozen=frozen)
                return dict(peak_memory(logprob, problem, phases))
            arguments = (name, shape, dtype, frozen, tuple(phases), torch.get_num_threads())
            return dict(memory.in_fresh_process(peak_memory_of, *arguments))
        except (*CANNOT_RUN, BrokenProcessPool) as error:
            why = reason(error)
    print(f"{name}: memory not measured: {why}", file=sys.stderr)
    return {phase: None for phase in MEMORY_PHASES if phase in phases}


def measure_errors(
    problem: Problem, found: Mapping[str, LogprobFn], limits: Limits
) -> tuple[dict[str, dict[str, float | None]], int, dict[str, str]]:
    """Errors of each provider over the first rows, how many rows, and why others have none."""
    (N, H), V = problem.hidden.shape, len(problem.weight)
    share = limits.truth_flop / Shape("", N, H, V).step_flop
    error_rows = N if share >= 1 else max(1, int(N * share))
    sample = problem.rows(error_rows)
    truth = solve_fp64(sample)
    error: dict[str, dict[str, float | None]] = {}
    reasons: dict[str, str] = {}
    for name, logprob in found.items():
        try:
            error[name] = errors(solve(logprob, sample), truth)
        except CANNOT_RUN as failure:
            reasons[name] = reason(failure)
    return error, error_rows, reasons


def bench(
    shape: Shape,
    dtype: str,
    found: Mapping[str, LogprobFn],
    device: torch.device,
    limits: Limits,
    *,
    phases: Sequence[str] = PHASES,
    frozen: bool = False,
) -> tuple[list[Row], dict[str, str]]:
    """All of `found` on one shape in one dtype; with a head that needs no gradient if `frozen`.

    Returns:
        A row for the bare GEMMs and each provider that ran, and why the others did not. Without
        `phases` nothing is timed, and the rows hold errors only.
    """
    problem = make_problem(shape, DTYPES[dtype], device, frozen=frozen)
    print("  errors", end="", file=sys.stderr, flush=True)
    error, error_rows, reasons = measure_errors(problem, found, limits)
    runs = {name: found[name] for name in error}
    if not phases:
        print(file=sys.stderr)
        return [
            Row(shape, dtype, name, {}, {}, {}, error[name], error_rows) for name in runs
        ], reasons

    print(", times", end="", file=sys.stderr, flush=True)
    times = time_all(problem, runs, limits, phases)
    del problem

    print(", memory", file=sys.stderr)
    bare = times.pop(BARE_GEMMS)
    measured = [phase for phase in MEMORY_PHASES if phase in phases]
    rows = [
        Row(
            *(shape, dtype, BARE_GEMMS, bare, multiples(bare, bare)),
            memory=dict.fromkeys(measured),
            error=dict.fromkeys(ERRORS),
            error_rows=None,
        )
    ]
    for name, by_phase in times.items():
        peaks = measure_memory(
            name, found[name], shape, DTYPES[dtype], device, frozen=frozen, phases=measured
        )
        rows.append(
            Row(
                *(shape, dtype, name, by_phase, multiples(by_phase, bare)),
                memory=peaks,
                error=error[name],
                error_rows=error_rows,
            )
        )
    return rows, reasons
