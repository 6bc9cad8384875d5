"""linear_kl in Triton: the two folds over the tiles of both heads, one program per row.

The formulas stand in `latro_kernels.linear_kl`, the loops around the folds in
`latro_kernels.kl_tiles`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latro_kernels.kl_tiles import Heads, RowGrad, RowState, gradient_tile
from latro_kernels.triton.softmax import row_logits

BLOCK_V = 1024


@triton.jit
def _second_order(x):
    """exp(-x) - 1 + x by Taylor's series: below 0.5 the next term is under 2^-24."""
    series = 1.0 - x / 8
    series = 1.0 - x / 7 * series
    series = 1.0 - x / 6 * series
    series = 1.0 - x / 5 * series
    series = 1.0 - x / 4 * series
    series = 1.0 - x / 3 * series
    return 0.5 * x * x * series


@triton.jit
def fold_kernel(
    tile_p_ptr,
    tile_q_ptr,
    bias_p_ptr,
    bias_q_ptr,
    peak_p_ptr,
    total_p_ptr,
    peak_q_ptr,
    total_q_ptr,
    anchor_ptr,
    moment_ptr,
    second_ptr,
    columns,
    softcap,
    temperature,
    HAS_BIAS_P: tl.constexpr,
    HAS_BIAS_Q: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_ptr = tile_p_ptr + row * columns
    q_ptr = tile_q_ptr + row * columns
    peak_p = tl.load(peak_p_ptr + row)
    total_p = tl.load(total_p_ptr + row)
    peak_q = tl.load(peak_q_ptr + row)
    total_q = tl.load(total_q_ptr + row)
    anchor = tl.load(anchor_ptr + row)
    moment = tl.load(moment_ptr + row)
    second = tl.load(second_ptr + row)
    for begin in range(0, columns, BLOCK_V):
        j = begin + tl.arange(0, BLOCK_V)
        mask = j < columns
        zp = row_logits(p_ptr, bias_p_ptr, j, mask, softcap, temperature, HAS_BIAS_P, HAS_SOFTCAP)
        zq = row_logits(q_ptr, bias_q_ptr, j, mask, softcap, temperature, HAS_BIAS_Q, HAS_SOFTCAP)
        largest_p = tl.maximum(peak_p, tl.max(zp, 0))
        largest_q = tl.maximum(peak_q, tl.max(zq, 0))
        # Of several columns that share the largest logit any will do.
        q_there = tl.max(tl.where(zp == largest_p, zq, float("-inf")), 0)
        new_anchor = tl.where(q_there == float("-inf"), 0.0, q_there)
        new_anchor = tl.where(largest_p > peak_p, new_anchor, anchor)
        # A row that is -inf so far has no peak to subtract.
        shift_p = tl.where(largest_p == float("-inf"), 0.0, largest_p)
        shift_q = tl.where(largest_q == float("-inf"), 0.0, largest_q)
        at_anchor = shift_p - new_anchor

        # What was summed so far, seen from the new peaks.
        drop_p = peak_p - shift_p
        drop_q = peak_q - shift_q
        shrink_p = tl.exp(drop_p)
        shrink_q = tl.exp(drop_q)
        turn = drop_p - drop_q
        first = moment + (peak_q - anchor) * total_p
        bend = _second_order(turn) * (total_p - first) + turn * first
        moved = tl.where(shrink_p == 0.0, 0.0, shrink_p * (first + turn * total_p))
        second = tl.where(
            tl.abs(turn) < 0.5,
            shrink_q * second + shrink_p * bend,
            (shrink_q * total_q - shrink_p * total_p) + moved,
        )
        move = (peak_p - anchor) - at_anchor
        moment = tl.where(shrink_p == 0.0, 0.0, shrink_p * (moment + move * total_p))
        total_p *= shrink_p
        total_q *= shrink_q

        ep = tl.exp(zp - shift_p)
        eq = tl.exp(zq - shift_q)
        distance = zp - zq
        delta = distance - (shift_p - shift_q)
        close = tl.abs(delta) < 0.5
        # 0 * inf counts as 0.
        far = (eq - ep) + tl.where(ep == 0.0, 0.0, ep * delta)
        total_p += tl.sum(ep, 0)
        total_q += tl.sum(eq, 0)
        moment += tl.sum(tl.where(ep == 0.0, 0.0, ep * (distance - at_anchor)), 0)
        second += tl.sum(tl.where(close, ep * _second_order(delta), far), 0)
        anchor = new_anchor
        peak_p = largest_p
        peak_q = largest_q
    tl.store(peak_p_ptr + row, peak_p)
    tl.store(total_p_ptr + row, total_p)
    tl.store(peak_q_ptr + row, peak_q)
    tl.store(total_q_ptr + row, total_q)
    tl.store(anchor_ptr + row, anchor)
    tl.store(moment_ptr + row, moment)
    tl.store(second_ptr + row, second)


@triton.jit
def grad_kernel(
    tile_p_ptr,
    tile_q_ptr,
    bias_p_ptr,
    bias_q_ptr,
    dtile_ptr,
    grad_kl_ptr,
    anchor_ptr,
    mean_ptr,
    peak_ptr,
    total_ptr,
    columns,
    softcap,
    temperature,
    HAS_BIAS_P: tl.constexpr,
    HAS_BIAS_Q: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_ptr = tile_p_ptr + row * columns
    q_ptr = tile_q_ptr + row * columns
    grad_kl = tl.load(grad_kl_ptr + row)
    peak = tl.load(peak_ptr + row)
    at_anchor = peak - tl.load(anchor_ptr + row)
    mean = tl.load(mean_ptr + row)
    total = tl.load(total_ptr + row)
    for begin in range(0, columns, BLOCK_V):
        j = begin + tl.arange(0, BLOCK_V)
        mask = j < columns
        zp = row_logits(p_ptr, bias_p_ptr, j, mask, softcap, temperature, HAS_BIAS_P, HAS_SOFTCAP)
        zq = row_logits(q_ptr, bias_q_ptr, j, mask, softcap, temperature, HAS_BIAS_Q, HAS_SOFTCAP)
        p = tl.exp(zp - peak) / total
        dz = tl.where(p == 0.0, 0.0, grad_kl * p * (((zp - zq) - at_anchor) - mean))
        if HAS_SOFTCAP:
            tanh = zp * temperature / softcap
            dz *= 1.0 - tanh * tanh
        tl.store(dtile_ptr + row * columns + j, dz / temperature, mask=mask)


class TritonKernels:
    """The folds as `latro_kernels.kl_tiles` calls them."""

    @staticmethod
    def fold(
        heads: Heads,
        tiles: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, Tensor | None],
        state: RowState,
    ) -> None:
        """Add the tiles of products to the state of their rows."""
        with torch.cuda.device_of(tiles[0]):
            fold_kernel[(len(tiles[0]),)](
                *(*tiles, *biases, *vars(state).values()),
                *(tiles[0].shape[1], heads.softcap, heads.temperature),
                HAS_BIAS_P=biases[0] is not None,
                HAS_BIAS_Q=biases[1] is not None,
                HAS_SOFTCAP=heads.softcap > 0,
                BLOCK_V=BLOCK_V,
            )

    @staticmethod
    def grad(
        heads: Heads,
        tiles: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, Tensor | None],
        grad: RowGrad,
    ) -> Tensor:
        """The gradient with respect to p's products, in the dtype of the next product."""
        dz = gradient_tile(heads, tiles[0])
        with torch.cuda.device_of(dz):
            grad_kernel[(len(dz),)](
                *(*tiles, *biases, dz, *vars(grad).values()),
                *(dz.shape[1], heads.softcap, heads.temperature),
                HAS_BIAS_P=biases[0] is not None,
                HAS_BIAS_Q=biases[1] is not None,
                HAS_SOFTCAP=heads.softcap > 0,
                BLOCK_V=BLOCK_V,
            )
        return dz
