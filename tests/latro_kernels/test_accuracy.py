"""Every op on every backend: results and gradients against fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from tests.latro_kernels.ops.op import (
    BACKENDS,
    COLUMNS,
    DTYPES,
    HALF,
    INTERPRETED,
    ROWS,
    Op,
    Problem,
    assert_same,
    backends,
    check,
    each_backend,
    each_dtype,
    each_fused_backend,
    gate,
)
from tests.latro_kernels.ops.table import (
    DIFFERENTIABLE,
    GATHER_LOGPROB,
    GROUP_ADVANTAGE,
    LINEAR_KL,
    LINEAR_LOGPROB,
    LINEAR_SAMPLE,
    each_form,
    each_op,
    each_sample,
)

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@each_backend
@each_sample
def test_matches_fp64(
    op: Op, shape: Any, dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    given = op.problem(shape, dtype, **options).on(backend)
    if options.get("rows") == "peaked" and "logp" in given.upstream:
        assert given.truth()["logp"].exp().min() > 0.999
    check(given, backend)


# The same problems every time: two rounding errors are compared, and theirs may be small by chance.
@pytest.mark.parametrize("backend", backends("cpu", "reference"))
@each_op()
@drawn(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_shape(op: Op, backend: str, data: st.DataObject) -> None:
    check(data.draw(op.draws).on(backend), backend)


@pytest.mark.parametrize("backend", backends("triton", "cuda"))
@drawn(given=GROUP_ADVANTAGE.draws)
@settings(max_examples=30 if INTERPRETED else 180, deadline=None)
def test_any_groups_on_a_gpu(backend: str, given: Problem) -> None:
    check(given.on(backend), backend)


@each_op([*DIFFERENTIABLE, LINEAR_SAMPLE])
def test_the_reference_is_the_formula(op: Op) -> None:
    given = op.plain(7, torch.float64, temperature=0.7, softcap=3.1)
    expected = op.formula(**given.arguments)
    results = op.named(op.reference(**given.arguments))
    # fp32, which has neither number, is 1e-8 off and more.
    step = 16 * torch.finfo(torch.float64).eps
    for name, value in results.items():
        torch.testing.assert_close(value, expected[name], rtol=step, atol=step)
    public = op.named(op.function(**given.arguments, **given.options, backend="reference"))
    assert public.keys() >= set(op.outputs)
    # Of the statistics of a row the reference gives all, the function those that are asked for.
    assert_same(public, {name: results[name] for name in public})


@each_backend
@each_dtype
@each_op()
def test_strided_inputs(op: Op, dtype: torch.dtype, backend: str) -> None:
    # On the device first: a copy to it would close the gaps.
    for strided in op.strided(op.plain(ROWS, dtype).on(backend)):
        check(strided, backend)


@each_form(DIFFERENTIABLE)
def test_expanded_upstream_gradient(op: Op, form: dict[str, Any], backend: str) -> None:
    """sum() hands an upstream gradient of stride 0 to the backward."""
    given = op.of_rows(ROWS, **exact(form)).on(backend)
    ones = {name: g.new_ones(()).expand_as(g) for name, g in given.upstream.items()}
    given = replace(given, upstream=ones)
    if "inplace_backward" in form:
        assert_same(given.map(torch.clone).solve(backend), given.solve(backend))
    else:
        check(given, backend)


def exact(form: dict[str, Any]) -> dict[str, Any]:
    """Return the form with a filter that leaves nothing out."""
    return form | ({"grad_filter": 1e-20} if "grad_filter" in form else {})


@each_backend
@pytest.mark.parametrize("name", ["entropy", "log_sum_exp"])
@pytest.mark.parametrize(
    ("op", "form"),
    [
        pytest.param(op, form, id="-".join([op.name, *form]))
        for op, form in (
            *product((LINEAR_LOGPROB, GATHER_LOGPROB), ({}, {"batch": True})),
            (LINEAR_LOGPROB, {"frozen": True}),
        )
    ],
)
def test_gradient_of_one_statistic_alone(
    op: Op, name: str, form: dict[str, Any], backend: str
) -> None:
    """Where no other result has an upstream gradient, or one of 0."""
    given = op.of_rows(ROWS, statistics=("entropy", "log_sum_exp"), **form)
    alone = replace(given, upstream={name: given.upstream[name]}).on(backend)
    got = check(alone, backend)
    for upstream in given.upstream.keys() - {name}:
        given.upstream[upstream].zero_()
    with_zeros = given.on(backend).solve(backend)
    for gradient in got.keys() - {name}:
        torch.testing.assert_close(with_zeros[gradient], got[gradient], rtol=1e-4, atol=1e-5)


@each_backend
@pytest.mark.parametrize("name", ["dx", "dw", "db"])
@each_op([LINEAR_LOGPROB, LINEAR_KL])
def test_gradient_of_one_input_alone(op: Op, name: str, backend: str) -> None:
    given = op.of_rows(ROWS, bias=True).on(backend)
    wanted = next(argument for argument, gradient in op.gradients.items() if gradient == name)
    alone = check(replace(given, trained=(wanted,)), backend)
    if op is LINEAR_KL:
        assert torch.equal(alone[name], given.solve(backend)[name])


@each_fused_backend
@each_dtype
@each_op(DIFFERENTIABLE)
def test_rows_without_upstream_gradient(op: Op, dtype: torch.dtype, backend: str) -> None:
    """Their gradient is exactly 0."""
    given = op.plain(ROWS, dtype)
    for upstream in given.upstream.values():
        upstream[::3] = 0
    given = given.on(backend)
    assert not check(given, backend)[op.row_results[-1]][::3].any()
    for upstream in given.upstream.values():
        upstream.zero_()
    results = given.solve(backend)
    assert not any(results[name].any() for name in op.gradients.values())


def leaves_rows_out(op: Op, form: dict[str, Any], backend: str) -> bool:
    """Whether a backward in bf16 or fp16 reads no row that has no upstream gradient."""
    return (
        op is GATHER_LOGPROB or backend == "cpu" or (op is LINEAR_LOGPROB and backend == "triton")
    )


@pytest.mark.parametrize("dtype", [HALF] if INTERPRETED else DTYPES, ids=str)
@each_form(DIFFERENTIABLE, where=leaves_rows_out)
def test_nothing_comes_of_rows_without_upstream_gradient(
    op: Op, form: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    """Whatever is in them."""
    if op is LINEAR_LOGPROB and backend == "triton" and dtype == torch.float32:
        pytest.skip("in tiles, which fp32 goes through, every row is multiplied")
    given = op.of_rows(ROWS, dtype, **exact(form))
    for upstream in given.upstream.values():
        upstream[::3] = 0
    given = given.on(backend)
    true, plain = given.truth(), given.unfused()
    given[op.rows[0]][::6] = torch.nan
    got = given.solve(backend)
    for name in got.keys() - op.outputs:
        gate(name, got[name], true[name], plain[name], given)
    assert not got[op.row_results[-1]][::3].any()


def ignores_some(op: Op, form: dict[str, Any], backend: str) -> bool:
    """Whether some rows are ignored."""
    return "batch" in form


@each_dtype
@each_form(DIFFERENTIABLE, BACKENDS, where=ignores_some)
def test_ignored_rows_are_as_if_they_were_not_there(
    op: Op, form: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    """Whatever is in them: log-prob and gradient 0, and the others' bits are those without them."""
    given = op.of_rows(ROWS, dtype, **form).on(backend)
    kept = given["target"] != given["ignore_index"]
    given[op.rows[0]][~kept] = torch.nan
    got = given.map(torch.clone).solve(backend)
    few = given.of_rows(kept).but(ignore_index=None)
    expected = few.map(torch.clone).solve(backend)
    for name, value in got.items():
        if name in op.row_results:
            assert not value[~kept].any(), name
        # The reference's products have rows of zeros more.
        bound = {"rtol": 1e-5, "atol": 1e-5} if backend == "reference" else {"rtol": 0, "atol": 0}
        of_kept = value[kept] if name in op.row_results else value
        torch.testing.assert_close(of_kept, expected[name], **bound)


@each_fused_backend
@each_op([LINEAR_LOGPROB, GATHER_LOGPROB])
def test_all_rows_or_none_are_ignored(op: Op, backend: str) -> None:
    given = op.of_rows(5, batch=True, entropy=True).on(backend)
    nothing = given.but(target=torch.full_like(given["target"], -100))
    assert not any(value.any() for value in nothing.map(torch.clone).solve(backend).values())
    all_rows = given.but(target=given["target"].clamp(min=0))
    others = all_rows.but(ignore_index=None).map(torch.clone).solve(backend)
    assert_same(all_rows.map(torch.clone).solve(backend), others)


@each_backend
@each_op([LINEAR_LOGPROB, GATHER_LOGPROB])
def test_a_token_of_the_vocabulary_may_be_ignored(op: Op, backend: str) -> None:
    given = op.of_rows(5, batch=True, entropy=True)
    padded = given.but(target=given["target"].masked_fill(given["target"] < 0, 3), ignore_index=3)
    check(padded.on(backend), backend)


@each_backend
@pytest.mark.parametrize("shape", [(), (2, 3), (1, 2, 3), (3, 1, 2), (2, 0, 3)], ids=str)
@each_op(DIFFERENTIABLE)
def test_rows_have_any_leading_dimensions(op: Op, shape: tuple[int, ...], backend: str) -> None:
    """Results have their shape and the bits of one row after the other, slices' too."""
    flat = op.plain(math.prod(shape)).on(backend)

    def shaped(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view((*shape, *tensor.shape[1:]))

    batch = flat.but(**{name: shaped(flat[name]) for name in op.rows})
    batch = replace(batch, upstream={name: shaped(g) for name, g in flat.upstream.items()})
    expected = flat.map(torch.clone).solve(backend)
    for name in op.row_results:
        expected[name] = shaped(expected[name])
    if not shape:
        assert_same(batch.solve(backend), expected)
        return
    last = len(shape) - 1
    longer = {name: torch.cat([batch[name], batch[name]], last) for name in op.rows}
    sliced = batch.but(**{n: t.narrow(last, 0, shape[last]) for n, t in longer.items()})
    for given in (batch, sliced):
        got = given.solve(backend)
        if backend == "reference":
            torch.testing.assert_close(got, expected)
        else:
            assert_same(got, expected)


@each_backend
@pytest.mark.parametrize(
    ("op", "bad"), [*((op, torch.nan) for op in DIFFERENTIABLE), (GATHER_LOGPROB, torch.inf)]
)
def test_nan_stays_in_its_row(op: Op, bad: float, backend: str) -> None:
    for name in op.rows:
        given = op.plain(10).on(backend)
        if given[name].is_floating_point():
            given[name][3, 2] = bad
            results = given.solve(backend)
            for of_row in op.row_results:
                # The log Σ exp of a row with ∞ is ∞.
                rows = results[of_row].view(10, -1).isfinite().all(1)
                assert (~rows).nonzero().flatten().tolist() == [3], (name, of_row)


def has_no_softcap(op: Op, form: dict[str, Any], backend: str) -> bool:
    """Whether logits may be −∞."""
    return "softcap" not in form


@each_dtype
@each_form(DIFFERENTIABLE, BACKENDS, where=has_no_softcap)
def test_logits_of_minus_infinity(
    op: Op, form: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    """They take tokens out of the vocabulary, with no NaN in any gradient."""
    few = op.of_rows(10, dtype, **(exact(form) | ({} if op is GATHER_LOGPROB else {"bias": True})))
    # Whole blocks and tiles of them come first, some more in between.
    first = 70 if INTERPRETED else 9000
    kept = first + torch.arange(COLUMNS) * 9 // 8
    changes = {}
    if "target" in op.rows:
        target = few["target"]
        changes["target"] = torch.where(target < 0, target, kept[target.clamp(min=0)])
    for name, dimension in op.columns.items():
        shape = list(few[name].shape)
        shape[dimension] = first + COLUMNS * 9 // 8
        fill = 1.0 if "weight" in name else -torch.inf
        changes[name] = torch.full(shape, fill, dtype=dtype).index_copy(dimension, kept, few[name])
    got = few.but(**changes).on(backend).solve(backend)
    true, plain = few.truth(), few.unfused()
    dimensions = {op.gradients[n]: d for n, d in op.columns.items() if n in op.gradients}
    for name, of_many in got.items():
        value = of_many.cpu()
        if name in dimensions:
            assert not value.index_fill(dimensions[name], kept, 0).any(), name
            value = value.index_select(dimensions[name], kept)
        gate(name, value, true[name], plain[name], few)


def has_rows_apart(op: Op, form: dict[str, Any], backend: str) -> bool:
    """Whether a row has the same bits whatever others there are."""
    return "grad_filter" not in form and (backend == "cpu" or op is not LINEAR_KL)


@pytest.mark.parametrize("dtype", [HALF] if INTERPRETED else DTYPES, ids=str)
@each_form(
    [*DIFFERENTIABLE, LINEAR_SAMPLE],
    backends("triton" if INTERPRETED else "cpu"),
    where=has_rows_apart,
)
def test_a_row_does_not_depend_on_the_others(
    op: Op, form: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    given = (
        op.of_rows(ROWS, dtype, **form) if INTERPRETED else op.problem(op.uneven[0], dtype, **form)
    )
    whole = given.map(torch.clone).solve(backend)
    # On GPUs torch's products make the gradients.
    names = op.row_results if backend == "cpu" else op.outputs
    n = len(given[op.rows[0]])
    parts = (slice(0, 1), slice(n // 8, n // 2), slice(-(n // 4), None))
    for rows in (*parts, torch.tensor([-1, n // 2, 1])):
        part = given.of_rows(rows).map(torch.clone).solve(backend)
        for name in part.keys() & names:
            assert torch.equal(part[name], whole[name][rows]), name


@each_dtype
@each_form(backends=backends("cpu"))
def test_same_bits_on_every_run_and_thread_count(
    op: Op, form: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    threads = torch.get_num_threads()
    for shape in op.uneven:
        given = op.problem(shape, dtype, **form)
        runs = []
        try:
            for count in (threads, threads, 1, 2, 3):
                torch.set_num_threads(count)
                runs.append(given.map(torch.clone).solve(backend))
        finally:
            torch.set_num_threads(threads)
        for run in runs[1:]:
            assert_same(run, runs[0])
