"""The study of the LM head: how near to the bare GEMMs, in which memory, with which error.

    python benchmarks/logprob_bench.py --study head                       # all sections
    python benchmarks/logprob_bench.py --study head --quick               # small shapes, 2 minutes
    python benchmarks/logprob_bench.py --study head --sections full,peers --dtype bf16

Sections, each timed beside the bare GEMMs that it is a multiple of:

- forward: no gradient wanted, over one GEMM;
- full: forward and backward with all logits kept, those that fit into 64 MiB, or none; over three;
- frozen: the same where only the hidden states need a gradient, over two;
- peers: everyone, forward and full, by default on the smallest shape;
- error: of the log-probs and gradients, beside those of the unfused loss; not timed;
- filter: full with `grad_filter` on the head and the states of a small model (see `small_lm`),
  with the share of blocks skipped, the errors of the gradients and what bounds them;
- scaling: full as N and V grow, on two logarithmic axes, with the fitted slopes.

study_head.json, .csv and .png and study_head_scaling.png in --out are written after each shape and
dtype, whole or not at all. What they held is kept but for what is measured anew, so that a long
study can be made in parts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import filter_study, report
from benchmarks.head_study_report import Group, Results
from benchmarks.logprob_report import BARE_GEMMS, Row
from benchmarks.measure import DTYPES, PEER_PACKAGES, Limits, bench, multiples, time_all
from benchmarks.problem import (
    CPU_SHAPES,
    GPU_SHAPES,
    STUDY_SHAPES,
    Problem,
    Shape,
    make_problem,
)
from benchmarks.providers import BUDGETS, CANNOT_RUN, PROVIDERS, discover, reason

OURS = {"cpu": "latro-cpu", "cuda": "latro-triton"}
PEERS = ("unfused", "torch-chunked", "trl", "liger", "liger-flce", "cce", "cce-compile")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"
_FILTER_ROWS = 2048


@dataclass(frozen=True)
class Plan:
    """What to measure and how long; `shapes` are for all sections but filter and scaling, None for
    each section's own.

    The small model is trained on the text in the folder `data`. A `quick` plan says nothing about
    speed: what remains of sizes is small, and what compiles is left out.
    """

    sections: tuple[str, ...]
    shapes: Sequence[Shape] | None
    dtypes: tuple[str, ...]
    limits: Limits
    device: torch.device
    data: Path
    out: Path
    quick: bool

    @property
    def ours(self) -> str:
        """The provider that is ours on the device."""
        return OURS[self.device.type]


@dataclass(frozen=True)
class Comparison:
    """A section that is one table for each shape and dtype.

    Of `ours` each stands for a provider, behind the name of the device's. `phases` are timed and
    their memory measured; where there are none, the table is of errors only.
    """

    ours: tuple[str, ...]
    phases: tuple[str, ...]
    others: tuple[str, ...] = ()
    frozen: bool = False


_BUDGETS = tuple(f"-{budget}" for budget in BUDGETS)
COMPARISONS = {
    "forward": Comparison(("",), ("forward",)),
    "full": Comparison(_BUDGETS, ("full",)),
    "frozen": Comparison(("",), ("full",), frozen=True),
    "peers": Comparison(_BUDGETS, ("forward", "full"), PEERS),
    "error": Comparison(("",), (), ("unfused",)),
}
SECTIONS = (*COMPARISONS, "filter", "scaling")


def run(plan: Plan) -> Results:
    """Measure what `plan` says; the files in `plan.out` are written on the way."""
    results = Results(plan.out)
    for section in plan.sections:
        for group in _measure(section, plan):
            results.put(group)
    return results


def _measure(section: str, plan: Plan) -> Iterator[Group]:
    if section == "filter":
        return _filter(plan)
    if section == "scaling":
        return _scaling(plan)
    return _comparison(section, plan)


def _comparison(section: str, plan: Plan) -> Iterator[Group]:
    comparison = COMPARISONS[section]
    names = [plan.ours + suffix for suffix in comparison.ours]
    names += [name for name in comparison.others if not (plan.quick and PROVIDERS[name].slow_start)]
    for dtype in plan.dtypes:
        found, absent = discover(names, plan.device, DTYPES[dtype])
        for shape in plan.shapes or default_shapes(section, plan.device):
            print(f"{section}, {shape.name} {dtype}: {', '.join(found)}", file=sys.stderr)
            rows, failed = bench(
                *(shape, dtype, found, plan.device, plan.limits),
                phases=comparison.phases,
                frozen=comparison.frozen,
            )
            notes = [f"cannot run: {name}: {why}" for name, why in (absent | failed).items()]
            yield Group(section, shape.name, dtype, rows, notes, _environment(plan))


def default_shapes(section: str, device: torch.device) -> Sequence[Shape]:
    """The shapes of a section that compares providers."""
    if device.type == "cuda":
        return GPU_SHAPES
    # All peers on all shapes would take an hour on two cores.
    return CPU_SHAPES if section == "peers" else STUDY_SHAPES


def _filter(plan: Plan) -> Iterator[Group]:
    # Where it is used: transformers takes seconds to import.
    from benchmarks import small_lm

    settings = small_lm.Settings(vocab=1024, steps=60) if plan.quick else small_lm.Settings()
    try:
        head = small_lm.trained(plan.data, settings, _FILTER_ROWS, plan.out, plan.device)
    except FileNotFoundError as error:
        print(f"filter: skipped, no text to train a small model on: {error}", file=sys.stderr)
        return
    note = (
        f"held-out perplexity {head.perplexity:.1f} after {settings.steps} steps of training, "
        f"{settings.vocab} if every token were as probable"
    )
    name = f"small-lm-{settings.steps}"
    grad = torch.randn(_FILTER_ROWS, generator=torch.Generator().manual_seed(0)).to(plan.device)
    for dtype in plan.dtypes:
        print(f"filter, {dtype}: {note}", file=sys.stderr)
        hidden, weight = (t.to(DTYPES[dtype]).requires_grad_() for t in (head.hidden, head.weight))
        problem = Problem(hidden, weight, head.target, grad)
        try:
            rows = filter_study.measure(problem, name, dtype, f"{plan.ours}-keep", plan.limits)
        except CANNOT_RUN as error:
            print(f"filter, {dtype}: skipped: {reason(error)}", file=sys.stderr)
        else:
            yield Group("filter", name, dtype, rows, [note], _environment(plan))


def _scaling(plan: Plan) -> Iterator[Group]:
    h, (n, most_n), (v, most_v) = 256, (256, 16384), (8192, 262144)
    if plan.quick:
        h, (n, most_n), (v, most_v) = 64, (64, 256), (1024, 4096)
    axes = {
        f"N to {most_n}": [Shape(f"N={size}", size, h, v) for size in _doublings(n, most_n)],
        f"V to {most_v}": [Shape(f"V={size}", 2 * n, h, size) for size in _doublings(v, most_v)],
    }
    # Thirteen shapes share what other sections spend on a few.
    limits = replace(plan.limits, seconds=plan.limits.seconds / 4)
    for dtype in plan.dtypes:
        names = [f"{plan.ours}-keep", f"{plan.ours}-recompute"]
        found, absent = discover(names, plan.device, DTYPES[dtype])
        notes = [f"cannot run: {name}: {why}" for name, why in absent.items()]
        for axis, shapes in axes.items():
            rows: list[Row] = []
            for shape in tqdm(shapes, desc=f"scaling, {axis}, {dtype}"):
                problem = make_problem(shape, DTYPES[dtype], plan.device)
                times = time_all(problem, found, limits, ("full",))
                bare = times[BARE_GEMMS]
                rows += [
                    Row(shape, dtype, name, time, multiples(time, bare), {}, {}, None)
                    for name, time in times.items()
                ]
            yield Group("scaling", axis, dtype, rows, notes, _environment(plan))


def _doublings(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


def _environment(plan: Plan) -> dict[str, object]:
    return report.environment(plan.device, PEER_PACKAGES)
