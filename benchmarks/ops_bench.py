"""The ops beside `linear_logprob`: their time next to plain PyTorch's, and their error.

    python benchmarks/ops_bench.py --out benchmarks/results/ops

- gather_logprob: log-probs from logits that exist, and back, in memory of its own and over the
  logits themselves;
- linear_kl: exact KL of two heads over the vocabulary, forward and back;
- group_advantage: coefficients of a million rows.

Plain PyTorch is what one writes without this package. Both take turns, repetition by repetition
(see `timing`). `moved` is what has to be read and written, over the time: beside it stands what a
copy of the same machine moves. The error is the largest elementwise error over the largest true
element against fp64, of what the first lap of the op gives.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import report, timing
from benchmarks.measure import DTYPES
from benchmarks.problem import ragged_layout, relative_error
from latro_kernels import GroupAdvantage, gather_logprob, group_advantage, linear_kl

_COPY_BYTES = 256 << 20


@dataclass(frozen=True)
class Sizes:
    """Rows, hidden size and vocabulary; rows and sequences of group_advantage."""

    N: int
    H: int
    V: int
    rows: int
    sequences: int


SIZES = {"cpu": Sizes(1024, 1024, 32000, 1 << 20, 1024)}
SIZES["cuda"] = Sizes(8192, 4096, 128256, 1 << 20, 1024)
QUICK = Sizes(16, 32, 500, 1000, 8)
_K = 8


@dataclass(frozen=True)
class Op:
    """One table: laps of every way to compute the same, and the bytes that a lap has to move."""

    name: str
    dtype: str
    ways: Mapping[str, Mapping[str, Callable[[], object]]]
    moved: Mapping[str, int]
    truth: Tensor


class _Differentiated:
    """Laps forward and back of `function`, a function of one leaf."""

    def __init__(self, function: Callable[[Tensor], Tensor], leaf: Tensor, grad: Tensor) -> None:
        self._function, self._leaf, self._grad = function, leaf.requires_grad_(), grad
        self._out: Tensor | None = None

    def forward(self) -> Tensor:
        self._out = self._function(self._leaf)
        return self._out

    def backward(self) -> Tensor:
        out, self._out = self._out, None
        assert out is not None, "forward runs first"
        return torch.autograd.grad(out, self._leaf, self._grad)[0]

    @property
    def laps(self) -> dict[str, Callable[[], object]]:
        return {"forward": self.forward, "backward": self.backward}


def gather_op(sizes: Sizes, dtype: str, device: torch.device) -> Op:
    """[N, V] logits."""
    logits = torch.randn(sizes.N, sizes.V, device=device).to(DTYPES[dtype])
    target = torch.randint(sizes.V, (sizes.N,), device=device)
    grad = torch.randn(sizes.N, device=device)

    def plain(z: Tensor) -> Tensor:
        return torch.log_softmax(z.float(), -1).gather(1, target[:, None]).squeeze(1)

    def in_place(z: Tensor) -> Tensor:
        # A view: a leaf may not be written over. What becomes of the logits costs the same time.
        return gather_logprob(z.view_as(z), target, inplace_backward=True)

    ways = {"latro": lambda z: gather_logprob(z, target), "latro, in place": in_place}
    ways["plain"] = plain
    truth = torch.log_softmax(logits.double(), -1).gather(1, target[:, None]).squeeze(1)
    return Op(
        "gather_logprob",
        dtype,
        {name: _Differentiated(way, logits.clone(), grad).laps for name, way in ways.items()},
        {"forward": logits.nbytes, "backward": 2 * logits.nbytes},
        truth,
    )


def kl_op(sizes: Sizes, dtype: str, device: torch.device) -> Op:
    """Hidden states of policy and reference, [N, H], at one head, [V, H], that is not trained."""
    states = [torch.randn(sizes.N, sizes.H, device=device).to(DTYPES[dtype]) for _ in range(2)]
    weight = (torch.randn(sizes.V, sizes.H, device=device) / sizes.H**0.5).to(DTYPES[dtype])
    grad = torch.randn(sizes.N, device=device)

    def plain(x: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
        at = weight.to(x.dtype).t()
        log_p, log_q = (
            torch.log_softmax((h.to(x.dtype) @ at).to(out_dtype), -1) for h in (x, states[1])
        )
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    ways = {"latro": lambda x: linear_kl(x, weight, states[1], weight), "plain": plain}
    laps = {name: _Differentiated(way, states[0].clone(), grad).laps for name, way in ways.items()}
    return Op("linear_kl", dtype, laps, {}, plain(states[0].double(), torch.float64))


def advantage_op(sizes: Sizes, device: torch.device) -> Op:
    """Segments cut anywhere: they differ widely in length."""
    N = sizes.rows
    layout = ragged_layout(N, sizes.sequences, _K, device)
    logp, ref_logp = (-torch.rand(N, device=device) for _ in range(2))

    def coefficients(backend: str) -> dict[str, Callable[[], object]]:
        return {"forward": lambda: group_advantage(logp, ref_logp, layout, backend=backend)}

    truth = group_advantage(logp.double(), ref_logp.double(), layout, backend="reference")
    moved = {"forward": 4 * (2 * N + int(layout.offsets.diff()[::2].sum()))}
    ways = {"latro": coefficients("auto"), "plain": coefficients("reference")}
    return Op("group_advantage", "fp32", ways, moved, truth.coefficient)


def ops(sizes: Sizes, device: torch.device) -> Iterator[Op]:
    """All tables."""
    for dtype in ("fp32", "bf16"):
        yield gather_op(sizes, dtype, device)
        yield kl_op(sizes, dtype, device)
    yield advantage_op(sizes, device)


def measure(op: Op, device: torch.device, reps: int, copy_bytes: int) -> list[dict[str, object]]:
    """Rows of the table: seconds, bytes per second, and the error."""
    # Before a backward writes over the logits.
    error = {
        way: relative_error(_value(laps["forward"]()), op.truth) for way, laps in op.ways.items()
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
                    **{"op": op.name, "dtype": op.dtype, "way": way, "lap": lap},
                    **asdict(summary),
                    "bytes_per_second": None if moved is None else moved / summary.median,
                    "copy_bytes_per_second": 2 * copy_bytes / copy.median,
                    "error": error[way],
                }
            )
    return rows


def _value(result: object) -> Tensor:
    return result.coefficient if isinstance(result, GroupAdvantage) else result


def table(rows: list[dict[str, object]]) -> Table:
    """What is printed."""
    made = Table(title="ops", title_justify="left")
    for heading in ("op", "dtype", "", "lap"):
        made.add_column(heading, no_wrap=True)
    for heading in ("ms (range)", "GB/s", "copy GB/s", "error"):
        made.add_column(heading, justify="right")
    for row in rows:
        low, median, high = (1e3 * row[name] for name in ("low", "median", "high"))
        rate = row["bytes_per_second"]
        made.add_row(
            *(row["op"], row["dtype"], row["way"], row["lap"]),
            f"{median:.2f} ({low:.2f}–{high:.2f})",
            "–" if rate is None else f"{rate / 1e9:.1f}",
            f"{row['copy_bytes_per_second'] / 1e9:.1f}",
            f"{row['error']:.0e}",
        )
    return made


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write ops.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--reps", type=int, default=7, help="repetitions (default 7)")
    parser.add_argument("--quick", action="store_true", help="small shapes, which say nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    sizes = QUICK if args.quick else SIZES[args.device.type]
    copy_bytes = 1 << 16 if args.quick else _COPY_BYTES
    rows: list[dict[str, object]] = []
    for op in tqdm(ops(sizes, args.device), desc="ops", total=5):
        rows += measure(op, args.device, args.reps, copy_bytes)
    report.console(width=120).print(table(rows))
    result = {"sizes": asdict(sizes), "rows": rows}
    result["environment"] = report.environment(args.device, ())
    report.write_json(args.out / "ops.json", result)
    print(f"written: {args.out}/ops.json")


if __name__ == "__main__":
    main()
