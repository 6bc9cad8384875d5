"""The draw from a tile of `linear_sample`, in Triton.

The loop around it is in `latro_kernels.linear_sample.tiles`. A program takes a part of a row, so
that few rows keep a whole chip busy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latro_kernels.head import Head
from latro_kernels.linear_sample.state import Draw
from latro_kernels.linear_sample.triton.draw import choose, draw_of_fours, winner
from latro_kernels.logit_tiles import Tile
from latro_kernels.triton.softmax import flags, row_logits

# Columns at a time, and of a program.
BLOCK_V, PART = 1024, 4096


@triton.heuristics(flags(HAS_BIAS="bias_ptr", HAS_FIRST="first_ptr"))
@triton.jit(do_not_specialize=["rows"])
def draw_kernel(
    tile_ptr,
    bias_ptr,
    seed_ptr,
    position_ptr,
    first_ptr,
    scores_ptr,
    columns_ptr,
    rows,
    columns,
    first_column,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    GREEDY: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the highest score of PART columns of a row of a tile, and its column."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seed = tl.load(seed_ptr + row + tl.arange(0, 1))
    position = tl.load(position_ptr + row + tl.arange(0, 1))
    of_rank = 0
    if HAS_FIRST:
        of_rank = tl.load(first_ptr)
    FOURS: tl.constexpr = BLOCK_V // 4
    best_score = tl.full((1, FOURS), float("-inf"), tl.float32)
    best_column = tl.zeros((1, FOURS), tl.int32)
    begin = part * PART
    for left in range(begin, min(begin + PART, columns), BLOCK_V):
        j = left + tl.arange(0, BLOCK_V)
        z = row_logits(
            tile_ptr + row * columns,
            bias_ptr,
            j,
            j < columns,
            softcap,
            temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        score, column, _ = draw_of_fours(
            z[None, :],
            first_column + left,
            seed,
            position,
            of_rank,
            1.0,
            HAS_FIRST,
            GREEDY,
            1,
            BLOCK_V,
        )
        is_better = score > best_score
        best_score = tl.where(is_better, score, best_score)
        best_column = tl.where(is_better, column, best_column)
    score, column, _ = winner(best_score, best_column, best_score)
    at = part * rows + row + tl.arange(0, 1)
    tl.store(scores_ptr + at, score)
    tl.store(columns_ptr + at, column)


def draw(
    head: Head, tile: Tile, products: Tensor, drawn: Draw, score: Tensor, token: Tensor
) -> None:
    """Put a tile's highest score in the place of a row's if it is higher; so with the token.

    All but the tile are of its rows; tokens are columns of the head's weight.
    """
    rows, columns = products.shape
    parts = triton.cdiv(columns, PART)
    scores = torch.empty(parts, rows, dtype=torch.float32, device=products.device)
    best_columns = torch.empty_like(scores, dtype=torch.int32)
    with torch.cuda.device_of(products):
        draw_kernel[(rows, parts)](
            tile_ptr=products,
            bias_ptr=tile.bias,
            seed_ptr=drawn.seed,
            position_ptr=drawn.position,
            first_ptr=drawn.first_column,
            scores_ptr=scores,
            columns_ptr=best_columns,
            rows=rows,
            columns=columns,
            first_column=tile.columns.start,
            softcap=head.softcap,
            temperature=head.temperature,
            GREEDY=drawn.greedy,
            PART=PART,
            BLOCK_V=BLOCK_V,
        )
    choose(scores, best_columns, score, token)
