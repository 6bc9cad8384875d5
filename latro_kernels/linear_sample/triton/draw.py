"""The noise of `linear_sample` in Triton, and the columns that win by it.

The highest of the scores z_j + g_j is the first arrival of a race: with the exponential variate
e_j = exp(−g_j), column j arrives at the time e_j·exp(−z_j). Times take one logarithm a column where
scores take two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latro_kernels.linear_logprob.triton.products import LN_2, LOG2_E

# Of what is compared at once where a token is chosen.
CHOSEN_ROWS, SPLITS = 16, 64
# The bits of 2/3 as a float, and those that hold a float's sign and exponent.
_TWO_THIRDS: tl.constexpr = tl.constexpr(0x3F2AAAAB)
_EXPONENT: tl.constexpr = tl.constexpr(-0x800000)


@triton.jit
def noise_words(seed, position, fours, first, HAS_FIRST: tl.constexpr):
    """Return the words of columns 4f, 4f + 1, 4f + 2 and 4f + 3 for each f of `fours`.

    seed, position: int64 [R, 1]; fours: int32 [1, C]; first: int64, with HAS_FIRST the number of
    column 0, which is 0 without.
    """
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    if not HAS_FIRST:
        return tl.philox(seed, fours.to(tl.uint32), low, high, 0)
    # The first column need not be the first of its four: words of two counters are its neighbours'.
    counter = (first // 4 + fours).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, low, high, 0)
    w4, w5, w6, _ = tl.philox(seed, counter + 1, low, high, 0)
    by_two = (first & 2) != 0
    w0, w1 = tl.where(by_two, w2, w0), tl.where(by_two, w3, w1)
    w2, w3, w4 = tl.where(by_two, w4, w2), tl.where(by_two, w5, w3), tl.where(by_two, w6, w4)
    by_one = (first & 1) != 0
    w0, w1 = tl.where(by_one, w1, w0), tl.where(by_one, w2, w1)
    return w0, w1, tl.where(by_one, w3, w2), tl.where(by_one, w4, w3)


@triton.jit
def exponential(word):
    """Return -log(1 - v), v = (word + 1/2) / 2^32 in fp32, at most 1 - 2^-24."""
    v = tl.minimum(word.to(tl.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24)
    exponent, m = _split(1.0 - v)
    # Where v is small, 1 - v has lost digits of it that m still has.
    return -_log(exponent, tl.where(exponent == 0, -v, m))


@triton.jit
def log(x):
    """Return the logarithm of a positive normal number, without branches for others."""
    exponent, m = _split(x)
    return _log(exponent, m)


@triton.jit
def _split(x):
    """Return k·2^23, int32, and m of x = 2^k·(1 + m), -1/3 <= m < 1/3."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _TWO_THIRDS) & _EXPONENT
    return exponent, (bits - exponent).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _log(exponent, m):
    # A minimax of (log(1 + m) - m) / m^2, which keeps the digits of a small m: its relative error
    # is below 2^-23.
    p = 0.14026358723640442
    p = p * m - 0.1538853943347931
    p = p * m + 0.13995806872844696
    p = p * m - 0.1641596108675003
    p = p * m + 0.20011168718338013
    p = p * m - 0.2500782012939453
    p = p * m + 0.33333197236061096
    p = p * m - 0.49999937415122986
    return exponent.to(tl.float32) * (LN_2 * 2.0**-23) + (m * m * p + m)


@triton.jit
def draw_of_fours(
    z,
    begin,
    seed,
    position,
    first,
    temperature,
    HAS_FIRST: tl.constexpr,
    GREEDY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return of each four columns the highest score, the first column that has it, and z there.

    z: [ROWS, COLUMNS], logits before they are divided by the temperature, -inf in columns that are
    none. begin: the column of the weight that z begins with, a multiple of 4. seed, position: int64
    [ROWS]. first: as in `noise_words`. Results are [ROWS, COLUMNS / 4].
    """
    FOURS: tl.constexpr = COLUMNS // 4
    column = begin + 4 * tl.arange(0, FOURS)[None, :]
    # Column 4f + 2a + b of z is z_ab[:, f].
    even, odd = tl.split(tl.reshape(z, (ROWS, FOURS, 2, 2)))
    z0, z2 = tl.split(even)
    z1, z3 = tl.split(odd)
    top = tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3))
    # Of four columns of -inf there is no maximum to subtract.
    shift = tl.where(top == float("-inf"), 0.0, top)
    t0, t1, t2, t3 = shift - z0, shift - z1, shift - z2, shift - z3
    if not GREEDY:
        scale = LOG2_E / temperature
        w0, w1, w2, w3 = noise_words(
            seed[:, None], position[:, None], column // 4, first, HAS_FIRST
        )
        t0 = exponential(w0) * tl.exp2(t0 * scale)
        t1 = exponential(w1) * tl.exp2(t1 * scale)
        t2 = exponential(w2) * tl.exp2(t2 * scale)
        t3 = exponential(w3) * tl.exp2(t3 * scale)
    earliest = tl.minimum(tl.minimum(t0, t1), tl.minimum(t2, t3))
    is0, is1, is2 = t0 == earliest, t1 == earliest, t2 == earliest
    column += tl.where(is0, 0, tl.where(is1, 1, tl.where(is2, 2, 3)))
    score = top * (1.0 / temperature)
    if not GREEDY:
        score -= log(earliest)
    return score, column, tl.where(is0, z0, tl.where(is1, z1, tl.where(is2, z2, z3)))


@triton.jit
def winner(score, column, z):
    """Return of each row the highest score, the lowest column that has it, and z there."""
    highest = tl.max(score, 1)
    lowest = tl.min(tl.where(score == highest[:, None], column, 0x7FFFFFFF), 1)
    return highest, lowest, tl.max(tl.where(column == lowest[:, None], z, float("-inf")), 1)


# A multiple of 16 rows would have wider loads, and a kernel of its own, for a thousandth of the
# time: the rows of a batch that is sampled change from token to token.
@triton.jit(do_not_specialize=["N", "splits"])
def choose_kernel(
    scores_ptr,
    columns_ptr,
    score_ptr,
    token_ptr,
    N,
    splits,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Put the highest of a row's scores[splits, N] in the place of its score if it is higher.

    Its column, the lowest that has it, becomes the token, int64.
    """
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = i < N
    best_score = tl.load(score_ptr + i, mask=in_rows, other=float("-inf"))
    best_column = tl.load(token_ptr + i, mask=in_rows, other=0)
    # Splits are in the order of their columns.
    for begin in range(0, splits, SPLITS):
        split = begin + tl.arange(0, SPLITS)
        at = split.to(tl.int64)[:, None] * N + i[None, :]
        mask = (split < splits)[:, None] & in_rows[None, :]
        score = tl.load(scores_ptr + at, mask=mask, other=float("-inf"))
        column = tl.load(columns_ptr + at, mask=mask, other=0)
        highest = tl.max(score, 0)
        lowest = tl.min(tl.where(score == highest[None, :], column, 0x7FFFFFFF), 0)
        is_better = highest > best_score
        best_score = tl.where(is_better, highest, best_score)
        best_column = tl.where(is_better, lowest.to(tl.int64), best_column)
    tl.store(score_ptr + i, best_score, mask=in_rows)
    tl.store(token_ptr + i, best_column, mask=in_rows)


def choose(scores: Tensor, columns: Tensor, score: Tensor, token: Tensor) -> None:
    """Put the highest of scores[splits, N] in the place of a row's score if it is higher.

    Its column, int32 [splits, N], becomes the row's token.
    """
    splits, N = scores.shape
    with torch.cuda.device_of(scores):
        choose_kernel[(triton.cdiv(N, CHOSEN_ROWS),)](
            scores_ptr=scores,
            columns_ptr=columns,
            score_ptr=score,
            token_ptr=token,
            N=N,
            splits=splits,
            BLOCK_N=CHOSEN_ROWS,
            SPLITS=SPLITS,
        )
