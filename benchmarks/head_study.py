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

What `grad_filter` skips, told without the op: rows and vocabulary are cut into blocks. With
upstream gradient g_t, a block's entries of the logits' gradient are −g_t·p_tj, but for targets, and
none is above |g_t|·exp(max_t − lse_t), where max_t is the row's largest logit in the block. A block
is skipped where that is below eps in every row of it, and no row's target lies in it; rows go into
blocks in the order of how many columns they need. So each entry that is lost is below eps, and the
gradients lose, elementwise, at most

    |ΔdX_th| ≤ eps·Σ_j |W_jh|        |ΔdW_jh| ≤ eps·Σ_t |x_th|

study_head.json, .csv and .png and study_head_scaling.png in --out are written after each shape and
dtype, whole or not at all. What they held is kept but for what is measured anew, so that a long
study can be made in parts.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.common.problem import (
    CPU_SHAPES,
    DTYPES,
    GPU_SHAPES,
    STUDY_SHAPES,
    Problem,
    Shape,
    errors,
    make_problem,
    solve_fp64,
)
from benchmarks.common.providers import (
    CANNOT_RUN,
    SLOW_START,
    LogprobFn,
    discover,
    reason,
    solve,
)
from benchmarks.head_study_report import Group, Results
from benchmarks.linear_logprob import (
    BARE_GEMMS,
    NO_ERROR,
    PEER_PACKAGES,
    Limits,
    Row,
    bench,
    compared,
    time_all,
)
from latro_kernels import environment
from latro_kernels.linear_logprob.cpu import FILTER_COLUMNS, FILTER_ROWS

OURS = {"cpu": ("latro-cpu",), "cuda": ("latro-triton", "latro-cuda")}
BUDGETS = {
    "cpu": ("-keep", "-64mib", "-recompute"),
    "cuda": ("-keep", "-3gib", "-64mib", "-recompute"),
}
PEERS = ("unfused", "torch-chunked", "trl", "liger", "liger-flce", "cce", "cce-compile")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"
_STATES = 2048
EXPONENTS = (-16, -14, -12, -10, -8)
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Plan:
    """What to measure and how long.

    The `shapes` are for all sections but filter and scaling; None stands for each section's own.
    The small model is trained on the text in the folder `data`. A `quick` plan says nothing about
    speed: what remains of sizes is small, and what compiles is left out.
    """

    sections: Sequence[str]
    shapes: Sequence[Shape] | None
    dtypes: Sequence[str]
    limits: Limits
    device: torch.device
    data: Path
    out: Path
    quick: bool

    def ours(self, *suffixes: str) -> list[str]:
        """Return the names of our providers on the device, each with each of `suffixes`."""
        return [name + suffix for name in OURS[self.device.type] for suffix in suffixes]

    def group(
        self, section: str, name: str, *, dtype: str, rows: list[Row], notes: list[str]
    ) -> Group:
        """Make a group of what was measured here and now."""
        where = environment(self.device, PEER_PACKAGES)
        return Group(section, name, dtype=dtype, rows=rows, notes=notes, environment=where)


@dataclass(frozen=True)
class Comparison:
    """A section that is one table for each shape and dtype.

    Ours take part with each of the `BUDGETS` of the device, or with the default one. `phases` are
    timed and their memory measured; where there are none, the table is of errors only.
    """

    phases: tuple[str, ...]
    budgets: bool = False
    others: tuple[str, ...] = ()
    frozen: bool = False


COMPARISONS = {
    "forward": Comparison(("forward",)),
    "full": Comparison(("full",), budgets=True),
    "frozen": Comparison(("full",), frozen=True),
    "peers": Comparison(("forward", "full"), budgets=True, others=PEERS),
    "error": Comparison((), others=("unfused",)),
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
    of_their_own = {"filter": _filter, "scaling": _scaling}
    return of_their_own[section](plan) if section in of_their_own else _comparison(section, plan)


def _comparison(section: str, plan: Plan) -> Iterator[Group]:
    comparison = COMPARISONS[section]
    names = plan.ours(*(BUDGETS[plan.device.type] if comparison.budgets else [""]))
    names += [name for name in comparison.others if not (plan.quick and name in SLOW_START)]
    for dtype in plan.dtypes:
        found, absent = discover(names, plan.device, DTYPES[dtype])
        for shape in plan.shapes or default_shapes(section, plan.device):
            print(f"{section}, {shape.name} {dtype}: {', '.join(found)}", file=sys.stderr)
            rows, failed = bench(
                shape,
                dtype,
                found,
                device=plan.device,
                limits=plan.limits,
                phases=comparison.phases,
                frozen=comparison.frozen,
            )
            notes = [f"cannot run: {name}: {why}" for name, why in (absent | failed).items()]
            yield plan.group(section, shape.name, dtype=dtype, rows=rows, notes=notes)


def default_shapes(section: str, device: torch.device) -> Sequence[Shape]:
    """Return the shapes of a section that compares providers."""
    if device.type == "cuda":
        return GPU_SHAPES
    # All peers on all shapes would take an hour on two cores.
    return CPU_SHAPES if section == "peers" else STUDY_SHAPES


def _filter(plan: Plan) -> Iterator[Group]:
    # Where it is used: transformers takes seconds to import.
    from benchmarks.common import small_lm

    settings = small_lm.Settings(vocab=1024, steps=60) if plan.quick else small_lm.Settings()
    try:
        head = small_lm.trained(plan.data, settings, _STATES, cache=plan.out, device=plan.device)
    except FileNotFoundError as error:
        print(f"filter: skipped, no text to train a small model on: {error}", file=sys.stderr)
        return
    note = (
        f"held-out perplexity {head.perplexity:.1f} after {settings.steps} steps of training, "
        f"{settings.vocab} if every token were as probable"
    )
    name = f"small-lm-{settings.steps}"
    grad = torch.randn(_STATES, generator=torch.Generator().manual_seed(0)).to(plan.device)
    for dtype in plan.dtypes:
        print(f"filter, {dtype}: {note}", file=sys.stderr)
        hidden, weight = (t.to(DTYPES[dtype]).requires_grad_() for t in (head.hidden, head.weight))
        problem = Problem(hidden, weight, target=head.target, grad=grad)
        found, absent = discover(plan.ours("-keep"), plan.device, DTYPES[dtype])
        rows, failed = measure_filter(problem, name, dtype, found=found, limits=plan.limits)
        notes = [note, *(f"cannot run: {who}: {why}" for who, why in (absent | failed).items())]
        yield plan.group("filter", name, dtype=dtype, rows=rows, notes=notes)


def _scaling(plan: Plan) -> Iterator[Group]:
    h, (n, most_n), (v, most_v) = 256, (256, 16384), (8192, 262144)
    if plan.quick:
        h, (n, most_n), (v, most_v) = 64, (64, 256), (1024, 4096)
    over_n = [Shape(f"N={size}", n=size, h=h, v=v) for size in _doublings(n, most_n)]
    over_v = [Shape(f"V={size}", n=2 * n, h=h, v=size) for size in _doublings(v, most_v)]
    axes = {f"N to {most_n}": over_n, f"V to {most_v}": over_v}
    # Thirteen shapes share what other sections spend on a few.
    limits = replace(plan.limits, seconds=plan.limits.seconds / 4)
    for dtype in plan.dtypes:
        names = plan.ours("-keep", "-recompute")
        found, absent = discover(names, plan.device, DTYPES[dtype])
        notes = [f"cannot run: {name}: {why}" for name, why in absent.items()]
        for axis, shapes in axes.items():
            rows: list[Row] = []
            for shape in tqdm(shapes, desc=f"scaling, {axis}, {dtype}"):
                problem = make_problem(shape, DTYPES[dtype], plan.device)
                times = time_all(problem, found, limits, phases=("full",))
                rows += compared(shape, dtype, times, about={})
            yield plan.group("scaling", axis, dtype=dtype, rows=rows, notes=notes)


def _doublings(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


@torch.no_grad()
def evidence(problem: Problem, columns: int) -> tuple[Tensor, Tensor]:
    """Compute |g_t|·exp(max_t − lse_t) for every row t and block of columns, in fp32.

    Returns:
        That bound [N, ⌈V / columns⌉], and whether the row's target lies in the block, bool.
    """
    weight = problem.weight.float()
    V = len(weight)
    chunk = max(1, _CHUNK_BYTES // (4 * V))
    blocks = []
    for hidden, grad in zip(problem.hidden.split(chunk), problem.grad.split(chunk), strict=True):
        logits = hidden.float() @ weight.T
        lse = logits.logsumexp(1, keepdim=True)
        padded = F.pad(logits, (0, -V % columns), value=-math.inf)
        peak = padded.unflatten(1, (-1, columns)).amax(2)
        blocks.append(grad.abs()[:, None] * (peak - lse).exp())
    bound = torch.cat(blocks)
    hit = torch.zeros_like(bound, dtype=torch.bool)
    return bound, hit.scatter_(1, problem.target[:, None] // columns, True)


def skipped(bound: Tensor, hit: Tensor, *, rows: int, eps: float) -> float:
    """Return the share of blocks of `rows` rows that are skipped.

    The rows with fewest blocks above eps stand first.
    """
    above = bound >= eps
    needed = (above | hit)[above.sum(1).argsort(stable=True)]
    needed = F.pad(needed, (0, 0, 0, -len(needed) % rows))
    return 1 - needed.unflatten(0, (-1, rows)).any(1).float().mean().item()


def block_shape(weight: Tensor) -> tuple[int, int]:
    """Return how many rows and columns are left out together on the weight's device."""
    if weight.device.type == "cpu":
        return FILTER_ROWS, FILTER_COLUMNS
    from latro_kernels.linear_logprob.triton import blocks

    V, H = weight.shape
    config = blocks.config(weight.device, weight.dtype, H=H, V=V)
    return config.rows, config.columns


def bounds(problem: Problem, eps: float) -> tuple[float, float]:
    """Return the most that any entry of dX, and of dW, can lose."""
    by_column = (
        tensor.detach().double().abs().sum(0) for tensor in (problem.weight, problem.hidden)
    )
    dx, dw = (eps * total.max().item() for total in by_column)
    return dx, dw


def measure_filter(
    problem: Problem,
    shape_name: str,
    dtype: str,
    *,
    found: Mapping[str, LogprobFn],
    limits: Limits,
) -> tuple[list[Row], dict[str, str]]:
    """Measure full of each provider without filter, and with every eps of `EXPONENTS`.

    Returns:
        Rows with times, errors over all rows and, as `more`, the percentage of blocks skipped, the
        gradients' absolute errors and their bounds; and why others cannot run.
    """
    (N, H), V = problem.hidden.shape, len(problem.weight)
    truth = solve_fp64(problem)
    rows, columns = block_shape(problem.weight)
    bound, hit = evidence(problem, columns)
    filtered: dict[str, LogprobFn] = {}
    reasons: dict[str, str] = {}
    about: dict[str, dict[str, object]] = {BARE_GEMMS: {"error": NO_ERROR}}
    epsilons = {"": 0.0} | {f", eps 2^{e}": 2.0**e for e in EXPONENTS}
    for (provider, logprob), (end, eps) in itertools.product(found.items(), epsilons.items()):
        name, with_filter = provider + end, partial(logprob, grad_filter=eps)
        try:
            error = errors(solve(with_filter, problem), truth) | {"dx_peaked": None}
        except CANNOT_RUN as failure:
            reasons[name] = reason(failure)
            continue
        filtered[name] = with_filter
        bound_dx, bound_dw = bounds(problem, eps)
        more = {
            "skipped %": 100 * skipped(bound, hit, rows=rows, eps=eps),
            "dX error": error["dx"] * truth.dx.abs().max().item(),
            "dX bound": bound_dx,
            "dW error": error["dw"] * truth.dw.abs().max().item(),
            "dW bound": bound_dw,
        }
        about[name] = {"error": error, "error_rows": N, "more": more}
    times = time_all(problem, filtered, limits, phases=("full",))
    return compared(Shape(shape_name, n=N, h=H, v=V), dtype, times, about=about), reasons
