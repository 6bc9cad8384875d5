"""What `grad_filter` leaves out of a backward, what that saves, and what it costs.

The rule, told without the op: rows and vocabulary are cut into blocks. With upstream gradient g_t,
a block's entries of the logits' gradient are −g_t·p_tj, but for targets, and none is above
|g_t|·exp(max_t − lse_t), max_t the row's largest logit in the block. Where that is below eps in
every row of a block, and no row's target lies in it, the block is skipped; rows go into blocks in
the order of how many columns they need. So each entry that is lost is below eps, and of the
gradients, elementwise,

    |ΔdX_th| ≤ eps·Σ_j |W_jh|        |ΔdW_jh| ≤ eps·Σ_t |x_th|
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.logprob_report import BARE_GEMMS, ERRORS, Row
from benchmarks.measure import Limits, multiples, time_all
from benchmarks.problem import Problem, Shape, relative_error, solve_fp64
from benchmarks.providers import PROVIDERS, solve
from latro_kernels.cpu import FILTER_COLUMNS, FILTER_ROWS

EXPONENTS = (-16, -14, -12, -10, -8)
_PHASES = ("full",)
_CHUNK_BYTES = 64 << 20


@torch.no_grad()
def evidence(problem: Problem, columns: int) -> tuple[Tensor, Tensor]:
    """|g_t|·exp(max_t − lse_t) of every row t and block of columns, fp32 [N, ⌈V / columns⌉], and
    whether the row's target lies there, bool."""
    weight = problem.weight.float()
    V = len(weight)
    chunk = max(1, _CHUNK_BYTES // (4 * V))
    blocks = []
    for hidden, grad in zip(problem.hidden.split(chunk), problem.grad.split(chunk), strict=True):
        logits = hidden.float() @ weight.T
        lse = logits.logsumexp(1, keepdim=True)
        padded = F.pad(logits, (0, -V % columns), value=-math.inf)
        peak = padded.unflatten(1, (-1, columns)).amax(2)
        blocks.append(grad.abs()[:, None] * (peak - lse).exp())
    bound = torch.cat(blocks)
    hit = torch.zeros_like(bound, dtype=torch.bool)
    return bound, hit.scatter_(1, problem.target[:, None] // columns, True)


def skipped(bound: Tensor, hit: Tensor, rows: int, eps: float) -> float:
    """The share of blocks of `rows` rows that are skipped, the rows with fewest blocks above eps
    standing first."""
    above = bound >= eps
    needed = (above | hit)[above.sum(1).argsort(stable=True)]
    needed = F.pad(needed, (0, 0, 0, -len(needed) % rows))
    return 1 - needed.unflatten(0, (-1, rows)).any(1).float().mean().item()


def block_shape(weight: Tensor) -> tuple[int, int]:
    """Rows and columns that are left out together on the weight's device."""
    if weight.device.type == "cpu":
        return FILTER_ROWS, FILTER_COLUMNS
    from latro_kernels.triton import tuning

    V, H = weight.shape
    config = tuning.config(weight.device, weight.dtype, H, V)
    return config.rows, config.columns


def bounds(problem: Problem, eps: float) -> tuple[float, float]:
    """The largest that any entry of dX, and of dW, can lose."""
    by_column = (
        tensor.detach().double().abs().sum(0) for tensor in (problem.weight, problem.hidden)
    )
    dx, dw = (eps * total.max().item() for total in by_column)
    return dx, dw


def measure(
    problem: Problem, shape_name: str, dtype: str, provider: str, limits: Limits
) -> list[Row]:
    """Full, without filter and with every eps of `EXPONENTS`: times, errors over all rows and, as
    `more`, the percentage of blocks skipped, the gradients' absolute errors and their bounds.

    Raises:
        Exception of `providers.CANNOT_RUN`: the provider, or its filter, cannot run here.
    """
    (N, H), V = problem.hidden.shape, len(problem.weight)
    logprob = PROVIDERS[provider].find(problem.hidden.device)
    epsilons = {provider: 0.0} | {f"{provider}, eps 2^{e}": 2.0**e for e in EXPONENTS}
    found = {name: partial(logprob, grad_filter=eps) for name, eps in epsilons.items()}
    truth = solve_fp64(problem)
    rows, columns = block_shape(problem.weight)
    bound, hit = evidence(problem, columns)
    error, more = {}, {}
    for name, eps in epsilons.items():
        solution = solve(found[name], problem)
        error[name] = {
            "logp": relative_error(solution.logp, truth.logp),
            "dx": relative_error(solution.dx, truth.dx),
            "dw": relative_error(solution.dw, truth.dw),
            "dx_peaked": None,
        }
        bound_dx, bound_dw = bounds(problem, eps)
        more[name] = {
            "skipped %": 100 * skipped(bound, hit, rows, eps),
            "dX error": error[name]["dx"] * truth.dx.abs().max().item(),
            "dX bound": bound_dx,
            "dW error": error[name]["dw"] * truth.dw.abs().max().item(),
            "dW bound": bound_dw,
        }
    times = time_all(problem, found, limits, _PHASES)
    bare = times.pop(BARE_GEMMS)
    shape = Shape(shape_name, N, H, V)
    return [
        Row(
            *(shape, dtype, BARE_GEMMS, bare, multiples(bare, bare)),
            memory={},
            error=dict.fromkeys(ERRORS),
            error_rows=None,
        ),
        *(
            Row(
                *(shape, dtype, name, times[name], multiples(times[name], bare)),
                memory={},
                error=error[name],
                error_rows=N,
                more=more[name],
            )
            for name in found
        ),
    ]
