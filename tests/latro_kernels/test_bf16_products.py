"""Each way in which CPUs multiply bf16: widened to fp32, with AVX512-BF16, with AMX.

The other tests take the best that the processor has. Here each that it has passes the same gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from latro_kernels import few_rows_linear, linear_logprob, linear_sample, native
from tests.latro_kernels.ops.op import INTERPRETED, Op, assert_same, check, gate
from tests.latro_kernels.ops.table import (
    LINEAR_KL,
    LINEAR_LOGPROB,
    LINEAR_SAMPLE,
    each_form,
    each_op,
)

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="has no kernel in Triton"),
    pytest.mark.usefixtures("products"),
]
BF16 = torch.bfloat16
OPS = [LINEAR_LOGPROB, LINEAR_KL, LINEAR_SAMPLE]
# No whole word; no whole step of AMX; one step more; several pieces.
DEPTHS = (129, 130, 160, 257, 600, 4200)


@pytest.fixture(params=["LATRO_BF16_WIDENED", "LATRO_BF16_AVX512", "LATRO_BF16_AMX"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have bf16 multiplied in one way, where the processor can."""
    library, kind = native.library("cpu"), native.constants()[request.param]
    # Each is better than the one before, and what has AMX has AVX512-BF16 too.
    if library.latro_cpu_bf16_products() < kind:
        pytest.skip(f"this processor cannot: {request.param}")
    monkeypatch.setattr(library, "latro_cpu_bf16_products", lambda: kind)


def _heads(N: int, H: int, V: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(N + H + V)
    hidden = torch.randn(N, H, generator=random).to(BF16)
    weight = (2 * torch.randn(V, H, generator=random) / H**0.5).to(BF16)
    return hidden, weight, torch.randint(V, (N,), generator=random)


@each_op(OPS)
def test_matches_fp64(op: Op) -> None:
    for shape, dtype, options in op.samples:
        if dtype == BF16:
            check(op.problem(shape, dtype, **options), "cpu")


@each_op(OPS)
def test_strided_inputs(op: Op) -> None:
    for strided in op.strided(op.plain(40, BF16)):
        check(strided, "cpu")


@each_form(OPS, backends=[pytest.param("cpu")])
def test_a_row_does_not_depend_on_the_others_or_on_threads(
    op: Op, form: dict[str, Any], backend: str
) -> None:
    threads = torch.get_num_threads()
    given = op.problem(op.uneven[0], BF16, **form)
    whole = given.map(torch.clone).solve(backend)
    try:
        torch.set_num_threads(threads + 1)
        assert_same(given.map(torch.clone).solve(backend), whole)
    finally:
        torch.set_num_threads(threads)
    if "grad_filter" in form:
        return
    n = len(given[op.rows[0]])
    for rows in (slice(0, 1), slice(n // 8, n // 2), torch.tensor([-1, n // 2, 1])):
        part = given.of_rows(rows).map(torch.clone).solve(backend)
        for name in part.keys() & op.row_results:
            assert torch.equal(part[name], whole[name][rows]), name


@pytest.mark.parametrize("H", DEPTHS)
def test_few_rows_have_the_bits_of_many(H: int) -> None:
    """Few are multiplied the other way around: the weight's rows by a panel of hidden states."""
    hidden, weight, target = _heads(150, H, 391)
    whole = linear_logprob(hidden, weight, target, backend="cpu")
    transposed = weight.t().contiguous().t()
    for N in (1, 2, 8, 9, 15, 16, 17, 33, 64, 65):
        few = linear_logprob(hidden[:N], weight, target[:N], backend="cpu")
        assert torch.equal(few, whole[:N]), N
        other = linear_logprob(hidden[:N], transposed, target[:N], backend="cpu")
        assert torch.equal(other, whole[:N]), N
        seed = torch.arange(N)
        token, logp, _ = linear_sample(hidden[:N], weight, seed, 0 * seed, backend="cpu")
        assert torch.equal(logp, linear_logprob(hidden, weight, _padded(token, 150))[:N]), N


def _padded(token: torch.Tensor, N: int) -> torch.Tensor:
    return torch.cat([token, token.new_zeros(N - len(token))])


@pytest.mark.parametrize("H", DEPTHS)
def test_a_linear_layer_of_few_rows(H: int) -> None:
    x, weight, _ = _heads(70, H, 203)
    for N in (1, 5, 16, 70):
        y = few_rows_linear(x[:N], weight, backend="cpu")
        gate("y", y, linear(x[:N].double(), weight.double()), linear(x[:N], weight))


def _of_torch() -> torch.Tensor:
    x, weight, _ = _heads(200, 256, 500)
    return x @ weight.t()


def _of_ours() -> torch.Tensor:
    return linear_logprob(*_heads(200, 256, 500), backend="cpu")


@pytest.mark.parametrize(
    "order", [(_of_torch, _of_ours), (_of_ours, _of_torch)], ids=["torch first", "ours first"]
)
def test_products_of_torch_beside_ours(order: tuple[Callable[[], torch.Tensor], ...]) -> None:
    """AMX's registers have a state, and torch's library sets it in the same threads."""
    first = [function() for function in order]
    for _ in range(5):
        for function, expected in zip(order, first, strict=True):
            assert torch.equal(function(), expected)
