"""Every op among torch's own machinery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from latro_kernels import gather_logprob, linear_logprob
from tests.latro_kernels.ops import linear_jsd, linear_topk
from tests.latro_kernels.ops.op import (
    FUSED,
    INTERPRETED,
    Op,
    Problem,
    Results,
    assert_same,
    backends,
)
from tests.latro_kernels.ops.table import (
    DIFFERENTIABLE,
    GROUP_ADVANTAGE,
    LINEAR_KL,
    LINEAR_LOGPROB,
    LINEAR_SAMPLE,
    each_form,
    each_op,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
ON_CPU = backends("cpu")
each_of_two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@each_of_two_dtypes
@pytest.mark.parametrize(
    "default", [torch.bfloat16, *([] if INTERPRETED else [torch.float64])], ids=str
)
@each_form()
def test_any_default_dtype(
    op: Op,
    form: dict[str, Any],
    backend: str,
    default: torch.dtype,
    dtype: torch.dtype,
    small_tiles: None,
) -> None:
    """The default dtype of torch is the caller's: no op's memory or result depends on it."""
    given = op.of_rows(5 if INTERPRETED else 30, dtype, **form).on(backend)
    expected = given.map(torch.clone).solve(backend)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = given.solve(backend)
    finally:
        torch.set_default_dtype(before)
    assert_same(got, expected)


def forms(results: Results) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, value.shape, value.dtype) for name, value in results.items()]


@each_of_two_dtypes
@each_form(backends=[*backends("cpu", "reference"), *map(pytest.param, ("auto", "triton", "cuda"))])
def test_the_meta_device(op: Op, form: dict[str, Any], backend: str, dtype: torch.dtype) -> None:
    given = op.of_rows(6, dtype, **form)
    results = given.map(lambda t: t.to("meta")).solve(backend)
    assert all(t.is_meta for t in results.values())
    assert forms(results) == forms(given.solve("cpu"))


@each_of_two_dtypes
@each_form(backends=[*backends("cpu", "reference"), pytest.param("auto")])
def test_fake_tensors(op: Op, form: dict[str, Any], backend: str, dtype: torch.dtype) -> None:
    given = op.of_rows(6, dtype, **form)
    mode = FakeTensorMode()
    fake = given.map(mode.from_tensor)
    with mode:
        results = fake.solve(backend)
    assert all(isinstance(t, FakeTensor) for t in results.values())
    assert forms(results) == forms(given.solve("cpu"))


class RawOps(TorchDispatchMode):
    """Records the calls of our raw ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "latro_kernels":
            copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
            self.calls.append((func, tuple(copies)))
        return func(*args, **(kwargs or {}))


def is_checked(op: Op, form: dict[str, Any], backend: str) -> bool:
    """Whether to have torch try the op; another backend's shapes are no others."""
    return not INTERPRETED and (backend == "cpu" or op is GROUP_ADVANTAGE)


@each_of_two_dtypes
@pytest.mark.parametrize("alone", [False, True])
@each_form(where=is_checked)
def test_opcheck(
    op: Op, form: dict[str, Any], backend: str, alone: bool, dtype: torch.dtype
) -> None:
    given = op.of_rows(9, dtype, **form).on(backend)
    with RawOps() as raw:
        replace(given, trained=given.trained[:1] if alone else given.trained).solve(backend)
    # linear_kl has a backward for each of its heads.
    backwards = 0 if not op.gradients else 2 if op is LINEAR_KL and not alone else 1
    assert len(raw.calls) == 1 + backwards
    for function, arguments in raw.calls:
        torch.library.opcheck(function, arguments)


def loss(op: Op, options: dict[str, Any], arguments: Results, upstream: Results) -> Tensor:
    """One number of all results, by what a caller multiplies them with."""
    # Leaves may not be written to in the backward.
    trained = {n: 1 * arguments[n] for n in op.gradients if arguments[n] is not None}
    outputs = op.named(op.function(**(arguments | trained), **options))
    if upstream:
        return sum((outputs[name] * g).sum() for name, g in upstream.items())
    coefficient = outputs["coefficient"] + outputs.get("kl_coefficient", 0)
    return (coefficient * arguments["logp"]).sum() + outputs["reward"].sum()


def losses(op: Op, options: list[dict[str, Any]], given: list[tuple[Results, Results]]) -> Tensor:
    """Return the loss of each problem, of which its arguments and upstream gradients are given."""
    pairs = zip(options, given, strict=True)
    return torch.stack([loss(op, of_one, *tensors) for of_one, tensors in pairs])


def values_and_gradients(
    problems: list[Problem], function: Callable[[list[tuple[Results, Results]]], Tensor]
) -> list[Tensor]:
    """Return what `function` makes of problems, and the gradients of its sum."""
    trained = [
        {n: p[n].clone().requires_grad_() for n in p.trained or ("logp",) if p[n] is not None}
        for p in problems
    ]
    pairs = zip(problems, trained, strict=True)
    values = function([(p.arguments | leaves, p.upstream) for p, leaves in pairs])
    every_leaf = [leaf for leaves in trained for leaf in leaves.values()]
    return [values.detach(), *torch.autograd.grad(values.sum(), every_leaf)]


def is_compiled(op: Op, form: dict[str, Any], backend: str) -> bool:
    """Whether shapes are of this backend, or the same on every one."""
    if op is LINEAR_SAMPLE:  # has no gradient to compile with; test_linear_sample.py compiles it
        return False
    return backend == "cpu" or (op is LINEAR_LOGPROB and "grad_filter" not in form)


@each_form(backends=backends("triton") if INTERPRETED else ON_CPU, where=is_compiled)
def test_compiles_once_for_any_number_of_rows(op: Op, form: dict[str, Any], backend: str) -> None:
    """One graph for the first number of rows, one for every other, with the results of eager."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    options = op.of_rows(6, **form).options | {"backend": backend}
    eager = partial(losses, op, [options])
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for N in (6, 8, 14, 16, 28):
        given = [op.of_rows(N, **form)]
        results = values_and_gradients(given, compiled)
    torch.testing.assert_close(results, values_and_gradients(given, eager))
    assert counter.frame_count == 2


# Nothing can be compiled beside the interpreter.
COMPILED = [
    pytest.param(op, *backend.values, id=f"{op.name}-{backend.values[0]}", marks=backend.marks)
    for op in (*DIFFERENTIABLE, GROUP_ADVANTAGE)
    for backend in FUSED
    if not INTERPRETED and (op is GROUP_ADVANTAGE or backend.values == ("cpu",))
]


@pytest.mark.parametrize(("op", "backend"), COMPILED)
def test_compiles_as_one_graph(op: Op, backend: str) -> None:
    """With torch's own compiler, which takes seconds for a graph: all forms together are one."""
    forms = list(op.forms.values())
    if op is GROUP_ADVANTAGE:
        forms = [{"kl": kl, "unfinished": "exclude"} for kl in ("k3", "exact")]
        assert all(form in op.forms.values() for form in forms)
    given = [op.of_rows(9, **form).on(backend) for form in forms]
    eager = partial(losses, op, [p.options | {"backend": backend} for p in given])
    for dynamic in (False, True) if op is GROUP_ADVANTAGE else (False,):
        torch.compiler.reset()
        compiled = torch.compile(eager, fullgraph=True, dynamic=dynamic)
        results = values_and_gradients(given, compiled)
        torch.testing.assert_close(results, values_and_gradients(given, eager))


@each_op([LINEAR_KL, linear_jsd.OP])
def test_heads_that_share_their_tensors_compile(op: Op) -> None:
    torch.compiler.reset()
    given = op.plain(6)
    hidden, weight, bias = (given[name] for name in ("hidden_p", "weight_p", "bias_p"))

    def divergence(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        own = {"hidden_p": hidden, "weight_p": weight, "bias_p": bias}
        others = {"hidden_q": hidden, "weight_q": weight, "bias_q": bias}
        return op.function(**own, **others, temperature=(1.0, 2.0))

    results = []
    for function in (divergence, torch.compile(divergence, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
        output = function(*leaves, *[None] * (3 - len(leaves)))
        results.append([output.detach(), *torch.autograd.grad(output.sum(), leaves)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("op", ["linear_logprob", "gather_logprob"])
def test_targets_are_checked_where_compiled(op: str, has_grad: bool) -> None:
    torch.compiler.reset()
    x, weight = torch.randn(4, 16, requires_grad=has_grad), torch.randn(32, 16)

    def logp(x: Tensor, target: Tensor) -> Tensor:
        if op == "linear_logprob":
            return linear_logprob(x, weight, target)
        return gather_logprob(x @ weight.t(), target)

    compiled = torch.compile(logp, backend="aot_eager", fullgraph=True)
    good, bad = torch.tensor([1, 2, 3, 31]), torch.tensor([1, 2, 3, 32])
    torch.testing.assert_close(compiled(x, good), logp(x, good))
    for function in (logp, compiled):
        with pytest.raises(ValueError, match=r"expected values in 0\.\.31, got 32 in row 3"):
            function(x, bad)


@each_op([LINEAR_LOGPROB, LINEAR_KL])
def test_autocast_casts_as_linear_does(op: Op) -> None:
    given = op.problem((9, 150, 31), bias=True)
    hidden, weight, bias = (given[name] for name in [*op.gradients][:3])
    low = {n: t.bfloat16() for n, t in given.arguments.items() if n.split("_")[0] in HEAD}
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(hidden, weight, bias).dtype == torch.bfloat16
        got = given.solve("cpu")
    expected = given.but(**low).solve("cpu")
    for name in op.outputs:
        if name in got:
            assert torch.equal(got[name], expected[name]), name
    assert all(got[name].dtype == torch.float32 for name in op.gradients.values())


HEAD = ("hidden", "weight", "bias")


@each_op([LINEAR_LOGPROB, LINEAR_KL])
def test_backward_under_autocast(op: Op) -> None:
    """The products of the backward keep their dtype where autocast is still on."""
    given = op.problem((9, 8, 31))
    hidden = given[op.rows[0]].requires_grad_()
    (output,) = op.named(op.function(**given.arguments)).values()
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients += torch.autograd.grad(output.sum(), hidden, retain_graph=True)
    assert torch.equal(*gradients)


@each_op(DIFFERENTIABLE)
def test_double_backward_is_refused(op: Op) -> None:
    given = op.plain(9)
    leaf = given[op.rows[0]].requires_grad_()
    output = op.named(op.function(**given.arguments))[op.outputs[0]]
    with pytest.raises(RuntimeError, match=f"{op.name} has no double backward"):
        torch.autograd.grad(output.sum(), leaf, create_graph=True)


@each_op([*DIFFERENTIABLE, linear_jsd.OP, linear_topk.OF_LOGPROB, linear_topk.OF_KL])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(op: Op, use_reentrant: bool) -> None:
    """What the backward needs is made again, and given out once."""
    given = op.plain(9)

    def checkpointed(**arguments: Any) -> Tensor:
        names = list(arguments)

        def first(*values: Any) -> Tensor:
            outputs = op.named(op.function(**dict(zip(names, values, strict=True))))
            return outputs[op.outputs[0]]

        return checkpoint(first, *arguments.values(), use_reentrant=use_reentrant)

    upstream = {op.outputs[0]: given.upstream[op.outputs[0]]}
    given = replace(given, upstream=upstream, options={})
    assert_same(given.results(checkpointed), given.results(op.function))


def keeps_its_inputs(op: Op, form: dict[str, Any], backend: str) -> bool:
    return "inplace_backward" not in form


@each_form(DIFFERENTIABLE, ON_CPU, where=keeps_its_inputs)
def test_backward_may_run_twice(op: Op, form: dict[str, Any], backend: str) -> None:
    given = op.of_rows(9, **form)
    leaves = [given[n].requires_grad_() for n in given.trained if given[n] is not None]
    output = op.named(op.function(**given.arguments, **given.options))[op.outputs[0]]
    first, second = (torch.autograd.grad(output.sum(), leaves, retain_graph=True) for _ in "12")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@each_form(DIFFERENTIABLE, ON_CPU)
def test_outputs_may_be_changed_in_place(op: Op, form: dict[str, Any], backend: str) -> None:
    """As those of torch's log_softmax and gather: trainers write zeros where a mask says so."""
    given = op.of_rows(9, **form)

    def in_place(*arguments: Any, **options: Any) -> Results:
        outputs = op.named(op.function(*arguments, **options))
        for output in outputs.values():
            output[..., ::2] = 0
        return outputs

    expected = given.map(torch.clone)
    for upstream in expected.upstream.values():
        upstream[..., ::2] = 0
    got = replace(given, options={}).results(partial(in_place, backend=backend, **given.options))
    others = expected.solve(backend)
    for name in op.gradients.values():
        if name in got:
            torch.testing.assert_close(got[name], others[name], rtol=0, atol=0)


@each_op([*DIFFERENTIABLE, linear_jsd.OP, linear_topk.OF_LOGPROB, linear_topk.OF_KL])
def test_an_input_that_was_changed_in_place_is_refused(op: Op) -> None:
    """As torch refuses it, where the backward would read another number than the forward."""
    given = op.plain(9)
    for name in op.gradients:
        leaves = {n: given[n].clone().requires_grad_() for n in op.gradients}
        arguments = given.arguments | {n: 1 * leaf for n, leaf in leaves.items()}
        output = op.named(op.function(**arguments))[op.outputs[0]]
        arguments[name].detach().zero_()
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            torch.autograd.grad(output.sum(), list(leaves.values()))


@each_op([*DIFFERENTIABLE, linear_jsd.OP, linear_topk.OF_LOGPROB, linear_topk.OF_KL])
def test_several_gradients_at_once(op: Op) -> None:
    """As a Jacobian takes them."""
    given = op.plain(4)
    leaf = given[op.rows[0]].requires_grad_()
    output = op.named(op.function(**given.arguments))[op.outputs[0]]
    ways = torch.eye(output.numel()).view(-1, *output.shape)
    expected = [torch.autograd.grad(output, leaf, one, retain_graph=True)[0] for one in ways]
    (got,) = torch.autograd.grad(output, leaf, ways, is_grads_batched=True)
    torch.testing.assert_close(got, torch.stack(expected))


@each_op(DIFFERENTIABLE)
def test_autocast_leaves_alone_what_linear_does(op: Op) -> None:
    """That is fp64, and integers, which are no hidden states."""
    given = op.plain(9, torch.float64)
    expected = given.solve("reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(given.solve("reference"), expected)
        name = op.rows[0]
        with pytest.raises(TypeError, match=f"{name}: expected dtype .*, got torch.int64"):
            op.function(**given.but(**{name: given[name].long()}).arguments)


@each_form(DIFFERENTIABLE, ON_CPU)
def test_no_gradient_is_asked_for(op: Op, form: dict[str, Any], backend: str) -> None:
    given = op.of_rows(9, **form)
    outputs = op.named(op.function(**given.arguments, **given.options)).values()
    assert not any(output.requires_grad for output in outputs)
    given[op.rows[0]].requires_grad_()
    with torch.no_grad():
        outputs = op.named(op.function(**given.arguments, **given.options)).values()
    assert not any(output.requires_grad for output in outputs)
