"""How rows are cut into blocks, and in which precision products are summed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from latro_kernels import logit_tiles
from latro_kernels.head import Head
from latro_kernels.head_gradient import Gradient, sweep
from latro_kernels.logit_tiles import Tile, add_product, blocks_of_rows


@pytest.mark.parametrize("most", [1, 6, 24, 128, 2048, 4096, 8192])
@pytest.mark.parametrize("N", [0, 1, 127, 129, 2049, 8191, 8192, 8200, 16_385, 30_721])
def test_blocks_of_rows_are_few_and_even(N: int, most: int) -> None:
    blocks = list(blocks_of_rows(N, most))
    edges = [0, *(block.stop for block in blocks)]
    assert [block.start for block in blocks] == edges[:-1]
    assert edges[-1] == N
    assert len(blocks) == -(-N // most)
    sizes = [block.stop - block.start for block in blocks]
    group = max(g for g in range(1, 129) if most % g == 0 and 128 % g == 0)
    assert all(block.start % group == 0 for block in blocks)
    assert all(0 < size <= most for size in sizes)
    # The last group of rows need not be full.
    assert max(sizes, default=0) - min(sizes, default=0) < 2 * group


def test_a_few_rows_more_are_no_block_of_their_own() -> None:
    assert list(blocks_of_rows(8200, 8192)) == [slice(0, 4096), slice(4096, 8200)]


MATMUL = torch.backends.cuda.matmul
NAMES = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}
each_16_bit_dtype = pytest.mark.parametrize("dtype", list(NAMES), ids=str)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Leave torch's settings as they were, whatever a test does."""
    before = [getattr(torch._C, f"_get_cublas_{name}")() for name in NAMES.values()]
    yield
    for name, of in zip(NAMES.values(), before, strict=True):
        setattr(MATMUL, name, of)


class Products(TorchFunctionMode):
    """Records of each product its dtype and whether cuBLAS might round parts of it."""

    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, bool]] = []
        self.during = during

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.mm, torch.addmm, torch.Tensor.addmm_):
            dtype = kwargs["out"].dtype if kwargs else args[0].dtype
            self.during()
            self.seen.append((dtype, getattr(MATMUL, NAMES[dtype])))
        return func(*args, **(kwargs or {}))


@each_16_bit_dtype
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("of_caller", [True, False, (False, False)], ids=str)
def test_a_sum_in_16_bits_is_rounded_once(
    dtype: torch.dtype, first: bool, of_caller: bool | tuple[bool, bool]
) -> None:
    """No part is rounded by cuBLAS, and the caller's setting is the same before and after."""
    a, b, out = torch.randn(4, 6), torch.randn(6, 5), torch.zeros(4, 5)
    for name in NAMES.values():
        setattr(MATMUL, name, of_caller)
    before = [getattr(torch._C, f"_get_cublas_{name}")() for name in NAMES.values()]
    out = out.to(dtype)
    with Products() as products:
        add_product(out, a.to(dtype), b.to(dtype), first=first)
        with pytest.raises(RuntimeError):
            add_product(out, b.to(dtype), b.to(dtype), first=first)
    assert products.seen == [(dtype, False)] * 2
    assert [getattr(torch._C, f"_get_cublas_{name}")() for name in NAMES.values()] == before
    assert torch.equal(out, a.to(dtype) @ b.to(dtype))


@each_16_bit_dtype
def test_the_gradient_of_a_weight_is_rounded_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one block of rows, whose product is the gradient itself, as on a GPU."""
    monkeypatch.setattr(logit_tiles, "operand_dtype", lambda head: head.hidden.dtype)
    N, H, V = 12, 8, 20
    hidden, weight = torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype)
    head = Head(hidden, weight, bias=None, temperature=1.0, softcap=0.0, backend="triton")
    dz = torch.randn(N, V).to(dtype)

    def make(tile: Tile) -> Gradient:
        return Gradient(dz[tile.rows, tile.columns])

    for name in NAMES.values():
        setattr(MATMUL, name, True)
    with Products() as products:
        _, dw, _ = sweep(head, (False, True, False), (N, 8), make)
    allowed = {of: getattr(MATMUL, name) for of, name in NAMES.items()}
    assert allowed == dict.fromkeys(NAMES, True)
    assert dw is not None
    assert dw.dtype == dtype
    assert products.seen == [(dtype, False)] * 3
    torch.testing.assert_close(dw, (dz.double().t() @ hidden.double()).to(dtype))


def test_threads_do_not_undo_each_other() -> None:
    """A product that ends while another thread's is on its way leaves the setting to that one."""
    a = torch.randn(4, 4).bfloat16()
    second = Products()

    def run_second() -> None:
        with second:
            add_product(torch.empty_like(a), a, a, first=True)

    thread = threading.Thread(target=run_second)
    inside: list[bool] = []

    def begin_second() -> None:
        thread.start()
        thread.join(timeout=0.2)
        inside.append(thread.is_alive())

    MATMUL.allow_bf16_reduced_precision_reduction = True
    with Products(begin_second) as first:
        add_product(torch.empty_like(a), a, a, first=True)
    thread.join()
    assert inside == [True], "the second waits for the first"
    assert first.seen == second.seen == [(torch.bfloat16, False)]
    assert MATMUL.allow_bf16_reduced_precision_reduction is True
