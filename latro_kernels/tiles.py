"""`linear_logprob` in tiles, for the GPU backends: products by torch, folds by a kernel.

A tile is the products hidden[rows] · weight[columns]ᵀ of a block of rows and a slice of the
vocabulary. The forward folds each tile into a few numbers per row and drops it, or keeps it where
the memory budget has room. The backward takes the kept tile, or makes it again, and turns it into
the gradient dz with respect to the products, from which

    dx[rows]    += dz · weight[columns]
    dw[columns] += dzᵀ · hidden[rows]
    db[columns] += Σ_rows dz

The vocabulary is the outer loop, so that each slice of dw is finished, and rounded, once; dx is
carried in fp32 from slice to slice. No tensor of N × V exists, and none of V × H in another dtype
than the weight's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.head import Head, RowGrad, State, Wanted, kept_columns

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
    rows = max(1, min(len(head.hidden), MAX_TILE_ROWS))
    # Whole groups of 64 columns keep a tile's rows, and the kernels' loads, aligned.
    return rows, min(len(head.weight), max(64, tile_bytes // (rows * 4) // 64 * 64))


def forward(head: Head, wanted: Wanted) -> State:
    """Fold every tile into the state of its rows."""
    state = empty_state(head, wanted)
    state.peak.fill_(-torch.inf)
    state.picked.fill_(-torch.inf)
    state.total.zero_()
    if state.weighted is not None:
        state.weighted.zero_()
    kernels, buffer = _kernels(head.backend), _tile_buffer(head)
    for columns, weight, bias in _slices(head):
        for rows, x, tile in _tiles(head, weight, columns, state.kept, buffer):
            _add_product(tile, x, weight.t(), first=True)
            before = state.peak[rows].clone()
            kernels.fold(head, tile, bias, head.target[rows], state.rows(rows), columns.start)
            if state.pull is not None:
                _pull(head, state, rows, columns, tile, weight, bias, before)
    return state


def empty_state(head: Head, wanted: Wanted) -> State:
    """Room for what `forward` makes."""
    (N, H), V = head.hidden.shape, len(head.weight)

    def empty(*shape: int) -> Tensor:
        return head.hidden.new_empty(shape, dtype=torch.float32)

    kept = kept_columns(N, V, wanted.memory_budget, tile_shape(head)[1])
    return State(
        *(empty(N) for _ in range(3)),
        weighted=empty(N) if wanted.weighted else None,
        pull=empty(N, H) if wanted.pull else None,
        kept=empty(N * kept),
        block_peak=None,
    )


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
    nothing = torch.zeros_like(peak)
    # With these the gradient's formula gives exp(z − peak)·∂z/∂a, and 0 at the target.
    unit = RowGrad(nothing, None, peak, nothing, nothing - 1, None)
    kernels = _kernels(head.backend)
    e = kernels.grad(head, tile, bias, head.target[rows], unit, columns.start)
    pull = state.pull[rows]
    first = columns.start == 0
    if not first:
        pull *= torch.where(peak == before, 1, torch.exp(before - peak))[:, None]
    _add_product(pull, e, weight, first=first)


def backward(
    head: Head,
    grad: RowGrad,
    kept: Tensor,
    block_peak: Tensor | None,
    grad_filter: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, in fp32, weight and bias; None where `needs` says that nobody asks."""
    dx, dw, db = _gradients(head, needs)
    if len(head.hidden) == 0:
        return dx, *(None if t is None else t.zero_() for t in (dw, db))
    kernels, buffer = _kernels(head.backend), _tile_buffer(head)
    # A slice of dw is summed over the blocks of rows in fp32; one block has nothing to sum.
    one_block = tile_shape(head)[0] == len(head.hidden)
    in_place = one_block or head.weight.dtype == torch.float32
    for columns, weight, bias in _slices(head):
        slice_dw = None
        if dw is not None:
            slice_dw = dw[columns] if in_place else torch.empty(weight.shape, device=weight.device)
        slice_db = torch.zeros(len(weight), device=weight.device)
        for rows, x, tile in _tiles(head, weight, columns, kept, buffer):
            if _is_kept(head, columns, kept):
                # The gradient may take the tile's place, and a second backward wants it again.
                products = tile.clone()
            else:
                products = tile
                _add_product(products, x, weight.t(), first=True)
            dz = kernels.grad(
                head, products, bias, head.target[rows], grad.rows(rows), columns.start
            )
            if dx is not None:
                _add_product(dx[rows], dz, weight, first=columns.start == 0)
            if slice_dw is not None:
                _add_product(slice_dw, dz.t(), x, first=rows.start == 0)
            if db is not None:
                slice_db += dz.sum(0, dtype=torch.float32)
        if dw is not None and slice_dw is not None and not in_place:
            dw[columns] = slice_dw
        if db is not None:
            db[columns] = slice_db
    return dx, dw, db


def _gradients(head: Head, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Room for dx, in fp32, and for dw and db."""
    device, dtype = head.hidden.device, head.hidden.dtype
    shapes = (head.hidden.shape, head.weight.shape, head.weight.shape[:1])
    return tuple(
        torch.empty(shape, dtype=of, device=device) if needed else None
        for shape, of, needed in zip(shapes, (torch.float32, dtype, dtype), needs, strict=True)
    )


def _slices(head: Head) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Slices of the vocabulary, with their weight and their bias in fp32."""
    V, width = len(head.weight), tile_shape(head)[1]
    for begin in range(0, V, width):
        columns = slice(begin, min(begin + width, V))
        bias = None if head.bias is None else head.bias[columns].float()
        yield columns, head.weight[columns].to(operand_dtype(head)), bias


def _tile_buffer(head: Head) -> Tensor:
    rows, columns = tile_shape(head)
    return torch.empty(rows * columns, device=head.hidden.device)


def _tiles(
    head: Head, weight: Tensor, columns: slice, kept: Tensor, buffer: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows, with their hidden states and the memory of their tile, in `kept` or not."""
    N, height = len(head.hidden), tile_shape(head)[0]
    is_kept = _is_kept(head, columns, kept)
    if is_kept:
        buffer = kept[N * columns.start :]
    for begin in range(0, N, height):
        rows = slice(begin, min(begin + height, N))
        x = head.hidden[rows].to(operand_dtype(head))
        offset = begin * len(weight) if is_kept else 0
        tile = buffer[offset : offset + len(x) * len(weight)].view(len(x), len(weight))
        yield rows, x, tile


def _is_kept(head: Head, columns: slice, kept: Tensor) -> bool:
    return columns.stop * len(head.hidden) <= kept.numel()


def operand_dtype(head: Head) -> torch.dtype:
    """The dtype in which products are made."""
    # On the CPU, for the interpreter, torch would round a product of bf16.
    return head.hidden.dtype if head.hidden.device.type == "cuda" else torch.float32


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """out += a · b, or out = a · b for the first product of a sum; a sum in fp32 is not rounded."""
    if a.dtype == out.dtype:
        if first:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)
    elif first and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif first:
        out.copy_(torch.mm(a, b))
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


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
        from latro_kernels.triton.linear_logprob import TritonKernels

        return TritonKernels()
    return _CudaKernels()
