"""Every kernel of one native library, once over and at small odd shapes: for a sanitizer to watch.

    compute-sanitizer --tool memcheck python benchmarks/gpu/sanitize_run.py --out DIR
    python benchmarks/gpu/sanitize_run.py --backend cpu --out DIR

Each op runs forward and, where it has one, backward, on the inputs that take its kernels to their
edges: one row, one column, rows that are not aligned, segments of no rows and of many, every dtype
and option, logits for more than one tile. Results are held to the gate, an error against the
reference in fp64 of at most twice that of unfused torch in the same dtype plus 1e-5, and have to be
the same bits when it is all done again. Both of these run on the CPU, so that the sanitizer has
little to watch but ours.

The exit status is 1 where a result is wrong, or a function of `latro.h` that launches a kernel was
never called. DIR/sanitize.json says which were, and what was wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
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
from latro_kernels.group_advantage.formulas import reference as group_reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHAPING = {"temperature": 0.7, "softcap": 5.0}
# Of logits more than one tile takes: a tile fills the L2 cache, 50 MB of an H100.
_TWO_TILES = (130, 40, 128257)

Solver = Callable[..., tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Case:
    """One call, three ways: `ours`, on `device`, the reference `exact` and what one writes without
    this package, `plain`, on the CPU; each takes `inputs`, of which the first `wanted` get
    gradients."""

    name: str
    device: torch.device
    ours: Solver
    exact: Solver
    plain: Solver
    inputs: tuple[Tensor, ...]
    wanted: int

    def check(self) -> list[str]:
        """Say what is wrong with ours."""
        given = [t.to(self.device) for t in self.inputs]
        results, again = ([t.cpu() for t in self._solve(self.ours, given)] for _ in range(2))
        truth = self._solve(self.exact, [t.double() for t in self.inputs])
        plain = self._solve(self.plain, self.inputs)
        wrong = []
        for i, (got, true, unfused) in enumerate(zip(results, truth, plain, strict=True)):
            error, allowed = (_distance(x, true) for x in (got, unfused))
            bound = 2 * allowed + 1e-5 * true.abs().amax().clamp(max=1).item()
            if not error <= bound:  # nor NaN
                wrong.append(f"result {i}: error {error:.2e}, allowed {bound:.2e}")
            if not torch.equal(got, again[i]):
                wrong.append(f"result {i}: other bits the second time")
        return wrong

    def _solve(self, solver: Solver, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Results, then gradients from an upstream gradient that is the same for every solver."""
        leaves = [t.detach().clone().requires_grad_(i < self.wanted) for i, t in enumerate(inputs)]
        outputs = [out for out in solver(*leaves) if out is not None]
        gradients: Sequence[Tensor] = ()
        if self.wanted:
            random = torch.Generator().manual_seed(1)
            upstream = [torch.randn(out.shape, generator=random).to(out) for out in outputs]
            gradients = torch.autograd.grad(outputs, leaves[: self.wanted], upstream)
        return [*(out.detach() for out in outputs), *gradients]


def _distance(got: Tensor, truth: Tensor) -> float:
    return (got.double() - truth).abs().amax().item()


def gather_cases(backend: str, device: torch.device) -> Iterator[Case]:
    """Rows that lie apart and begin off every alignment but an element's, as `_inner` cuts them."""
    for dtype, (N, V), everything in itertools.product(
        _DTYPES, [(1, 1), (5, 63), (37, 1031), (3, 50257)], [False, True]
    ):
        target = torch.randint(V, (N,))
        options = {"entropy": everything, **(_SHAPING if everything else {})}
        ours = {"target": target.to(device), "backend": backend, "inplace_backward": everything}
        yield Case(
            f"gather_logprob {dtype} {(N, V)} {'every option' if everything else 'plain'}",
            device,
            partial(_gather, **ours, **options),
            partial(_gather, target=target, backend="reference", **options),
            partial(_gather_plain, target=target, **options),
            inputs=((2 * torch.randn(N, V + 3)).to(dtype),),
            wanted=1,
        )


def _inner(wide: Tensor) -> Tensor:
    return wide[:, 1:-2]


def _gather(
    wide: Tensor, *, target: Tensor, entropy: bool, backend: str, **options: object
) -> tuple[Tensor | None, ...]:
    out = gather_logprob(_inner(wide), target, return_entropy=entropy, backend=backend, **options)
    return out if entropy else (out, None)


def _gather_plain(
    wide: Tensor, *, target: Tensor, entropy: bool, **options: float
) -> tuple[Tensor | None, ...]:
    return _from_logits(_inner(wide), target, entropy, **options)


def _from_logits(
    logits: Tensor,
    target: Tensor,
    entropy: bool,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor | None, ...]:
    """Log-probs, and entropies if asked for, in fp32."""
    log_p = _log_softmax(logits, temperature, softcap)
    logp = log_p.gather(1, target[:, None]).squeeze(1)
    return logp, -(log_p.exp() * log_p).sum(-1) if entropy else None


def _log_softmax(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    z = logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z / temperature, -1)


@dataclass(frozen=True)
class _Form:
    """A way to call `linear_logprob`, with a bias where three gradients are `wanted`."""

    name: str
    wanted: int
    options: Mapping[str, object] = field(default_factory=dict)
    shaping: Mapping[str, float] = field(default_factory=dict)
    entropy: bool = False


_RECOMPUTE = _Form("recompute", 2, {"memory_budget": 0})
_FORMS = (
    _Form("keep", 2, {"memory_budget": 1 << 40}),
    _RECOMPUTE,
    _Form("every option", 3, {}, _SHAPING, entropy=True),
    _Form("frozen", 1),
)


def linear_cases(backend: str, device: torch.device) -> Iterator[Case]:
    shapes = [(1, 1, 1), (37, 33, 1031), (129, 64, 2049)]
    for dtype, shape, form in itertools.product(_DTYPES, shapes, _FORMS):
        yield _linear_case(backend, device, dtype, shape, form)
    yield _linear_case(backend, device, torch.bfloat16, _TWO_TILES, _RECOMPUTE)


def _linear_case(
    backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], form: _Form
) -> Case:
    N, H, V = shape
    target = torch.randint(V, (N,))
    inputs = [torch.randn(N, H), torch.randn(V, H) * (2 / H**0.5), torch.randn(V)]
    options = {"entropy": form.entropy, **form.shaping}
    return Case(
        f"linear_logprob {dtype} {shape} {form.name}",
        device,
        partial(_linear, target=target.to(device), backend=backend, **form.options, **options),
        partial(_linear, target=target, backend="reference", **options),
        partial(_linear_plain, target=target, **options),
        inputs=tuple(t.to(dtype) for t in inputs[: max(2, form.wanted)]),
        wanted=form.wanted,
    )


def _linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    target: Tensor,
    entropy: bool,
    **options: object,
) -> tuple[Tensor | None, ...]:
    out = linear_logprob(hidden, weight, target, bias=bias, return_entropy=entropy, **options)
    return out if entropy else (out, None)


def _linear_plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    target: Tensor,
    entropy: bool,
    **options: float,
) -> tuple[Tensor | None, ...]:
    return _from_logits(F.linear(hidden, weight, bias), target, entropy, **options)


def kl_cases(backend: str, device: torch.device) -> Iterator[Case]:
    shapes = [(1, 1, 1), (37, 33, 1031), (129, 64, 2049)]
    for dtype, (N, H, V) in itertools.product(_DTYPES, shapes):
        heads = (t for _ in "pq" for t in (torch.randn(N, H), torch.randn(V, H) * (2 / H**0.5)))
        yield Case(
            f"linear_kl {dtype} {(N, H, V)}",
            device,
            partial(_kl, backend=backend),
            partial(_kl, backend="reference"),
            _kl_plain,
            inputs=tuple(t.to(dtype) for t in heads),
            wanted=2,
        )


def _kl(*heads: Tensor, backend: str) -> tuple[Tensor, ...]:
    return (linear_kl(*heads, **_SHAPING, backend=backend),)


def _kl_plain(
    hidden_p: Tensor, weight_p: Tensor, hidden_q: Tensor, weight_q: Tensor
) -> tuple[Tensor, ...]:
    log_p, log_q = (
        _log_softmax(F.linear(hidden, weight), **_SHAPING)
        for hidden, weight in ((hidden_p, weight_p), (hidden_q, weight_q))
    )
    return (F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),)


def group_cases(backend: str, device: torch.device) -> Iterator[Case]:
    """Ragged groups: segments of none, one and many rows; few sequences per group, and many."""
    lengths = {2: [0, 1, 5, 2, 40000, 7, 33, 1], 64: [31, 2] * 62 + [0, 3, 257, 1]}
    for K, kl, rule in itertools.product(lengths, KL_FORMS, UNFINISHED_RULES):
        offsets = torch.tensor([0, *lengths[K]]).cumsum(0)
        finished = torch.arange(len(lengths[K]) // 2) % 3 != 1
        layout = GroupLayout(offsets, K, finished)
        on_device = GroupLayout(offsets.to(device), K, finished.to(device))
        ours = partial(group_advantage, layout=on_device, backend=backend)
        reference = partial(group_reference, layout=layout)
        yield Case(
            f"group_advantage K={K} {kl} {rule}",
            device,
            *(partial(_group, f, kl=kl, unfinished=rule) for f in (ours, reference, reference)),
            inputs=tuple(torch.randn(sum(lengths[K])) for _ in range(2)),
            wanted=0,
        )


def _group(
    function: Callable[..., GroupAdvantage],
    logp: Tensor,
    other: Tensor,
    *,
    kl: str,
    unfinished: str,
) -> tuple[Tensor | None, ...]:
    given = (None, other) if kl == "exact" else (other, None)
    out = function(-logp.abs(), ref_logp=given[0], row_kl=given[1], kl=kl, unfinished=unfinished)
    return tuple(getattr(out, item.name) for item in fields(out))


def launchers(backend: str) -> set[str]:
    """Name the functions of `latro.h` that launch a kernel of this library: they take tensors."""
    return {
        name
        for name, (_, arguments) in native.signatures().items()
        if name.startswith(f"latro_{backend}_") and ctypes.c_void_p in arguments
    }


def run(backend: str) -> dict[str, object]:
    """Check every case; how many there were, the launchers called and what was wrong."""
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    torch.manual_seed(0)
    count, failures = 0, []
    called: set[str] = set()
    call = native.call

    def noting(symbol: str, *arguments: Tensor | int | float | None) -> None:
        called.add(symbol)
        call(symbol, *arguments)

    with mock.patch.object(native, "call", noting):
        for cases in (gather_cases, linear_cases, kl_cases, group_cases):
            for case in cases(backend, device):
                wrong = case.check()
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
