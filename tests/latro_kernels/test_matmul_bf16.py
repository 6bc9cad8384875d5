"""The bf16 product with an fp32 result that linear_logprob's gradient is summed with on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latro_kernels import native

pytestmark = pytest.mark.skipif(
    not native.library("cpu").latro_cpu_matmul_bf16_supported(),
    reason="needs a processor with AVX-512 BF16",
)

# Around the sizes of a register block (12 x 32), of a cache block (240 x 256) and of a stretch of
# the sum (384), and odd ones.
SHAPES = [(1, 1, 1), (12, 32, 64), (13, 33, 65), (241, 257, 385), (100, 515, 771), (5, 7, 0)]


def product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    native.call(
        "latro_cpu_matmul_bf16",
        *(a, *a.stride(), b, *b.stride(), out, *out.shape, a.shape[1]),
        *(accumulate, torch.get_num_threads()),
    )
    return out


def operand(rows: int, cols: int, layout: str) -> Tensor:
    if layout == "row":
        return torch.randn(rows, cols).bfloat16()
    if layout == "column":
        return torch.randn(cols, rows).bfloat16().t()
    return torch.randn(rows, 2 * cols).bfloat16()[:, ::2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("a_layout", ["row", "column", "strided"])
@pytest.mark.parametrize("b_layout", ["row", "column", "strided"])
def test_it_is_as_exact_as_fp32(shape: tuple[int, int, int], a_layout: str, b_layout: str) -> None:
    rows, cols, length = shape
    torch.manual_seed(0)
    a, b = operand(rows, length, a_layout), operand(length, cols, b_layout)
    truth = a.double() @ b.double()
    # Products of bf16 are exact in fp32, so unfused fp32 is what it has to keep up with.
    error = (a.float() @ b.float() - truth).abs().amax() if length else torch.tensor(0.0)
    ours = product(a, b, torch.full((rows, cols), torch.nan))
    assert (ours - truth).abs().amax() <= 2 * error + 1e-5
    start = torch.randn(rows, cols)
    added = product(a, b, start.clone(), accumulate=True)
    assert (added - (start + truth)).abs().amax() <= 2 * error + 1e-5


def test_a_value_depends_on_neither_threads_nor_the_other_rows() -> None:
    torch.manual_seed(0)
    a, b = operand(500, 700, "row"), operand(700, 600, "column")
    threads = torch.get_num_threads()
    whole = product(a, b, torch.empty(500, 600))
    torch.set_num_threads(threads % 2 + 1)
    try:
        assert torch.equal(product(a, b, torch.empty(500, 600)), whole)
        assert torch.equal(product(a[77:90], b, torch.empty(13, 600)), whole[77:90])
    finally:
        torch.set_num_threads(threads)


def test_nan_and_infinity_pass_and_padding_adds_none() -> None:
    a, b = torch.ones(13, 65).bfloat16(), torch.ones(65, 33).bfloat16()
    a[3, 64], a[4, 0] = torch.nan, torch.inf
    out = product(a, b, torch.empty(13, 33))
    assert out[3].isnan().all()
    assert (out[4] == torch.inf).all()
    rest = [i for i in range(13) if i not in (3, 4)]
    assert (out[rest] == 65).all()
