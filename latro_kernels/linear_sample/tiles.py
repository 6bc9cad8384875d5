"""`linear_sample` in tiles, for GPUs: torch makes the products, as it does for `linear_logprob`.

A kernel draws the best column of a tile, and another column that was best so far gives way to it.
Then `linear_logprob` folds the tile, the token being the target: its log-prob has the bits that it
has there.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

from latro_kernels.head import Head
from latro_kernels.linear_logprob import tiles
from latro_kernels.linear_sample import cuda
from latro_kernels.linear_sample.state import Draw, State, first_fold


def sample(head: Head, draw: Draw) -> State:
    """Return what one sweep over the vocabulary finds out of each row."""
    state, score = first_fold(head, tiles.empty_state)
    for rows, tile, products in tiles.product_tiles(head, state.cached):
        of_rows = replace(draw, seed=draw.seed[rows], position=draw.position[rows])
        _kernels(head.backend).draw(head, tile, products, of_rows, score[rows], state.target[rows])
        tiles.fold_kernels(head.backend).fold(head, tile, products, state.rows(rows))
    return State.of_fold(state, score, draw)


def _kernels(backend: str) -> ModuleType:
    """Return the module whose `draw` works on a tile."""
    if backend == "cuda":
        return cuda
    from latro_kernels.linear_sample.triton import tiles

    return tiles
