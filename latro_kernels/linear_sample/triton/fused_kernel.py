"""linear_sample in Triton without a tile of logits in memory: folded and drawn where they are made.

`sample_kernel` goes over the vocabulary as linear_logprob's `forward_kernel` does, with the same
blocks and the same sums, so that log-probs have the same bits. `choose_kernel` finds the highest of
the parts' scores; linear_logprob's `merge_kernel` adds the rest, that being the target.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latro_kernels.linear_logprob.triton.products import (
    LN_2,
    LOG2_E,
    block_products,
    capped_products,
    descriptors,
    fold_part,
    place,
    quarters,
)
from latro_kernels.linear_sample.triton.draw import draw_of_fours, winner
from latro_kernels.triton.softmax import flags


@triton.heuristics(flags(HAS_BIAS="bias_ptr", HAS_FIRST="first_ptr") | descriptors)
# Whether these are 1 or multiples of 16 changes no load and no store.
@triton.jit(do_not_specialize=["N", "stride_part", "row_blocks", "splits"])
def sample_kernel(
    hidden,
    weight,
    bias_ptr,
    seed_ptr,
    position_ptr,
    first_ptr,
    parts_ptr,
    scores_ptr,
    columns_ptr,
    N,
    H,
    begin,
    end,
    stride_xn,
    stride_xh,
    stride_wv,
    stride_wh,
    stride_part,
    row_blocks,
    splits,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    GREEDY: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DRAWN_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Fold columns begin .. end, of which weight and bias_ptr hold a slice, and draw one of them.

    Tokens are drawn for the first DRAWN_ROWS rows of a block: with few rows, a block is larger than
    what the noise is made for.
    """
    row_block, split = place(tl.program_id(0), row_blocks, splits, GROUP)
    first_row = row_block * BLOCK_N
    first = begin + split * TILES * BLOCK_V
    last = min(first + TILES * BLOCK_V, end)
    # In the loop, logits are not yet divided by the temperature; `fold_part` says why.
    scale = LOG2_E / temperature
    row_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    sum_exp = tl.zeros((BLOCK_N,), tl.float32)
    weighted_sum = tl.zeros((BLOCK_N,), tl.float32)
    of_rank = 0
    if HAS_FIRST:
        of_rank = tl.load(first_ptr)
    drawn = tl.arange(0, DRAWN_ROWS)
    is_drawn = first_row + drawn < N
    seed = tl.load(seed_ptr + first_row + drawn, mask=is_drawn, other=0)
    position = tl.load(position_ptr + first_row + drawn, mask=is_drawn, other=0)
    PART: tl.constexpr = BLOCK_V // 4
    # The noise of many rows is made in smaller pieces: the block's sums have most registers.
    PIECE: tl.constexpr = PART if DRAWN_ROWS <= 32 else PART // 4
    FOURS: tl.constexpr = PIECE // 4
    best_score = tl.full((DRAWN_ROWS, FOURS), float("-inf"), tl.float32)
    best_column = tl.zeros((DRAWN_ROWS, FOURS), tl.int32)
    best_logit = tl.full((DRAWN_ROWS, FOURS), float("-inf"), tl.float32)
    shape = (N, end - begin, H)
    strides = (stride_xn, stride_xh, stride_wv, stride_wh)
    for column in range(first, last, BLOCK_V):
        corner = (first_row, column - begin)
        products = block_products(
            hidden, weight, corner, shape, strides, DESCRIPTORS, BLOCK_N, BLOCK_V, BLOCK_H
        )
        parts = quarters(products, BLOCK_N, BLOCK_V)
        for quarter in tl.static_range(4):
            left = column - begin + quarter * PART
            j = left + tl.arange(0, PART)
            in_range = j < end - begin
            capped = capped_products(
                parts[quarter], bias_ptr, j, in_range, softcap, HAS_BIAS, HAS_SOFTCAP
            )
            # The last block alone has columns beyond the end.
            if column + BLOCK_V > end:
                capped = tl.where(in_range[None, :], capped, float("-inf"))
            row_max, sum_exp, weighted_sum = fold_part(
                capped, tl.max(capped, 1), row_max, sum_exp, weighted_sum, scale, True
            )
            pieces = (capped,)
            if PIECE < PART:
                pieces = quarters(capped, BLOCK_N, PART)
            for k in tl.static_range(len(pieces)):
                piece = pieces[k]
                if DRAWN_ROWS < BLOCK_N:
                    numbers = tl.broadcast_to(drawn[:, None], (DRAWN_ROWS, PIECE))
                    piece = tl.gather(piece, numbers, 0)
                score, number, logit = draw_of_fours(
                    piece,
                    begin + left + k * PIECE,
                    seed,
                    position,
                    of_rank,
                    temperature,
                    HAS_FIRST,
                    GREEDY,
                    DRAWN_ROWS,
                    PIECE,
                )
                is_better = score > best_score
                best_score = tl.where(is_better, score, best_score)
                best_column = tl.where(is_better, number, best_column)
                best_logit = tl.where(is_better, logit, best_logit)
    score, number, logit = winner(best_score, best_column, best_logit)
    i = first_row + tl.arange(0, BLOCK_N)
    in_rows = i < N
    to = parts_ptr + split.to(tl.int64) * N + i
    tl.store(to, row_max * (1.0 / temperature), mask=in_rows)
    tl.store(to + stride_part, sum_exp, mask=in_rows)
    tl.store(to + 3 * stride_part, weighted_sum * LN_2, mask=in_rows)
    at = split.to(tl.int64) * N + first_row + drawn
    tl.store(parts_ptr + 2 * stride_part + at, logit * (1.0 / temperature), mask=is_drawn)
    tl.store(scores_ptr + at, score, mask=is_drawn)
    tl.store(columns_ptr + at, number, mask=is_drawn)
