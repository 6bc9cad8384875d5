"""Problems for linear_kl, and the three ways to solve them that a gate compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latro_kernels import linear_kl
from latro_kernels.linear_kl import reference

NAMES = ("kl", "dx", "dw", "db")


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs of one call, with an upstream gradient for each row's KL."""

    hidden_p: Tensor
    weight_p: Tensor
    hidden_q: Tensor
    weight_q: Tensor
    bias_p: Tensor | None
    bias_q: Tensor | None
    temperature: float
    softcap: float | None
    grad_kl: Tensor

    def to(self, device: str) -> Problem:
        moved = {
            name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, **moved)

    def share_weight(self) -> Problem:
        """Head q with the very weight of p."""
        return replace(self, weight_q=self.weight_p)

    def equal_heads(self) -> Problem:
        """Head q as a copy of p."""
        bias = None if self.bias_p is None else self.bias_p.clone()
        return replace(
            self, hidden_q=self.hidden_p.clone(), weight_q=self.weight_p.clone(), bias_q=bias
        )


def problem(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    hidden_size_q: int | None = None,
    rows: str = "random",
    apart: float | None = None,
    bias: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    seed: int = 0,
) -> Problem:
    """A random problem of (N, H, V), with `hidden_size_q` for q where it is another.

    `rows` is "random", "flat" (all logits nearly equal) or "peaked" (p and q above 0.999 at the
    same token). `apart` is how far q's hidden states and weight are from p's, relatively; None:
    they have nothing in common.
    """
    N, H, V = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    def head(H: int, token: Tensor) -> tuple[Tensor, Tensor]:
        hidden = normal(N, H) * (1e-3 if rows == "flat" else 1.0)
        weight = normal(V, H) * (2.0 / H**0.5)
        if rows == "peaked":
            directions = weight[token]
            norm = directions.square().sum(1, keepdim=True)
            hidden = 0.1 * hidden + directions * (17.0 * max(1.0, temperature) / norm)
        return hidden, weight

    token = torch.randperm(V, generator=random)[:N] if rows == "peaked" else torch.empty(0)
    hidden_p, weight_p = head(H, token)
    hidden_q, weight_q = head(hidden_size_q or H, token)
    if apart is not None:
        hidden_q, weight_q = hidden_p + apart * hidden_q, weight_p + apart * weight_q
    return Problem(
        hidden_p=hidden_p.to(dtype),
        weight_p=weight_p.to(dtype),
        hidden_q=hidden_q.to(dtype),
        weight_q=weight_q.to(dtype),
        bias_p=normal(V).to(dtype) if bias else None,
        bias_q=normal(V).to(dtype) if bias else None,
        temperature=temperature,
        softcap=softcap,
        grad_kl=normal(N),
    )


def of_logits(zp: Tensor, zq: Tensor, grad_kl: Tensor) -> Problem:
    """The problem whose heads have these logits [N, V], by weights that are the identity."""
    identity = torch.eye(zp.shape[1])
    return Problem(
        hidden_p=zp,
        weight_p=identity,
        hidden_q=zq,
        weight_q=identity.clone(),
        bias_p=None,
        bias_q=None,
        temperature=1.0,
        softcap=None,
        grad_kl=grad_kl,
    )


def nearly_one_hot(N: int, V: int, scale: float, seed: int = 0) -> Problem:
    """Rows of which p has 1 − 10⁻⁶ to 1 − 10⁻¹² at one token, where log p/q is about 60."""
    random = torch.Generator().manual_seed(seed)
    zp = 2 * torch.randn(N, V, generator=random)
    zq = 2 * torch.randn(N, V, generator=random)
    token = torch.randint(V, (N, 1), generator=random)
    zp.scatter_(1, token, 20 + 6 * torch.rand(N, 1, generator=random))
    zq.scatter_add_(1, token, -60 * torch.ones(N, 1))
    return of_logits(zp, zq, scale * torch.randn(N, generator=random))


Solver = Callable[[Problem], Tensor]


def solve(solver: Solver, given: Problem, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """KL and the gradients of p's hidden, weight and bias, by `solver` in `dtype`."""
    cast = {
        name: value.detach().to(dtype or value.dtype)
        for name, value in vars(given).items()
        if torch.is_tensor(value) and name != "grad_kl"
    }
    inputs = [
        cast[name].requires_grad_() for name in ("hidden_p", "weight_p", "bias_p") if name in cast
    ]
    if given.weight_q is given.weight_p:
        cast["weight_q"] = cast["weight_p"].detach()
    kl = solver(replace(given, **cast))
    kl.backward(given.grad_kl.to(kl.dtype))
    return dict(zip(NAMES, [kl.detach(), *(t.grad for t in inputs)], strict=False))


def exact(given: Problem) -> Tensor:
    """The reference."""
    return reference(
        *(given.hidden_p, given.weight_p, given.hidden_q, given.weight_q),
        *(given.bias_p, given.bias_q, given.temperature, given.softcap),
    )


def unfused(given: Problem) -> Tensor:
    """What one writes without this package: logits in the model's dtype, the KL in fp32."""

    def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = torch.nn.functional.linear(hidden, weight, bias).float()
        if given.softcap is not None:
            z = given.softcap * torch.tanh(z / given.softcap)
        return torch.log_softmax(z / given.temperature, -1)

    log_p = log_softmax(given.hidden_p, given.weight_p, given.bias_p)
    log_q = log_softmax(given.hidden_q, given.weight_q, given.bias_q)
    terms = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
    return terms.sum(-1)


def fused(backend: str) -> Solver:
    """linear_kl on one backend."""

    def solver(given: Problem) -> Tensor:
        return linear_kl(
            *(given.hidden_p, given.weight_p, given.hidden_q, given.weight_q),
            bias_p=given.bias_p,
            bias_q=given.bias_q,
            temperature=given.temperature,
            softcap=given.softcap,
            backend=backend,
        )

    return solver


def truth(given: Problem) -> dict[str, Tensor]:
    """The reference in fp64."""
    return solve(exact, given, torch.float64)


def solve_all(given: Problem, backend: str) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, fused, truth, unfused) of every result that the problem has."""
    ours, true, plain = solve(fused(backend), given), truth(given), solve(unfused, given)
    return [(name, ours[name], true[name], plain[name]) for name in ours]
