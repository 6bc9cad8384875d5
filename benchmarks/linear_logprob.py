"""Time, memory and error of per-token log-probs at the LM head, beside the bare GEMMs.

`logprob_bench.py` and its study are tables of the rows that are measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from rich.table import Table

from benchmarks.common import memory, report, timing
from benchmarks.common.problem import DTYPES, Problem, Shape, errors, make_problem, solve_fp64
from benchmarks.common.providers import CANNOT_RUN, PROVIDERS, TINY, LogprobFn, reason, solve
from benchmarks.common.timing import Laps, Summary, TrainStep

PEER_PACKAGES = ("triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
TRUTH_FLOP = {"cpu": 3e11, "cuda": 4e13}

BARE_GEMMS = "bare GEMMs"
PHASES = ("forward", "backward", "full")
MEMORY_PHASES = ("forward", "full")
ERRORS = ("logp", "dx", "dw", "dx_peaked")
NO_ERROR = dict.fromkeys(ERRORS)


@dataclass(frozen=True)
class Row:
    """One provider on one shape in one dtype.

    Times are in seconds, by those of `PHASES` that were timed, and `multiples` their medians over
    those of the bare GEMMs; memory is in bytes, by those of `MEMORY_PHASES`; errors are relative,
    by `ERRORS`, over the first `error_rows` rows. `None`: does not apply, or could not be had.
    `more` is what only some tables have, by the heading it gets there.
    """

    shape: Shape
    dtype: str
    provider: str
    times: Mapping[str, Summary] = field(default_factory=dict)
    multiples: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int | None] = field(default_factory=dict)
    error: Mapping[str, float | None] = field(default_factory=dict)
    error_rows: int | None = None
    more: Mapping[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, object]:
        """Return milliseconds, MiB and relative errors, one key each; `None` if there is none."""
        cells: dict[str, object] = {
            "shape": self.shape.name,
            "N": self.shape.n,
            "H": self.shape.h,
            "V": self.shape.v,
            "dtype": self.dtype,
            "provider": self.provider,
            "reps": max((summary.reps for summary in self.times.values()), default=None),
        }
        for phase in PHASES:
            summary = self.times.get(phase)
            for end, name in (("", "median"), ("_min", "low"), ("_max", "high")):
                seconds = None if summary is None else getattr(summary, name)
                cells[f"{phase}_ms{end}"] = None if seconds is None else round(seconds * 1e3, 4)
            cells[f"{phase}_x_gemm"] = round(self.multiples[phase], 4) if summary else None
        for phase in MEMORY_PHASES:
            peak = self.memory.get(phase)
            cells[f"{phase}_peak_extra_mib"] = None if peak is None else round(peak / 2**20, 2)
        for name in ERRORS:
            cells[f"{name}_error"] = self.error.get(name)
        cells["error_rows"] = self.error_rows
        return cells | dict(self.more)


def compared(
    shape: Shape,
    dtype: str,
    times: Mapping[str, Mapping[str, Summary]],
    *,
    about: Mapping[str, Mapping[str, object]],
) -> list[Row]:
    """Return a row for each provider of `times`, which holds the bare GEMMs.

    Args:
        shape: the shape of all rows.
        dtype: the dtype of all rows.
        times: summaries by provider and phase.
        about: the other fields of `Row` by provider, for those that have any.
    """
    bare = times[BARE_GEMMS]
    return [
        Row(
            shape=shape,
            dtype=dtype,
            provider=name,
            times=by_phase,
            multiples={phase: of.median / bare[phase].median for phase, of in by_phase.items()},
            **about.get(name, {}),
        )
        for name, by_phase in times.items()
    ]


def table(rows: Sequence[Row], title: str = "") -> Table:
    """Tabulate rows of one shape and dtype, with columns for what at least one of them has."""
    shape = rows[0].shape
    phases = [phase for phase in PHASES if any(phase in row.times for row in rows)]
    memory_phases = [phase for phase in MEMORY_PHASES if any(phase in row.memory for row in rows)]
    more = list(dict.fromkeys(name for row in rows for name in row.more))
    headings = ["provider"]
    for phase in phases:
        headings += [f"{phase} ms\n(range)", "× GEMM"]
    headings += [f"{phase}\nextra MiB" for phase in memory_phases]
    headings += [f"error\n{name.replace('_', ' ')}" for name in ERRORS]
    headings += [name.replace(" ", "\n", 1) for name in more]

    def cells(row: Row) -> list[str]:
        cells = [row.provider]
        for phase in phases:
            digits = 2 if row.times[phase].median < 10e-3 else 0
            cells += [report.span(row.times[phase], 1e3, digits), f"{row.multiples[phase]:.2f}"]
        cells += [report.mib(row.memory.get(phase)) for phase in memory_phases]
        found = (row.error[name] for name in ERRORS)
        cells += ["–" if error is None else f"{error:.0e}" for error in found]
        return cells + [f"{row.more[name]:.3g}" if name in row.more else "–" for name in more]

    title = f"{title}{shape.name} {rows[0].dtype}: N={shape.n} H={shape.h} V={shape.v}"
    made = report.table(title, headings, map(cells, rows))
    captions = []
    reps = sorted({summary.reps for row in rows for summary in row.times.values()})
    if reps:
        captions.append(
            f"median (least–greatest) of {reps[0]} to {reps[-1]} interleaved repetitions"
        )
    error_rows = max((row.error_rows or 0 for row in rows), default=0)
    if 0 < error_rows < shape.n:
        captions.append(f"errors over the first {error_rows} of {shape.n} rows")
    made.caption = "; ".join(captions)
    return made


@dataclass(frozen=True)
class Limits:
    """How long to measure: at most `reps` repetitions, and about `seconds` a provider.

    Every provider gets `timing.MIN_REPS` repetitions, however long they take. A truth in fp64 that
    would take more than `truth_flop` operations is computed for the first rows only.
    """

    reps: int
    seconds: float
    truth_flop: float


def laps_of(step: TrainStep | BareGemms, phases: Sequence[str]) -> Laps:
    """Return those of the three laps of `step` that `phases` are made of."""
    wanted: dict[str, Callable[[], object]] = {}
    if "forward" in phases:
        wanted["forward"] = step.forward
    if "backward" in phases or "full" in phases:
        wanted |= {"forward_grad": step.forward_grad, "backward": step.backward}
    return wanted


def train_step(logprob: LogprobFn, problem: Problem) -> TrainStep:
    """Return one provider's laps on one problem."""
    inputs = (problem.hidden, problem.weight, problem.target)
    return TrainStep(lambda: logprob(*inputs), problem.differentiable, problem.grad)


class BareGemms:
    """The laps of the GEMMs alone: logits = X·Wᵀ, then dX = dZ·W and dW = dZᵀ·X.

    Their outputs exist already, and dW is left out where the head is frozen. dZ is a true gradient
    of the logits, as a GPU's clocks depend on the numbers it multiplies.
    """

    def __init__(self, problem: Problem) -> None:
        self._x, self._w = problem.hidden.detach(), problem.weight.detach()
        self._frozen = not problem.weight.requires_grad
        self._logits = torch.mm(self._x, self._w.T)
        dz = self._logits.float().softmax(1).neg_()
        dz.scatter_add_(1, problem.target[:, None], torch.ones_like(dz[:, :1]))
        self._dz = dz.mul_(problem.grad[:, None]).to(self._x.dtype)
        self._dx, self._dw = torch.empty_like(self._x), torch.empty_like(self._w)

    def forward(self) -> None:
        torch.mm(self._x, self._w.T, out=self._logits)

    forward_grad = forward

    def backward(self) -> None:
        torch.mm(self._dz, self._w, out=self._dx)
        if not self._frozen:
            torch.mm(self._dz.T, self._x, out=self._dw)


def summaries(
    laps: Mapping[str, list[float]], phases: Sequence[str] = PHASES
) -> dict[str, Summary]:
    """Summarise each of `phases`; full is added up repetition by repetition."""
    times = dict(laps)
    if "full" in phases:
        steps = zip(laps["forward_grad"], laps["backward"], strict=True)
        times["full"] = [a + b for a, b in steps]
    return {phase: timing.summarize(times[phase]) for phase in phases}


def time_all(
    problem: Problem,
    found: Mapping[str, LogprobFn],
    limits: Limits,
    *,
    phases: Sequence[str] = PHASES,
) -> dict[str, dict[str, Summary]]:
    """Time all in turns; return summaries by provider and phase, the bare GEMMs' first."""
    candidates = {BARE_GEMMS: laps_of(BareGemms(problem), phases)}
    for name, logprob in found.items():
        candidates[name] = laps_of(train_step(logprob, problem), phases)
    clock = timing.clock_for(problem.hidden.device)
    samples = timing.interleave(candidates, clock, reps=limits.reps, budget_s=limits.seconds)
    return {name: summaries(laps, phases) for name, laps in samples.items()}


def peak_memory(
    shape: Shape,
    *,
    logprob: LogprobFn | str,
    make: Callable[[Shape], Problem],
    phases: Sequence[str],
) -> dict[str, int]:
    """Measure peak bytes of those of forward and full in `phases`, beyond inputs and results.

    Results that did not exist yet at the peak are subtracted all the same (never below 0): they
    have to fit in memory in any case.

    Args:
        shape: the shape of the problem.
        logprob: a provider, or its name, which another process is given: not all functions pickle.
        make: makes the problem of a shape.
        phases: some of `MEMORY_PHASES`.
    """
    problem = make(shape)
    device = problem.hidden.device
    step = train_step(PROVIDERS[logprob](device) if isinstance(logprob, str) else logprob, problem)

    def full() -> object:
        step.forward_grad()
        return step.backward()

    calls = {"forward": step.forward, "full": full}
    results = dict.fromkeys(MEMORY_PHASES, 4 * len(problem.hidden))  # fp32 log-probs
    results["full"] += sum(tensor.nbytes for tensor in problem.differentiable)
    return {
        phase: max(0, memory.peak_extra_bytes(calls[phase], device) - results[phase])
        for phase in phases
    }


def measure_errors(
    problem: Problem, found: Mapping[str, LogprobFn], limits: Limits
) -> tuple[dict[str, dict[str, object]], dict[str, str]]:
    """Measure errors over the first rows.

    Returns:
        Fields of `Row` by provider, and why others have none. On a GPU, where sums may have no
        order, `more` says whether a second run gave the same bits: 1 or 0.
    """
    (N, H), V = problem.hidden.shape, len(problem.weight)
    share = limits.truth_flop / Shape("", n=N, h=H, v=V).step_flop
    error_rows = N if share >= 1 else max(1, int(N * share))
    sample = problem.rows(error_rows)
    truth = solve_fp64(sample)
    about: dict[str, dict[str, object]] = {}
    reasons: dict[str, str] = {}
    for name, logprob in found.items():
        try:
            solution = solve(logprob, sample)
            about[name] = {"error": errors(solution, truth), "error_rows": error_rows}
            if problem.hidden.is_cuda:
                again = solve(logprob, sample)
                about[name]["more"] = {"same bits": float(solution.equals(again))}
        except CANNOT_RUN as failure:
            about.pop(name, None)
            reasons[name] = reason(failure)
    return about, reasons


def bench(
    shape: Shape,
    dtype: str,
    found: Mapping[str, LogprobFn],
    *,
    device: torch.device,
    limits: Limits,
    phases: Sequence[str] = PHASES,
    frozen: bool = False,
) -> tuple[list[Row], dict[str, str]]:
    """Measure all of `found` on one shape in one dtype; if `frozen`, the head needs no gradient.

    Returns:
        A row for the bare GEMMs and each provider that ran, and why the others did not. Without
        `phases` nothing is timed, and the rows hold errors only.
    """
    make = partial(make_problem, dtype=DTYPES[dtype], device=device, frozen=frozen)
    problem = make(shape)
    about, reasons = measure_errors(problem, found, limits)
    if not phases:
        return [Row(shape, dtype, name, **about[name]) for name in about], reasons
    times = time_all(problem, {name: found[name] for name in about}, limits, phases=phases)
    del problem

    measured = [phase for phase in MEMORY_PHASES if phase in phases]
    for name in about:
        logprob = found[name] if device.type == "cuda" else name
        peaks = memory.measured(
            partial(peak_memory, logprob=logprob, make=make, phases=measured),
            shape,
            device,
            tiny=TINY,
            name=name,
            failures=CANNOT_RUN,
        )
        about[name]["memory"] = peaks or dict.fromkeys(measured)
    about[BARE_GEMMS] = {"memory": dict.fromkeys(measured), "error": NO_ERROR}
    return compared(shape, dtype, times, about=about), reasons
