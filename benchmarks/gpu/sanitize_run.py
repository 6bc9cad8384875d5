"""Every kernel of one native library, once over and at small odd shapes: for a sanitizer to watch.

    compute-sanitizer --tool memcheck python benchmarks/gpu/sanitize_run.py --out DIR
    python benchmarks/gpu/sanitize_run.py --backend cpu --out DIR

Each op runs forward and, where it has one, backward, on the inputs that take its kernels to their
edges: one row, one column, rows that are not aligned, segments of no rows and of many, every dtype
and option, logits for more than one tile. Results are held to the gate, an error against the
reference in fp64 of at most twice that of unfused torch in the same dtype plus 1e-5, and have to be
the same bits when it is all done again. The truth and the unfused computation run on the CPU, so
that the sanitizer has little to watch but our kernels.

The exit status is 1 where a result is wrong, or a function of `latro.h` that launches a kernel was
never called. DIR/sanitize.json says which were, and what was wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

from benchmarks.common import report
from latro_kernels import (
    GroupAdvantage,
    GroupLayout,
    gather_logprob,
    group_advantage,
    linear_kl,
    linear_logprob,
    native,
)
from latro_kernels.group_advantage import KL_FORMS, UNFINISHED_RULES

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHAPING = {"temperature": 0.7, "softcap": 5.0}
_EVERYTHING = {"return_entropy": True, **_SHAPING}
_HEADS = [(1, 1, 1), (37, 33, 1031), (129, 64, 2049)]  # N, H, V
# Logits of more than one tile: a tile fills the L2 cache, 50 MB of an H100.
_TWO_TILES = (130, 40, 128257)

Solver = Callable[..., Tensor | GroupAdvantage | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One call of an op, and what one writes without this package.

    Args:
        name: in the output.
        op: takes the inputs and `backend`.
        plain: takes the inputs.
        inputs: of both, on the CPU.
        wanted: the number of inputs, the first ones, that get gradients.
    """

    name: str
    op: Solver
    plain: Solver
    inputs: tuple[Tensor, ...]
    wanted: int

    def check(self, backend: str, device: torch.device) -> list[str]:
        """Say what is wrong with the op on `backend`."""
        on_device = [t.to(device) for t in self.inputs]
        exact = [t.double() if t.is_floating_point() else t for t in self.inputs]
        ours, reference = (partial(self.op, backend=name) for name in (backend, "reference"))
        results, again = (self._solve(ours, on_device) for _ in range(2))
        truth, plain = self._solve(reference, exact), self._solve(self.plain, self.inputs)
        wrong = []
        for i, (got, true, unfused) in enumerate(zip(results, truth, plain, strict=True)):
            error, allowed = ((x.double() - true).abs().amax().item() for x in (got, unfused))
            bound = 2 * allowed + 1e-5 * true.abs().amax().clamp(max=1).item()
            if not error <= bound:  # nor NaN
                wrong.append(f"result {i}: error {error:.2e}, allowed {bound:.2e}")
            if not torch.equal(got, again[i]):
                wrong.append(f"result {i}: other bits the second time")
        return wrong

    def _solve(self, solver: Solver, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Results, then gradients from an upstream gradient that is the same for every solver."""
        leaves = [t.detach().clone().requires_grad_(i < self.wanted) for i, t in enumerate(inputs)]
        output = solver(*leaves)
        if isinstance(output, GroupAdvantage):
            output = tuple(vars(output).values())
        outputs = [output] if isinstance(output, Tensor) else [t for t in output if t is not None]
        gradients: Sequence[Tensor] = ()
        if self.wanted:
            random = torch.Generator().manual_seed(1)
            upstream = [torch.randn(out.shape, generator=random).to(out) for out in outputs]
            gradients = torch.autograd.grad(outputs, leaves[: self.wanted], upstream)
        return [t.detach().cpu() for t in (*outputs, *gradients)]


def _log_softmax(logits: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    z = logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z / temperature, -1)


def _from_logits(
    logits: Tensor, target: Tensor, *, return_entropy: bool = False, **shaping: float
) -> tuple[Tensor, ...]:
    """Return log-probs, and entropies if asked for, in fp32."""
    log_p = _log_softmax(logits, **shaping)
    logp = log_p.gather(1, target[:, None]).squeeze(1)
    return (logp, -(log_p.exp() * log_p).sum(-1)) if return_entropy else (logp,)


def _gather(
    wide: Tensor, target: Tensor, *, backend: str, in_place: bool, **options: object
) -> Tensor | tuple[Tensor, Tensor]:
    in_place = in_place and backend != "reference"
    return gather_logprob(
        wide[:, 1:-2], target, inplace_backward=in_place, backend=backend, **options
    )


def _gather_plain(wide: Tensor, target: Tensor, **options: float) -> tuple[Tensor, ...]:
    return _from_logits(wide[:, 1:-2], target, **options)


def gather_cases() -> Iterator[Case]:
    """Rows that lie apart and begin off every alignment but an element's."""
    for dtype, (N, V), options in itertools.product(
        _DTYPES, [(1, 1), (5, 63), (37, 1031), (3, 50257)], [{}, _EVERYTHING]
    ):
        yield Case(
            f"gather_logprob {dtype} {(N, V)} {'every option' if options else 'plain'}",
            op=partial(_gather, in_place=bool(options), **options),
            plain=partial(_gather_plain, **options),
            inputs=((2 * torch.randn(N, V + 3)).to(dtype), torch.randint(V, (N,))),
            wanted=1,
        )


def _linear(
    hidden: Tensor, weight: Tensor, *bias_and_target: Tensor, **options: object
) -> Tensor | tuple[Tensor, Tensor]:
    *bias, target = bias_and_target
    return linear_logprob(hidden, weight, target, bias=bias[0] if bias else None, **options)


def _linear_plain(
    hidden: Tensor, weight: Tensor, *bias_and_target: Tensor, **options: float
) -> tuple[Tensor, ...]:
    *bias, target = bias_and_target
    return _from_logits(F.linear(hidden, weight, *bias), target, **options)


def linear_cases() -> Iterator[Case]:
    """Every form: products kept or not, every option with a bias, and a frozen head."""
    forms = {  # gradients wanted, memory budget, options
        "keep": (2, 1 << 40, {}),
        "recompute": (2, 0, {}),
        "every option": (3, None, _EVERYTHING),
        "frozen": (1, None, {}),
    }
    cases = [*itertools.product(_DTYPES, _HEADS, forms), (torch.bfloat16, _TWO_TILES, "recompute")]
    for dtype, (N, H, V), form in cases:
        wanted, budget, options = forms[form]
        head = [torch.randn(N, H), torch.randn(V, H) * (2 / H**0.5), torch.randn(V)]
        yield Case(
            f"linear_logprob {dtype} {(N, H, V)} {form}",
            op=partial(_linear, memory_budget=budget, **options),
            plain=partial(_linear_plain, **options),
            inputs=(*(t.to(dtype) for t in head[: max(2, wanted)]), torch.randint(V, (N,))),
            wanted=wanted,
        )


def _kl_plain(hidden_p: Tensor, weight_p: Tensor, hidden_q: Tensor, weight_q: Tensor) -> Tensor:
    log_p, log_q = (
        _log_softmax(F.linear(hidden, weight), **_SHAPING)
        for hidden, weight in ((hidden_p, weight_p), (hidden_q, weight_q))
    )
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def kl_cases() -> Iterator[Case]:
    for dtype, (N, H, V) in itertools.product(_DTYPES, _HEADS):
        heads = (t for _ in "pq" for t in (torch.randn(N, H), torch.randn(V, H) * (2 / H**0.5)))
        yield Case(
            f"linear_kl {dtype} {(N, H, V)}",
            op=partial(linear_kl, **_SHAPING),
            plain=_kl_plain,
            inputs=tuple(t.to(dtype) for t in heads),
            wanted=2,
        )


def _group(
    logp: Tensor,
    other: Tensor,
    offsets: Tensor,
    finished: Tensor,
    *,
    K: int,
    kl: str,
    **options: str,
) -> GroupAdvantage:
    given = {"row_kl" if kl == "exact" else "ref_logp": other}
    layout = GroupLayout(offsets, K, finished)
    return group_advantage(
        -logp.abs(), layout=layout, kl=kl, **{"ref_logp": None} | given, **options
    )


def group_cases() -> Iterator[Case]:
    """Ragged groups: segments of none, one and many rows; few sequences per group, and many."""
    lengths = {2: [0, 1, 5, 2, 40000, 7, 33, 1], 64: [31, 2] * 62 + [0, 3, 257, 1]}
    for K, kl, rule in itertools.product(lengths, KL_FORMS, UNFINISHED_RULES):
        op = partial(_group, K=K, kl=kl, unfinished=rule)
        yield Case(
            f"group_advantage K={K} {kl} {rule}",
            op=op,
            plain=partial(op, backend="reference"),
            inputs=(
                *(torch.randn(sum(lengths[K])) for _ in range(2)),
                torch.tensor([0, *lengths[K]]).cumsum(0),
                torch.arange(len(lengths[K]) // 2) % 3 != 1,
            ),
            wanted=0,
        )


def launchers(backend: str) -> set[str]:
    """Name the functions of `latro.h` that launch a kernel of this library: they take tensors."""
    return {
        name
        for name, (_, arguments) in native.signatures().items()
        if name.startswith(f"latro_{backend}_") and ctypes.c_void_p in arguments
    }


def run(backend: str) -> dict[str, object]:
    """Check every case; return how many, the launchers that were called, and what was wrong."""
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    torch.manual_seed(0)
    count, failures = 0, []
    called: set[str] = set()
    call = native.call

    def noting(symbol: str, *arguments: Tensor | int | float | None) -> None:
        called.add(symbol)
        call(symbol, *arguments)

    with mock.patch.object(native, "call", noting):
        cases = (gather_cases(), linear_cases(), kl_cases(), group_cases())
        for case in itertools.chain.from_iterable(cases):
            wrong = case.check(backend, device)
            count += 1
            failures += [f"{case.name}: {what}" for what in wrong]
            print(f"{case.name}: {'; '.join(wrong) or 'right'}", flush=True)
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
    parser.add_argument("--out", type=Path, required=True, help="folder for sanitize.json")
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
