"""The LM head in tiles: products by torch, everything between them by a fold kernel.

A tile is the products hidden[rows] · weight[columns]ᵀ of a block of rows and a slice of the
vocabulary. The forward folds each tile into four numbers per row and drops it. The backward makes
it again and turns it into the gradient dz with respect to the products, from which

    dx[rows]    += dz · weight[columns]
    dw[columns] += dzᵀ · hidden[rows]
    db[columns] += Σ_rows dz

The vocabulary is the outer loop, so that each slice of dw is finished, and rounded, once; dx is
carried in fp32 from slice to slice. No tensor of N × V exists, and none of V × H in another dtype
than the weight's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from latro_kernels import native

# A tile on the CPU stays in the last-level cache of a small server. A larger one gains nothing, and
# in a smaller one the products are too small to run at full speed.
CPU_TILE_BYTES = 8 * 2**20
# More rows make fewer sums of dw, and narrower slices of the vocabulary, which make more of dx.
MAX_TILE_ROWS = 4096
# The least H at which products in bf16 save more time than they lose digits.
MIN_BF16_H = 128


@dataclass(frozen=True, eq=False)
class Head:
    """The problem: logits z = softcap · tanh((hidden · weightᵀ + bias) / softcap) / temperature.

    Args:
        hidden: [N, H].
        weight: [V, H], dtype and device of hidden.
        target: [N] int64, contiguous.
        bias: [V] or None.
        temperature: divides the logits.
        softcap: 0 where there is none.
        backend: "cpu", "triton" or "cuda": whose kernels fold.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float
    backend: str

    @property
    def operand_dtype(self) -> torch.dtype:
        """The dtype in which products are made."""
        dtype = self.hidden.dtype
        if self.hidden.device.type != "cpu":
            return dtype
        # On the CPU fp32 is at least as fast, and more exact, than fp16, than bf16 that the
        # processor cannot multiply, and than short bf16 products. Triton's interpreter, whose
        # kernels meet CPU tensors as well, is no place for speed.
        long = self.hidden.shape[1] >= MIN_BF16_H
        if dtype != torch.bfloat16 or self.backend != "cpu" or not long:
            return torch.float32
        supported = native.library("cpu").latro_cpu_matmul_bf16_supported()
        return torch.bfloat16 if supported else torch.float32

    @property
    def tile_dtype(self) -> torch.dtype:
        """The dtype of the products: fp32 but for bf16 on the CPU, where torch rounds them."""
        return self.operand_dtype if self.hidden.device.type == "cpu" else torch.float32


@dataclass(frozen=True, eq=False)
class RowState:
    """What the forward carries from tile to tile, fp32 [N] each; z are a row's logits so far.

    Args:
        peak: max z.
        total: Σ exp(z − peak).
        picked: z at the target.
        weighted: Σ exp(z − peak) · (z − peak), or None where no entropy is asked for.
    """

    peak: Tensor
    total: Tensor
    picked: Tensor
    weighted: Tensor | None

    def rows(self, block: slice) -> RowState:
        return RowState(**_part(self, block))


@dataclass(frozen=True, eq=False)
class RowGrad:
    """What the backward needs of each row, fp32 [N] each and contiguous.

    Args:
        logp: the forward's log-prob of the target.
        entropy: the forward's entropy, or None with `grad_entropy`.
        peak: max z.
        log_total: log Σ exp(z − peak).
        grad_logp: upstream gradient.
        grad_entropy: upstream gradient, or None where no entropy was asked for.
    """

    logp: Tensor
    entropy: Tensor | None
    peak: Tensor
    log_total: Tensor
    grad_logp: Tensor
    grad_entropy: Tensor | None

    def rows(self, block: slice | Tensor) -> RowGrad:
        return RowGrad(**_part(self, block))


def _part(rows: RowState | RowGrad, block: slice | Tensor) -> dict[str, Any]:
    return {name: None if t is None else t[block] for name, t in vars(rows).items()}


def tile_shape(head: Head) -> tuple[int, int]:
    """Rows and columns of a tile: a bound in bytes that depends on neither N nor V."""
    device = head.hidden.device
    if device.type == "cuda":
        tile_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        tile_bytes = CPU_TILE_BYTES
    rows = max(1, min(len(head.hidden), MAX_TILE_ROWS))
    columns = tile_bytes // (rows * head.tile_dtype.itemsize)
    # Whole groups of 64 columns keep a tile's rows, and the kernels' loads, aligned.
    return rows, min(len(head.weight), max(64, columns // 64 * 64))


def forward(head: Head, with_entropy: bool) -> RowState:
    """Fold every tile into the state of its rows."""
    N, device = len(head.hidden), head.hidden.device
    state = RowState(
        peak=torch.full((N,), -torch.inf, device=device),
        total=torch.zeros(N, device=device),
        picked=torch.empty(N, device=device),
        weighted=torch.zeros(N, device=device) if with_entropy else None,
    )
    kernels, buffer = _kernels(head.backend), _tile_buffer(head)
    for columns, weight, bias in _slices(head):
        for rows, _, tile in _tiles(head, weight, buffer):
            kernels.fold(head, tile, bias, head.target[rows], state.rows(rows), columns.start)
    return state


def backward(head: Head, grad: RowGrad, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias; None where `needs` says that nobody asks."""
    if head.hidden.device.type == "cpu":
        # Finding the rows that matter costs nothing here; on a GPU it would wait for the device.
        active = grad.grad_logp != 0
        if grad.grad_entropy is not None:
            active |= grad.grad_entropy != 0
        if not bool(active.all()):
            return _backward_of(active.nonzero().flatten(), head, grad, needs)

    dx, dw, db = _gradients(head, needs)
    if len(head.hidden) == 0:
        return dx, *(None if t is None else t.zero_() for t in (dw, db))
    kernels, buffer = _kernels(head.backend), _tile_buffer(head)
    # A slice of dw is summed over the blocks of rows in fp32; one block has nothing to sum.
    one_block = tile_shape(head)[0] == len(head.hidden)
    in_place = head.operand_dtype == head.weight.dtype and (
        one_block or head.weight.dtype == torch.float32
    )
    for columns, weight, bias in _slices(head):
        slice_dw = None
        if dw is not None:
            slice_dw = dw[columns] if in_place else torch.empty(weight.shape, device=weight.device)
        slice_db = torch.zeros(len(weight), device=weight.device)
        for rows, x, tile in _tiles(head, weight, buffer):
            dz = kernels.grad(head, tile, bias, head.target[rows], grad.rows(rows), columns.start)
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
    return None if dx is None else dx.to(head.hidden.dtype), dw, db


def _backward_of(
    index: Tensor, head: Head, grad: RowGrad, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """`backward` from the rows in `index` alone; the others get a gradient of zero."""
    some = replace(head, hidden=head.hidden[index], target=head.target[index])
    dx, dw, db = backward(some, grad.rows(index), needs)
    if dx is not None:
        dx = dx.new_zeros(head.hidden.shape).index_copy_(0, index, dx)
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
    """Slices of the vocabulary, with their weight as operand and their bias in fp32."""
    V, width = len(head.weight), tile_shape(head)[1]
    for begin in range(0, V, width):
        columns = slice(begin, min(begin + width, V))
        bias = None if head.bias is None else head.bias[columns].float()
        yield columns, head.weight[columns].to(head.operand_dtype), bias


def _tile_buffer(head: Head) -> Tensor:
    rows, columns = tile_shape(head)
    return torch.empty(rows * columns, dtype=head.tile_dtype, device=head.hidden.device)


def _tiles(head: Head, weight: Tensor, buffer: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows, with their hidden states as operand and their products with `weight`."""
    N, height = len(head.hidden), tile_shape(head)[0]
    for begin in range(0, N, height):
        rows = slice(begin, min(begin + height, N))
        x = head.hidden[rows].to(head.operand_dtype)
        tile = buffer[: len(x) * len(weight)].view(len(x), len(weight))
        _add_product(tile, x, weight.t(), first=True)
        yield rows, x, tile


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """out += a · b, or out = a · b for the first product of a sum; a sum in fp32 is not rounded."""
    if a.dtype == out.dtype:
        if first:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)
    elif out.device.type == "cuda":
        if first:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            out += torch.mm(a, b, out_dtype=out.dtype)
    else:
        # torch's product of bf16 on the CPU comes in bf16: each part of the sum would be rounded.
        native.call(
            "latro_cpu_matmul_bf16",
            *(a, *a.stride(), b, *b.stride(), out, *out.shape, a.shape[1]),
            *(not first, torch.get_num_threads()),
        )


class _Kernels(Protocol):
    """The two folds of a backend."""

    def fold(
        self,
        head: Head,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        state: RowState,
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


class _CpuKernels:
    @staticmethod
    def fold(
        head: Head,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        state: RowState,
        first_column: int,
    ) -> None:
        native.call(
            "latro_cpu_linear_logprob_fold",
            *(tile, native.dtype_code(tile.dtype), bias, target),
            *(state.peak, state.total, state.picked, state.weighted),
            *(*tile.shape, first_column, head.softcap, head.temperature),
            torch.get_num_threads(),
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
        native.call(
            "latro_cpu_linear_logprob_grad",
            *(tile, native.dtype_code(tile.dtype), bias, target),
            *(grad.grad_logp, grad.grad_entropy, grad.logp, grad.entropy),
            *(grad.peak, grad.log_total, *tile.shape, first_column),
            *(head.softcap, head.temperature, torch.get_num_threads()),
        )
        return tile


class _CudaKernels:
    @staticmethod
    def fold(
        head: Head,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        state: RowState,
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
        dz = (
            tile
            if tile.dtype == head.operand_dtype
            else torch.empty_like(tile, dtype=head.operand_dtype)
        )
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
    return _CpuKernels() if backend == "cpu" else _CudaKernels()
