"""linear_kl in Triton: the two folds over the tiles of both heads, one program per row.

The formulas stand in `latro_kernels.linear_kl`, the loops around the folds in its `tiles`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latro_kernels.linear_kl.state import Heads, KlGrad, KlState, OptionalPair, Pair
from latro_kernels.triton.softmax import row_logits

BLOCK_V = 1024
FLAGS = {
    "HAS_BIAS_P": lambda args: args["bias_p_ptr"] is not None,
    "HAS_BIAS_Q": lambda args: args["bias_q_ptr"] is not None,
    "HAS_SOFTCAP_P": lambda args: args["softcap_p"] > 0,
    "HAS_SOFTCAP_Q": lambda args: args["softcap_q"] > 0,
}


@triton.jit
def _second_order(x):
    """Return exp(-x) - 1 + x by Taylor's series: below 0.5 the next term is under 2^-24."""
    series = 1.0 - x / 8
    series = 1.0 - x / 7 * series
    series = 1.0 - x / 6 * series
    series = 1.0 - x / 5 * series
    series = 1.0 - x / 4 * series
    series = 1.0 - x / 3 * series
    return 0.5 * x * x * series


@triton.heuristics(FLAGS)
@triton.jit
def fold_kernel(
    tile_p_ptr,
    tile_q_ptr,
    bias_p_ptr,
    bias_q_ptr,
    max_p_ptr,
    sum_exp_p_ptr,
    max_q_ptr,
    sum_exp_q_ptr,
    anchor_ptr,
    moment_ptr,
    second_ptr,
    columns,
    softcap_p,
    temperature_p,
    softcap_q,
    temperature_q,
    HAS_BIAS_P: tl.constexpr,
    HAS_BIAS_Q: tl.constexpr,
    HAS_SOFTCAP_P: tl.constexpr,
    HAS_SOFTCAP_Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_ptr = tile_p_ptr + row * columns
    q_ptr = tile_q_ptr + row * columns
    max_p = tl.load(max_p_ptr + row)
    sum_exp_p = tl.load(sum_exp_p_ptr + row)
    max_q = tl.load(max_q_ptr + row)
    sum_exp_q = tl.load(sum_exp_q_ptr + row)
    anchor = tl.load(anchor_ptr + row)
    moment = tl.load(moment_ptr + row)
    second = tl.load(second_ptr + row)
    for begin in range(0, columns, BLOCK_V):
        j = begin + tl.arange(0, BLOCK_V)
        mask = j < columns
        zp = row_logits(
            p_ptr, bias_p_ptr, j, mask, softcap_p, temperature_p, HAS_BIAS_P, HAS_SOFTCAP_P
        )
        zq = row_logits(
            q_ptr, bias_q_ptr, j, mask, softcap_q, temperature_q, HAS_BIAS_Q, HAS_SOFTCAP_Q
        )
        largest_p = tl.maximum(max_p, tl.max(zp, 0))
        largest_q = tl.maximum(max_q, tl.max(zq, 0))
        # Of several columns that share the largest logit any will do.
        q_there = tl.max(tl.where(zp == largest_p, zq, float("-inf")), 0)
        new_anchor = tl.where(q_there == float("-inf"), 0.0, q_there)
        new_anchor = tl.where(largest_p > max_p, new_anchor, anchor)
        # A row that is -inf so far has no maximum to subtract.
        shift_p = tl.where(largest_p == float("-inf"), 0.0, largest_p)
        shift_q = tl.where(largest_q == float("-inf"), 0.0, largest_q)
        at_anchor = shift_p - new_anchor

        # Bring what was summed so far to the new maxima, by which every delta moves by `turn`.
        drop_p = max_p - shift_p
        drop_q = max_q - shift_q
        shrink_p = tl.exp(drop_p)
        shrink_q = tl.exp(drop_q)
        turn = drop_p - drop_q
        # The sum of exp(zp - max_p) * delta.
        first = moment + (max_q - anchor) * sum_exp_p
        # With S(x) = exp(-x) - 1 + x, S(delta + turn) is
        # exp(-turn) * S(delta) + S(turn) * (1 - delta) + turn * delta: nothing cancels in it. Where
        # the maxima move apart the sum is made anew from those of exponentials.
        bend = _second_order(turn) * (sum_exp_p - first) + turn * first
        moved = tl.where(shrink_p == 0.0, 0.0, shrink_p * (first + turn * sum_exp_p))
        second = tl.where(
            tl.abs(turn) < 0.5,
            shrink_q * second + shrink_p * bend,
            (shrink_q * sum_exp_q - shrink_p * sum_exp_p) + moved,
        )
        move = (max_p - anchor) - at_anchor
        moment = tl.where(shrink_p == 0.0, 0.0, shrink_p * (moment + move * sum_exp_p))
        sum_exp_p *= shrink_p
        sum_exp_q *= shrink_q

        # Add this block's columns.
        ep = tl.exp(zp - shift_p)
        eq = tl.exp(zq - shift_q)
        distance = zp - zq
        delta = distance - (shift_p - shift_q)
        close = tl.abs(delta) < 0.5
        # 0 * inf counts as 0.
        far = (eq - ep) + tl.where(ep == 0.0, 0.0, ep * delta)
        sum_exp_p += tl.sum(ep, 0)
        sum_exp_q += tl.sum(eq, 0)
        moment += tl.sum(tl.where(ep == 0.0, 0.0, ep * (distance - at_anchor)), 0)
        second += tl.sum(tl.where(close, ep * _second_order(delta), far), 0)
        anchor = new_anchor
        max_p = largest_p
        max_q = largest_q
    tl.store(max_p_ptr + row, max_p)
    tl.store(sum_exp_p_ptr + row, sum_exp_p)
    tl.store(max_q_ptr + row, max_q)
    tl.store(sum_exp_q_ptr + row, sum_exp_q)
    tl.store(anchor_ptr + row, anchor)
    tl.store(moment_ptr + row, moment)
    tl.store(second_ptr + row, second)


@triton.heuristics(FLAGS)
@triton.jit
def grad_kernel(
    tile_p_ptr,
    tile_q_ptr,
    bias_p_ptr,
    bias_q_ptr,
    dz_ptr,
    grad_kl_ptr,
    anchor_ptr,
    mean_ptr,
    max_p_ptr,
    sum_exp_p_ptr,
    max_q_ptr,
    sum_exp_q_ptr,
    columns,
    softcap_p,
    temperature_p,
    softcap_q,
    temperature_q,
    HAS_BIAS_P: tl.constexpr,
    HAS_BIAS_Q: tl.constexpr,
    HAS_SOFTCAP_P: tl.constexpr,
    HAS_SOFTCAP_Q: tl.constexpr,
    OF_Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_ptr = tile_p_ptr + row * columns
    q_ptr = tile_q_ptr + row * columns
    grad_kl = tl.load(grad_kl_ptr + row)
    max_p = tl.load(max_p_ptr + row)
    at_anchor = max_p - tl.load(anchor_ptr + row)
    mean = tl.load(mean_ptr + row)
    sum_exp_p = tl.load(sum_exp_p_ptr + row)
    max_q = tl.load(max_q_ptr + row)
    sum_exp_q = tl.load(sum_exp_q_ptr + row)
    softcap = softcap_q if OF_Q else softcap_p
    temperature = temperature_q if OF_Q else temperature_p
    for begin in range(0, columns, BLOCK_V):
        j = begin + tl.arange(0, BLOCK_V)
        mask = j < columns
        zp = row_logits(
            p_ptr, bias_p_ptr, j, mask, softcap_p, temperature_p, HAS_BIAS_P, HAS_SOFTCAP_P
        )
        zq = row_logits(
            q_ptr, bias_q_ptr, j, mask, softcap_q, temperature_q, HAS_BIAS_Q, HAS_SOFTCAP_Q
        )
        p = tl.exp(zp - max_p) / sum_exp_p
        if OF_Q:
            dz = grad_kl * (tl.exp(zq - max_q) / sum_exp_q - p)
        else:
            dz = tl.where(p == 0.0, 0.0, grad_kl * p * (((zp - zq) - at_anchor) - mean))
        # From the logits to the products that they were made of.
        if HAS_SOFTCAP_Q if OF_Q else HAS_SOFTCAP_P:
            # Divided first: a division for each logit would take more registers than there are.
            tanh = (zq if OF_Q else zp) * (temperature / softcap)
            dz *= 1.0 - tanh * tanh
        tl.store(dz_ptr + row * columns + j, dz / temperature, mask=mask)


def fold(heads: Heads, tiles: Pair, biases: OptionalPair, state: KlState) -> None:
    """Add the tiles of p and q to the state of their rows, in place."""
    rows, columns = tiles[0].shape
    with torch.cuda.device_of(tiles[0]):
        fold_kernel[(rows,)](
            tile_p_ptr=tiles[0],
            tile_q_ptr=tiles[1],
            bias_p_ptr=biases[0],
            bias_q_ptr=biases[1],
            max_p_ptr=state.max_p,
            sum_exp_p_ptr=state.sum_exp_p,
            max_q_ptr=state.max_q,
            sum_exp_q_ptr=state.sum_exp_q,
            anchor_ptr=state.anchor,
            moment_ptr=state.moment,
            second_ptr=state.second,
            columns=columns,
            **_scales(heads),
            BLOCK_V=BLOCK_V,
        )


def grad(
    heads: Heads, tiles: Pair, biases: OptionalPair, *, rows: KlGrad, of_q: bool, dz: Tensor
) -> None:
    """Fill `dz`, the gradient with respect to p's products, or q's, which may be their tile."""
    with torch.cuda.device_of(dz):
        grad_kernel[(len(dz),)](
            tile_p_ptr=tiles[0],
            tile_q_ptr=tiles[1],
            bias_p_ptr=biases[0],
            bias_q_ptr=biases[1],
            dz_ptr=dz,
            grad_kl_ptr=rows.grad_kl,
            anchor_ptr=rows.anchor,
            mean_ptr=rows.mean,
            max_p_ptr=rows.max_p,
            sum_exp_p_ptr=rows.sum_exp_p,
            max_q_ptr=rows.max_q,
            sum_exp_q_ptr=rows.sum_exp_q,
            columns=dz.shape[1],
            **_scales(heads),
            OF_Q=of_q,
            BLOCK_V=BLOCK_V,
        )


def _scales(heads: Heads) -> dict[str, float]:
    """Return what both kernels take of p and q."""
    scales: dict[str, float] = {}
    for name, head in zip("pq", heads, strict=True):
        scales |= {f"softcap_{name}": head.softcap, f"temperature_{name}": head.temperature}
    return scales
