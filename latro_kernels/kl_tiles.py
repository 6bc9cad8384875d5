"""Two LM heads in tiles, for `linear_kl`: products by torch, all between them by a fold kernel.

Over a slice of the vocabulary and a block of rows, the products of head p and those of head q stand
side by side in two tiles. The forward folds both into six numbers per row and drops them. The
backward makes them again and turns p's into the gradient dz with respect to it, from which

    dx[rows]    += dz · weight_p[columns]
    dw[columns] += dzᵀ · hidden_p[rows]
    db[columns] += Σ_rows dz

The vocabulary is the outer loop: where both heads have the same weight, a slice of it is read for
both, and each slice of dw is finished, and rounded, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from latro_kernels import native

# More rows make fewer sums of dw, and narrower slices of the vocabulary, which make more of dx.
MAX_TILE_ROWS = 4096
# Both tiles of Triton's interpreter, whose kernels meet CPU tensors: no place for speed.
INTERPRETER_TILE_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class Head:
    """Products hidden · weightᵀ + bias, of shapes [N, H], [V, H] and [V]; bias may be None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> Head:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.hidden.to(dtype), self.weight.to(dtype), bias)


@dataclass(frozen=True, eq=False)
class Heads:
    """The problem: logits z = softcap · tanh(products / softcap) / temperature of two heads.

    Args:
        p: the head that is differentiated.
        q: the head that is held constant: N, V, dtype and device of p, any H.
        temperature: divides the logits.
        softcap: 0 where there is none.
        backend: "cpu", "triton" or "cuda".
    """

    p: Head
    q: Head
    temperature: float
    softcap: float
    backend: str

    @property
    def operand_dtype(self) -> torch.dtype:
        """The dtype in which products are made; torch rounds those of bf16 on the CPU."""
        hidden = self.p.hidden
        return torch.float32 if hidden.device.type == "cpu" else hidden.dtype

    @property
    def share_weight(self) -> bool:
        """Whether both heads have the same weight in memory."""
        p, q = self.p.weight, self.q.weight
        return (p.data_ptr(), p.shape, p.stride()) == (q.data_ptr(), q.shape, q.stride())


@dataclass(frozen=True, eq=False)
class RowState:
    """What the forward carries from tile to tile, fp32 [N] each; logits are those so far.

    Args:
        peak_p: max zᵖ.
        total_p: Σ exp(zᵖ − peak_p).
        peak_q: max z^q.
        total_q: Σ exp(z^q − peak_q).
        first: Σ exp(zᵖ − peak_p)·δ with δ = (zᵖ − z^q) − (peak_p − peak_q).
        second: Σ exp(zᵖ − peak_p)·(exp(−δ) − 1 + δ).
    """

    peak_p: Tensor
    total_p: Tensor
    peak_q: Tensor
    total_q: Tensor
    first: Tensor
    second: Tensor

    def rows(self, block: slice) -> RowState:
        return RowState(**_part(self, block))

    def finish(self) -> tuple[Tensor, ...]:
        """kl, and what `RowGrad` keeps of the forward."""
        total, first = self.total_p.double(), self.first.double()
        mean = first / total
        excess = (self.second.double() - first) / total
        # Σ exp(z^q − peak_q) / total_p, which is 1 + excess; the sum itself where that cancels.
        log_ratio = torch.where(
            excess > -0.5, excess.log1p(), self.total_q.double().log() - total.log()
        )
        kl = (mean + log_ratio).float()
        return kl, (self.peak_p - self.peak_q) + mean.float(), self.peak_p, self.total_p.log()


@dataclass(frozen=True, eq=False)
class RowGrad:
    """What the backward needs of each row, fp32 [N] each and contiguous.

    Args:
        grad_kl: upstream gradient.
        center: E_p[zᵖ − z^q].
        peak: max zᵖ.
        log_total: log Σ exp(zᵖ − peak).
    """

    grad_kl: Tensor
    center: Tensor
    peak: Tensor
    log_total: Tensor

    def rows(self, block: slice) -> RowGrad:
        return RowGrad(**_part(self, block))


def _part(rows: RowState | RowGrad, block: slice) -> dict[str, Any]:
    return {name: t[block] for name, t in vars(rows).items()}


def tile_shape(heads: Heads) -> tuple[int, int]:
    """Rows and columns of the two tiles: a bound in bytes that depends on neither N nor V."""
    hidden, V = heads.p.hidden, len(heads.p.weight)
    tile_bytes = INTERPRETER_TILE_BYTES
    if hidden.device.type == "cuda":
        tile_bytes = torch.cuda.get_device_properties(hidden.device).L2_cache_size
    rows = max(1, min(len(hidden), MAX_TILE_ROWS))
    columns = tile_bytes // (2 * rows * torch.float32.itemsize)
    # Whole groups of 64 columns keep a tile's rows, and the kernels' loads, aligned.
    return rows, min(V, max(64, columns // 64 * 64))


def forward(heads: Heads) -> tuple[Tensor, ...]:
    """kl, center, peak and log_total of every row."""
    N, device = len(heads.p.hidden), heads.p.hidden.device

    def filled(value: float) -> Tensor:
        return torch.full((N,), value, dtype=torch.float32, device=device)

    state = RowState(
        peak_p=filled(-torch.inf),
        total_p=filled(0),
        peak_q=filled(-torch.inf),
        total_q=filled(0),
        first=filled(0),
        second=filled(0),
    )
    kernels = _kernels(heads.backend)
    for _, p, q in _slices(heads):
        for rows, tiles in _tiles(heads, p, q):
            kernels.fold(heads, tiles, (p.bias, q.bias), state.rows(rows))
    return state.finish()


def backward(heads: Heads, grad: RowGrad, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of p's hidden, weight and bias; None where `needs` says that nobody asks."""
    hidden, weight = heads.p.hidden, heads.p.weight
    dx = torch.zeros(hidden.shape, device=hidden.device) if needs[0] else None
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    db = weight.new_empty(len(weight)) if needs[2] else None
    kernels = _kernels(heads.backend)
    for columns, p, q in _slices(heads):
        slice_dw = torch.zeros(p.weight.shape, device=hidden.device)
        slice_db = torch.zeros(len(p.weight), device=hidden.device)
        for rows, tiles in _tiles(heads, p, q):
            dz = kernels.grad(heads, tiles, (p.bias, q.bias), grad.rows(rows))
            if dx is not None:
                _add_product(dx[rows], dz, p.weight)
            if dw is not None:
                _add_product(slice_dw, dz.t(), p.hidden[rows])
            if db is not None:
                slice_db += dz.sum(0, dtype=torch.float32)
        if dw is not None:
            dw[columns] = slice_dw
        if db is not None:
            db[columns] = slice_db
    return None if dx is None else dx.to(hidden.dtype), dw, db


def _slices(heads: Heads) -> Iterator[tuple[slice, Head, Head]]:
    """Slices of the vocabulary, with both heads cut to them, as operands; biases in fp32."""
    p, q, dtype = heads.p, heads.q, heads.operand_dtype
    hidden_p, hidden_q = p.hidden.to(dtype), q.hidden.to(dtype)
    V, width = len(p.weight), tile_shape(heads)[1]
    for begin in range(0, V, width):
        columns = slice(begin, min(begin + width, V))
        weight_p = p.weight[columns].to(dtype)
        weight_q = weight_p if heads.share_weight else q.weight[columns].to(dtype)
        bias_p, bias_q = (None if b is None else b[columns].float() for b in (p.bias, q.bias))
        yield columns, Head(hidden_p, weight_p, bias_p), Head(hidden_q, weight_q, bias_q)


def _tiles(heads: Heads, p: Head, q: Head) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """Blocks of rows, with the products, in fp32, of both heads."""
    N, height = len(p.hidden), tile_shape(heads)[0]
    for begin in range(0, N, height):
        rows = slice(begin, min(begin + height, N))
        # Two products, though of one weight they could be one: equal rows of p and q then have
        # equal places in equal products, and their logits equal bits.
        yield rows, (_product(p.hidden[rows], p.weight.t()), _product(q.hidden[rows], q.weight.t()))


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        out += _product(a, b)


class _Kernels(Protocol):
    """The two folds of a backend; tiles and biases are those of p and q."""

    def fold(
        self,
        heads: Heads,
        tiles: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, Tensor | None],
        state: RowState,
    ) -> None:
        """Add the tiles to `state`, in place."""

    def grad(
        self,
        heads: Heads,
        tiles: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, Tensor | None],
        grad: RowGrad,
    ) -> Tensor:
        """The gradient with respect to p's products, as operand; p's tile may be lost."""


class _CudaKernels:
    @staticmethod
    def fold(
        heads: Heads,
        tiles: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, Tensor | None],
        state: RowState,
    ) -> None:
        with torch.cuda.device(tiles[0].device):
            native.call(
                "latro_cuda_linear_kl_fold",
                *(*tiles, *biases, *vars(state).values(), *tiles[0].shape),
                *(heads.softcap, heads.temperature, torch.cuda.current_stream().cuda_stream),
            )

    @staticmethod
    def grad(
        heads: Heads,
        tiles: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, Tensor | None],
        grad: RowGrad,
    ) -> Tensor:
        dz = gradient_tile(heads, tiles[0])
        with torch.cuda.device(dz.device):
            native.call(
                "latro_cuda_linear_kl_grad",
                *(*tiles, *biases, dz, native.dtype_code(dz.dtype), *vars(grad).values()),
                *(*dz.shape, heads.softcap, heads.temperature),
                torch.cuda.current_stream().cuda_stream,
            )
        return dz


def gradient_tile(heads: Heads, tile: Tensor) -> Tensor:
    """Room for dz, in the dtype of the products to come: p's tile itself where that is fp32."""
    if tile.dtype == heads.operand_dtype:
        return tile
    return torch.empty_like(tile, dtype=heads.operand_dtype)


def _kernels(backend: str) -> _Kernels:
    if backend == "triton":
        from latro_kernels.triton.linear_kl import TritonKernels

        return TritonKernels()
    return _CudaKernels()
