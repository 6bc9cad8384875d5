"""`linear_sample` in Triton without a tile of logits in memory: the loops around its kernels.

They are those of `linear_logprob.triton.fused`: the same blocks, folded and merged in the same
order, so that a row's log-prob has the bits that it has there, but in the warp-specialised form.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from latro_kernels.head import Head
from latro_kernels.linear_logprob.state import State as FoldState
from latro_kernels.linear_logprob.triton import fused
from latro_kernels.linear_logprob.triton.blocks import Config
from latro_kernels.linear_sample.state import Draw, State, first_fold
from latro_kernels.linear_sample.triton.draw import choose
from latro_kernels.linear_sample.triton.fused_kernel import sample_kernel
from latro_kernels.logit_tiles import Tile

# The fewest rows of a block that noise is made for, though there be fewer.
MIN_DRAWN_ROWS = 16


def sample(head: Head, draw: Draw) -> State:
    """Return what one sweep over the vocabulary finds out of each row."""
    state, score = first_fold(head, fused.empty_state)
    if len(head.hidden) > 0:
        for rows, tile in fused.fitting_tiles(head):
            of_rows = replace(draw, seed=draw.seed[rows], position=draw.position[rows])
            _draw(head, tile, of_rows, state.rows(rows), score[rows])
    return State.of_fold(state, score, draw)


def _draw(head: Head, tile: Tile, draw: Draw, state: FoldState, score: Tensor) -> None:
    """Fold a tile into `state`, and draw its target; all but the tile are of its rows."""
    config, (N, columns) = fused.shape_of_blocks(head), (len(tile.hidden), len(tile.weight))
    row_blocks = triton.cdiv(N, config.rows)
    splits = triton.cdiv(columns, fused.TILES * config.columns)
    parts = torch.empty(4, splits, N, dtype=torch.float32, device=score.device)
    scores, best_columns = torch.empty_like(parts[0]), torch.empty_like(parts[0], dtype=torch.int32)
    with torch.cuda.device_of(score):
        sample_kernel[(row_blocks * splits,)](
            seed_ptr=draw.seed,
            position_ptr=draw.position,
            first_ptr=draw.first_column,
            parts_ptr=parts,
            scores_ptr=scores,
            columns_ptr=best_columns,
            N=N,
            stride_part=parts.stride(0),
            row_blocks=row_blocks,
            splits=splits,
            GREEDY=draw.greedy,
            DRAWN_ROWS=_drawn_rows(N, config),
            TILES=fused.TILES,
            **fused.product_arguments(head, tile, config),
        )
    choose(scores, best_columns, score, state.target)
    fused.merge(parts, tile.columns, state, config)


def _drawn_rows(N: int, config: Config) -> int:
    """Return of how many rows of a block noise is made: few rows leave most of one block empty."""
    return min(max(triton.next_power_of_2(N), MIN_DRAWN_ROWS), config.rows)
