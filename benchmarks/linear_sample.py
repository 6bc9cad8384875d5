"""Tokens sampled at the LM head: `linear_sample` beside what makes the logits first.

    python benchmarks/linear_sample.py                  # all shapes, both dtypes
    python benchmarks/linear_sample.py --quick          # a second
    python benchmarks/linear_sample.py --shapes h1024-v128256 --rows 1,8 --dtype fp32

Providers take turns, repetition by repetition (see `common.timing`):

- read: the weight's bytes, taken for fp32, are summed up once: the least that a provider can take;
- latro: `linear_sample`, which also gives log-probs and entropies (on a GPU, each backend);
- multinomial: logits and their softmax in the model's dtype, then `torch.multinomial`;
- generate: what transformers' `generate` does: logits copied to fp32, then the same;
- cumulative: logits, softmax, a cumulative sum in fp64 and a search for one number per row: as
  `generate` does in the trainer here, so that a prompt has random numbers of its own.

Memory is the peak beyond inputs (`common.memory`), for the largest number of rows. The table is
printed; linear_sample.json in --out has all numbers, and keeps those of other shapes that were
measured on the same machine.
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
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common import memory, report, timing
from benchmarks.common.ops import BACKENDS, held
from benchmarks.common.problem import DTYPES
from benchmarks.common.providers import CANNOT_RUN
from benchmarks.common.report import some_of
from latro_kernels import environment, linear_sample

ROWS = (1, 8, 32, 64)
_LOGIT_STD = 3.0


@dataclass(frozen=True)
class Case:
    """N rows of hidden size H under a vocabulary of V, in a dtype."""

    N: int
    H: int
    V: int
    dtype: str


SIZES = {
    f"h{H}-v{V}": (H, V)
    for H, V in ((384, 32000), (576, 49152), (1024, 32000), (1024, 49152), (1024, 128256))
}
QUICK = {"quick": (128, 1000)}
TINY = Case(N=2, H=128, V=500, dtype="fp32")


class Inputs:
    """Random hidden states and a weight whose logits have a standard deviation of 3."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        hidden = torch.randn(case.N, case.H, device=device) * (_LOGIT_STD / case.H**0.5)
        self.hidden = hidden.to(DTYPES[case.dtype])
        self.weight = torch.randn(case.V, case.H, device=device).to(DTYPES[case.dtype])
        self.seed = torch.arange(case.N, device=device)
        self.generators = [torch.Generator(device).manual_seed(n) for n in range(case.N)]


def read(given: Inputs) -> Tensor:
    return given.weight.view(torch.float32).sum()


def latro(given: Inputs, backend: str) -> Tensor:
    return linear_sample(given.hidden, given.weight, given.seed, given.seed, backend=backend).token


def multinomial(given: Inputs) -> Tensor:
    policy = torch.softmax(linear(given.hidden, given.weight), -1)
    return torch.multinomial(policy, 1).squeeze(1)


def generate(given: Inputs) -> Tensor:
    scores = linear(given.hidden, given.weight).to(torch.float32, copy=True)
    return torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)


def cumulative(given: Inputs) -> Tensor:
    scores = linear(given.hidden, given.weight).to(torch.float32, copy=True)
    summed = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    u = [torch.rand(1, dtype=torch.float64, device=g.device, generator=g) for g in given.generators]
    chosen = torch.searchsorted(summed, torch.cat(u)[:, None] * summed[:, -1:], right=True)
    return chosen.squeeze(1).clamp(max=len(given.weight) - 1)


Sampler = Callable[[Inputs], Tensor]
PLAIN: Mapping[str, Sampler] = {
    "multinomial": multinomial,
    "generate": generate,
    "cumulative": cumulative,
}


def providers(device: torch.device) -> dict[str, Sampler]:
    """Return who samples on a device, ours first."""
    ours = {
        name: partial(latro, backend=backend) for name, backend in BACKENDS[device.type].items()
    }
    return ours | PLAIN


def extra_bytes(case: Case, sampler: Sampler, device: torch.device) -> int:
    """Measure the peak of one call beyond its inputs."""
    given = Inputs(case, device)
    return memory.peak_extra_bytes(lambda: sampler(given), device)


def bench(
    case: Case, device: torch.device, *, reps: int, with_memory: bool
) -> list[dict[str, object]]:
    """Return a row for the read and for each provider: seconds, multiples of the read, memory."""
    given, found = Inputs(case, device), providers(device)
    candidates = {"read": {"call": partial(read, given)}}
    candidates |= {name: {"call": partial(sampler, given)} for name, sampler in found.items()}
    samples = timing.interleave(candidates, timing.clock_for(device, cold=True), reps=reps)
    times = {name: timing.summarize(laps["call"]) for name, laps in samples.items()}
    peaks: dict[str, int | None] = {}
    del given, candidates  # there may be no room for another process beside them
    for name, sampler in found.items() if with_memory else ():
        peaks[name] = memory.measured(
            partial(extra_bytes, sampler=sampler, device=device),
            case,
            device,
            tiny=replace(TINY, dtype=case.dtype),
            name=name,
            failures=CANNOT_RUN,
        )
    return [
        {
            **asdict(case),
            "provider": name,
            **asdict(time),
            "multiple": time.median / times["read"].median,
            "extra_bytes": peaks.get(name),
        }
        for name, time in times.items()
    ]


def cells(row: Mapping[str, object]) -> list[str]:
    """Format a row of `bench` for the table."""
    summary = timing.Summary(**{name: row[name] for name in ("median", "low", "high", "reps")})
    return [
        *(str(row[name]) for name in ("dtype", "H", "V", "N", "provider")),
        report.span(summary, 1e3),
        f"{row['multiple']:.2f}",
        report.mib(row["extra_bytes"]),
    ]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = report.arguments(__doc__, reps=15, quick="one small shape, which says nothing")
    for name, known in (
        ("shapes", SIZES),
        ("dtype", ("fp32", "bf16")),
        ("rows", [*map(str, ROWS)]),
    ):
        parser.add_argument(
            f"--{name}", type=some_of(known), default=",".join(known), help=f"of {', '.join(known)}"
        )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and put the rows into linear_sample.json."""
    args = parse_args(argv)
    device = report.device_of(args)
    sizes = QUICK if args.quick else {name: SIZES[name] for name in args.shapes}
    most = max(map(int, args.rows))
    rows: list[dict[str, object]] = []
    for dtype in args.dtype:
        for H, V in sizes.values():
            for N in map(int, args.rows):
                case = Case(N=N, H=H, V=V, dtype=dtype)
                rows += bench(case, device, reps=args.reps, with_memory=most == N)
            # A run that is cut off keeps what it has measured.
            write(args.out / "linear_sample.json", rows, device)
    headings = ("dtype", "H", "V", "N", "", "ms (range)", "× read", "extra MiB")
    report.console().print(report.table("linear_sample", headings, map(cells, rows), names=5))
    print(f"written: {args.out / 'linear_sample.json'}")


def write(path: Path, rows: Sequence[Mapping[str, object]], device: torch.device) -> None:
    """Write the rows, and those of other cases that the file holds of the same machine."""
    result = {"environment": environment(device)}
    names = tuple(asdict(TINY))
    new = {tuple(row[name] for name in names) for row in rows}
    kept = [row for row in held(path, result) if tuple(row[name] for name in names) not in new]
    report.write_json(path, {**result, "rows": [*kept, *rows]})


if __name__ == "__main__":
    main()
