"""Per-token log-probs at the LM head: ours and the peers, in time, memory and error.

    python benchmarks/logprob_bench.py                   # CPU shapes, or GPU shapes on a GPU
    python benchmarks/logprob_bench.py --quick           # under a minute
    python benchmarks/logprob_bench.py --shapes mistral-7b --dtype bf16
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
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import logprob_report, memory, report, timing
from benchmarks.logprob_report import BARE_GEMMS, ERRORS, MEMORY_PHASES, Row
from benchmarks.problem import (
    CPU_SHAPES,
    GPU_SHAPES,
    SHAPES,
    Problem,
    Shape,
    errors,
    make_problem,
    solve_fp64,
)
from benchmarks.providers import (
    CANNOT_RUN,
    PROVIDERS,
    TINY,
    LogprobFn,
    discover,
    reason,
    solve,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEER_PACKAGES = ("triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
# Of fp64 work; more than that and the truth is computed for the first rows only.
TRUTH_FLOP = {"cpu": 3e11, "cuda": 4e13}


class TrainStep:
    """One provider's laps on one problem; the graph of `forward_grad` waits for `backward`."""

    def __init__(self, logprob: LogprobFn, problem: Problem) -> None:
        self._logprob = logprob
        self._problem = problem
        self._logp: Tensor | None = None

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self._logprob(self._problem.hidden, self._problem.weight, self._problem.target)

    def forward_grad(self) -> None:
        self._logp = self._logprob(self._problem.hidden, self._problem.weight, self._problem.target)

    def backward(self) -> tuple[Tensor, ...]:
        logp, self._logp = self._logp, None
        assert logp is not None, "forward_grad runs first"
        inputs = (self._problem.hidden, self._problem.weight)
        return torch.autograd.grad(logp, inputs, self._problem.grad.to(logp.dtype))

    def candidate(self, name: str) -> timing.Candidate:
        laps = {
            "forward": self.forward,
            "forward_grad": self.forward_grad,
            "backward": self.backward,
        }
        return timing.Candidate(name, laps)


def bare_gemms(problem: Problem) -> timing.Candidate:
    """The three GEMMs into outputs made here: logits = X·Wᵀ, dX = dZ·W, dW = dZᵀ·X.

    dZ is a true gradient of the logits, as a GPU's clocks depend on the numbers it multiplies.
    """
    x, w = problem.hidden.detach(), problem.weight.detach()
    logits = torch.mm(x, w.T)
    dz = logits.float().softmax(1).neg_()
    dz.scatter_add_(1, problem.target[:, None], torch.ones_like(dz[:, :1]))
    dz = dz.mul_(problem.grad[:, None]).to(x.dtype)
    dx, dw = torch.empty_like(x), torch.empty_like(w)

    def forward() -> None:
        torch.mm(x, w.T, out=logits)

    def backward() -> None:
        torch.mm(dz, w, out=dx)
        torch.mm(dz.T, x, out=dw)

    laps = {"forward": forward, "forward_grad": forward, "backward": backward}
    return timing.Candidate(BARE_GEMMS, laps)


def phases(laps: dict[str, list[float]]) -> dict[str, timing.Summary]:
    """Forward, backward and full; full is added up repetition by repetition."""
    full = [a + b for a, b in zip(laps["forward_grad"], laps["backward"], strict=True)]
    times = {"forward": laps["forward"], "backward": laps["backward"], "full": full}
    return {phase: timing.summarize(seconds) for phase, seconds in times.items()}


def peak_memory(
    logprob: LogprobFn, shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, int]:
    """Peak bytes of forward and full beyond inputs and results.

    Results that did not exist yet at the peak are subtracted all the same (never below 0): they
    have to fit in memory in any case.
    """
    problem = make_problem(shape, dtype, device)
    step = TrainStep(logprob, problem)

    def full() -> object:
        step.forward_grad()
        return step.backward()

    logp_bytes = 4 * shape.n
    results = logp_bytes + problem.hidden.nbytes + problem.weight.nbytes
    return {
        "forward": max(0, memory.peak_extra_bytes(step.forward, device) - logp_bytes),
        "full": max(0, memory.peak_extra_bytes(full, device) - results),
    }


def peak_memory_of(
    name: str, shape: Shape, dtype: torch.dtype, threads: int
) -> dict[str, int | None]:
    """`peak_memory` of a provider on CPU. Runs in a process of its own."""
    memory.make_malloc_honest()
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    logprob = PROVIDERS[name].find(device)
    peak_memory(logprob, TINY, dtype, device)
    return peak_memory(logprob, shape, dtype, device)


def measure_memory(
    name: str, logprob: LogprobFn, shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, int | None]:
    """`peak_memory` in the way that is honest on `device`; a failure is printed, and `None`."""
    why = memory.can_measure(device)
    if why is None:
        try:
            if device.type == "cuda":
                return peak_memory(logprob, shape, dtype, device)
            return memory.in_fresh_process(
                peak_memory_of, name, shape, dtype, torch.get_num_threads()
            )
        except (*CANNOT_RUN, BrokenProcessPool) as error:
            why = reason(error)
    print(f"{name}: memory not measured: {why}", file=sys.stderr)
    return dict.fromkeys(MEMORY_PHASES)


def bench(
    shape: Shape,
    dtype: str,
    found: dict[str, LogprobFn],
    device: torch.device,
    limits: tuple[int, float],
) -> tuple[list[Row], dict[str, str]]:
    """All of `found` on one shape in one dtype; `limits` is (repetitions, seconds a provider).

    Returns:
        A row for the bare GEMMs and each provider that ran, and why the others did not.
    """
    problem = make_problem(shape, DTYPES[dtype], device)
    share = TRUTH_FLOP[device.type] / shape.step_flop
    error_rows = shape.n if share >= 1 else max(1, int(shape.n * share))
    sample = problem.rows(error_rows)
    truth = solve_fp64(sample)

    print("  errors", end="", file=sys.stderr, flush=True)
    error: dict[str, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    for name, logprob in found.items():
        try:
            error[name] = errors(solve(logprob, sample), truth)
        except CANNOT_RUN as failure:
            reasons[name] = reason(failure)
    del truth, sample

    print(", times", end="", file=sys.stderr, flush=True)
    candidates = [bare_gemms(problem)]
    candidates += [TrainStep(found[name], problem).candidate(name) for name in error]
    reps, seconds = limits
    samples = timing.interleave(candidates, timing.clock_for(device), reps=reps, budget_s=seconds)
    times = {name: phases(laps) for name, laps in samples.items()}
    del candidates, problem

    print(", memory", file=sys.stderr)
    rows = []
    for name, by_phase in times.items():
        is_bare = name == BARE_GEMMS
        rows.append(
            Row(
                shape,
                dtype,
                name,
                by_phase,
                {
                    phase: summary.median / times[BARE_GEMMS][phase].median
                    for phase, summary in by_phase.items()
                },
                dict.fromkeys(MEMORY_PHASES)
                if is_bare
                else measure_memory(name, found[name], shape, DTYPES[dtype], device),
                dict.fromkeys(ERRORS) if is_bare else error[name],
                None if is_bare else error_rows,
            )
        )
    return rows, reasons


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
    parser.add_argument("--quick", action="store_true", help="one small shape, nothing compiled")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(argv)

    try:
        args.shapes = choose_shapes(args)
        args.dtype = choose(args.dtype, DTYPES, "--dtype")
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


def choose_shapes(args: argparse.Namespace) -> list[Shape]:
    """Named shapes, one of the user's own, or the default set of the device."""
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
    return list(GPU_SHAPES if torch.device(args.device).type == "cuda" else CPU_SHAPES)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    where = report.environment(device, PEER_PACKAGES)
    rows: list[Row] = []
    cannot_run: dict[tuple[str, str], list[str]] = {}  # (provider, reason) -> where
    for dtype in args.dtype:
        found, reasons = discover(args.providers, device, DTYPES[dtype])
        for absence in reasons.items():
            cannot_run.setdefault(absence, []).append(dtype)
        for shape in args.shapes:
            print(f"{shape.name} {dtype}: {', '.join(found)}", file=sys.stderr)
            more, reasons = bench(shape, dtype, found, device, (args.reps, args.seconds))
            rows += more
            for absence in reasons.items():
                cannot_run.setdefault(absence, []).append(f"{shape.name} {dtype}")
            absent = [
                f"{name} ({', '.join(places)}): {why}" for (name, why), places in cannot_run.items()
            ]
            # After each shape: a run that is cut off keeps what it has measured.
            write(args.out, rows, absent, where)
    logprob_report.show(rows, absent, where, args.out)


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
