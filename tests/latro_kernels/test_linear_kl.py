"""What linear_kl alone has: digits of small KLs, two heads that may be equal, and ∞."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.latro_kernels.ops.linear_kl import (
    OP,
    equal_heads,
    nearly_one_hot,
    of_logits,
    problem,
    share_weight,
)
from tests.latro_kernels.ops.op import (
    COLUMNS,
    INTERPRETED,
    ROWS,
    assert_same,
    check,
    each_backend,
    each_dtype,
)

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
SHAPE = (10, 9, 70) if INTERPRETED else (61, 256, 1031)


@each_backend
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    "shape", [(7, 70)] if INTERPRETED else [(1, 3), (20, 11), (7, 300)], ids=str
)
def test_nearly_one_hot_and_far_apart(shape: tuple[int, int], scale: float, backend: str) -> None:
    """The gradient at the likely token is a millionth of what it is the difference of."""
    given = nearly_one_hot(*shape, scale).on(backend)
    dx = check(given, backend)["dx"]
    if backend != "reference":
        torch.testing.assert_close(dx.double(), given.truth()["dx"], rtol=1e-5, atol=0)


@each_backend
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_one_likely_token_among_three(scale: float, backend: str) -> None:
    zp = torch.tensor([[40.363994581876426, 4.30750576201069, 2.2369950442807793]])
    zq = torch.tensor([[-59.33355497818053, -15.327916284520228, 38.43913177334029]])
    got = check(of_logits(zp, zq, torch.tensor([scale])).on(backend), backend)["dx"][0, 0].item()
    if backend != "reference":
        assert got == pytest.approx(scale * 2.19e-14, rel=0.05)


@each_backend
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 5.0}, {"apart": 1e-3}])
@each_dtype
def test_equal_heads_give_exactly_zero(
    dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    """With a weight of its own or p's, at any place in the batch; the reference's are rounded."""
    given = equal_heads(problem(SHAPE, dtype, bias=True, **options).on(backend))
    for case in (given, share_weight(given)):
        results = case.solve(backend)
        assert (results["kl"] == 0).all()
        if backend != "reference":
            assert not any(results[name].any() for name in OP.gradients.values())


@each_backend
def test_a_small_kl_keeps_its_digits(backend: str) -> None:
    """Heads 1e-4 apart have a KL of 4e-8, below the rounding of their log-probs."""
    N, V = (6, 70) if INTERPRETED else (40, 1031)
    given = problem((N, 64, V), apart=1e-4).on(backend)
    true = given.truth()["kl"]
    assert true.max() < 1e-7
    if backend != "reference":
        error = (given.solve(backend)["kl"] - true).abs() / true
        assert error.max() < 2**-6
    if not INTERPRETED:
        assert ((OP.reference(**given.arguments) - true).abs() / true).max() > 1


@pytest.mark.parametrize("H", [1, 2, 3])
def test_few_products_a_logit(H: int) -> None:
    """Then little is rounded by torch, too."""
    for seed in range(40):
        for softcap in (None, 5.0):
            check(problem((20, H, 50), bias=True, softcap=softcap, scale=100, seed=seed), "cpu")


@each_backend
def test_logits_that_differ_by_a_constant(backend: str) -> None:
    """The softmax does not see it: the KL stays as it was, also where that is 0."""
    given = problem((ROWS, 9, COLUMNS if INTERPRETED else 300), bias=True, apart=0.1)
    check(given.but(bias_q=given["bias_q"] + 3.0).on(backend), backend)
    equal = equal_heads(given).but(bias_q=given["bias_p"] + 3.0).on(backend)
    assert equal.solve(backend)["kl"].abs().max() < 1e-6


@each_backend
@each_dtype
def test_a_shared_weight_changes_nothing(dtype: torch.dtype, backend: str) -> None:
    given = share_weight(problem((10, 40, 70) if INTERPRETED else (61, 130, 300), dtype, bias=True))
    given = given.on(backend)
    shared = check(given, backend)
    assert_same(shared, given.but(weight_q=given["weight_p"].clone()).solve(backend))


@each_backend
def test_logits_of_minus_infinity(backend: str) -> None:
    """A token that p rules out counts for q's sum alone; one that q rules out is infinite."""
    given = problem((3, 9, 350), bias=True)
    given["bias_p"][100:330] = -torch.inf
    given["bias_q"][100:300] = -torch.inf
    given = given.on(backend)
    results = given.solve(backend)
    kept = torch.cat([torch.arange(100), torch.arange(300, 350)])
    expected = given.but(**{name: given[name][kept] for name in OP.columns}).truth()
    for name in ("kl", "dx", "dx_q"):
        torch.testing.assert_close(results[name].double(), expected[name], rtol=1e-5, atol=1e-5)
    assert not results["dw"][100:330].any()
    given["bias_q"][50] = -torch.inf
    assert (given.solve(backend)["kl"] == torch.inf).all()
    # Also where that token is p's likeliest.
    given["bias_p"][50] = 50
    assert (given.solve(backend)["kl"] == torch.inf).all()


@each_backend
@pytest.mark.parametrize("head", ["p", "q"])
def test_one_head_alone_has_the_gradient_that_it_has_beside_the_other(
    head: str, backend: str
) -> None:
    given = problem((10, 9, 70), bias=True, hidden_size_q=4, softcap=5.0).on(backend)
    both = given.solve(backend)
    of_head = tuple(name for name in given.trained if name.endswith(head))
    alone = replace(given, trained=of_head).solve(backend)
    assert len(alone) == 4
    assert_same(alone, {name: both[name] for name in alone})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_weight_of_both_heads_has_the_sum_of_both_gradients(backend: str) -> None:
    given = share_weight(problem((9, 8, 31)))
    apart = given.solve(backend)
    hidden_p, hidden_q = given["hidden_p"], given["hidden_q"]
    weight = given["weight_p"].clone().requires_grad_()
    kl = OP.function(hidden_p, weight, hidden_q, weight, backend=backend)
    kl.backward(given.upstream["kl"])
    torch.testing.assert_close(weight.grad, apart["dw"] + apart["dw_q"])


@each_backend
def test_a_token_that_p_rules_out_pushes_q_away(backend: str) -> None:
    """Where p is 0, or an exponential of fp32 is, the gradient of q's logit is q."""
    zp = torch.tensor([[0.0, -torch.inf, -200.0, 1.0]])
    zq = torch.tensor([[1.0, 2.0, 0.5, 0.0]])
    given = of_logits(zp, zq, torch.tensor([2.0])).but(
        hidden_p=torch.ones(1, 1), weight_p=zp.t().contiguous()
    )
    got = given.on(backend).solve(backend)["dx_q"]
    expected = 2 * (zq.softmax(-1) - zp.softmax(-1))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-6, atol=1e-6)
