"""The warp-specialised forward: compiled, and run in the simulator; on a GPU, dz as well.

That the simulator finds an order of barriers that is wrong is tested as well, with kernels in which
one line is another.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.gpu.compiled import SHARED_OPT_IN, Resources
from benchmarks.gpu.launches import FEATURES, launch
from latro_kernels import logit_tiles
from latro_kernels.head import Head
from latro_kernels.linear_logprob.state import State, Wanted
from latro_kernels.linear_logprob.triton import blocks, fused, warp_specialized
from latro_kernels.linear_logprob.triton.blocks import Config
from latro_kernels.linear_logprob.triton.warp_specialized_forward import warp_specialized_kernel
from tests.latro_kernels.gluon_simulator import (
    DeadlockError,
    Simulator,
    is_found_by_some_seed,
)
from tests.latro_kernels.gpu_resources import compile_kernel, violations
from tests.latro_kernels.ops.linear_logprob import OP, problem
from tests.latro_kernels.ops.op import Problem, assert_same, check, gate

# Instructions of a warp, as in test_store_free_compile.py, and with entropy: on sm_90 for 64 x 256
# logits, on sm_100 for 128 x 256.
MAX_EPILOGUE = {
    (90, ()): 700,
    (90, ("WITH_ENTROPY",)): 1_050,
    (100, ()): 1_050,
    (100, ("WITH_ENTROPY",)): 1_700,
}
# Bytes of a thread, for what a block's sums meet once: bias, softcap, products that are kept.
MAX_STACK = 128
# Two consumers and the producer, or a consumer and two warps that do the rest, have the registers
# of so many warps.
WARPS = {90: 12, 100: 8}
SMALL = Config(rows=16, columns=32, depth=16, warps=8, stages=4, warp_specialized=True)
# Blocks of rows and of columns, steps of H: several of each, and the last not full.
SHAPE = (37, 72, 203)
SHAPES: list[tuple[tuple[int, int, int], torch.dtype, dict[str, Any]]] = [
    (SHAPE, torch.float16, {"bias": True, "temperature": 1.3, "softcap": 5.0}),
    (SHAPE, torch.bfloat16, {"rows": "peaked", "entropy": True}),
    (SHAPE, torch.bfloat16, {"rows": "flat", "entropy": True, "temperature": 0.7}),
    (SHAPE, torch.bfloat16, {"entropy": True, "temperature": 0.01}),
    # Rows that no descriptor takes as they are.
    ((37, 70, 203), torch.bfloat16, {}),
    # One row, one column, one step; fewer steps than the lead.
    ((1, 8, 1), torch.bfloat16, {}),
    ((33, 16, 65), torch.bfloat16, {"bias": True}),
    ((16, 64, 64), torch.bfloat16, {"entropy": True}),
]
# In blocks of the size that is launched.
MORE_THAN_ONE_BLOCK = (150, 136, 1100)


each_capability = pytest.mark.parametrize("capability", WARPS, ids="sm_{}".format)


def check_fit(found: Resources, capability: int, stack: int) -> None:
    shared = SHARED_OPT_IN[capability]
    assert violations(found, capability, shared_limit=shared, stack_limit=stack) == []
    assert found.threads == 32 * WARPS[capability]
    assert found.spills_in_products == 0
    assert found.waits_in_products == 0


@each_capability
@pytest.mark.parametrize(
    "chosen", [(), ("WITH_ENTROPY",), FEATURES["kept"], FEATURES["all"]], ids="+".join
)
def test_it_fits(chosen: tuple[str, ...], capability: int) -> None:
    types, constants, options = launch(
        warp_specialized_kernel, chosen, capability, by_descriptor=True
    )
    found = compile_kernel(warp_specialized_kernel, types, constants, capability, **options)
    check_fit(found, capability, stack=MAX_STACK if chosen else 0)
    if limit := MAX_EPILOGUE.get((capability, chosen)):
        # A thread takes the exponential of each of its logits.
        assert logits_of_a_thread(capability) < found.epilogue <= limit


def logits_of_a_thread(capability: int) -> int:
    """Return how many a consumer's thread has of a block."""
    block = blocks.WARP_SPECIALIZED
    return block.rows * block.columns // (128 if capability == 100 else 256)


def merge(parts: Tensor, columns: slice, state: State, config: Config) -> None:
    """Do what `fused.merge` does, for a state that is empty."""
    row_max, sum_exp, target_logit, *weighted_sum = parts.double()
    largest = row_max.amax(0)
    drop = row_max - largest
    state.row_max.copy_(largest)
    state.sum_exp.copy_((drop.exp() * sum_exp).sum(0))
    state.target_logit.copy_(target_logit.amax(0))
    if state.weighted_sum is not None:
        # 0 * -inf counts as 0.
        of_parts = drop.exp() * (weighted_sum[0] + drop * sum_exp)
        state.weighted_sum.copy_(of_parts.where(drop > -torch.inf, 0).sum(0))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(blocks, "has_descriptors", lambda device: True)
    for module in (fused, logit_tiles):  # as on a GPU
        monkeypatch.setattr(module, "operand_dtype", lambda head: head.hidden.dtype)
    monkeypatch.setattr(fused, "merge", merge)
    monkeypatch.setattr(fused, "TILES", 2)
    monkeypatch.setattr(fused, "GROUP", 2)
    return monkeypatch


def forward(
    given: Problem, simulator: Simulator, config: Config = SMALL, *, cached: bool = False
) -> State:
    """Return the state after a forward in the simulator."""
    bias = given["bias"]
    head = Head(
        hidden=given["hidden"],
        weight=given["weight"],
        bias=None if bias is None else bias.float(),
        temperature=given["temperature"],
        softcap=given["softcap"] or 0.0,
        backend="triton",
    )
    wanted = Wanted(
        weighted_sum="entropy" in given.upstream,
        dx_sum=False,
        block_max=cached,
        memory_budget=2**30 if cached else 0,
    )
    state = State.empty(head, given["target"], wanted, cached_step=1, block_columns=config.columns)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(warp_specialized, "launch", simulator.launch)
        fused.forward(head, state, config)
    assert simulator.launched
    return state


def results(state: State) -> dict[str, Tensor]:
    log_sum = state.sum_exp.log()
    found = {"logp": (state.target_logit - state.row_max) - log_sum}
    if state.weighted_sum is not None:
        found["entropy"] = log_sum - state.weighted_sum / state.sum_exp
    return found


def check_forward(given: Problem, state: State) -> None:
    truth, unfused = given.truth(), given.unfused()
    for name, value in results(state).items():
        gate(name, value, truth[name], unfused[name])


@each_capability
@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_events_gives_the_same_bits(
    seed: int, capability: int, simulated: None
) -> None:
    given = problem(SHAPE, torch.bfloat16, entropy=True)
    state, again = (
        forward(given, Simulator(s, capability=capability)) for s in (seed, seed + 1000)
    )
    check_forward(given, state)
    assert_same(results(state), results(again))


@each_capability
@pytest.mark.parametrize("multiprocessors", [1, 2, 1000])
@pytest.mark.parametrize(("shape", "dtype", "options"), SHAPES)
def test_it_passes_the_gate(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    options: dict[str, Any],
    multiprocessors: int,
    capability: int,
    simulated: None,
) -> None:
    given = problem(shape, dtype, **options)
    simulator = Simulator(0, capability=capability, multiprocessors=multiprocessors)
    check_forward(given, forward(given, simulator))


@each_capability
def test_blocks_of_the_size_that_is_launched(capability: int, simulated: None) -> None:
    given = problem(MORE_THAN_ONE_BLOCK, torch.bfloat16, entropy=True)
    simulator = Simulator(0, capability=capability)
    check_forward(given, forward(given, simulator, blocks.WARP_SPECIALIZED))


@each_capability
def test_what_the_backward_needs_is_kept(capability: int, simulated: None) -> None:
    given = problem(SHAPE, torch.bfloat16, bias=True, temperature=0.7)
    state = forward(given, Simulator(0, capability=capability), cached=True)
    check_forward(given, state)
    products = given["hidden"].double() @ given["weight"].double().T
    torch.testing.assert_close(state.cached.view(products.shape), products.float())
    logits = ((products + given["bias"]) / 0.7).split(SMALL.columns, 1)
    largest = torch.stack([part.amax(1) for part in logits], 1)
    assert state.block_max is not None
    torch.testing.assert_close(state.block_max, largest.float())


@each_capability
def test_columns_of_probability_zero(capability: int, simulated: None) -> None:
    given = problem(SHAPE, torch.bfloat16, bias=True, entropy=True)
    bias = given["bias"].clone()
    # The whole first part, and all but one column of a block.
    bias[: 2 * SMALL.columns] = -torch.inf
    bias[3 * SMALL.columns + 1 : 4 * SMALL.columns] = -torch.inf
    target = given["target"] % SMALL.columns + 4 * SMALL.columns
    given = given.but(bias=bias, target=target)
    truth = given.truth()
    found = results(forward(given, Simulator(0, capability=capability)))
    for name, value in found.items():
        torch.testing.assert_close(value, truth[name].float(), rtol=1e-5, atol=1e-5)


FIRST_ROUND = ("(step // STAGES + 1) % 2", "step // STAGES % 2")
TOO_FEW_BYTES = (
    "hidden.block_type.nbytes + weight.block_type.nbytes",
    "weight.block_type.nbytes",
)
DEADLOCKS = {
    (90, "the first round is waited for"): FIRST_ROUND,
    (90, "fewer bytes are expected than land"): TOO_FEW_BYTES,
    (90, "a block's last stage is not given away"): (
        "mbarrier.arrive(ring.empty.index((step + steps + STAGES - 1) % STAGES))",
        "pass",
    ),
    (90, "the second consumer is not started"): ("mbarrier.arrive(ring.start)", "pass"),
    (90, "the lead is longer than the ring"): ("== min(LEAD, steps) - 1", "== STAGES"),
    (100, "the first round is waited for"): FIRST_ROUND,
    (100, "fewer bytes are expected than land"): TOO_FEW_BYTES,
    (100, "stages are not given away"): ("mbarriers=[ring.empty.index(stage)]", "mbarriers=[]"),
    (100, "the first sums are waited for"): (
        "(block // BLOCKS + 1) % 2",
        "block // BLOCKS % 2",
    ),
    (100, "sums are never said to be ready"): (
        "tcgen05_commit(accumulators.ready.index(block % BLOCKS))",
        "pass",
    ),
    (100, "sums are never given away"): (
        "mbarrier.arrive(source.free.index(block % BLOCKS))",
        "pass",
    ),
}
FILLED_TOO_EARLY = ("mbarrier.wait(ring.empty.index(stage), (step // STAGES + 1) % 2)", "pass")
RACES = {
    (90, "a stage is filled before it is empty"): FILLED_TOO_EARLY,
    (90, "a stage is read before it is full"): (
        "mbarrier.wait(ring.full.index(stage), (step + k) // STAGES % 2)",
        "pass",
    ),
    (90, "one consumer empties a stage"): (
        "empty.index(stage), count=READERS",
        "empty.index(stage), count=1",
    ),
    (90, "a stage is given away with its products under way"): (
        "sums = warpgroup_mma_wait(1, deps=[sums])",
        "pass",
    ),
    (90, "a stage is given away a step early"): (
        "(step + k + STAGES - 1) % STAGES), pred=k > 0",
        "stage), pred=k + 1 < steps",
    ),
    (90, "the phase of the next round is waited for"): (
        "(step + k) // STAGES % 2",
        "((step + k) // STAGES + 1) % 2",
    ),
    (100, "a stage is filled before it is empty"): FILLED_TOO_EARLY,
    (100, "a stage is read before it is full"): (
        "mbarrier.wait(ring.full.index(stage), step // STAGES % 2)",
        "pass",
    ),
    (100, "sums are written before they are free"): (
        "mbarrier.wait(accumulators.free.index(block % BLOCKS), (block // BLOCKS + 1) % 2)",
        "pass",
    ),
    (100, "sums are read before they are ready"): (
        "mbarrier.wait(source.ready.index(block % BLOCKS), block // BLOCKS % 2)",
        "pass",
    ),
    (100, "sums are given away before all are read"): ("if part == 3:", "if part == 0:"),
    (100, "the sums of the last block are added to"): ("use_acc=h > 0", "use_acc=True"),
}


@pytest.mark.parametrize(("capability", "wrong"), DEADLOCKS)
def test_a_wrong_order_that_hangs_is_found(capability: int, wrong: str, simulated: None) -> None:
    given, edit = problem(SHAPE, torch.bfloat16), DEADLOCKS[capability, wrong]
    for seed in range(3):
        with pytest.raises(DeadlockError):
            forward(given, Simulator(seed, edit, capability=capability))


def test_a_lead_of_more_steps_than_there_are_hangs(simulated: None) -> None:
    """Which is why it is cut short."""
    given = problem((16, 16, 32), torch.bfloat16)
    with pytest.raises(DeadlockError):
        forward(given, Simulator(0, ("min(LEAD, steps) - 1", "LEAD - 1")))


@pytest.mark.parametrize(("capability", "wrong"), RACES)
def test_a_wrong_order_that_gives_wrong_results_is_found(
    capability: int, wrong: str, simulated: None
) -> None:
    """By some of the seeds, as an AssertionError of the gate or of a barrier."""
    given, edit = problem(SHAPE, torch.bfloat16), RACES[capability, wrong]
    assert is_found_by_some_seed(
        lambda seed: check_forward(
            given, forward(given, Simulator(seed, edit, capability=capability))
        )
    )


def _has_none() -> bool:
    if not torch.cuda.is_available():
        return True
    return not blocks.can_warp_specialize(torch.device("cuda"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(_has_none(), reason="for sm_90 and sm_100 alone")
@pytest.mark.timeout(60, method="thread")  # a deadlock on a GPU ends no call
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [sample for sample in OP.samples if sample[1] != torch.float32],
    ids=str,
)
def test_it_passes_the_gate_on_a_gpu(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "config", lambda *_: blocks.WARP_SPECIALIZED)
    given = OP.problem(shape, dtype, **options).on("triton")
    logp = []
    for memory_budget in (0, 2**30):  # dz of products made again, and of those kept
        first = check(given, "triton", memory_budget=memory_budget)
        for _ in range(20):
            assert_same(given.solve("triton", memory_budget=memory_budget), first)
        logp.append({"logp": first["logp"]})
    assert_same(*logp)
