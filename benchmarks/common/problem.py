"""The problem that providers of log-probs solve: shapes, inputs, and the fp64 truth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEAKED_EVERY = 8  # every eighth row is planted to be certain of one token
_PEAK_LOG_ODDS = 10.0  # 1 - p about 1e-4: where bf16 cannot tell p from 1, and fp32 can
_LOGIT_STD = 3.0
_TRUTH_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Shape:
    """N rows, H hidden, V vocabulary, under a name."""

    name: str
    n: int
    h: int
    v: int

    @property
    def step_flop(self) -> int:
        """Floating-point operations of the three GEMMs (logits, dX, dW): 6·N·H·V."""
        return 6 * self.n * self.h * self.v


CPU_SHAPES = (Shape("cpu-1k", n=1024, h=1024, v=32000),)
GPU_SHAPES = (
    Shape("llama-3.1-8b", n=8192, h=4096, v=128256),
    Shape("mistral-7b", n=8192, h=4096, v=32768),
    Shape("phi-3.5-mini", n=8192, h=3072, v=32064),
    Shape("qwen2.5-7b", n=8192, h=3584, v=152064),
)
# The study's rows of few and many tokens under a vocabulary of Llama 2 and one of GPT-2.
STUDY_SHAPES = (
    *CPU_SHAPES,
    Shape("cpu-1k-50k", n=1024, h=1024, v=50257),
    Shape("cpu-4k", n=4096, h=1024, v=32000),
    Shape("cpu-4k-50k", n=4096, h=1024, v=50257),
)
OTHER_SHAPES = (
    Shape("quick", n=64, h=256, v=2048),
    Shape("cpu-8k", n=1024, h=1024, v=8192),
    Shape("gpt2", n=1024, h=768, v=50257),
)
SHAPES = {shape.name: shape for shape in (*STUDY_SHAPES, *GPU_SHAPES, *OTHER_SHAPES)}


class Problem(NamedTuple):
    """The inputs of one loss.

    `hidden` [N, H] and `weight` [V, H] have the tested dtype and require gradients, but for the
    weight of a frozen head; `target` [N] is int64; `grad` [N] fp32 is the upstream gradient of the
    log-probs.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    grad: Tensor

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """Those of hidden and weight that require a gradient."""
        return tuple(tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad)

    def rows(self, count: int) -> Problem:
        """Cut the problem to its first `count` rows."""
        hidden = self.hidden.detach()[:count].clone().requires_grad_()
        return self._replace(hidden=hidden, target=self.target[:count], grad=self.grad[:count])


def make_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, seed: int = 0, frozen: bool = False
) -> Problem:
    """Draw inputs whose logits have standard deviation about 3, as language models' have.

    Every eighth row points along the weight row of one token, which gets p > 0.999: there p - 1
    cancels, and low-precision gradients break. Half of those rows have that token as their target,
    half another. The upstream gradient is normal, so that a kernel that uses one gradient for all
    rows is found out. None is zero: a method that leaves such rows out would be compared with
    others on less work. The weight of a `frozen` head requires no gradient.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = normal(shape.v, shape.h)
    hidden = normal(shape.n, shape.h).mul_(_LOGIT_STD / shape.h**0.5)
    target = torch.randint(shape.v, (shape.n,), generator=generator, device=device)

    peaked = torch.arange(0, shape.n, PEAKED_EVERY, device=device)
    token = torch.randint(shape.v, (len(peaked),), generator=generator, device=device)
    # V normal logits of standard deviation s have logsumexp about ln V + s²/2.
    logit = math.log(shape.v) + _LOGIT_STD**2 / 2 + _PEAK_LOG_ODDS
    direction = weight[token]
    missing = logit - (hidden[peaked] * direction).sum(1, keepdim=True)
    hidden[peaked] += direction * (missing / direction.square().sum(1, keepdim=True))
    target[peaked[::2]] = token[::2]

    grad = normal(shape.n)
    return Problem(
        hidden=hidden.to(dtype).requires_grad_(),
        weight=weight.to(dtype).requires_grad_(not frozen),
        target=target,
        grad=grad,
    )


class Solution(NamedTuple):
    """Log-probs [N], and the gradients dX [N, H] and dW [V, H] of `grad · logp`.

    dW is None where the head is frozen.
    """

    logp: Tensor
    dx: Tensor
    dw: Tensor | None

    def equals(self, other: Solution) -> bool:
        """Return whether all of it has the same bits as `other`."""
        pairs = zip(self, other, strict=True)
        return all(torch.equal(one, two) for one, two in pairs if one is not None)


@torch.no_grad()
def solve_fp64(problem: Problem) -> Solution:
    """Compute the truth in fp64, from the same rounded inputs, in chunks of rows.

    With z = x·Wᵀ, p = softmax(z) and upstream gradient g: logp = z_target - logsumexp(z),
    dz = g·(onehot(target) - p), dX = dz·W, dW = dzᵀ·X.
    """
    hidden, weight = problem.hidden.double(), problem.weight.double()
    grad = problem.grad.double()
    logp = torch.empty_like(grad)
    dx = torch.empty_like(hidden)
    dw = torch.zeros_like(weight) if problem.weight.requires_grad else None
    chunk = max(1, _TRUTH_CHUNK_BYTES // (8 * weight.shape[0]))
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        target = problem.target[rows, None]
        log_softmax = torch.log_softmax(hidden[rows] @ weight.T, dim=1)
        logp[rows] = log_softmax.gather(1, target).squeeze(1)
        dz = log_softmax.exp_().neg_()
        dz.scatter_add_(1, target, torch.ones_like(target, dtype=dz.dtype))
        dz *= grad[rows, None]
        dx[rows] = dz @ weight
        if dw is not None:
            dw.addmm_(dz.T, hidden[rows])
    return Solution(logp, dx, dw)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Compute max |got - truth| / max |truth| in fp64; it is nan if `got` has a nan.

    Raises:
        ValueError: the shapes differ.
    """
    if got.shape != truth.shape:
        raise ValueError(f"got: expected shape {tuple(truth.shape)}, got {tuple(got.shape)}")
    error = (got.detach().double() - truth).abs_().max()
    return (error / truth.abs().max()).item()


def errors(got: Solution, truth: Solution) -> dict[str, float | None]:
    """Compute `relative_error` of logp, dX and dW (None where there is none), and `dx_peaked`.

    The last is that of dX over the planted rows whose target is the planted token: their gradients
    are too small to show in the whole.
    """
    peaked = slice(0, None, 2 * PEAKED_EVERY)
    return {
        "logp": relative_error(got.logp, truth.logp),
        "dx": relative_error(got.dx, truth.dx),
        "dw": None if got.dw is None or truth.dw is None else relative_error(got.dw, truth.dw),
        "dx_peaked": relative_error(got.dx[peaked], truth.dx[peaked]),
    }
