"""The noise that `linear_sample` draws by, in plain PyTorch: every backend makes the same words.

Philox4x32-10 is a counter-based generator: its four words are a function of a counter of four words
and a key of two, so that the noise of any row and column can be made alone, in any order. It is
that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Words are 32 bits,
unsigned; here they stand in int64, in 0..2³² − 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the four words of each counter (four words) under its key (two), all int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps around, and its bits are those of the unsigned one.
        of_c0, of_c2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(of_c2) ^ c1 ^ k0, of_c2 & _LOW, _high(of_c0) ^ c3 ^ k1, of_c0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def words(seed: Tensor, position: Tensor, V: int) -> Tensor:
    """Return the word of each row and column, int64 [N, V], from seed and position, int64 [N].

    The key is the seed; the counter is (column // 4, position's low and high word, 0), and a column
    takes word column % 4 of what it gives.
    """
    fours = torch.arange(-(-V // 4), device=seed.device)[None, :]
    low, high = (position & _LOW)[:, None], _high(position)[:, None]
    counter = (fours, low, high, torch.zeros_like(low))
    made = philox(counter, ((seed & _LOW)[:, None], _high(seed)[:, None]))
    return torch.stack(made, dim=-1).flatten(1)[:, :V]


def gumbel(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the standard Gumbel variate of each word, −log(−log(1 − v)), v being uniform.

    v = (word + ½) / 2³², rounded to fp32 and at most 1 − 2⁻²⁴. The largest variates come of the
    smallest v, where fp32 has digits to spare: they reach 22.9, and no two words share one.
    """
    v = (word.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-v.to(dtype)))


def _high(value: Tensor) -> Tensor:
    """Return the upper 32 of 64 bits."""
    return (value >> 32) & _LOW
