"""What linear_logprob needs beyond inputs, outputs and gradients: the budget is a promise."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common import memory
from latro_kernels import linear_logprob
from tests.latro_kernels.logprob_cases import problem

MIB = 2**20
H = 64
N, V = 5000, 12_000  # logits of 229 MiB
# A slice of the weight packed in two ways and one of dz, 4 MiB each at most, and as much for the
# rest: nothing in it grows with N or V.
TILE = 16 * MIB
# Numbers per row, among them the upstream gradient and the bool of which rows have one.
BYTES_A_ROW = 64

pytestmark = pytest.mark.skipif(
    memory.can_measure(torch.device("cpu")) is not None,
    reason=str(memory.can_measure(torch.device("cpu"))),
)


def extra_bytes(dtype: torch.dtype, frozen: bool, budget: int) -> int:
    """Peak of forward and backward beyond inputs and results. Runs in a process of its own."""
    memory.make_malloc_honest()
    # Every thread has a small room of its own.
    torch.set_num_threads(2)

    def measure(rows: int, columns: int) -> int:
        given = problem((rows, H, columns), dtype)
        hidden = given.hidden.requires_grad_()
        weight = given.weight.requires_grad_(not frozen)

        def full() -> tuple[torch.Tensor, ...]:
            logp = linear_logprob(hidden, weight, given.target, memory_budget=budget)
            inputs = (hidden,) if frozen else (hidden, weight)
            return torch.autograd.grad(logp, inputs, given.grad_logp)

        results = hidden.nbytes + (0 if frozen else weight.nbytes)
        return memory.peak_extra_bytes(full, torch.device("cpu")) - results

    measure(60, 200)
    return measure(N, V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_budget_is_kept(dtype: torch.dtype) -> None:
    # Where hidden is not fp32, its gradient is summed in fp32.
    allowed = TILE + BYTES_A_ROW * N + (4 * N * H if dtype != torch.float32 else 0)
    for budget in (0, 40 * MIB):
        used = memory.in_fresh_process(extra_bytes, dtype, False, budget)
        assert used <= allowed + budget, f"{used / MIB:.1f} MiB with a budget of {budget / MIB}"
        assert used >= budget * 0.9, "the budget is not used"


def test_frozen_head_keeps_no_logits() -> None:
    used = memory.in_fresh_process(extra_bytes, torch.float32, True, 10**9)
    assert used <= TILE + (BYTES_A_ROW + 4 * H) * N
