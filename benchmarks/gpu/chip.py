"""What this GPU can do: copy bandwidth, and bf16 GEMM rate, which the suite's goals come from.

    python benchmarks/gpu/chip.py --out DIR

Measured are bytes read and written a second by a large copy on the device, and operations a second
by square bf16 GEMMs of random numbers, ten in a row, for a GPU's clocks fall under load. Times are
of the device (see `timing.CudaClock`). DIR/chip.json is written whole.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

from benchmarks.common import report, timing
from benchmarks.common.ops import copying
from latro_kernels import environment

_GEMMS = 10


def measure(
    device: torch.device, *, copy_bytes: int, gemm_size: int, reps: int
) -> dict[str, object]:
    """Measure copy and GEMM: median and range of seconds, and of work a second."""
    a, b = (torch.randn(gemm_size, gemm_size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(_GEMMS):
            torch.mm(a, b, out=out)

    candidates = {"copy": copying(copy_bytes, device), "gemm": {"gemm": multiply}}
    samples = timing.interleave(candidates, timing.clock_for(device, cold=True), reps=reps)
    found: dict[str, object] = {}
    for name, work in (("copy", 2 * copy_bytes), ("gemm", _GEMMS * 2 * gemm_size**3)):
        (seconds,) = samples[name].values()
        rates = timing.summarize([work / second for second in seconds])
        summary = asdict(timing.summarize(seconds))
        found[name] = {"work": work, "seconds": summary, "per_second": asdict(rates)}
    return found | {"gemm_size": gemm_size, "copy_bytes": copy_bytes}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the device, and write chip.json."""
    parser = report.arguments(__doc__, reps=10, quick="small sizes, which say nothing")
    args = parser.parse_args(argv)
    device = report.device_of(args)
    copy_bytes, gemm_size = (1 << 16, 64) if args.quick else (2 << 30, 8192)
    found = measure(device, copy_bytes=copy_bytes, gemm_size=gemm_size, reps=args.reps)
    report.write_json(args.out / "chip.json", {"environment": environment(device), **found})


if __name__ == "__main__":
    main()
