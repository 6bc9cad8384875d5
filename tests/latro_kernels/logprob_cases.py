"""Problems for linear_logprob, and the three ways to solve them that a gate compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latro_kernels import linear_logprob
from latro_kernels.linear_logprob import reference

NAMES = ("logp", "entropy", "dx", "dw", "db")


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs of one call, with an upstream gradient for each row's logp and entropy."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None
    grad_logp: Tensor
    grad_entropy: Tensor | None

    def to(self, device: str) -> Problem:
        moved = {
            name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, **moved)


def problem(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    rows: str = "random",
    bias: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    seed: int = 0,
) -> Problem:
    """A random problem of (N, H, V).

    `rows` is "random", "flat" (all logits nearly equal) or "peaked" (p of the target above 0.999,
    logits of the others random).
    """
    N, H, V = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    hidden = normal(N, H) * (1e-3 if rows == "flat" else 1.0)
    weight = normal(V, H) * (2.0 / H**0.5)
    target = torch.randint(V, (N,), generator=random)
    if rows == "peaked":
        # Targets of their own, and hidden states that point at them.
        target = torch.randperm(V, generator=random)[:N]
        directions = weight[target]
        norm = directions.square().sum(1, keepdim=True)
        hidden = 0.1 * hidden + directions * (17.0 * max(1.0, temperature) / norm)
    return Problem(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        target=target,
        bias=normal(V).to(dtype) if bias else None,
        temperature=temperature,
        softcap=softcap,
        grad_logp=normal(N),
        grad_entropy=normal(N) if entropy else None,
    )


def trained_like(
    dtype: torch.dtype, entropy: bool, shape: tuple[int, int, int] = (150, 160, 3000)
) -> Problem:
    """Rows that are sure of a few tokens among many, as a trained model's are."""
    given = problem(shape, dtype, entropy=entropy, bias=True)
    likely = shape[2] // 15
    bias = given.bias.float()
    bias[likely:] -= 12.0
    return replace(given, bias=bias.to(dtype), target=given.target % (2 * likely))


def solve(
    function: Callable[..., tuple[Tensor, Tensor]], given: Problem, dtype: torch.dtype | None = None
) -> dict[str, Tensor | None]:
    """logp, entropy and the gradients of hidden, weight and bias, by `function` in `dtype`."""
    inputs = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
        for t in (given.hidden, given.weight, given.bias)
    ]
    hidden, weight, bias = inputs
    logp, entropy = function(hidden, weight, given.target, bias, given.temperature, given.softcap)
    if given.grad_entropy is None:
        torch.autograd.backward([logp], [given.grad_logp.to(logp.dtype)])
        entropy = None
    else:
        upstream = [given.grad_logp.to(logp.dtype), given.grad_entropy.to(logp.dtype)]
        torch.autograd.backward([logp, entropy], upstream)
    gradients = [None if t is None else t.grad for t in inputs]
    results = (logp.detach(), None if entropy is None else entropy.detach(), *gradients)
    return dict(zip(NAMES, results, strict=True))


def truth(given: Problem) -> dict[str, Tensor | None]:
    """The reference in fp64."""
    return solve(reference, given, torch.float64)


def unfused(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """What one writes without this package: logits in the model's dtype, the loss in fp32."""
    z = torch.nn.functional.linear(hidden, weight, bias).float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, -1)
    return log_p.gather(1, target[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def fused(
    backend: str, entropy: bool, *, frozen: bool = False, **more: Any
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """linear_logprob with the arguments of `unfused`; frozen: only hidden gets a gradient."""

    def function(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        temperature: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        if frozen:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        options: dict[str, Any] = {"bias": bias, "temperature": temperature, "softcap": softcap}
        options |= {"return_entropy": entropy, "backend": backend, **more}
        out = linear_logprob(hidden, weight, target, **options)
        return out if entropy else (out, None)

    return function


def solve_all(
    given: Problem, backend: str, **more: Any
) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, fused, truth, unfused) of every result that the problem has."""
    entropy = given.grad_entropy is not None
    ours = solve(fused(backend, entropy, **more), given)
    exact, plain = truth(given), solve(unfused, given)
    return [
        (name, ours[name], exact[name], plain[name]) for name in NAMES if ours[name] is not None
    ]


def assert_filter_keeps_its_bound(
    given: Problem, eps: float, backend: str, **more: Any
) -> tuple[Tensor, Tensor]:
    """Something is left out, and no entry is off by more than the documentation says.

    Returns the log-probs without filter, and with it.
    """
    entropy = given.grad_entropy is not None
    exact = solve(fused(backend, entropy, **more), given)
    some = solve(fused(backend, entropy, grad_filter=eps, **more), given)
    hidden, weight = given.hidden.double(), given.weight.double()
    bounds = {
        "dx": eps * weight.abs().sum(0),
        "dw": eps * hidden.abs().sum(0),
        "db": eps * len(hidden),
    }
    for name, bound in bounds.items():
        rounding = 4 * torch.finfo(given.hidden.dtype).eps * exact[name].double().abs()
        difference = (some[name].double() - exact[name].double()).abs()
        assert (difference <= bound + rounding).all(), name
        assert difference.any(), f"{name}: nothing was left out"
    return exact["logp"], some["logp"]
