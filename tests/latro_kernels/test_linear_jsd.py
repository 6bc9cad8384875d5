"""linear_jsd: the gates of all ops, and what it alone has."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from latro_kernels import linear_jsd, linear_kl, logit_tiles
from tests.latro_kernels.ops.linear_jsd import OP, problem
from tests.latro_kernels.ops.linear_kl import equal_heads, share_weight
from tests.latro_kernels.ops.op import Problem, assert_same, check, each_dtype, gate
from tests.latro_kernels.test_memory import LargestTensor
from tests.latro_kernels.test_torch import RawOps, forms, losses, values_and_gradients

each_backend = pytest.mark.parametrize("backend", ["auto", "reference"])
each_form = pytest.mark.parametrize("form", OP.forms.values(), ids=OP.forms)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and slices of the vocabulary."""
    monkeypatch.setattr(logit_tiles, "CPU_ROWS", 24)
    monkeypatch.setattr(logit_tiles, "CPU_COLUMNS", 192)


@each_backend
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [pytest.param(*sample, id="-".join(map(str, sample))) for sample in OP.samples],
)
def test_matches_fp64(
    shape: Any, dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    check(problem(shape, dtype, **options), backend)


@pytest.mark.gpu
@each_dtype
def test_on_a_gpu(dtype: torch.dtype) -> None:
    check(OP.plain(40, dtype).map(lambda t: t.to("cuda")), "auto")


# The same problems every time: two rounding errors are compared, and theirs may be small by chance.
@drawn(given=OP.draws)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_shape(given: Problem) -> None:
    check(given, "auto")


def test_the_reference_is_the_formula() -> None:
    given = OP.plain(7, torch.float64, temperature=0.7, softcap=3.1, beta=0.3)
    expected = OP.formula(**given.arguments)
    results = OP.named(OP.reference(**given.arguments))
    step = 16 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(results["jsd"], expected["jsd"], rtol=step, atol=step)
    assert_same(OP.named(linear_jsd(**given.arguments, backend="reference")), results)


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.9])
def test_it_is_what_trl_makes_of_logits(beta: float) -> None:
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    given = problem((20, 16, 300), beta=beta)
    teacher, student = (given[f"hidden_{n}"] @ given[f"weight_{n}"].t() for n in "pq")
    expected = trainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")
    torch.testing.assert_close(linear_jsd(**given.arguments).sum(), expected)


@each_backend
@pytest.mark.parametrize("shape", [(), (2, 3), (3, 1, 2), (2, 0)], ids=str)
def test_rows_have_any_leading_dimensions(shape: tuple[int, ...], backend: str) -> None:
    flat = problem((math.prod(shape), 16, 300), bias=True)
    batch = flat.but(**{name: flat[name].view(*shape, 16) for name in OP.rows})
    batch = replace(batch, upstream={"jsd": flat.upstream["jsd"].view(shape)})
    expected, got = flat.solve(backend), batch.solve(backend)
    assert got["jsd"].shape == shape
    for name in ("jsd", "dx", "dx_q"):
        got[name] = got[name].view_as(expected[name])
    torch.testing.assert_close(got, expected)


def test_it_tends_to_the_kl_of_either_direction() -> None:
    given = problem((20, 16, 300), apart=0.3)
    heads = [given[f"{name}_{head}"] for head in "pq" for name in ("hidden", "weight")]
    small = 2.0**-14
    of_p, of_q = linear_jsd(*heads, beta=small), linear_jsd(*heads, beta=1 - small)
    torch.testing.assert_close(of_p / small, linear_kl(*heads), rtol=0.01, atol=0.01)
    backwards = linear_kl(*heads[2:], *heads[:2])
    torch.testing.assert_close(of_q / small, backwards, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_heads_in_each_others_place(beta: float) -> None:
    given = problem((30, 16, 300), bias=True, beta=beta)
    swapped = given.but(
        beta=1 - beta,
        **{
            f"{n}_{to}": given[f"{n}_{of}"]
            for n in ("hidden", "weight", "bias")
            for to, of in ("pq", "qp")
        },
    )
    got, other = given.solve("auto"), swapped.solve("auto")
    for name in ("jsd", "dx", "dw", "db"):
        twin = name if name == "jsd" else f"{name}_q"
        torch.testing.assert_close(got[name], other[twin], rtol=1e-4, atol=1e-6)


@each_dtype
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 5.0, "beta": 0.1}])
def test_equal_heads_give_exactly_zero(dtype: torch.dtype, options: dict[str, Any]) -> None:
    given = equal_heads(problem((61, 64, 1031), dtype, bias=True, **options))
    for case in (given, share_weight(given)):
        assert not any(value.any() for value in case.solve("auto").values())


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_a_small_divergence_keeps_its_digits(beta: float) -> None:
    """Heads 1e-4 apart have one below the rounding of their log-probs."""
    given = problem((40, 64, 1031), apart=1e-4, beta=beta)
    true = given.truth()["jsd"]
    assert true.max() < 1e-7
    got = given.solve("auto")["jsd"]
    assert (got >= 0).all()
    assert ((got - true).abs() / true).max() < 2**-6
    assert ((given.unfused()["jsd"] - true).abs() / true).max() > 1


@pytest.mark.parametrize("far", [1e4, 1e6])
@pytest.mark.parametrize("shape", [(40, 3, 2), (40, 3, 350)], ids=str)
def test_logits_far_apart_keep_their_digits(far: float, shape: tuple[int, int, int]) -> None:
    """The logits have quarters, which fp32 holds beside `far`."""
    given = problem(shape, beta=0.3)
    given["hidden_p"][:], given["hidden_q"][:] = torch.eye(3)[:1], torch.eye(3)[1:2]
    for name in ("weight_p", "weight_q"):
        given[name].mul_(4).round_().div_(4)
    given["weight_p"][:, 0] += far
    ours, exact, plain = given.solve("auto"), given.truth(), given.unfused()
    # The gradients with respect to hidden states are products with `far`.
    for name in ("jsd", "dw", "dw_q"):
        gate(name, ours[name], exact[name], plain[name])


@each_backend
def test_logits_of_minus_infinity(backend: str) -> None:
    """A token that both rule out is none; one that a head alone rules out costs a finite amount."""
    given = problem((3, 9, 350), bias=True)
    given["bias_p"][100:330] = -torch.inf
    given["bias_q"][50:300] = -torch.inf
    results = given.solve(backend)
    finite = given.but(
        bias_p=given["bias_p"].clamp(min=-1e4), bias_q=given["bias_q"].clamp(min=-1e4)
    )
    expected = finite.truth()
    for name in ("jsd", "dx", "dx_q"):
        torch.testing.assert_close(results[name].double(), expected[name], rtol=1e-4, atol=1e-5)


def test_heads_with_nothing_in_common() -> None:
    """Then it is the entropy of (beta, 1 - beta), whatever the distance."""
    identity = torch.eye(3)
    p, q = torch.tensor([[500.0, 0, 0]]), torch.tensor([[0, 500.0, 0]])
    for beta in (0.5, 0.1):
        got = linear_jsd(p, identity, q, identity.clone(), beta=beta).item()
        entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
        assert got == pytest.approx(entropy, rel=1e-6)


@each_backend
@each_dtype
def test_strided_inputs(dtype: torch.dtype, backend: str) -> None:
    for strided in OP.strided(OP.plain(40, dtype)):
        check(strided, backend)


@pytest.mark.parametrize(
    ("change", "error", "message"), [pytest.param(*case, id=case[2]) for case in OP.bad]
)
def test_wrong_arguments(change: dict[str, Any], error: Any, message: str) -> None:
    linear_jsd(**OP.good)
    with pytest.raises(error, match=message):
        linear_jsd(**(OP.good | change))


def test_nothing_of_all_logits() -> None:
    N, H, V = 640, 160, 1500
    given = problem((N, H, V))
    with LargestTensor() as recorded:
        given.solve("auto")
    assert max(recorded.sizes) == V * H * 4 < N * V * 4


@pytest.mark.parametrize("head", ["p", "q"])
def test_gradients_of_one_head(head: str) -> None:
    given = OP.plain(40)
    every = given.solve("auto")
    of_head = tuple(name for name in given.trained if name.endswith(head))
    alone = replace(given, trained=of_head).solve("auto")
    assert len(alone) == 4
    assert_same(alone, {name: every[name] for name in alone})


@each_form
def test_opcheck(form: dict[str, Any]) -> None:
    for trained, backwards in ((OP.gradients, 2), (("hidden_q",), 1)):
        with RawOps() as raw:
            replace(OP.of_rows(9, **form), trained=tuple(trained)).solve("auto")
        assert len(raw.calls) == 1 + backwards
        for function, arguments in raw.calls:
            torch.library.opcheck(function, arguments)


@each_backend
@each_dtype
@each_form
def test_the_meta_device_and_fake_tensors(
    form: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    given = OP.of_rows(6, dtype, **form)
    expected = forms(given.solve("auto"))
    assert forms(given.map(lambda t: t.to("meta")).solve(backend)) == expected
    mode = FakeTensorMode()
    fake = given.map(mode.from_tensor)
    with mode:
        assert forms(fake.solve(backend)) == expected


@each_form
def test_compiles_once_for_any_number_of_rows(form: dict[str, Any]) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager = partial(losses, OP, [{}])
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for N in (6, 8, 14, 28):
        given = [OP.of_rows(N, **form)]
        results = values_and_gradients(given, compiled)
    torch.testing.assert_close(results, values_and_gradients(given, eager))
    assert counter.frame_count == 2


def test_autocast_casts_as_linear_does() -> None:
    given = problem((9, 150, 31), bias=True)
    low = given.but(**{name: given[name].bfloat16() for name in OP.gradients})
    with torch.autocast("cpu", torch.bfloat16):
        got = given.solve("auto")
    assert torch.equal(got["jsd"], low.solve("auto")["jsd"])
    assert all(got[name].dtype == torch.float32 for name in OP.gradients.values())


def test_any_default_dtype() -> None:
    given = OP.of_rows(30, **next(iter(OP.forms.values())), beta=0.01)
    expected = given.solve("auto")
    before = torch.get_default_dtype()
    for default in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        try:
            got = given.solve("auto")
        finally:
            torch.set_default_dtype(before)
        assert_same(got, expected)


def test_double_backward_is_refused() -> None:
    given = OP.plain(9)
    hidden = given["hidden_q"].requires_grad_()
    with pytest.raises(RuntimeError, match="linear_jsd has no double backward"):
        torch.autograd.grad(linear_jsd(**given.arguments).sum(), hidden, create_graph=True)


def test_rows_without_an_upstream_gradient() -> None:
    given = OP.plain(40)
    upstream = given.upstream["jsd"].clone()
    upstream[::3] = 0
    results = check(replace(given, upstream={"jsd": upstream}), "auto")
    assert not results["dx"][::3].any()
    assert not results["dx_q"][::3].any()
