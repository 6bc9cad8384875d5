"""What the GPU suite measures itself: the chip, forms of the head, and the ops beside a copy.

    python benchmarks/gpu/measure.py chip --out DIR
    python benchmarks/gpu/measure.py forms --out DIR
    python benchmarks/gpu/measure.py ops --out DIR

- chip: bytes read and written a second by a large copy on the device, and operations a second by
  square bf16 GEMMs of random numbers, ten in a row, for a GPU's clocks fall under load;
- forms: forward and backward of `linear_logprob` with a memory budget of 3 GiB, and with a frozen
  head, of both GPU backends, beside the bare GEMMs; and whether two runs give the same bits;
- ops: `gather_logprob` forward and backward, this in place, and `group_advantage` on ragged groups,
  of both GPU backends, with the bytes that they have to move as a share of a copy's rate.

Times are of the device: see `ColdClock`. DIR/chip.json, forms.json or ops.json is written whole.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

from benchmarks.common import report, timing
from benchmarks.common.problem import GPU_SHAPES, Shape, make_problem, ragged_layout
from benchmarks.common.providers import CANNOT_RUN, LogprobFn, discover, reason, solve
from benchmarks.gpu.goals import FROZEN, THREE_GIB
from benchmarks.linear_logprob import (
    BARE_GEMMS,
    DTYPES,
    PEER_PACKAGES,
    TRUTH_FLOP,
    Limits,
    Row,
    bench,
)
from latro_kernels import gather_logprob, group_advantage

BACKENDS = ("triton", "cuda")
COPY_BYTES = 2 << 30
GEMM_SIZE = 8192
_GEMMS = 10
_REPS = 10
_FLUSH_BYTES = 2 << 30


class ColdClock(timing.CudaClock):
    """CUDA events behind a large write.

    While the device writes, the host queues the lap that is timed: what is measured is the device's
    work and not the host's. And the device's caches hold none of the lap's inputs.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def mark(self) -> None:
        if not self._marks:
            self._flush.zero_()
        super().mark()


def clock_for(device: torch.device) -> timing.Clock:
    return ColdClock(device) if device.type == "cuda" else timing.clock_for(device)


def copying(size: int, device: torch.device) -> timing.Candidate:
    """Make a copy of `size` bytes of random numbers: 2·size bytes read and written."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return timing.Candidate("copy", {"copy": partial(target.copy_, source)})


def measure_chip(
    device: torch.device, copy_bytes: int = COPY_BYTES, gemm_size: int = GEMM_SIZE
) -> dict[str, object]:
    """Measure copy bandwidth and GEMM rate: median and range of seconds, and of work a second."""
    a, b = (torch.randn(gemm_size, gemm_size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(_GEMMS):
            torch.mm(a, b, out=out)

    candidates = [copying(copy_bytes, device), timing.Candidate("gemm", {"gemm": multiply})]
    samples = timing.interleave(candidates, clock_for(device), reps=_REPS)
    work = {"copy": 2 * copy_bytes, "gemm": _GEMMS * 2 * gemm_size**3}
    found: dict[str, object] = {}
    for name, done in work.items():
        rates = timing.summarize([done / seconds for seconds in samples[name][name]])
        seconds = timing.summarize(samples[name][name])
        found[name] = {"work": done, "seconds": asdict(seconds), "per_second": asdict(rates)}
    return found | {"gemm_size": gemm_size, "copy_bytes": copy_bytes}


@dataclass(frozen=True)
class Form:
    """A way to call `linear_logprob`: `name` ends its providers' names."""

    name: str
    options: Mapping[str, object]
    frozen: bool = False


FORMS = (Form(THREE_GIB, {"memory_budget": 3 << 30}), Form(FROZEN, {}, frozen=True))


def measure_form(
    form: Form,
    shape: Shape,
    found: Mapping[str, LogprobFn],
    device: torch.device,
    limits: Limits,
) -> tuple[list[Row], dict[str, str]]:
    """Measure full in bf16 by `bench`, with "same bits" in `more` of ours: 1 where they are."""
    runs = {
        f"{name}, {form.name}": partial(logprob, **form.options) for name, logprob in found.items()
    }
    rows, reasons = bench(
        shape,
        "bf16",
        runs,
        device=device,
        limits=limits,
        phases=("full",),
        frozen=form.frozen,
    )
    problem = make_problem(shape, DTYPES["bf16"], device, frozen=form.frozen)
    measured = []
    for row in rows:
        if row.provider == BARE_GEMMS:
            measured.append(replace(row, provider=f"{BARE_GEMMS}, {form.name}"))
            continue
        first, second = (solve(runs[row.provider], problem) for _ in range(2))
        same = all(
            torch.equal(one, other)
            for one, other in zip(first, second, strict=True)
            if one is not None
        )
        measured.append(replace(row, more={"same bits": float(same)}))
    return measured, reasons


def measure_forms(out: Path, device: torch.device) -> None:
    """Measure every form at every GPU shape; forms.json in `out` is written after each."""
    limits = Limits(reps=5, seconds=1.0, truth_flop=TRUTH_FLOP[device.type])
    names = [f"latro-{backend}" for backend in BACKENDS]
    found, absent = discover(names, device, DTYPES["bf16"])
    cannot_run = [f"{name}: {why}" for name, why in absent.items()]
    rows: list[Row] = []
    for shape in GPU_SHAPES:
        for form in FORMS:
            print(f"{shape.name}, {form.name}", file=sys.stderr)
            more, reasons = measure_form(form, shape, found, device, limits)
            rows += more
            cannot_run += [f"{name} ({shape.name}): {why}" for name, why in reasons.items()]
        write(out / "forms.json", device, rows=[asdict(row) for row in rows], cannot_run=cannot_run)


class GatherLaps:
    """`gather_logprob` and its backward, which writes over the logits; laps in their order."""

    def __init__(self, logits: Tensor, target: Tensor, grad: Tensor, backend: str) -> None:
        self._logits, self._target, self._grad = logits, target, grad
        self._leaf = torch.empty_like(logits).requires_grad_()
        self._gather = partial(gather_logprob, target=target, backend=backend)
        self._logp: Tensor | None = None

    @torch.no_grad()
    def restore(self) -> None:
        self._leaf.copy_(self._logits)

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self._gather(self._leaf)

    def forward_grad(self) -> None:
        # A view: a leaf may not be written over.
        self._logp = self._gather(self._leaf.view_as(self._leaf), inplace_backward=True)

    def backward(self) -> Tensor:
        logp, self._logp = self._logp, None
        assert logp is not None, "forward_grad runs first"
        return torch.autograd.grad(logp, self._leaf, self._grad)[0]

    @property
    def laps(self) -> dict[str, Callable[[], object]]:
        return {
            "restore": self.restore,
            "forward": self.forward,
            "forward_grad": self.forward_grad,
            "backward": self.backward,
        }


@dataclass(frozen=True)
class OpSizes:
    """gather_logprob of [N, V], bf16; group_advantage of `rows` rows in S sequences, K a group."""

    N: int = 8192
    V: int = 128256
    rows: int = 1 << 20
    S: int = 1024
    K: int = 16
    copy_bytes: int = COPY_BYTES


def measure_ops(
    device: torch.device, sizes: OpSizes, backends: Sequence[str] = BACKENDS
) -> dict[str, object]:
    """Measure seconds, bytes and share of a copy's rate by op, lap and backend."""
    logits = torch.randn(sizes.N, sizes.V, device=device, dtype=torch.bfloat16)
    target = torch.randint(sizes.V, (sizes.N,), device=device)
    grad = torch.randn(sizes.N, device=device)
    layout = ragged_layout(sizes.rows, sizes.S, sizes.K, device)
    logp, ref_logp = (-torch.rand(sizes.rows, device=device) for _ in range(2))
    rationale_rows = int(layout.offsets.diff()[::2].sum())
    # What has to be read and written, numbers per row and per sequence left aside.
    moved = {
        ("gather_logprob", "forward"): logits.nbytes,
        ("gather_logprob", "backward"): 2 * logits.nbytes,
        ("group_advantage", "forward"): 4 * (2 * sizes.rows + rationale_rows),
    }
    shapes = {
        "gather_logprob": {"N": sizes.N, "V": sizes.V, "dtype": "bf16"},
        "group_advantage": {"N": sizes.rows, "S": sizes.S, "K": sizes.K},
    }

    candidates, cannot_run = [copying(sizes.copy_bytes, device)], []
    of: dict[str, tuple[str, str]] = {}
    for backend in backends:
        advantage = partial(group_advantage, logp, ref_logp, layout, backend=backend)
        laps = {
            "gather_logprob": GatherLaps(logits, target, grad, backend).laps,
            "group_advantage": {"forward": advantage},
        }
        for op, its_laps in laps.items():
            name = f"{op} {backend}"
            try:
                for lap in its_laps.values():
                    lap()
            except CANNOT_RUN as error:
                cannot_run.append(f"{name}: {reason(error)}")
            else:
                candidates.append(timing.Candidate(name, its_laps))
                of[name] = op, backend

    samples = timing.interleave(candidates, clock_for(device), reps=_REPS)
    copy = timing.summarize(samples["copy"]["copy"])
    copy_rate = 2 * sizes.copy_bytes / copy.median
    rows = []
    for name, (op, backend) in of.items():
        for lap, seconds in samples[name].items():
            if (op, lap) in moved:
                summary, size = timing.summarize(seconds), moved[op, lap]
                what = {"op": op, "lap": lap, "backend": backend, "shape": shapes[op]}
                share = size / summary.median / copy_rate
                rows.append(
                    what | {"bytes": size, "seconds": asdict(summary), "share_of_copy": share}
                )
    return {
        "copy": {"bytes": 2 * sizes.copy_bytes, "seconds": asdict(copy)},
        "cannot_run": cannot_run,
        "rows": rows,
    }


def write(path: Path, device: torch.device, **results: object) -> None:
    where = report.environment(device, PEER_PACKAGES)
    report.write_json(path, {"environment": where, **results})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["chip", "forms", "ops"])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU")
    device = torch.device("cuda")
    if args.what == "forms":
        measure_forms(args.out, device)
    elif args.what == "chip":
        write(args.out / "chip.json", device, **measure_chip(device))
    else:
        write(args.out / "ops.json", device, **measure_ops(device, OpSizes()))


if __name__ == "__main__":
    main()
