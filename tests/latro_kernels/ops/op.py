"""What the tests of all ops know of one: its forms, its truth, its problems, and the one gate."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from latro_kernels import RowStatistics

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# In Triton's interpreter its kernels take tensors of the CPU; test_triton_interpreted.py starts a
# session of pytest for that.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# A small problem's rows, hidden size (one for which CPUs multiply bf16 as such) and vocabulary.
ROWS, HIDDEN, COLUMNS = (10, 16, 70) if INTERPRETED else (40, 130, 300)
_MARKS = {"triton": [pytest.mark.interpreted if INTERPRETED else pytest.mark.gpu]}
_MARKS["cuda"] = [pytest.mark.gpu]


def backends(*names: str) -> list[Any]:
    """Return parameters of a test for these backends, in the interpreter for Triton alone."""
    names = tuple(name for name in names if name == "triton" or not INTERPRETED)
    return [pytest.param(name, marks=_MARKS.get(name, [])) for name in names]


FUSED = backends("cpu", "triton", "cuda")
BACKENDS = backends("cpu", "reference", "triton", "cuda")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_fused_backend = pytest.mark.parametrize("backend", FUSED)
# The interpreter cuts off the bits that bf16 has no room for, where a GPU rounds; fp16 goes through
# the same code. Samples in bf16 that pass the gate all the same are named one by one.
HALF = torch.float16 if INTERPRETED else torch.bfloat16
each_dtype = pytest.mark.parametrize(
    "dtype", (torch.float32, HALF) if INTERPRETED else DTYPES, ids=str
)

Results = dict[str, Tensor]
BadInputs = list[tuple[dict[str, Any], type[Exception] | tuple[type[Exception], ...], str]]


def device_of(backend: str) -> str:
    """Return the device whose tensors the tests give to `backend`."""
    return "cuda" if backend in ("triton", "cuda") and not INTERPRETED else "cpu"


@dataclass(frozen=True, eq=False)
class Op:
    """One op. Functions take the arguments of a `Problem` by name.

    Args:
        name: that of the public function.
        function: the public function.
        reference: the same in plain PyTorch, in fp32 or fp64.
        unfused: what one writes without this package; its error is the measure of the gate.
        formula: the results from `torch.distributions`, in fp64.
        outputs: names of the results, in their order.
        gradients: arguments that may be trained, and how the tests call their gradients.
        rows: arguments of which each row of the problem has a row.
        columns: arguments that have an entry for each token of the vocabulary, and in which
            dimension they have it.
        of_rows: makes a small problem of N rows from N, a dtype, and the options of a form.
        uneven: shapes with several chunks of rows or slices of the vocabulary on the CPU, the last
            of them smaller.
        problem: makes one from a shape (of group_advantage, a name), a dtype and options.
        samples: shapes, dtypes and options of problems for the gate.
        draws: problems of any shape, for hypothesis.
        forms: options of `of_rows` that lead through different code; the first has everything.
        strided: makes problems of one whose tensors have gaps and other orders in memory.
        good: arguments that are right.
        bad: changes of them, with the error that each is.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    unfused: Callable[..., Any]
    outputs: tuple[str, ...]
    of_rows: Callable[..., Problem]
    problem: Callable[..., Problem]
    samples: list[tuple[Any, torch.dtype, dict[str, Any]]]
    draws: SearchStrategy[Problem]
    uneven: list[Any]
    forms: dict[str, dict[str, Any]]
    strided: Callable[[Problem], list[Problem]]
    good: dict[str, Any]
    bad: BadInputs
    formula: Callable[..., Results] | None = None
    gradients: dict[str, str] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    columns: dict[str, int] = field(default_factory=dict)

    def plain(self, N: int, dtype: torch.dtype = torch.float32, **options: Any) -> Problem:
        """Make a problem of the first form."""
        return self.of_rows(N, dtype, **(next(iter(self.forms.values())) | options))

    @property
    def row_results(self) -> list[str]:
        """The results of which each row has its own: outputs, and gradients of `rows`."""
        return [*self.outputs, *(self.gradients[n] for n in self.rows if n in self.gradients)]

    def named(self, out: Any) -> Results:
        """Name what a function of this op returned."""
        if isinstance(out, dict):
            return out
        if isinstance(out, RowStatistics):
            return {name: value for name, value in vars(out).items() if value is not None}
        return dict(zip(self.outputs, out if isinstance(out, tuple) else (out,), strict=False))


@dataclass(frozen=True, eq=False)
class Problem:
    """One call of an op.

    Args:
        op: the op.
        arguments: what the public function, the reference and the unfused form take, by name.
        upstream: gradients of the results, by name; results without one are not looked at, unless
            the op has no gradients.
        trained: the arguments that are differentiated.
        options: what the public function alone takes.
    """

    op: Op
    arguments: dict[str, Any]
    upstream: Results = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def but(self, **arguments: Any) -> Problem:
        """With other arguments."""
        return replace(self, arguments=self.arguments | arguments)

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """With `change` of every tensor."""
        # A tensor that two arguments share stays shared.
        tensors = [*self.arguments.values(), *self.upstream.values()]
        changed = {id(t): change(t) for t in tensors if torch.is_tensor(t)}
        return replace(
            self,
            arguments={name: changed.get(id(v), v) for name, v in self.arguments.items()},
            upstream={name: changed[id(v)] for name, v in self.upstream.items()},
        )

    def on(self, backend: str) -> Problem:
        """With tensors for `backend`."""
        return self.map(lambda t: t.to(device_of(backend)))

    def of_rows(self, rows: slice | Tensor) -> Problem:
        """Return the problem of these rows alone."""
        few = self.but(**{name: self[name][rows] for name in self.op.rows})
        return replace(few, upstream={name: g[rows] for name, g in self.upstream.items()})

    def solve(self, backend: str, **options: Any) -> Results:
        """Results and gradients from the public function."""
        return self.results(partial(self.op.function, backend=backend, **(self.options | options)))

    def truth(self) -> Results:
        """Results and gradients from the reference in fp64."""
        return self.results(self.op.reference, torch.float64)

    def unfused(self) -> Results:
        """Results and gradients from what one writes without this package."""
        return self.results(self.op.unfused)

    def in_order(self, number: int) -> Problem:
        """Return the problem with hidden states and weights whose entries are in another order."""
        changed = {}
        for name, hidden in self.arguments.items():
            if name.startswith("hidden"):
                random = torch.Generator().manual_seed(number)
                order = torch.randperm(hidden.shape[-1], generator=random).to(hidden.device)
                weight = name.replace("hidden", "weight")
                changed |= {name: hidden[..., order], weight: self[weight][:, order]}
        return self.but(**changed)

    def error_of_unfused(self, name: str) -> Tensor:
        """Return the largest error of one of the unfused results."""
        return (self.unfused()[name].double() - self.truth()[name]).abs().max()

    def results(self, function: Callable[..., Any], dtype: torch.dtype | None = None) -> Results:
        """Results and gradients from `function`, with floats in `dtype` where one is given."""
        arguments, leaves = dict(self.arguments), {}
        for name, value in self.arguments.items():
            if torch.is_tensor(value) and value.is_floating_point():
                arguments[name] = value.detach().to(dtype or value.dtype)
            if name in self.trained and value is not None:
                leaves[name] = arguments[name].requires_grad_()
                # A view: the logits of a model are no leaf, and may be written to.
                arguments[name] = leaves[name].view_as(leaves[name])
        outputs = self.op.named(function(**arguments))
        if self.upstream:
            outputs = {name: outputs[name] for name in self.upstream}
            upstream = [g.to(outputs[name].dtype) for name, g in self.upstream.items()]
            torch.autograd.backward(list(outputs.values()), upstream)
        gradients = {self.op.gradients[name]: leaf.grad for name, leaf in leaves.items()}
        return {name: value.detach() for name, value in outputs.items()} | gradients


def gate(
    name: str, got: Tensor, truth: Tensor, unfused: Tensor, given: Problem | None = None
) -> None:
    """Fail unless `got` is as good as unfused torch in the same dtype.

    The largest error against the fp64 truth may be twice that of the unfused computation, plus 1e-5
    of the truth's largest entry; absolute, not relative, where that entry is above 1. Log-probs,
    entropies and log Σ p² come from the logarithm of a sum that is at least 1: they may be two
    steps of fp32 at 1 off, where a few peaked rows of the unfused computation happen to be nearer.
    So may gradients, which are products with upstream gradients of any size, be four steps off at
    their largest entry.

    How far rounding takes the unfused computation of a few rows is luck, and other luck on another
    processor. Where it seems to be the better one, and `given` is the problem, its error is the
    largest that it has with the sums over H in several orders.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}"
    assert got.isfinite().all(), f"{name}: not finite"
    if truth.numel() == 0:
        return
    error, of_unfused = ((x.double() - truth).abs().max() for x in (got, unfused))
    largest, step = truth.abs().max(), torch.finfo(torch.float32).eps
    floor = 1e-5 * largest.clamp(max=1)
    if name in {"logp", "entropy", "log_sum_p_squared"}:
        floor = floor.clamp(min=2 * step)
    if name.startswith("d"):
        floor = floor.clamp(min=4 * step * largest)
    if error > 2 * of_unfused + floor and given is not None:
        of_unfused = max(of_unfused, *(given.in_order(n).error_of_unfused(name) for n in range(8)))
    bound = 2 * of_unfused + floor
    assert error <= bound, f"{name}: error {error:.3g}, of unfused torch {of_unfused:.3g}"


def check(given: Problem, backend: str, **options: Any) -> Results:
    """Fail unless all results pass the gate and the arguments stay as they are; return them."""
    before = given.map(Tensor.clone).arguments
    ours, exact, plain = given.solve(backend, **options), given.truth(), given.unfused()
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        gate(name, value, exact[name], plain[name], given)
        assert value.dtype == plain[name].dtype, name
    for name, value in before.items():
        if torch.is_tensor(value):
            torch.testing.assert_close(given[name], value, rtol=0, atol=0, equal_nan=True)
    return ours


def assert_same(ours: Results, others: Results) -> None:
    """Fail unless all results have the same bits."""
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        assert value.dtype == others[name].dtype
        torch.testing.assert_close(
            value, others[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
