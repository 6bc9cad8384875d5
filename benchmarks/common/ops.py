"""Time and error of an op beside plain PyTorch, as its own benchmark describes it.

All ways to compute the same take turns, repetition by repetition (see `timing`), and so does a
large copy. GB/s is the size of what an op has to read and write, over its time; beside it stands
the rate of the copy. The error is that of the first lap's result against fp64: the largest
elementwise error over the largest true element. On a GPU each backend is a way of its own, and its
caches hold nothing of a lap's inputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import report, timing
from benchmarks.common.problem import relative_error
from benchmarks.common.providers import CANNOT_RUN, reason
from benchmarks.common.timing import Laps, TrainStep
from latro_kernels import GroupAdvantage, environment

_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
BACKENDS = {"cpu": {"latro": "auto"}, "cuda": {"latro-triton": "triton", "latro-cuda": "cuda"}}
"""Backends that are measured on a device, by the names of their ways."""


@dataclass(frozen=True)
class Sizes:
    """Rows, hidden size and vocabulary; rows and sequences of group_advantage."""

    N: int
    H: int
    V: int
    rows: int
    sequences: int


SIZES = {
    "cpu": Sizes(N=1024, H=1024, V=32000, rows=1 << 20, sequences=1024),
    "cuda": Sizes(N=8192, H=4096, V=128256, rows=1 << 20, sequences=1024),
}
QUICK = Sizes(N=16, H=32, V=500, rows=1000, sequences=8)


@dataclass(frozen=True)
class Op:
    """One op in one dtype: laps of every way to compute it, and the bytes each lap has to move."""

    name: str
    dtype: str
    ways: Mapping[str, Laps]
    moved: Mapping[str, int]
    truth: Tensor


Make = Callable[[Sizes, torch.device], Iterable[Op]]


def differentiated(function: Callable[[Tensor], Tensor], leaf: Tensor, grad: Tensor) -> Laps:
    """Return laps forward and back of `function` at a copy of `leaf`."""
    at = leaf.clone().requires_grad_()
    step = TrainStep(lambda: function(at), [at], grad)
    return {"forward": step.forward_grad, "backward": step.backward}


def copying(size: int, device: torch.device) -> Laps:
    """Return a copy of `size` bytes of random numbers: 2·size bytes are read and written."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return {"copy": lambda: target.copy_(source)}


def measure(op: Op, device: torch.device, *, reps: int, copy_bytes: int) -> list[dict[str, object]]:
    """Return a row for each way and lap: seconds, bytes per second, and the error."""
    candidates = {"copy": copying(copy_bytes, device)}
    error = {}
    for way, laps in op.ways.items():
        try:
            # The first lap is the forward, whose result a backward in place has not written over.
            error[way] = relative_error(value(laps["forward"]()), op.truth)
            for lap in [*laps.values()][1:]:
                lap()
        except CANNOT_RUN as failure:
            print(f"{op.name} {op.dtype}: cannot run: {way}: {reason(failure)}", file=sys.stderr)
        else:
            candidates[way] = laps
    clock = timing.clock_for(device, cold=True)
    samples = timing.interleave(candidates, clock, reps=reps)
    copy = timing.summarize(samples.pop("copy")["copy"])
    rows: list[dict[str, object]] = []
    for way, laps in samples.items():
        for lap, seconds in laps.items():
            summary, moved = timing.summarize(seconds), op.moved.get(lap)
            rows.append(
                {
                    "op": op.name,
                    "dtype": op.dtype,
                    "way": way,
                    "lap": lap,
                    **asdict(summary),
                    "bytes_per_second": None if moved is None else moved / summary.median,
                    "copy_bytes_per_second": 2 * copy_bytes / copy.median,
                    "error": error[way],
                }
            )
    return rows


def value(result: object) -> Tensor:
    """Return the tensor that a lap gives."""
    if isinstance(result, GroupAdvantage):
        return result.coefficient
    return result[0] if isinstance(result, tuple) else result


def cells(row: Mapping[str, object]) -> list[str]:
    """Format a row of `measure` for the table."""
    rate = row["bytes_per_second"]
    summary = timing.Summary(**{name: row[name] for name in ("median", "low", "high", "reps")})
    return [
        *(str(row[name]) for name in ("op", "dtype", "way", "lap")),
        report.span(summary, 1e3),
        "–" if rate is None else f"{rate / 1e9:.1f}",
        f"{row['copy_bytes_per_second'] / 1e9:.1f}",
        f"{row['error']:.0e}",
    ]


def run(
    name: str, make: Make, description: str | None, *, argv: Sequence[str] | None = None
) -> None:
    """Measure one op, print its table, and put its rows into ops.json."""
    parser = report.arguments(description, reps=7, quick="small shapes, which say nothing")
    args = parser.parse_args(argv)
    device = report.device_of(args)
    torch.manual_seed(0)
    sizes = QUICK if args.quick else SIZES[device.type]
    copy_bytes = 1 << 16 if args.quick else _COPY_BYTES[device.type]
    rows: list[dict[str, object]] = []
    for op in make(sizes, device):
        rows += measure(op, device, reps=args.reps, copy_bytes=copy_bytes)
        del op  # a GPU has no room for this one's tensors beside the next one's
    result = {"sizes": asdict(sizes), "environment": environment(device)}
    path: Path = args.out / "ops.json"
    made = {row["op"] for row in rows}
    kept = [row for row in held(path, result) if row["op"] not in made]
    report.write_json(path, {**result, "rows": [*kept, *rows]})
    headings = ("op", "dtype", "", "lap", "ms (range)", "GB/s", "copy GB/s", "error")
    report.console(width=120).print(report.table(name, headings, map(cells, rows), names=4))
    print(f"written: {path}")


def held(path: Path, result: Mapping[str, Mapping[str, object]]) -> list[dict[str, object]]:
    """Return the rows of a file that may stand beside those of `result`.

    They may where sizes, machine and versions are the same. Where they are not, this says so.
    """
    if not path.exists():
        return []
    old = json.loads(path.read_text(encoding="utf-8"))
    for part in result:
        if old[part] | {"date": None} != result[part] | {"date": None}:
            print(f"{path}: what it held is of another {part.removesuffix('s')}, and is not kept")
            return []
    return old["rows"]
