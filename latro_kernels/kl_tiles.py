"""Two LM heads in tiles, for `linear_kl`: products by torch, all between them by a fold kernel.

Over a slice of the vocabulary and a block of rows, the products of head p and those of head q stand
side by side in two tiles. The forward folds both into seven numbers per row and drops them. The
backward makes them again and turns p's into the gradient dz with respect to it, of which
`head_gradient` makes gradients. The vocabulary is the outer loop: where both heads have the same
weight, a slice of it is read for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.head_gradient import (
    Gradient,
    Tile,
    add_product,
    operand_dtype,
    slices,
    sweep,
)

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
        anchor: z^q where zᵖ is peak_p; any number where that is −inf.
        moment: Σ exp(zᵖ − peak_p)·((zᵖ − z^q) − (peak_p − anchor)).
        second: Σ exp(zᵖ − peak_p)·(exp(−δ) − 1 + δ) with δ = (zᵖ − z^q) − (peak_p − peak_q).
    """

    peak_p: Tensor
    total_p: Tensor
    peak_q: Tensor
    total_q: Tensor
    anchor: Tensor
    moment: Tensor
    second: Tensor

    def rows(self, block: slice) -> RowState:
        return RowState(**_part(self, block))

    def finish(self) -> tuple[Tensor, ...]:
        """kl, and what `RowGrad` keeps of the forward."""
        total = self.total_p.double()
        mean = self.moment.double() / total
        first = mean + (self.peak_q.double() - self.anchor.double())
        excess = self.second.double() / total - first
        # Σ exp(z^q − peak_q) / total_p, which is 1 + excess; the sum itself where that cancels.
        log_ratio = torch.where(
            excess > -0.5, excess.log1p(), self.total_q.double().log() - total.log()
        )
        kl = (first + log_ratio).float()
        return kl, self.anchor.double(), mean, self.peak_p.double(), total


@dataclass(frozen=True, eq=False)
class RowGrad:
    """What the backward needs of each row, [N] each and contiguous, all but grad_kl fp64.

    Args:
        grad_kl: upstream gradient, fp32.
        anchor: z^q where zᵖ is peak.
        mean: E_p[zᵖ − z^q] − (peak − anchor).
        peak: max zᵖ.
        total: Σ exp(zᵖ − peak).
    """

    grad_kl: Tensor
    anchor: Tensor
    mean: Tensor
    peak: Tensor
    total: Tensor

    def rows(self, block: slice | Tensor) -> RowGrad:
        return RowGrad(**_part(self, block))


def _part(rows: RowState | RowGrad, block: slice | Tensor) -> dict[str, Any]:
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
    """kl, anchor, mean, peak and total of every row."""
    N, device = len(heads.p.hidden), heads.p.hidden.device

    def filled(value: float) -> Tensor:
        return torch.full((N,), value, dtype=torch.float32, device=device)

    state = RowState(
        peak_p=filled(-torch.inf),
        total_p=filled(0),
        peak_q=filled(-torch.inf),
        total_q=filled(0),
        anchor=filled(0),
        moment=filled(0),
        second=filled(0),
    )
    kernels = _kernels(heads.backend)
    height, width = tile_shape(heads)
    for columns, weight, bias in slices(heads.p, width):
        weight_q, bias_q = _slice_of_q(heads, columns, weight)
        for begin in range(0, N, height):
            rows = slice(begin, min(begin + height, N))
            tiles = _products(heads, rows, weight, weight_q)
            kernels.fold(heads, tiles, (bias, bias_q), state.rows(rows))
    return state.finish()


def backward(heads: Heads, grad: RowGrad, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of p's hidden, weight and bias; None where `needs` says that nobody asks."""
    kernels = _kernels(heads.backend)
    # On GPUs, as the folds do that made them.
    grad = RowGrad(**{name: rows.float() for name, rows in vars(grad).items()})

    def make(tile: Tile) -> Gradient:
        weight_q, bias_q = _slice_of_q(heads, tile.columns, tile.weight)
        tiles = _products(heads, tile.rows, tile.weight, weight_q)
        return Gradient(kernels.grad(heads, tiles, (tile.bias, bias_q), grad.rows(tile.rows)))

    dx, dw, db = sweep(heads.p, needs, tile_shape(heads), make)
    return None if dx is None else dx.to(heads.p.hidden.dtype), dw, db


def _slice_of_q(heads: Heads, columns: slice, weight_p: Tensor) -> tuple[Tensor, Tensor | None]:
    """q's weight, as operand, and its bias in fp32."""
    q = heads.q
    weight = weight_p if heads.share_weight else q.weight[columns].to(weight_p.dtype)
    return weight, None if q.bias is None else q.bias[columns].float().contiguous()


def _products(
    heads: Heads, rows: slice | Tensor, weight_p: Tensor, weight_q: Tensor
) -> tuple[Tensor, Tensor]:
    """Of a block of rows and a slice of both weights, in fp32.

    Two products, though of one weight they could be one: equal rows of p and q then have equal
    places in equal products, and their logits equal bits.
    """
    made = []
    for head, weight in ((heads.p, weight_p), (heads.q, weight_q)):
        hidden = head.hidden[rows].to(weight.dtype)
        made.append(hidden.new_empty(len(hidden), len(weight), dtype=torch.float32))
        add_product(made[-1], hidden, weight.t(), first=True)
    return made[0], made[1]


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
    dtype = operand_dtype(heads.p)
    return tile if tile.dtype == dtype else torch.empty_like(tile, dtype=dtype)


def _kernels(backend: str) -> _Kernels:
    if backend == "triton":
        from latro_kernels.triton.linear_kl import TritonKernels

        return TritonKernels()
    return _CudaKernels()
