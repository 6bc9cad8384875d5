"""Every kernel of one native library, once over and at small odd shapes: for a sanitizer to watch.

    compute-sanitizer --tool memcheck python benchmarks/gpu/sanitize_run.py --out DIR
    python benchmarks/gpu/sanitize_run.py --backend cpu --out DIR

The problems are those of the tests' table of ops, which take the kernels to their edges: no row and
one, one column, rows that lie apart and are not aligned, segments of no rows and of many, every
dtype and form; and logits for more than one tile. Results are held to the gate of the tests, and
have to be the same bits when it is all done again. The truth and the unfused computation run on the
CPU, so that the sanitizer has little to watch but our kernels.

The exit status is 1 where a result is wrong, or a function of `latro.h` that launches a kernel was
never called. DIR/sanitize.json says which were, and what was wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

from benchmarks.common import report
from latro_kernels import native
from tests.latro_kernels.ops.op import DTYPES, Op, Problem, assert_same, gate
from tests.latro_kernels.ops.table import LINEAR_LOGPROB, OPS

_ROWS = 37
# A CPU alone has these, for decoding. They are no ops of the table, and have tests of their own.
_OF_DECODING = {"latro_cpu_decode_attention", "latro_cpu_few_rows_linear"}
# Logits of more than one tile: a tile fills the L2 cache, 50 MB of an H100.
_TWO_TILES = (130, 40, 128257)


def problems() -> Iterator[tuple[str, Problem]]:
    """Yield every problem, after a name for it."""
    for op in OPS:
        yield from _of_op(op)
    two_tiles = LINEAR_LOGPROB.problem(_TWO_TILES, torch.bfloat16, memory_budget=0)
    yield f"{LINEAR_LOGPROB.name} {_TWO_TILES}", two_tiles


def _of_op(op: Op) -> Iterator[tuple[str, Problem]]:
    for shape, dtype, options in op.samples:
        yield f"{op.name} {shape} {dtype} {options}", op.problem(shape, dtype, **options)
    for name, form in op.forms.items():
        # A filter leaves out what the gate would miss, and is none of the CUDA kernels'.
        if "grad_filter" not in form:
            for dtype in DTYPES:
                yield f"{op.name} {name} {dtype}", op.of_rows(_ROWS, dtype, **form)
    for index, given in enumerate(op.strided(op.plain(_ROWS))):
        yield f"{op.name} strides {index}", given


def check(given: Problem, backend: str) -> list[str]:
    """Say what is wrong with the results on `backend`."""
    # Copies: an op that works in place writes to its arguments.
    solved = (given.map(Tensor.clone).on(backend).solve(backend) for _ in range(2))
    results, again = ({name: value.cpu() for name, value in one.items()} for one in solved)
    truth, unfused = given.truth(), given.unfused()
    wrong = []
    for name, value in results.items():
        try:
            gate(name, value, truth[name], unfused[name], given)
            assert_same({name: value}, {name: again[name]})
        except AssertionError as error:
            wrong.append(f"{error}".splitlines()[0])
    return wrong


def launchers(backend: str) -> set[str]:
    """Name the functions of `latro.h` that launch a kernel of this library: they take tensors."""
    return {
        name
        for name, (_, arguments) in native.signatures().items()
        if name.startswith(f"latro_{backend}_") and ctypes.c_void_p in arguments
    } - _OF_DECODING


def run(backend: str) -> dict[str, object]:
    """Check every problem; return how many, the launchers that were called, and what was wrong."""
    torch.manual_seed(0)
    count, failures = 0, []
    called: set[str] = set()
    call = native.call

    def noting(symbol: str, *arguments: Tensor | int | float | None) -> None:
        called.add(symbol)
        call(symbol, *arguments)

    with mock.patch.object(native, "call", noting):
        for name, given in problems():
            wrong = check(given, backend)
            count += 1
            failures += [f"{name}: {what}" for what in wrong]
            print(f"{name}: {'; '.join(wrong) or 'right'}", flush=True)
    failures += [f"{name}: never called" for name in sorted(launchers(backend) - called)]
    return {
        "backend": backend,
        "cases": count,
        "launchers": sorted(launchers(backend) & called),
        "failures": failures,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Check every kernel; write sanitize.json, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=report.folder, required=True, help="folder for sanitize.json")
    args = parser.parse_args(argv)
    if args.backend == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU")
    result = run(args.backend)
    report.write_json(args.out / "sanitize.json", result)
    for line in result["failures"]:
        print(line, file=sys.stderr)
    return int(bool(result["failures"]))


if __name__ == "__main__":
    sys.exit(main())
