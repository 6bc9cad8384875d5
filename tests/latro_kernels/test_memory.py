"""What ops need beyond inputs, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import memory
from latro_kernels import gather_logprob, linear_logprob, linear_sample
from tests.latro_kernels.ops.op import DTYPES
from tests.latro_kernels.ops.table import GATHER_LOGPROB, LINEAR_KL, LINEAR_LOGPROB, LINEAR_SAMPLE

MIB = 2**20


class LargestTensor(TorchDispatchMode):
    """Records the bytes of every storage that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.sizes.add(value.untyped_storage().nbytes())
        return out


def test_no_gradient_that_nobody_asks_for() -> None:
    """A frozen weight costs no [V, H] tensor."""
    given = LINEAR_LOGPROB.problem((20, 16, 3000))
    hidden = given["hidden"].requires_grad_()
    with LargestTensor() as largest:
        linear_logprob(hidden, given["weight"], given["target"]).sum().backward()
    assert given["weight"].nbytes not in largest.sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_kl_has_nothing_of_all_logits(dtype: torch.dtype) -> None:
    N, H, V = 640, 160, 1500
    given = LINEAR_KL.problem((N, H, V), dtype)
    with LargestTensor() as recorded:
        given.solve("cpu")
    assert max(recorded.sizes) == V * H * dtype.itemsize
    assert N * V * dtype.itemsize > V * H * dtype.itemsize
    with LargestTensor() as recorded:
        given.unfused()
    assert max(recorded.sizes) >= N * V * 4


def allocations(function: Callable[[], Any]) -> tuple[Any, list[int]]:
    """Return what `function` returns, and the bytes that each operator in it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    return result, [e.self_cpu_memory_usage for e in recorded.events()]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_logprob_has_a_few_numbers_a_row(dtype: torch.dtype, in_place: bool) -> None:
    """For an ordinary backward one [N, V] in the logits' dtype as well."""
    N, V = 30, 4001
    given = GATHER_LOGPROB.problem((N, V), dtype, entropy=True)
    leaf = given["logits"].clone().requires_grad_()

    def forward() -> Tensor:
        return sum(
            gather_logprob(leaf, given["target"], return_entropy=True, inplace_backward=in_place)
        )

    both, of_forward = allocations(forward)
    assert sum(b for b in of_forward if b > 0) <= 100 * N
    _, of_backward = allocations(lambda: both.backward(given.upstream["logp"]))
    large = [b for b in of_backward if b > 100 * N]
    assert large == ([] if in_place else [N * V * dtype.itemsize])
    _, of_unfused = allocations(given.unfused)
    assert max(of_unfused) >= N * V * 4


# linear_logprob's budget is a promise.

H = 64
N, V = 5000, 12_000  # logits of 229 MiB
# A slice of the weight packed in two ways and one of dz, 4 MiB each at most, and as much for the
# rest: nothing in it grows with N or V.
TILE = 16 * MIB
# Numbers per row, among them the upstream gradient and the bool of which rows have one.
BYTES_A_ROW = 64

measured = pytest.mark.skipif(
    memory.can_measure(torch.device("cpu")) is not None,
    reason=str(memory.can_measure(torch.device("cpu"))),
)


def extra_bytes(dtype: torch.dtype, frozen: bool, budget: int) -> int:
    """Peak of forward and backward beyond inputs and results. Runs in a process of its own."""
    memory.make_malloc_honest()
    # Every thread has a small room of its own.
    torch.set_num_threads(2)

    def measure(rows: int, columns: int) -> int:
        given = LINEAR_LOGPROB.problem((rows, H, columns), dtype)
        hidden = given["hidden"].requires_grad_()
        weight = given["weight"].requires_grad_(not frozen)

        def full() -> tuple[Tensor, ...]:
            logp = linear_logprob(hidden, weight, given["target"], memory_budget=budget)
            inputs = (hidden,) if frozen else (hidden, weight)
            return torch.autograd.grad(logp, inputs, given.upstream["logp"])

        results = hidden.nbytes + (0 if frozen else weight.nbytes)
        return memory.peak_extra_bytes(full, torch.device("cpu")) - results

    measure(60, 200)
    return measure(N, V)


@measured
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_budget_is_kept(dtype: torch.dtype) -> None:
    # Where hidden is not fp32, its gradient is summed in fp32.
    allowed = TILE + BYTES_A_ROW * N + (4 * N * H if dtype != torch.float32 else 0)
    for budget in (0, 40 * MIB):
        used = memory.in_fresh_process(extra_bytes, dtype, False, budget)
        assert used <= allowed + budget, f"{used / MIB:.1f} MiB with a budget of {budget / MIB}"
        assert used >= budget * 0.9, "the budget is not used"


@measured
def test_frozen_head_keeps_no_logits() -> None:
    used = memory.in_fresh_process(extra_bytes, torch.float32, True, 10**9)
    assert used <= TILE + (BYTES_A_ROW + 4 * H) * N


def bytes_of_samples(dtype: torch.dtype) -> int:
    """Peak of `linear_sample` beyond inputs. Runs in a process of its own."""
    memory.make_malloc_honest()
    torch.set_num_threads(2)

    def measure(rows: int, columns: int) -> int:
        given = LINEAR_SAMPLE.problem((rows, H, columns), dtype, bias=True).arguments
        return memory.peak_extra_bytes(lambda: linear_sample(**given), torch.device("cpu"))

    measure(60, 200)
    return measure(N, V)


@measured
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_samples_keep_no_logits(dtype: torch.dtype) -> None:
    used = memory.in_fresh_process(bytes_of_samples, dtype)
    # The slice of the weight, and the bias in fp32.
    assert used <= 4 * MIB + 4 * V + BYTES_A_ROW * N + MIB
