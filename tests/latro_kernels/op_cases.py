"""One loss of every op and form, for tests of what torch does around the ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from latro_kernels import (
    GroupLayout,
    gather_logprob,
    group_advantage,
    linear_kl,
    linear_logprob,
)

H, V = 16, 200


@dataclass(frozen=True)
class Case:
    """A differentiable number of one op.

    Args:
        loss: of the backend's name and `inputs`.
        inputs: of N rows in a dtype.
    """

    loss: Callable[..., Tensor]
    inputs: Callable[[int, torch.dtype], tuple[Tensor, ...]]

    def solve(self, backend: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The loss, and the gradients of the inputs that require one."""
        loss = self.loss(backend, *inputs)
        leaves = [t for t in inputs if t.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _normal(dtype: torch.dtype, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(len(size))).to(dtype)


def _head(N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states, weight, bias and target."""
    weights = _normal(dtype, N, H), _normal(dtype, V, H), _normal(dtype, V)
    return *(t.requires_grad_() for t in weights), torch.arange(N) * 7 % V


def _linear_logprob(
    backend: str, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor
) -> Tensor:
    logp, entropy = linear_logprob(
        hidden, weight, target, bias=bias, return_entropy=True, backend=backend
    )
    return (logp * logp + entropy).sum()


def _filtered(backend: str, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    logp = linear_logprob(hidden, weight, target, bias=bias, grad_filter=1e-3, backend=backend)
    return (logp * logp).sum()


def _frozen(backend: str, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, target, backend=backend).square().sum()


def _frozen_head(N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    hidden, weight, _, target = _head(N, dtype)
    return hidden, weight.detach(), target


def _gather_logprob(backend: str, logits: Tensor, target: Tensor) -> Tensor:
    logp, entropy = gather_logprob(logits, target, return_entropy=True, backend=backend)
    return (logp * logp + entropy).sum()


def _gather_in_place(backend: str, logits: Tensor, target: Tensor) -> Tensor:
    logits = 2 * logits
    return gather_logprob(logits, target, inplace_backward=True, backend=backend).square().sum()


def _logits(N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _normal(dtype, N, V).requires_grad_(), torch.arange(N) * 7 % V


def _linear_kl(
    backend: str, hidden: Tensor, weight: Tensor, bias: Tensor, hidden_q: Tensor, weight_q: Tensor
) -> Tensor:
    kl = linear_kl(hidden, weight, hidden_q, weight_q, bias_p=bias, backend=backend)
    return kl.square().sum()


def _two_heads(N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    hidden, weight, bias, _ = _head(N, dtype)
    return hidden, weight, bias, hidden.detach().flip(0), weight.detach().flip(0)


def _group_advantage(backend: str, logp: Tensor, ref_logp: Tensor, offsets: Tensor) -> Tensor:
    out = group_advantage(logp, ref_logp, GroupLayout(offsets, 2), kl="k3", backend=backend)
    return (out.coefficient * logp).sum()


def _two_sequences(N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    logp = -_normal(torch.float32, N).abs()
    offsets = torch.tensor([0, N // 4, N // 2, 3 * N // 4, N])
    return logp.requires_grad_(), 1.1 * logp.detach(), offsets


CASES = {
    "linear_logprob": Case(_linear_logprob, _head),
    "filtered": Case(_filtered, _head),
    "frozen": Case(_frozen, _frozen_head),
    "gather_logprob": Case(_gather_logprob, _logits),
    "in place": Case(_gather_in_place, _logits),
    "linear_kl": Case(_linear_kl, _two_heads),
    "group_advantage": Case(_group_advantage, _two_sequences),
}


def assert_default_dtype_does_not_matter(
    case: Case, backend: str, dtype: torch.dtype, default: torch.dtype, N: int, device: str = "cpu"
) -> None:
    """The same bits with `default` as torch's default dtype as with the one of before."""
    inputs = tuple(
        t.detach().to(device).requires_grad_(t.requires_grad) for t in case.inputs(N, dtype)
    )
    expected = case.solve(backend, inputs)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = case.solve(backend, inputs)
    finally:
        torch.set_default_dtype(before)
    for ours, as_before in zip(got, expected, strict=True):
        assert ours.dtype == as_before.dtype
        assert torch.equal(ours, as_before)


def assert_compiles_once_for_any_rows(case: Case, backend: str) -> None:
    """One graph for the first number of rows, one for every other, with the results of eager."""
    counter = CompileCounterWithBackend("aot_eager")

    def loss(*inputs: Tensor) -> Tensor:
        return case.loss(backend, *inputs)

    graph = torch.compile(loss, fullgraph=True, backend=counter)
    compiled = replace(case, loss=lambda _, *inputs: graph(*inputs))
    for N in (6, 8, 14, 16, 28):
        inputs = case.inputs(N, torch.float32)
        results = compiled.solve(backend, inputs)
    torch.testing.assert_close(results, case.solve(backend, inputs))
    assert counter.frame_count == 2
