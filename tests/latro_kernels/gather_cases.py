"""Problems for gather_logprob, and the three ways to solve them that a gate compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latro_kernels import gather_logprob
from latro_kernels.gather_logprob import reference

NAMES = ("logp", "entropy", "dlogits")
Function = Callable[[Tensor, Tensor, float, float | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs of one call, with an upstream gradient for each row's logp and entropy."""

    logits: Tensor
    target: Tensor
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
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    rows: str = "random",
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    seed: int = 0,
) -> Problem:
    """A random problem of (N, V).

    `rows` is "random", "flat" (all logits nearly equal) or "peaked" (p of the target above 0.999,
    logits of the others random).
    """
    N, V = shape
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=random) * (1e-3 if rows == "flat" else 2.0)
    target = torch.randint(V, (N,), generator=random)
    if rows == "peaked":
        logits.scatter_(1, target[:, None], 20.0 * max(1.0, temperature))
    return Problem(
        logits=logits.to(dtype),
        target=target,
        temperature=temperature,
        softcap=softcap,
        grad_logp=torch.randn(N, generator=random),
        grad_entropy=torch.randn(N, generator=random) if entropy else None,
    )


def solve(
    function: Function, given: Problem, dtype: torch.dtype | None = None
) -> dict[str, Tensor | None]:
    """logp, entropy and the gradient of the logits, by `function` in `dtype`."""
    leaf = given.logits.detach().to(dtype or given.logits.dtype).requires_grad_()
    # A view: the logits of a model are no leaf, and may be written to.
    logp, entropy = function(leaf.view_as(leaf), given.target, given.temperature, given.softcap)
    if given.grad_entropy is None:
        torch.autograd.backward([logp], [given.grad_logp.to(logp.dtype)])
        entropy = None
    else:
        upstream = [given.grad_logp.to(logp.dtype), given.grad_entropy.to(logp.dtype)]
        torch.autograd.backward([logp, entropy], upstream)
    results = (logp.detach(), None if entropy is None else entropy.detach(), leaf.grad)
    return dict(zip(NAMES, results, strict=True))


def truth(given: Problem) -> dict[str, Tensor | None]:
    """The reference in fp64."""
    return solve(reference, given, torch.float64)


def unfused(
    logits: Tensor, target: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """What one writes without this package: the loss in fp32, from logits in the model's dtype."""
    z = logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, -1)
    return log_p.gather(1, target[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def fused(backend: str, entropy: bool, inplace_backward: bool = False) -> Function:
    """gather_logprob with the arguments of `unfused`."""

    def function(
        logits: Tensor, target: Tensor, temperature: float, softcap: float | None
    ) -> tuple[Tensor, Tensor | None]:
        out = gather_logprob(
            logits,
            target,
            temperature=temperature,
            softcap=softcap,
            return_entropy=entropy,
            inplace_backward=inplace_backward,
            backend=backend,
        )
        return out if entropy else (out, None)

    return function


def solve_all(given: Problem, backend: str) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, fused, truth, unfused) of every result that the problem has."""
    entropy = given.grad_entropy is not None
    ours, exact, plain = solve(fused(backend, entropy), given), truth(given), solve(unfused, given)
    return [
        (name, ours[name], exact[name], plain[name]) for name in NAMES if ours[name] is not None
    ]
