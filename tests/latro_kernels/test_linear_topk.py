"""linear_topk_logprob and linear_topk_kl: the gates of all ops, and what they alone have."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import log_softmax

from latro_kernels import linear_kl, linear_topk_kl, linear_topk_logprob, logit_tiles
from tests.latro_kernels.ops.linear_topk import OF_KL, OF_LOGPROB, kl_problem, problem
from tests.latro_kernels.ops.op import Op, assert_same, check, each_dtype, gate
from tests.latro_kernels.test_memory import LargestTensor
from tests.latro_kernels.test_torch import RawOps, forms, losses, values_and_gradients

OPS = (OF_LOGPROB, OF_KL)
each_op = pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS])
each_backend = pytest.mark.parametrize("backend", ["auto", "reference"])
each_form = pytest.mark.parametrize(
    ("op", "form"),
    [pytest.param(op, form, id=f"{op.name}-{n}") for op in OPS for n, form in op.forms.items()],
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and slices of the vocabulary."""
    monkeypatch.setattr(logit_tiles, "CPU_ROWS", 24)
    monkeypatch.setattr(logit_tiles, "CPU_COLUMNS", 192)


@each_backend
@pytest.mark.parametrize(
    ("op", "shape", "dtype", "options"),
    [
        pytest.param(op, *sample, id="-".join([op.name, *map(str, sample)]))
        for op in OPS
        for sample in op.samples
    ],
)
def test_matches_fp64(
    op: Op, shape: Any, dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    check(op.problem(shape, dtype, **options), backend)


@pytest.mark.gpu
@each_dtype
@each_op
def test_on_a_gpu(op: Op, dtype: torch.dtype) -> None:
    check(op.plain(40, dtype).map(lambda t: t.to("cuda")), "auto")


# The same problems every time: two rounding errors are compared, and theirs may be small by chance.
@each_op
@drawn(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_shape(op: Op, data: st.DataObject) -> None:
    check(data.draw(op.draws), "auto")


@each_op
def test_the_reference_is_the_formula(op: Op) -> None:
    given = op.plain(7, torch.float64, temperature=0.7, softcap=3.1)
    given = given.map(lambda t: t.double() if t.is_floating_point() else t)
    expected = op.formula(**given.arguments)
    results = op.named(op.reference(**given.arguments))
    step = 16 * torch.finfo(torch.float64).eps
    for name, value in results.items():
        torch.testing.assert_close(value, expected[name], rtol=step, atol=step)
    assert_same(op.named(op.function(**given.arguments, backend="reference")), results)


@each_backend
@each_dtype
@each_op
def test_strided_inputs(op: Op, dtype: torch.dtype, backend: str) -> None:
    for strided in op.strided(op.plain(40, dtype)):
        check(strided, backend)


@each_backend
@each_op
def test_leading_dimensions(op: Op, backend: str) -> None:
    given = op.plain(24)
    flat = given.solve(backend)
    rows = {name: given[name].unflatten(0, (4, 6)) for name in op.rows}
    upstream = {name: g.unflatten(0, (4, 6)) for name, g in given.upstream.items()}
    batch = replace(given.but(**rows), upstream=upstream).solve(backend)
    for name in (*op.outputs, "dx"):
        batch[name] = batch[name].flatten(0, 1)
    assert_same(batch, flat)


@each_backend
@each_op
def test_no_token_leaves_its_probability_to_the_rest(op: Op, backend: str) -> None:
    given = op.problem((30, 16, 300), bias=True, k=5)
    without = given.but(token=given["token"][:, :4])
    absent = given.but(token=given["token"].index_fill(1, torch.tensor([4]), -1))
    if op is OF_KL:
        without = without.but(log_prob=given["log_prob"][:, :4])
        # Where the teacher has none its token does not count, whatever it is.
        log_prob = given["log_prob"].index_fill(1, torch.tensor([4]), -torch.inf)
        absent = given.but(log_prob=log_prob)
    else:
        upstream = given.upstream["log_prob"].clone()
        without = replace(without, upstream={"log_prob": upstream[:, [0, 1, 2, 3, 5]]})
    expected, got = without.solve(backend), absent.solve(backend)
    if op is OF_LOGPROB:
        assert (got["log_prob"][:, 4] == -torch.inf).all()
        got["log_prob"] = got["log_prob"][:, [0, 1, 2, 3, 5]]
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@each_backend
def test_all_tokens_but_one(backend: str) -> None:
    """The rest is one token as well, and the KL is that over the vocabulary."""
    N, H, V = 20, 16, 230
    given = problem((N, H, V), bias=True)
    teacher, head = torch.randn(N, 8), torch.randn(V, 8)
    log_prob, token = log_softmax(teacher @ head.t(), -1).topk(V - 1)
    kl = linear_topk_kl(
        *(given["hidden"], given["weight"], token, log_prob), bias=given["bias"], backend=backend
    )
    expected = linear_kl(
        *(teacher, head, given["hidden"], given["weight"]), bias_q=given["bias"], backend="cpu"
    )
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-5)


def test_the_kl_is_at_most_that_of_the_vocabulary() -> None:
    N, H, V = 50, 16, 300
    teacher, student = torch.randn(2, N, H)
    head = torch.randn(V, H)
    log_p = log_softmax(teacher @ head.t(), -1)
    over_all = linear_kl(teacher, head, student, head)
    before = torch.zeros(N)
    for k in (1, 4, 16, 64, 256):
        log_prob, token = log_p.topk(k)
        kl = linear_topk_kl(student, head, token, log_prob)
        assert (kl >= before * (1 - 1e-5)).all()
        before = kl
    assert (before <= over_all * (1 + 1e-5)).all()
    assert (before > 0.9 * over_all).all()


def test_the_rest_keeps_its_digits() -> None:
    """The tokens leave 10⁻⁹ of 1, which is nothing in fp32."""
    given = problem((40, 64, 300), k=1, rows="peaked")
    given = given.but(hidden=given["hidden"] * 3)
    truth, got = (of["log_prob"][:, -1] for of in (given.truth(), given.solve("auto")))
    assert truth.exp().max() < 1e-7
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=0)
    of_token = given.solve("auto")["log_prob"][:, 0]
    torch.testing.assert_close(of_token.double().expm1(), -truth.exp(), rtol=1e-4, atol=1e-15)


def test_a_small_kl_keeps_its_digits() -> None:
    """Of a teacher 1e-4 away it is 1e-8 or less, below the rounding of any log-prob."""
    N, H, V = 40, 64, 1031
    hidden, weight = torch.randn(N, H), torch.randn(V, H) / H**0.5
    moved = (hidden + 1e-4 * torch.randn(N, H)).double()
    log_prob, token = log_softmax(moved @ weight.double().t(), -1).topk(8)
    true = OF_KL.reference(hidden.double(), weight.double(), token, log_prob)
    assert true.max() < 1e-7
    got = linear_topk_kl(hidden, weight, token, log_prob)
    plain = OF_KL.unfused(
        hidden=hidden,
        weight=weight,
        token=token,
        log_prob=log_prob.float(),
        bias=None,
        temperature=1.0,
        softcap=None,
    )
    assert (got >= 0).all()
    assert (got - true).abs().max() < 0.05 * (plain - true).abs().max()


@each_backend
def test_a_teacher_that_leaves_nothing(backend: str) -> None:
    """Probabilities that sum to 1, or by rounding to more, have a rest of 0."""
    given = kl_problem((20, 16, 300), k=3)
    log_prob = log_softmax(given["log_prob"], -1)
    log_q = linear_topk_logprob(given["hidden"], given["weight"], given["token"])[:, :3]
    expected = (log_prob.exp() * (log_prob - log_q)).sum(-1)
    for above in (0.0, 1e-6):
        results = given.but(log_prob=log_prob + above).solve(backend)
        assert all(value.isfinite().all() for value in results.values())
        torch.testing.assert_close(results["kl"], expected, rtol=1e-4, atol=1e-4)


@each_backend
@pytest.mark.parametrize("log_prob", [-700.0, -720.0, -745.0, -800.0])
def test_a_token_that_the_teacher_all_but_rules_out(log_prob: float, backend: str) -> None:
    """Its probability may be no normal number of fp64, and q / p no number of it at all."""
    given = kl_problem((4, 16, 300), k=2)
    log_prob_of_two = torch.tensor([log_prob, -0.1], dtype=torch.float64).expand(4, 2)
    arguments = given.arguments | {"hidden": 3 * given["hidden"], "log_prob": log_prob_of_two}
    results = given.but(**arguments).solve(backend)
    truth = given.but(**arguments).truth()
    for name, value in results.items():
        torch.testing.assert_close(value, truth[name].float(), rtol=1e-4, atol=1e-5)


@each_backend
@each_op
def test_a_token_of_minus_infinity(op: Op, backend: str) -> None:
    """It has the gradient that a target of minus infinity has in `linear_logprob`."""
    given = op.problem((20, 16, 300), bias=True, k=3)
    given["bias"][given["token"][0, 0]] = -torch.inf
    results, truth = given.solve(backend), given.truth()
    (name,) = op.outputs
    assert truth[name].isinf().any()
    torch.testing.assert_close(results[name].double(), truth[name], rtol=1e-4, atol=1e-5)
    for name in op.gradients.values():
        gate(name, results[name], truth[name], given.results(op.reference)[name])


@each_backend
def test_the_teacher_has_no_gradient(backend: str) -> None:
    given = kl_problem((20, 16, 300), k=3)
    logits = torch.randn(20, 4, requires_grad=True)
    hidden = given["hidden"].clone().requires_grad_()
    log_prob = logits.log_softmax(-1)[:, :3]
    kl = linear_topk_kl(hidden, given["weight"], given["token"], log_prob, backend=backend)
    kl.sum().backward()
    assert hidden.grad is not None
    assert logits.grad is None


@pytest.mark.parametrize("add_tail", [True, False])
def test_it_is_what_trl_makes_of_logits(add_tail: bool) -> None:
    trainer = pytest.importorskip(
        "trl.experimental.server_distillation.server_distillation_trainer"
    )
    given = kl_problem((20, 16, 300), bias=True, k=4)
    log_prob, token = given["log_prob"].clone(), given["token"]
    log_prob[3, 2:] = -torch.inf
    head = (given["hidden"], given["weight"], token)
    logits = given["hidden"] @ given["weight"].t() + given["bias"]
    of_trl = trainer.ServerDistillationTrainer
    # All that the loss reads of its trainer.
    reduce = staticmethod(of_trl._reduce_divergence_loss)
    members = {"loss_add_tail": add_tail, "_reduce_divergence_loss": reduce}
    expected = of_trl._compute_server_forward_kl_loss(
        type("Trainer", (), members)(),
        {"topk_logprobs": log_prob[None], "topk_token_ids": token[None]},
        log_softmax(logits, -1)[None],
        torch.zeros(1, 20, dtype=torch.int64),
    )
    if add_tail:
        got = linear_topk_kl(*head, log_prob, bias=given["bias"])
    else:
        absent = token.masked_fill(log_prob == -torch.inf, -1)
        log_q = linear_topk_logprob(*head[:2], absent, bias=given["bias"])[..., :-1]
        log_p, log_q = log_prob.log_softmax(-1), log_q.log_softmax(-1)
        got = (log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p - log_q)).sum(-1)
    torch.testing.assert_close(got.mean(), expected)


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [pytest.param(op, *case, id=f"{op.name}: {case[2]}") for op in OPS for case in op.bad],
)
def test_wrong_arguments(op: Op, change: dict[str, Any], error: Any, message: str) -> None:
    op.function(**op.good)
    with pytest.raises(error, match=message):
        op.function(**(op.good | change))


def test_nothing_of_all_logits_nor_of_all_rows_of_the_weight() -> None:
    N, H, V, k = 640, 160, 1500, 50
    given = kl_problem((N, H, V), k=k)
    with LargestTensor() as recorded:
        given.solve("auto")
    assert max(recorded.sizes) == V * H * 4
    assert N * V * 4 > V * H * 4 < N * k * H * 4


@each_op
def test_no_gradient_that_nobody_asks_for(op: Op) -> None:
    given = replace(op.problem((20, 16, 3000)), trained=("hidden",))
    leaves = given.arguments | {"hidden": given["hidden"].clone().requires_grad_()}
    with LargestTensor() as largest:
        (result,) = op.named(op.function(**leaves)).values()
        result.backward(given.upstream[op.outputs[0]])
    assert max(largest.sizes) < given["weight"].nbytes
    alone = given.solve("auto")
    every = replace(given, trained=("hidden", "weight")).solve("auto")
    assert_same(alone, {name: every[name] for name in alone})


@each_form
def test_opcheck(op: Op, form: dict[str, Any]) -> None:
    for trained in (("hidden", "weight", "bias"), ("hidden",)):
        given = replace(op.of_rows(9, **form), trained=trained)
        with RawOps() as raw:
            given.solve("auto")
        assert len(raw.calls) == 2
        for function, arguments in raw.calls:
            torch.library.opcheck(function, arguments)


@each_backend
@each_dtype
@each_form
def test_the_meta_device_and_fake_tensors(
    op: Op, form: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    given = op.of_rows(6, dtype, **form)
    expected = forms(given.solve("auto"))
    assert forms(given.map(lambda t: t.to("meta")).solve(backend)) == expected
    mode = FakeTensorMode()
    fake = given.map(mode.from_tensor)
    with mode:
        assert forms(fake.solve(backend)) == expected


@each_form
def test_compiles_once_for_any_number_of_rows(op: Op, form: dict[str, Any]) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager = partial(losses, op, [{}])
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for N in (6, 8, 14, 28):
        given = [op.of_rows(N, **form)]
        results = values_and_gradients(given, compiled)
    torch.testing.assert_close(results, values_and_gradients(given, eager))
    assert counter.frame_count == 2


@each_op
def test_autocast_casts_as_linear_does(op: Op) -> None:
    given = op.problem((9, 150, 31), bias=True)
    low = given.but(**{name: given[name].bfloat16() for name in op.gradients})
    with torch.autocast("cpu", torch.bfloat16):
        got = given.solve("auto")
    assert_same({n: got[n] for n in op.outputs}, {n: low.solve("auto")[n] for n in op.outputs})
    assert all(got[name].dtype == torch.float32 for name in op.gradients.values())


@each_op
def test_double_backward_is_refused(op: Op) -> None:
    given = op.plain(9)
    hidden = given["hidden"].requires_grad_()
    output = op.function(**given.arguments)
    with pytest.raises(RuntimeError, match="linear_topk has no double backward"):
        torch.autograd.grad(output.sum(), hidden, create_graph=True)


@each_op
def test_rows_without_an_upstream_gradient(op: Op) -> None:
    given = op.plain(40)
    (name,) = op.outputs
    upstream = given.upstream[name].clone()
    upstream[::3] = 0
    results = check(replace(given, upstream={name: upstream}), "auto")
    assert not results["dx"][::3].any()
    none = replace(given, upstream={name: torch.zeros_like(upstream)}).solve("auto")
    assert not any(none[gradient].any() for gradient in op.gradients.values())
