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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import head_study, head_study_report, logprob_report, report, timing
from benchmarks.logprob_report import Row
from benchmarks.measure import DTYPES, PEER_PACKAGES, TRUTH_FLOP, Limits, bench
from benchmarks.problem import CPU_SHAPES, GPU_SHAPES, SHAPES, Shape
from benchmarks.providers import PROVIDERS, discover


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", help=f"names, comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--n", type=int, help="rows of one shape of your own")
    parser.add_argument("--hidden", type=int, help="its hidden size")
    parser.add_argument("--vocab", type=int, help="its vocabulary")
    parser.add_argument("--dtype", default="fp32,bf16", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--providers", help=f"of {', '.join(PROVIDERS)}; all by default")
    parser.add_argument("--reps", type=int, default=10, help="most repetitions (default 10)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help=f"of one provider on one shape, after {timing.MIN_REPS} repetitions (default 10)",
    )
    parser.add_argument("--study", choices=["head"], help="the study of the head instead")
    parser.add_argument(
        "--sections",
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
    parser.add_argument("--quick", action="store_true", help="one small shape, nothing compiled")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(argv)

    try:
        args.shapes = choose_shapes(args)
        args.dtype = choose(args.dtype, DTYPES, "--dtype")
        args.sections = choose(args.sections, head_study.SECTIONS, "--sections")
        args.providers = (
            choose(args.providers, PROVIDERS, "--providers")
            if args.providers
            else [p.name for p in PROVIDERS.values() if not (args.quick and p.slow_start)]
        )
    except ValueError as error:
        parser.error(str(error))
    if args.quick:
        args.reps, args.seconds = min(args.reps, timing.MIN_REPS), min(args.seconds, 1.0)
    return args


def choose(text: str, known: Sequence[str] | dict[str, object], argument: str) -> list[str]:
    """Split a comma-separated list of names that must all be in `known`."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: expected some of {', '.join(known)}, got {name!r}")
    return names


def choose_shapes(args: argparse.Namespace) -> list[Shape] | None:
    """Named shapes, one of the user's own, or the default set of the device; a study has its own
    defaults, for which None stands."""
    own = (args.n, args.hidden, args.vocab)
    if any(own):
        if args.shapes or not all(size and size > 0 for size in own):
            raise ValueError(
                f"--n, --hidden, --vocab: expected three positive sizes and no --shapes, got {own}"
            )
        return [Shape("custom", *own)]
    if args.shapes:
        return [SHAPES[name] for name in choose(args.shapes, SHAPES, "--shapes")]
    if args.quick:
        return [SHAPES["quick"]]
    if args.study:
        return None
    return list(GPU_SHAPES if torch.device(args.device).type == "cuda" else CPU_SHAPES)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    limits = Limits(args.reps, args.seconds, TRUTH_FLOP[device.type])
    if args.study:
        study(args, device, limits)
    else:
        benchmark(args, device, limits)


def study(args: argparse.Namespace, device: torch.device, limits: Limits) -> None:
    """`--study head`: its tables, files and charts."""
    plan = head_study.Plan(
        sections=tuple(args.sections),
        shapes=args.shapes,
        dtypes=tuple(args.dtype),
        limits=limits,
        device=device,
        data=args.data,
        out=args.out,
        quick=args.quick,
    )
    head_study_report.show(head_study.run(plan))


def benchmark(args: argparse.Namespace, device: torch.device, limits: Limits) -> None:
    """Every provider on every shape, in every dtype."""
    where = report.environment(device, PEER_PACKAGES)
    rows: list[Row] = []
    cannot_run: dict[tuple[str, str], list[str]] = {}  # (provider, reason) -> where
    for dtype in args.dtype:
        found, reasons = discover(args.providers, device, DTYPES[dtype])
        for absence in reasons.items():
            cannot_run.setdefault(absence, []).append(dtype)
        for shape in args.shapes:
            print(f"{shape.name} {dtype}: {', '.join(found)}", file=sys.stderr)
            more, reasons = bench(shape, dtype, found, device, limits)
            rows += more
            for absence in reasons.items():
                cannot_run.setdefault(absence, []).append(f"{shape.name} {dtype}")
            absent = absences(cannot_run)
            # After each shape: a run that is cut off keeps what it has measured.
            write(args.out, rows, absent, where)
    logprob_report.show(rows, absent, where, args.out)


def absences(cannot_run: Mapping[tuple[str, str], Sequence[str]]) -> list[str]:
    """(provider, reason) -> where, as one line for those that share reason and where."""
    alike: dict[tuple[str, str], list[str]] = {}
    for (name, why), places in cannot_run.items():
        alike.setdefault((", ".join(places), why), []).append(name)
    return [f"{', '.join(names)} ({places}): {why}" for (places, why), names in alike.items()]


def write(out: Path, rows: Sequence[Row], absent: Sequence[str], where: dict[str, object]) -> None:
    """The three files of the results so far."""
    report.write_csv(out / "logprob.csv", [logprob_report.flat(row) for row in rows])
    report.write_json(
        out / "logprob.json",
        {"environment": where, "cannot_run": absent, "rows": [asdict(row) for row in rows]},
    )
    report.write_bytes(out / "logprob.png", logprob_report.plot(rows, where))


if __name__ == "__main__":
    main()
