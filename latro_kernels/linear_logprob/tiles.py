"""`linear_logprob` in tiles, for the GPU backends: products by torch, folds by a kernel.

A tile is the products hidden[rows] · weight[columns]ᵀ of a block of rows and a slice of the
vocabulary. The forward folds each tile into a few numbers per row and drops it, or keeps it where
the memory budget has room. The backward takes the kept tile, or makes it again, turns it into the
gradient dz with respect to the products, and `head_gradient` makes gradients of that. But for what
is kept no tensor of N × V exists, and none of V × H in another dtype than the weight's.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.head import Head
from latro_kernels.head_gradient import (
    Gradient,
    Tile,
    add_product,
    operand_dtype,
    slices,
    sweep,
)
from latro_kernels.linear_logprob.state import RowGrad, State, Wanted, make_state

# More rows make fewer sums of dw, and narrower slices of the vocabulary, which make more of dx.
MAX_TILE_ROWS = 4096
# Where there is no GPU to ask: Triton's interpreter, whose kernels meet CPU tensors.
_INTERPRETED_TILE_BYTES = 8 * 2**20


def tile_shape(head: Head) -> tuple[int, int]:
    """Rows and columns of a tile: a bound in bytes that depends on neither N nor V."""
    device = head.hidden.device
    if device.type == "cuda":
        tile_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        tile_bytes = _INTERPRETED_TILE_BYTES
    rows = max(1, min(head.hidden.shape[0], MAX_TILE_ROWS))
    # Whole groups of 64 columns keep a tile's rows, and the kernels' loads, aligned.
    return rows, min(head.weight.shape[0], max(64, tile_bytes // (rows * 4) // 64 * 64))


def forward(head: Head, wanted: Wanted) -> State:
    """Fold every tile into the state of its rows."""
    state = empty_state(head, wanted)
    state.clear()
    kernels, buffer = _kernels(head.backend), _tile_buffer(head)
    height, width = tile_shape(head)
    for columns, weight, bias in slices(head, width):
        for begin in range(0, len(head.hidden), height):
            rows = slice(begin, min(begin + height, len(head.hidden)))
            tile = _products(head, rows, columns, state.kept, buffer)
            x = head.hidden[rows].to(operand_dtype(head))
            add_product(tile, x, weight.t(), first=True)
            before = state.peak[rows].clone()
            kernels.fold(head, tile, bias, head.target[rows], state.rows(rows), columns.start)
            if state.pull is not None:
                _pull(head, state, rows, columns, tile, weight, bias, before)
    return state


def empty_state(head: Head, wanted: Wanted) -> State:
    """Room for what `forward` makes."""
    return make_state(head, wanted, kept_grain=tile_shape(head)[1])


def _pull(
    head: Head,
    state: State,
    rows: slice,
    columns: slice,
    tile: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
) -> None:
    """Add a tile to the rows' pull, rescaled from the peak `before` to the one of now."""
    peak = state.peak[rows]
    unit = RowGrad.of_exponentials(peak)
    kernels = _kernels(head.backend)
    e = kernels.grad(head, tile, bias, head.target[rows], unit, columns.start)
    assert state.pull is not None
    pull = state.pull[rows]
    first = columns.start == 0
    if not first:
        pull *= torch.where(peak == before, 1, torch.exp(before - peak))[:, None]
    add_product(pull, e, weight, first=first)


def backward(
    head: Head,
    grad: RowGrad,
    kept: Tensor,
    block_peak: Tensor | None,
    grad_filter: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, in fp32, weight and bias; None where `needs` says that nobody asks."""
    kernels, buffer = _kernels(head.backend), _tile_buffer(head)

    def make(tile: Tile) -> Gradient:
        assert isinstance(tile.rows, slice)  # all rows are swept, in their order
        products = _products(head, tile.rows, tile.columns, kept, buffer)
        if _is_kept(head, tile.columns, kept):
            # The gradient may take the tile's place, and a second backward wants it again.
            products = products.clone()
        else:
            add_product(products, tile.hidden, tile.weight.t(), first=True)
        target, own = head.target[tile.rows], grad.rows(tile.rows)
        return Gradient(kernels.grad(head, products, tile.bias, target, own, tile.columns.start))

    return sweep(head, needs, tile_shape(head), make)


def _tile_buffer(head: Head) -> Tensor:
    rows, columns = tile_shape(head)
    return torch.empty(rows * columns, dtype=torch.float32, device=head.hidden.device)


def _products(head: Head, rows: slice, columns: slice, kept: Tensor, buffer: Tensor) -> Tensor:
    """The memory of a tile, in `kept` or not."""
    shape = rows.stop - rows.start, columns.stop - columns.start
    offset = 0
    if _is_kept(head, columns, kept):
        buffer, offset = kept, len(head.hidden) * columns.start + rows.start * shape[1]
    return buffer[offset : offset + shape[0] * shape[1]].view(shape)


def _is_kept(head: Head, columns: slice, kept: Tensor) -> bool:
    return columns.stop * len(head.hidden) <= kept.numel()


class _Kernels(Protocol):
    """The two folds of a backend."""

    def fold(
        self,
        head: Head,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        state: State,
        first_column: int,
    ) -> None:
        """Add the tile to `state`, in place."""

    def grad(
        self,
        head: Head,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        grad: RowGrad,
        first_column: int,
    ) -> Tensor:
        """The gradient with respect to the tile's products, as operand; the tile may be lost."""


class _CudaKernels:
    @staticmethod
    def fold(
        head: Head,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        state: State,
        first_column: int,
    ) -> None:
        with torch.cuda.device(tile.device):
            native.call(
                "latro_cuda_linear_logprob_fold",
                *(tile, bias, target),
                *(state.peak, state.total, state.picked, state.weighted),
                *(*tile.shape, first_column, head.softcap, head.temperature),
                torch.cuda.current_stream().cuda_stream,
            )

    @staticmethod
    def grad(
        head: Head,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        grad: RowGrad,
        first_column: int,
    ) -> Tensor:
        dtype = operand_dtype(head)
        dz = tile if tile.dtype == dtype else torch.empty_like(tile, dtype=dtype)
        with torch.cuda.device(tile.device):
            native.call(
                "latro_cuda_linear_logprob_grad",
                *(tile, dz, native.dtype_code(dz.dtype), bias, target),
                *(grad.grad_logp, grad.grad_entropy, grad.logp, grad.entropy),
                *(grad.peak, grad.log_total, *tile.shape, first_column),
                *(head.softcap, head.temperature, torch.cuda.current_stream().cuda_stream),
            )
        return dz


def _kernels(backend: str) -> _Kernels:
    if backend == "triton":
        from latro_kernels.linear_logprob.triton.tiles import TritonKernels

        return TritonKernels()
    return _CudaKernels()
