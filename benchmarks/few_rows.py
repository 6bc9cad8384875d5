"""Few rows and a large weight on a CPU: bytes of weight a second, beside those of a plain read.

    python benchmarks/few_rows.py --out benchmarks/results/few_rows
    python benchmarks/few_rows.py --quick                             # seconds, which say nothing

Compared, in interleaved repetitions:

- read: torch's sum of an fp32 tensor of as many bytes as the weight;
- linear: torch's `linear`;
- few_rows_linear;
- linear_logprob: its forward, without a gradient.

GB/s is the size of the weight over the median time. Written to --out: few_rows.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common import report, timing
from benchmarks.common.problem import DTYPES
from benchmarks.common.report import some_of
from benchmarks.common.timing import Laps, Summary
from latro_kernels import environment, few_rows_linear, linear_logprob

SHAPES = ((32000, 384), (49152, 576), (128256, 1024))
QUICK_SHAPES = ((200, 40),)
ROWS = (1, 4, 8, 16, 32, 64)
WAYS = ("read", "linear", "few_rows_linear", "linear_logprob")


@dataclass(frozen=True)
class Row:
    """What one way took: `bytes` is the size of the weight."""

    V: int
    H: int
    dtype: str
    N: int
    way: str
    bytes: int
    times: Summary

    @property
    def rate(self) -> float:
        """Bytes a second, by the median time."""
        return self.bytes / self.times.median


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = report.arguments(__doc__, reps=15, quick="a tiny weight, which says nothing")
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=["fp32", "bf16"])
    return parser.parse_args(argv)


def ways(x: torch.Tensor, weight: torch.Tensor, read: torch.Tensor) -> dict[str, Laps]:
    """Return the laps of each way."""
    target = torch.zeros(len(x), dtype=torch.int64)
    return {
        "read": {"": read.sum},
        "linear": {"": lambda: linear(x, weight)},
        "few_rows_linear": {"": lambda: few_rows_linear(x, weight)},
        "linear_logprob": {"": lambda: linear_logprob(x, weight, target)},
    }


def measure(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Time all ways for each shape, dtype and number of rows."""
    for V, H in QUICK_SHAPES if args.quick else SHAPES:
        for name in args.dtypes:
            weight = (torch.randn(V, H) / H**0.5).to(DTYPES[name])
            size = weight.numel() * weight.element_size()
            read = torch.randn(size // torch.float32.itemsize)
            for N in ROWS:
                laps = ways(torch.randn(N, H).to(DTYPES[name]), weight, read)
                samples = timing.interleave(laps, timing.clock_for(device), reps=args.reps)
                for way in WAYS:
                    times = timing.summarize(samples[way][""])
                    yield Row(V=V, H=H, dtype=name, N=N, way=way, bytes=size, times=times)


def as_table(rows: Sequence[Row]) -> Table:
    """Make a line of each shape, dtype and number of rows, with the rate of each way."""
    places = dict.fromkeys((row.V, row.H, row.dtype, row.N) for row in rows)
    rates = {(row.V, row.H, row.dtype, row.N, row.way): row.rate for row in rows}
    lines = []
    for V, H, dtype, N in places:
        of = {way: rates[V, H, dtype, N, way] for way in WAYS}
        lines.append(
            [
                f"{V} x {H} {dtype}",
                str(N),
                *(f"{of[way] / 1e9:.1f}" for way in WAYS),
                f"{of['few_rows_linear'] / of['linear']:.2f}",
                f"{of['linear_logprob'] / of['read']:.2f}",
            ]
        )
    multiples = ("× linear", "linear_logprob / read")
    return report.table("GB/s of the weight", ["weight", "N", *WAYS, *multiples], lines)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the JSON file."""
    args = parse_args(argv)
    if args.device != "cpu":
        raise SystemExit(
            f"--device: expected cpu, as few_rows_linear has no kernel for others, "
            f"got {args.device}"
        )
    device = report.device_of(args)
    where = environment(device)
    rows = list(measure(args, device))
    report.console().print(as_table(rows), report.where(where), sep="\n")
    content = [{**asdict(row), "bytes_per_second": row.rate} for row in rows]
    report.write_json(args.out / "few_rows.json", {"environment": where, "rows": content})


if __name__ == "__main__":
    main()
