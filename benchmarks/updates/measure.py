"""Times, counts and peak memory of the step benchmark's contenders."""

from __future__ import annotations

import gc
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import memory, timing
from benchmarks.common.timing import Summary
from benchmarks.updates.contenders import (
    Contender,
    Ours,
    OursCompiled,
    OursCompiledBf16,
    Pass,
    Trl,
)
from benchmarks.updates.problem import Setting, StepProblem
from benchmarks.updates.published import Published, PublishedRecipe

PHASES = ("update", "step")
MAKERS: dict[str, type[Contender]] = {
    one.name: one for one in (Ours, OursCompiled, OursCompiledBf16, Published, PublishedRecipe, Trl)
}


def absent(name: str) -> str | None:
    """Return why a contender cannot run here; None where it can."""
    if name == Trl.name and importlib.util.find_spec("trl") is None:
        return "trl is not installed"
    return None


@dataclass
class Row:
    """A contender on one setting.

    Attributes:
        contender: its name.
        setting: the sizes of the update.
        passes: the forwards of one update of the given rollouts.
        times: seconds by phase.
        ratio: by phase, the median over that of ours.
        peak: bytes of an update, None where they were not measured.
        prompt_tokens: what a step reads before it decodes: prompts, each once or once for each
            of its samples; None where no step was timed, or none can be counted.
        gradient_error: the largest difference of a gradient's entry from ours over ours' largest,
            over the parameters; None where the contender's gradient is another one.
    """

    contender: str
    setting: Setting
    passes: Sequence[Pass]
    times: dict[str, Summary] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    peak: int | None = None
    prompt_tokens: int | None = None
    gradient_error: float | None = None

    @property
    def tokens(self) -> int:
        return sum(p.tokens for p in self.passes)

    @property
    def head_rows(self) -> int:
        return sum(p.rows for p in self.passes)

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "tokens": self.tokens, "head_rows": self.head_rows}


@contextmanager
def contenders(
    names: Sequence[str], problem: StepProblem, **options: bool
) -> Iterator[dict[str, Contender]]:
    """Make those named on `problem`; their folders are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        made = {
            name: MAKERS[name](problem, Path(folder) / str(index), **options)
            for index, name in enumerate(names)
        }
        try:
            yield made
        finally:
            # Trainers are cycles of references: their models would stay beside what comes next.
            made.clear()
            gc.collect()


def first_update(made: Mapping[str, Contender], problem: StepProblem) -> list[Row]:
    """Do one update each: its time, what went through trunk and head, whose gradient is ours."""
    groups = problem.groups()
    clock = timing.clock_for(problem.device)
    rows: list[Row] = []
    for name, contender in made.items():
        with contender.counted() as passes:
            seconds = clock(partial(contender.update, groups))
        times = {"update": timing.summarize([seconds])}
        rows.append(Row(name, problem.setting, passes, times=times))
    for row in rows:
        if isinstance(made[row.contender], Published):
            row.gradient_error = _gradient_error(made[row.contender], made[Ours.name])
    for contender in made.values():
        contender.model.zero_grad()
    _compare(rows, "update")
    return rows


def _gradient_error(contender: Contender, ours: Contender) -> float:
    pairs = zip(contender.model.parameters(), ours.model.parameters(), strict=True)
    return max(((p.grad - q.grad).abs().max() / q.grad.abs().max()).item() for p, q in pairs)


def _compare(rows: Sequence[Row], phase: str) -> None:
    (ours,) = (row for row in rows if row.contender == Ours.name)
    for row in rows:
        row.ratio[phase] = row.times[phase].median / ours.times[phase].median


def time_phase(
    rows: Sequence[Row],
    made: Mapping[str, Contender],
    phase: str,
    *,
    problem: StepProblem,
    reps: int,
) -> None:
    """Time one phase of the contenders of `rows`, in turns, into their rows."""
    groups = problem.groups()
    if phase == "step":
        # The published algorithm is given ours' lengths, which are random.
        ours = made[Ours.name]
        ours.step()
        for contender in made.values():
            if isinstance(contender, Published):
                contender.lengths = ours.lengths
            elif isinstance(contender, OursCompiled):
                contender.step()  # in which it is compiled

    def lap(row: Row) -> None:
        contender = made[row.contender]
        contender.model.zero_grad()
        if phase == "update":
            contender.update(groups)
            return
        if not contender.counts_steps:
            contender.step()
            return
        with contender.counted() as passes:
            contender.step()
        row.prompt_tokens = contender.prompt_tokens(passes)

    samples = timing.interleave(
        {row.contender: {phase: partial(lap, row)} for row in rows},
        timing.clock_for(problem.device),
        reps=reps,
        warmup=0,
    )
    for row in rows:
        row.times[phase] = timing.summarize(samples[row.contender][phase])
    _compare(rows, phase)


def measure_memory(rows: Sequence[Row], device: torch.device) -> None:
    """Measure an update's peak memory into each row; a failure is printed, and None."""
    for row in rows:
        row.peak = memory.measured(
            partial(_peak, row.contender, device=device),
            row.setting,
            device,
            tiny=replace(row.setting, G=1, K=2, P=4, rationale=(2, 4)),
            name=row.contender,
            failures=(torch.OutOfMemoryError,),
        )


def _peak(name: str, setting: Setting, *, device: torch.device) -> int:
    """Return peak bytes beyond the weights of policy and reference; gradients are counted."""
    problem = StepProblem(setting, device)
    groups = problem.groups()
    with contenders([name], problem) as made:
        return memory.peak_extra_bytes(lambda: made[name].update(groups), device)


@dataclass(frozen=True)
class Held:
    """An update of one batch that fitted on the device; `peak` is in bytes beyond the weights."""

    contender: str
    G: int
    sequences: int
    seconds: float
    peak: int


def largest(name: str, setting: Setting, device: torch.device, *, limit: int) -> list[Held]:
    """Update with 1, 2, 4, … prompts, all sequences in one batch, until one does not fit.

    Args:
        name: a contender.
        setting: its G is not used.
        device: whose memory is the limit.
        limit: most prompts that are tried.
    """
    held: list[Held] = []
    G = 1
    while limit >= G:
        try:
            held.append(_hold(name, replace(setting, G=G), device))
        except torch.OutOfMemoryError:
            break
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        G *= 2
    return held


def _hold(name: str, setting: Setting, device: torch.device) -> Held:
    problem = StepProblem(setting, device)
    groups = problem.groups()
    with contenders([name], problem, one_batch=True) as made:
        contender = made[name]
        peak = memory.peak_extra_bytes(lambda: contender.update(groups), device)
        seconds = timing.clock_for(device)(partial(contender.update, groups))
    return Held(
        contender=name, G=setting.G, sequences=setting.G * setting.K, seconds=seconds, peak=peak
    )
