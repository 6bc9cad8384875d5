"""What log-prob ops return by name: the object, and what its gradients and bits are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from latro_kernels import RowStatistics, gather_logprob, linear_logprob
from latro_kernels.row_statistics import NAMES
from tests.latro_kernels.ops.op import (
    INTERPRETED,
    ROWS,
    Op,
    Problem,
    check,
    device_of,
    each_backend,
    each_dtype,
    each_fused_backend,
    gate,
)
from tests.latro_kernels.ops.table import GATHER_LOGPROB, LINEAR_LOGPROB, each_op

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
each_log_prob = each_op([LINEAR_LOGPROB, GATHER_LOGPROB])


def called(op: Op, arguments: dict[str, Any], **options: Any) -> RowStatistics:
    """Return what the op's function returns, which is the object."""
    found = op.function(**arguments, **options)
    assert isinstance(found, RowStatistics)
    return found


@each_fused_backend
@each_log_prob
def test_what_is_asked_for_changes_no_bit(op: Op, backend: str) -> None:
    """Each statistic is the same alone and among others, in any collection, and so is logp."""
    given = op.of_rows(ROWS, batch=True).on(backend)
    alone = op.function(**given.arguments, backend=backend)
    pair = op.function(**given.arguments, backend=backend, return_entropy=True)
    every = called(op, given.arguments, statistics=set(NAMES), backend=backend)
    assert isinstance(alone, Tensor)
    assert isinstance(pair, tuple)
    assert torch.equal(alone, every.logp)
    assert torch.equal(pair[0], every.logp)
    assert torch.equal(pair[1], every.entropy)
    for name in NAMES:
        found = called(op, given.arguments, statistics=[name], backend=backend)
        assert {n for n, value in vars(found).items() if value is not None} == {"logp", name}
        assert torch.equal(found.logp, alone)
        assert torch.equal(getattr(found, name), getattr(every, name))
    none = called(op, given.arguments, statistics=set(), backend=backend)
    assert {n for n, value in vars(none).items() if value is not None} == {"logp"}
    assert torch.equal(none.logp, alone)


@each_log_prob
def test_gradcheck_of_the_reference(op: Op) -> None:
    given = op.of_rows(5, torch.float64, batch=True, softcap=3.0, temperature=0.7)
    names = [n for n in op.gradients if given[n] is not None]

    def statistics(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = given.arguments | dict(zip(names, values, strict=True))
        found = called(op, arguments, statistics=NAMES, backend="reference")
        assert found.is_top1 is not None
        assert not found.is_top1.requires_grad
        return tuple(s for s in vars(found).values() if s.is_floating_point())

    assert torch.autograd.gradcheck(
        statistics, [given[n].clone().requires_grad_() for n in names], fast_mode=True
    )


def of_integers(N: int, V: int, device: str) -> tuple[Tensor, Tensor]:
    """Return logits [N, V] that are small integers, so that rows have several largest, targets."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randint(-4, 5, (N, V), generator=random).float()
    logits[::4] -= 3 * torch.arange(V)  # rows with one largest
    target = torch.randint(V, (N,), generator=random)
    best = logits.argmax(1)
    target[1::2] = best[1::2]
    target[3::8] = (logits == logits.amax(1, keepdim=True)).float().cumsum(1).argmax(1)[3::8]
    return logits.to(device), target.to(device)


@each_backend
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_log_prob
def test_the_largest_of_a_row(
    op: Op, dtype: torch.dtype, softcap: float | None, backend: str
) -> None:
    """Each of several largest counts; in rows that are ignored none does."""
    logits, target = of_integers(40, 70, device_of(backend))
    target[5::6] = -100
    arguments: dict[str, Any] = {"logits": logits.to(dtype), "target": target}
    if op is LINEAR_LOGPROB:
        # Logits of rows · identity are the rows, in any dtype and any order of a sum.
        weight = torch.eye(70, dtype=dtype, device=logits.device)
        arguments = {"hidden": logits.to(dtype), "weight": weight, "target": target}
    trained = arguments["hidden" if op is LINEAR_LOGPROB else "logits"].requires_grad_()
    found = called(
        op,
        arguments,
        statistics=("is_top1",),
        softcap=softcap,
        ignore_index=-100,
        backend=backend,
    )
    top = logits.gather(1, target.clamp(min=0)[:, None])[:, 0] == logits.amax(1)
    expected = top & (target >= 0)
    assert 4 < expected.sum() < 36
    assert found.is_top1 is not None
    assert found.is_top1.dtype == torch.bool
    assert not found.is_top1.requires_grad
    assert torch.equal(found.is_top1, expected)
    found.logp.sum().backward()
    assert trained.grad is not None
    assert trained.grad.any()


def of_mean(given: Problem) -> Problem:
    """Return the problem of the mean logit, which has no gradient."""
    options = given.options | {"return_entropy": False, "statistics": ("mean_logit",)}
    return replace(given, upstream={}, trained=(), options=options)


@each_backend
@pytest.mark.parametrize(
    "form",
    [
        *({}, {"softcap": 5.0, "temperature": 0.7}, {"rows": "peaked"}, {"rows": "flat"}),
        {"batch": True, "temperature": 1.3},
    ],
    ids=str,
)
@each_dtype
@each_log_prob
def test_the_mean_logit(op: Op, dtype: torch.dtype, form: dict[str, Any], backend: str) -> None:
    """As exact as in fp32 by torch; 0 in rows that are ignored."""
    V = 71 if INTERPRETED else 1203
    shape = (10, V) if op is GATHER_LOGPROB else (10, 16, V)
    bias = {} if op is GATHER_LOGPROB else {"bias": True}
    given = of_mean(op.problem(shape, dtype, **form, **bias))
    found = given.on(backend).solve(backend)["mean_logit"].cpu()
    in_fp32 = given.results(op.reference, torch.float32)["mean_logit"]
    gate("mean_logit", found, given.truth()["mean_logit"], in_fp32)
    if "batch" in form:
        assert not found[given["target"] < 0].any()
        assert found[given["target"] >= 0].all()


@each_backend
@each_log_prob
def test_the_mean_with_a_logit_of_minus_infinity(op: Op, backend: str) -> None:
    """It is −∞, as torch's is; with a softcap such a logit is the lowest that there is."""
    bias = {} if op is GATHER_LOGPROB else {"bias": True}
    given = of_mean(op.of_rows(ROWS, **bias))
    given["logits" if op is GATHER_LOGPROB else "bias"][..., 3] = -torch.inf
    found = given.on(backend).solve(backend)["mean_logit"]
    assert (found == -torch.inf).all()
    capped = given.but(softcap=5.0)
    found = capped.on(backend).solve(backend)["mean_logit"].cpu()
    in_fp32 = capped.results(op.reference, torch.float32)["mean_logit"]
    gate("mean_logit", found, capped.truth()["mean_logit"], in_fp32)


@each_backend
@each_log_prob
def test_the_mean_has_no_gradient(op: Op, backend: str) -> None:
    given = op.of_rows(ROWS).on(backend)
    name = op.rows[0]
    arguments = given.arguments | {name: given[name].requires_grad_()}
    found = called(op, arguments, statistics=NAMES, backend=backend)
    without = {n for n, value in vars(found).items() if not value.requires_grad}
    assert without == {"is_top1", "mean_logit"}


@each_backend
@each_log_prob
def test_gradients_whose_offsets_cancel(op: Op, backend: str) -> None:
    """Of log Σ exp(2·z) = log Σ p² + 2·log Σ exp(z), where c of every row is 0."""
    statistics = ("log_sum_exp", "log_sum_p_squared")
    given = op.of_rows(ROWS, softcap=8.0, temperature=0.7, statistics=statistics)
    q = given.upstream["log_sum_p_squared"]
    upstream = {"logp": 0 * q, "log_sum_exp": 2 * q, "log_sum_p_squared": q}
    given = replace(given, upstream=upstream).on(backend)
    options: list[dict[str, float]] = [{}]
    if op is LINEAR_LOGPROB and backend in ("cpu", "triton"):
        options.append({"grad_filter": 1e-30})
    for option in options:
        found = check(given, backend, **option)
        assert found[op.gradients[op.rows[0]]].any(-1).all()


@pytest.mark.parametrize("op", ["linear_logprob", "gather_logprob"])
def test_statistics_compile(op: str) -> None:
    """With a z-loss of them, as one graph."""
    torch.compiler.reset()
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 16, generator=random), torch.randn(32, 16, generator=random)
    target = torch.randint(32, (6,), generator=random)

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        if op == "linear_logprob":
            found = linear_logprob(x, weight, target, statistics=NAMES)
        else:
            found = gather_logprob(x @ weight.t(), target, statistics=NAMES)
        assert isinstance(found, RowStatistics)
        assert found.log_sum_exp is not None
        assert found.is_top1 is not None
        assert found.log_sum_p_squared is not None
        z_loss = 0.1 * found.log_sum_exp.square() + 0.2 * found.log_sum_p_squared
        return (z_loss - found.logp).sum(), found.is_top1

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        value, top = function(leaf)
        value.backward()
        results.append((value.detach(), top, leaf.grad))
    torch.testing.assert_close(results[0], results[1])
