"""A frozen head's sum of dx, of exponentials under a shift that is known before the maximum.

Against fp64, within what rounding each exponential once may do, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latro_kernels.linear_logprob.triton import fused, fused_frozen
from tests.latro_kernels.ops.linear_logprob import of_a_part, problem
from tests.latro_kernels.ops.op import Problem, assert_same

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
N, H, V = SHAPE = (8, 9, 140)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def check_sum(given: Problem, found: dict[str, Tensor]) -> None:
    """Hold dx_sum to its definition in fp64, within the rounding of its terms."""
    hidden, weight, bias = (given[name].double() for name in ("hidden", "weight", "bias"))
    a = hidden @ weight.T + bias
    z, slope = a, torch.ones_like(a)
    if given["softcap"]:
        z = given["softcap"] * torch.tanh(a / given["softcap"])
        slope = 1 - (z / given["softcap"]).square()
    z, slope = z / given["temperature"], slope / given["temperature"]
    top = z.amax(1, keepdim=True)
    e = (z - top).exp() * slope
    is_target = torch.arange(len(weight)) == given["target"][:, None]
    terms = torch.where(is_target, 0, e)
    # An exponential is rounded once to the dtype, by half a unit in its last place, or, where that
    # is smaller, by half of the smallest number; that of fp32 logits is off by their rounding.
    info = torch.finfo(given["hidden"].dtype)
    off = info.eps / 2 + 8 * torch.finfo(torch.float32).eps * (1 + z.abs().nan_to_num(posinf=0))
    bound = (terms * off + info.tiny * info.eps / given["temperature"]) @ weight.abs()
    error = (found["dx_sum"].double() - terms @ weight).abs()
    assert (error <= bound).all(), (error / bound).amax(1)
    torch.testing.assert_close(found["row_max"].double(), top[:, 0], rtol=1e-5, atol=1e-5)


def bias_of(change: Callable[[Tensor], None]) -> Tensor:
    """Return a random bias that was changed."""
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1))
    change(bias)
    return bias


def of_slices(step: float) -> Callable[[Tensor], None]:
    """Return what adds `step` to the bias for each slice, or block of it, that went before."""

    def change(bias: Tensor) -> None:
        bias += step * (torch.arange(V) // 32)

    return change


def at(column: int | slice, value: float) -> Callable[[Tensor], None]:
    """Return what puts a value into some columns of the bias."""

    def change(bias: Tensor) -> None:
        bias[column] = value

    return change


def alternating(bias: Tensor) -> None:
    """Put large numbers of either sign into the bias."""
    bias[::2] = 1e4
    bias[1::2] = -1e4


BIASES: dict[str, Callable[[Tensor], None]] = {
    "a maximum that rises in every block": of_slices(60.0),
    "one that falls": of_slices(-60.0),
    "one that rises by less than is too much": of_slices(5.0),
    "a maximum in the last column": at(V - 1, 300.0),
    "a maximum in the first column": at(0, 300.0),
    "logits of minus infinity first": at(slice(0, 100), -torch.inf),
    "and last": at(slice(100, V), -torch.inf),
    "columns of 10,000 and of -10,000": alternating,
    "nothing above -10,000": at(slice(0, V), -1e4),
    "one logit of 10,000": at(V // 2, 1e4),
}
# Of which shifts are made: the first column, the last, others, and those of other ranks.
TARGETS = torch.tensor([0, V - 1, 5, 101, 70, V + 7, -1, 33])


@HALVES
@pytest.mark.parametrize("bias", BIASES)
def test_no_shift_loses_digits(bias: str, dtype: torch.dtype) -> None:
    given = problem(SHAPE, dtype, bias=True)
    given = given.but(bias=bias_of(BIASES[bias]).to(dtype), target=TARGETS)
    check_sum(given, of_a_part(given))


@HALVES
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.05}, {"temperature": 30.0}, {"softcap": 5.0, "temperature": 0.7}],
    ids=str,
)
def test_temperature_and_softcap(options: dict[str, float], dtype: torch.dtype) -> None:
    for change in (of_slices(0.0), of_slices(3.0), at(V - 1, 300.0)):
        given = problem(SHAPE, dtype, bias=True, **options).but(bias=bias_of(change).to(dtype))
        check_sum(given, of_a_part(given))


@pytest.fixture
def redone(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return, for every slice, whether any row's exponentials have to be made again."""
    seen: list[bool] = []
    redo = fused._redo

    def recorded(head: Any, tile: Any, state: Any, config: Any, **more: Any) -> None:
        shift = more["exponentials"][1] / head.temperature
        seen.append(bool((state.row_max - shift > more["limit"]).any()))
        redo(head, tile, state, config, **more)

    monkeypatch.setattr(fused, "_redo", recorded)
    return seen


def test_exponentials_of_ordinary_rows_are_made_once(redone: list[bool]) -> None:
    of_a_part(problem(SHAPE, torch.bfloat16, bias=True))
    assert redone
    assert not any(redone)


def test_a_maximum_that_rises_too_far_is_seen(redone: list[bool]) -> None:
    """Again and again; and a row that has risen is at its maximum from then on."""
    given = problem(SHAPE, torch.bfloat16, bias=True)
    given = given.but(target=torch.zeros(N, dtype=torch.int64))
    of_a_part(given.but(bias=bias_of(of_slices(60.0)).bfloat16()))
    assert all(redone)
    redone.clear()
    of_a_part(given.but(bias=bias_of(at(100, 300.0)).bfloat16()))
    # The slice of column 100 of three, in both blocks of rows.
    assert redone == [False, True, False] * 2


def test_no_limit_is_too_high_for_the_dtype() -> None:
    """At the limit a whole vocabulary of exponentials, times large weights, is finite."""
    for dtype in (torch.bfloat16, torch.float16):
        limit = fused._MAX_RISE.get(dtype, fused._MAX_RISE_OF_FP32)
        largest = torch.tensor(limit, dtype=torch.float64).exp()
        assert 2 * largest < torch.finfo(dtype).max
        assert largest * 2**20 * 2**16 < torch.finfo(torch.float32).max


@HALVES
def test_every_row_has_a_logit_of_its_own_as_shift(dtype: torch.dtype) -> None:
    given = problem(SHAPE, dtype, bias=True, softcap=5.0)
    shift = torch.empty(N)
    fused_frozen.shift_kernel[(N,)](
        hidden_ptr=given["hidden"],
        weight_ptr=given["weight"],
        bias_ptr=given["bias"].float(),
        target_ptr=given["target"],
        shift_ptr=shift,
        H=H,
        V=V,
        stride_xn=H,
        stride_xh=1,
        stride_wv=H,
        stride_wh=1,
        softcap=5.0,
        BLOCK_H=16,
    )
    torch.testing.assert_close(shift, of_a_part(given)["target_logit"], rtol=1e-6, atol=1e-6)


def test_a_block_of_rows_is_redone_for_one_of_them() -> None:
    """The others keep their exponentials, and their bits."""
    given = problem(SHAPE, torch.bfloat16, bias=True)
    risen = given["hidden"].clone()
    # Of row 1 alone, far above what its shift is.
    direction = given["weight"][120].float()
    risen[1] = (direction * (200.0 / direction.square().sum())).bfloat16()
    changed = given.but(hidden=risen)
    found, before = of_a_part(changed), of_a_part(given)
    others = torch.arange(N) != 1
    check_sum(changed, found)
    assert_same(
        {name: value[others] for name, value in found.items()},
        {name: value[others] for name, value in before.items()},
    )
