"""Per-token log-probs at the LM head: ours and the peers, in time, memory and error.

    python benchmarks/logprob_bench.py                   # CPU shapes, or GPU shapes on a GPU
    python benchmarks/logprob_bench.py --quick           # under a minute
    python benchmarks/logprob_bench.py --shapes mistral-7b --dtype bf16
    python benchmarks/logprob_bench.py --study head      # see `head_study`
    python benchmarks/logprob_bench.py --n 512 --hidden 768 --vocab 50257

Providers take turns, repetition by repetition (see `timing`). Three times are reported:

- forward: no gradient wanted;
- full: forward, then backward with a random upstream gradient that differs by row;
- backward: the second part of full. Some peers make the gradient in the forward, so it says
  nothing without full beside it.

Each is also given as a multiple of the bare GEMMs: `torch.mm` in the same dtype, into outputs
that exist already, timed as one more provider of the same run. One GEMM (logits) for the forward,
two (dX, dW) for the backward, three for full: the least a method that keeps its logits can do.

Memory is the peak beyond inputs and results (`memory`): log-probs for the forward; log-probs, dX
and dW for full. Errors are the largest elementwise error over the largest true element, against
fp64 from the same inputs; `dx peaked` is dX over the rows where the target has p > 0.999, over
their own largest element. Where the truth of all rows would take too long, the first rows stand
for all, and `error rows` says how many.

The table is printed; logprob.csv, logprob.json (with versions and device) and logprob.png are
written to --out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import head_study, head_study_report
from benchmarks.common import report, timing
from benchmarks.common.problem import CPU_SHAPES, DTYPES, GPU_SHAPES, SHAPES, Shape
from benchmarks.common.providers import PROVIDERS, SLOW_START, discover
from benchmarks.common.report import some_of
from benchmarks.linear_logprob import BARE_GEMMS, PEER_PACKAGES, TRUTH_FLOP, Limits, Row, bench
from benchmarks.linear_logprob import table as table_of
from latro_kernels import environment


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `shapes` become those to measure, None for a study's own."""
    parser = report.arguments(__doc__, reps=10, quick="one small shape, nothing compiled")
    parser.add_argument(
        "--shapes", type=some_of(SHAPES), help=f"names, comma-separated: {', '.join(SHAPES)}"
    )
    parser.add_argument("--n", type=int, help="rows of one shape of your own")
    parser.add_argument("--hidden", type=int, help="its hidden size")
    parser.add_argument("--vocab", type=int, help="its vocabulary")
    parser.add_argument(
        "--dtype", type=some_of(DTYPES), default="fp32,bf16", help=f"of {', '.join(DTYPES)}"
    )
    parser.add_argument(
        "--providers", type=some_of(PROVIDERS), help=f"of {', '.join(PROVIDERS)}; all by default"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help=f"of one provider on one shape, after {timing.MIN_REPS} repetitions (default 10)",
    )
    parser.add_argument("--study", choices=["head"], help="the study of the head instead")
    parser.add_argument(
        "--sections",
        type=some_of(head_study.SECTIONS),
        default=",".join(head_study.SECTIONS),
        help=f"of the study: {', '.join(head_study.SECTIONS)}; all by default",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=head_study.DATA,
        help="folder of train.jsonl and test.jsonl, GSM8K's format, for the study's small model "
        "(default: ../shared/data/gsm8k beside the repository)",
    )
    args = parser.parse_args(argv)

    own = (args.n, args.hidden, args.vocab)
    if any(own):
        if args.shapes or not all(size and size > 0 for size in own):
            parser.error(
                f"--n, --hidden, --vocab: expected three positive sizes and no --shapes, got {own}"
            )
        args.shapes = [Shape("custom", n=args.n, h=args.hidden, v=args.vocab)]
    elif args.shapes or args.quick:
        args.shapes = [SHAPES[name] for name in args.shapes or ["quick"]]
    elif not args.study:
        on_gpu = torch.device(args.device).type == "cuda"
        args.shapes = list(GPU_SHAPES if on_gpu else CPU_SHAPES)
    if args.providers is None:
        args.providers = [name for name in PROVIDERS if not (args.quick and name in SLOW_START)]
    if args.quick:
        args.reps, args.seconds = min(args.reps, timing.MIN_REPS), min(args.seconds, 1.0)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the providers, or with --study the head; print tables and write files."""
    args = parse_args(argv)
    device = report.device_of(args)
    limits = Limits(reps=args.reps, seconds=args.seconds, truth_flop=TRUTH_FLOP[device.type])
    if not args.study:
        benchmark(args, device, limits)
        return
    plan = head_study.Plan(
        sections=args.sections,
        shapes=args.shapes,
        dtypes=args.dtype,
        limits=limits,
        device=device,
        data=args.data,
        out=args.out,
        quick=args.quick,
    )
    head_study_report.show(head_study.run(plan))


def benchmark(args: argparse.Namespace, device: torch.device, limits: Limits) -> None:
    """Measure every provider on every shape, in every dtype; print the tables last."""
    where = environment(device, PEER_PACKAGES)
    groups: list[list[Row]] = []
    cannot_run: dict[tuple[str, str], list[str]] = {}  # (provider, reason) -> where
    for dtype in args.dtype:
        found, reasons = discover(args.providers, device, DTYPES[dtype])
        for absence in reasons.items():
            cannot_run.setdefault(absence, []).append(dtype)
        for shape in args.shapes:
            print(f"{shape.name} {dtype}: {', '.join(found)}", file=sys.stderr)
            rows, reasons = bench(shape, dtype, found, device=device, limits=limits)
            groups.append(rows)
            for absence in reasons.items():
                cannot_run.setdefault(absence, []).append(f"{shape.name} {dtype}")
            absent = absences(cannot_run)
            # After each shape: a run that is cut off keeps what it has measured.
            write(args.out, groups=groups, absent=absent, where=where)
    console = report.console()
    for line in absent:
        console.print(f"cannot run: {line}")
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    console.print(f"written: {args.out}/logprob.csv, logprob.json, logprob.png")
    for rows in groups:
        console.print(table_of(rows))


def absences(cannot_run: Mapping[tuple[str, str], Sequence[str]]) -> list[str]:
    """Say in one line which providers cannot run in the same places for the same reason.

    Args:
        cannot_run: places by provider and reason.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for (name, why), places in cannot_run.items():
        alike.setdefault((", ".join(places), why), []).append(name)
    return [f"{', '.join(names)} ({places}): {why}" for (places, why), names in alike.items()]


def write(
    out: Path,
    *,
    groups: Sequence[Sequence[Row]],
    absent: Sequence[str],
    where: Mapping[str, object],
) -> None:
    """Write the three files of the results so far: a group of rows for each shape and dtype."""
    rows = [row for group in groups for row in group]
    report.write_csv(out / "logprob.csv", [row.flat() for row in rows])
    report.write_json(
        out / "logprob.json",
        {"environment": where, "cannot_run": absent, "rows": [asdict(row) for row in rows]},
    )
    report.write_png(out / "logprob.png", plot(groups, where))


def plot(groups: Sequence[Sequence[Row]], where: Mapping[str, object]) -> Figure:
    """Draw times of full and forward over the bare GEMMs, and peak extra memory of full."""
    figure = Figure(figsize=(13, 0.5 + sum(1.1 + 0.42 * len(group) for group in groups)))
    ratios = [len(group) + 1.5 for group in groups]
    axes = figure.subplots(
        len(groups), 2, squeeze=False, gridspec_kw={"height_ratios": ratios, "wspace": 0.3}
    )
    for (time_axis, memory_axis), group in zip(axes, groups, strict=True):
        names = [row.provider for row in group]
        for below, phase in ((-0.2, "forward"), (0.2, "full")):
            values = [row.multiples[phase] for row in group]
            report.bars(
                time_axis,
                values,
                [f" {value:.2f}" for value in values],
                names=names,
                below=below,
                times=[row.times[phase] for row in group],
                height=0.38,
                label=phase,
            )
        time_axis.axvline(1.0, color="grey", linewidth=0.8)
        time_axis.set_xscale("log")
        time_axis.set_title(f"{group[0].shape.name} {group[0].dtype}: time / {BARE_GEMMS}")
        time_axis.legend(fontsize=7)

        peaks = [row.memory["full"] for row in group]
        report.bars(
            memory_axis,
            [(peak or 0) / 2**20 for peak in peaks],
            [f" {report.mib(peak)}" for peak in peaks],
            names=names,
            height=0.6,
            color="tab:green",
        )
        memory_axis.set_title("full: peak MiB beyond inputs and results")
        for axis in (time_axis, memory_axis):
            axis.margins(x=0.15)
    figure.suptitle(report.where(where))
    return figure


if __name__ == "__main__":
    main()
