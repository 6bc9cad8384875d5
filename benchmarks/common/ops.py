"""Time and error of an op beside plain PyTorch, as its own benchmark describes it.

All ways to compute the same take turns, repetition by repetition (see `timing`), and so does a
large copy. GB/s is what an op has to read and write, over its time; beside it stands the rate of
the copy. The error is that of what the first lap gives, against fp64: the largest elementwise error
over the largest true element.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import report, timing
from benchmarks.common.problem import relative_error
from latro_kernels import GroupAdvantage

_COPY_BYTES = 256 << 20


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

Laps = Mapping[str, Callable[[], object]]


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
    waiting: list[Tensor] = []

    def forward() -> Tensor:
        waiting[:] = [function(at)]
        return waiting[0]

    def backward() -> Tensor:
        return torch.autograd.grad(waiting.pop(), at, grad)[0]

    return {"forward": forward, "backward": backward}


def measure(op: Op, device: torch.device, *, reps: int, copy_bytes: int) -> list[dict[str, object]]:
    """Return a row for each way and lap: seconds, bytes per second, and the error."""
    # Before a backward writes over the logits.
    error = {
        way: relative_error(value(laps["forward"]()), op.truth) for way, laps in op.ways.items()
    }
    source = torch.randn(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    candidates = [timing.Candidate(name, laps) for name, laps in op.ways.items()]
    candidates.append(timing.Candidate("copy", {"copy": lambda: target.copy_(source)}))
    samples = timing.interleave(candidates, timing.clock_for(device), reps=reps)
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
    return result.coefficient if isinstance(result, GroupAdvantage) else result


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
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.manual_seed(0)
    sizes = QUICK if args.quick else SIZES[device.type]
    copy_bytes = 1 << 16 if args.quick else _COPY_BYTES
    rows: list[dict[str, object]] = []
    for op in tqdm(make(sizes, device), desc=name):
        rows += measure(op, device, reps=args.reps, copy_bytes=copy_bytes)
    headings = ("op", "dtype", "", "lap", "ms (range)", "GB/s", "copy GB/s", "error")
    report.console(width=120).print(report.table(name, headings, map(cells, rows), names=4))
    result = {"sizes": asdict(sizes), "environment": report.environment(device, ())}
    path: Path = args.out / "ops.json"
    kept = [row for row in held(path, result) if row["op"] != name]
    report.write_json(path, {**result, "rows": [*kept, *rows]})
    print(f"written: {path}")


def held(path: Path, result: Mapping[str, Mapping[str, object]]) -> list[dict[str, object]]:
    """Return the rows of a file that may stand beside those of `result`.

    They may where sizes, machine and versions are the same. Where they are not, this says so.
    """
    if not path.exists():
        return []
    old = json.loads(path.read_text())
    for part in ("sizes", "environment"):
        if old[part] | {"date": None} != result[part] | {"date": None}:
            print(f"{path}: what it held is of another {part.removesuffix('s')}, and is not kept")
            return []
    return old["rows"]
