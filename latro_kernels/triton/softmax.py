"""What every Triton kernel that folds logits needs of them.

exp, tanh and expm1 are made of what Triton's interpreter has as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def flags(**pointers: str) -> dict[str, Callable[[dict[str, Any]], bool]]:
    """Return heuristics of a kernel: HAS_SOFTCAP, and by flag the pointer that sets it if given."""
    given = {
        flag: lambda args, name=name: args[name] is not None for flag, name in pointers.items()
    }
    return {"HAS_SOFTCAP": lambda args: args["softcap"] > 0, **given}


@triton.jit
def tanh(x):
    # An odd polynomial near 0, where the formula by exp would cancel; minimax on [0, 0.625].
    s = x * x
    t = -0.0057170366
    t = t * s + 0.020650579
    t = t * s - 0.053743495
    t = t * s + 0.13331491
    t = t * s - 0.33333284
    small = x + x * s * t
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(magnitude, 10.0)) + 1.0)
    return tl.where(magnitude < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def expm1(x):
    # Taylor's series where exp(x) - 1 would cancel: below 0.5 the next term is under 2^-24.
    series = 1.0 + x / 9
    series = 1.0 + x / 8 * series
    series = 1.0 + x / 7 * series
    series = 1.0 + x / 6 * series
    series = 1.0 + x / 5 * series
    series = 1.0 + x / 4 * series
    series = 1.0 + x / 3 * series
    series = 1.0 + x / 2 * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def row_logits(
    row_ptr,
    bias_ptr,
    columns,
    mask,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Load z of some columns of a row; -inf, which counts for nothing, outside of the mask."""
    z = tl.load(row_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=mask, other=0.0)
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return tl.where(mask, z / temperature, float("-inf"))


@triton.jit
def fold_logits(
    z,
    mask,
    row_max,
    sum_exp,
    weighted_sum,
    square_sum,
    logit_sum,
    WITH_ENTROPY: tl.constexpr,
    WITH_FURTHER_SUMS: tl.constexpr,
):
    """Add logits, which are -inf outside of the mask, to the state of their row."""
    new_max = tl.maximum(row_max, tl.max(z, 0))
    # A row that is -inf so far has no maximum to subtract.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    # What was summed so far, seen from the new maximum.
    drop = row_max - shift
    shrink = tl.exp(drop)
    below = z - shift
    e = tl.exp(below)
    if WITH_ENTROPY:
        # 0 * -inf counts as 0.
        moment = tl.sum(tl.where(e == 0.0, 0.0, e * below), 0)
        weighted_sum = (
            tl.where(shrink == 0.0, 0.0, shrink * (weighted_sum + drop * sum_exp)) + moment
        )
    if WITH_FURTHER_SUMS:
        square_sum = square_sum * (shrink * shrink) + tl.sum(e * e, 0)
        logit_sum += tl.sum(tl.where(mask, z, 0.0), 0)
    return new_max, sum_exp * shrink + tl.sum(e, 0), weighted_sum, square_sum, logit_sum


@triton.jit
def product_grad(
    z,
    is_target,
    upstream,
    forward,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    WITH_OFFSET: tl.constexpr,
    WITH_SQUARE: tl.constexpr,
):
    """Return the gradient with respect to the products that logits z were made of.

    upstream: grad_logp, grad_entropy, offset and grad_square; forward: logp, row_max, log_sum.
    """
    grad_logp, grad_entropy, offset, grad_square = upstream
    logp, row_max, log_sum = forward
    log_p = tl.where(is_target, logp, (z - row_max) - log_sum)
    p = tl.exp(log_p)
    # 1 - p by expm1: exact where p is close to 1.
    dz = grad_logp * tl.where(is_target, -expm1(logp), -p)
    if WITH_OFFSET:
        factor = grad_entropy * log_p + offset
        if WITH_SQUARE:
            factor -= grad_square * p
        dz -= tl.where(p == 0.0, 0.0, p * factor)
    if HAS_SOFTCAP:
        tanh = z * (temperature / softcap)
        dz *= 1.0 - tanh * tanh
    return dz * (1.0 / temperature)
