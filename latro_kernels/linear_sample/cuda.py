"""The draw from a tile of `linear_sample`, in CUDA C++: `csrc/cuda/linear_sample.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from latro_kernels import native
from latro_kernels.head import Head
from latro_kernels.linear_sample.state import Draw
from latro_kernels.logit_tiles import Tile


def draw(
    head: Head, tile: Tile, products: Tensor, drawn: Draw, score: Tensor, token: Tensor
) -> None:
    """Put a tile's highest score in the place of a row's if it is higher; so with the token.

    All but the tile are of its rows; tokens are columns of the head's weight.
    """
    rows, columns = products.shape
    parts = (columns + 3) // native.constants()["LATRO_SAMPLE_PART_COLS"] + 1
    part_score = torch.empty(parts, rows, dtype=torch.float32, device=products.device)
    with torch.cuda.device(products.device):
        native.call(
            "latro_cuda_linear_sample_draw",
            products,
            tile.bias,
            drawn.seed,
            drawn.position,
            drawn.first_column,
            drawn.greedy,
            score,
            token,
            part_score,
            torch.empty_like(part_score, dtype=torch.int64),
            rows,
            columns,
            tile.columns.start,
            head.softcap,
            head.temperature,
            torch.cuda.current_stream().cuda_stream,
        )
