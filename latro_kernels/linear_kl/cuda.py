"""The two folds of linear_kl over the tiles of both heads, in CUDA C++."""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.linear_kl.state import Heads, KlGrad, KlState, OptionalPair, Pair


def fold(heads: Heads, tiles: Pair, biases: OptionalPair, state: KlState) -> None:
    """Add the tiles of p and q to the state of their rows, in place."""
    with torch.cuda.device(tiles[0].device):
        native.call(
            "latro_cuda_linear_kl_fold",
            *tiles,
            *biases,
            *vars(state).values(),
            *tiles[0].shape,
            *_scales(heads),
            torch.cuda.current_stream().cuda_stream,
        )


def grad(
    heads: Heads, tiles: Pair, biases: OptionalPair, *, rows: KlGrad, of_q: bool, dz: Tensor
) -> None:
    """Fill `dz`, the gradient with respect to p's products, or q's, which may be their tile."""
    with torch.cuda.device(dz.device):
        native.call(
            "latro_cuda_linear_kl_grad",
            *tiles,
            *biases,
            dz,
            native.dtype_code(dz.dtype),
            of_q,
            *vars(rows).values(),
            *dz.shape,
            *_scales(heads),
            torch.cuda.current_stream().cuda_stream,
        )


def _scales(heads: Heads) -> list[float]:
    """Return what both calls take of p and q."""
    return [scale for head in heads for scale in (head.softcap, head.temperature)]
