"""The warp-specialised dz: compiled, and run in the simulator.

What the order of barriers does where it is wrong is tested with the forward's, which has the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.gpu.compiled import Resources
from benchmarks.gpu.launches import FEATURES, launch
from latro_kernels.gather_logprob import reference
from latro_kernels.head import Head
from latro_kernels.linear_logprob.state import RowGrad
from latro_kernels.linear_logprob.triton import blocks, fused, warp_specialized
from latro_kernels.linear_logprob.triton.blocks import Config
from latro_kernels.linear_logprob.triton.fused_gradient import grad_kernel
from latro_kernels.linear_logprob.triton.warp_specialized_gradient import (
    warp_specialized_grad_kernel,
)
from latro_kernels.logit_tiles import Tile
from tests.latro_kernels.gluon_simulator import (
    DeadlockError,
    Simulator,
    is_found_by_some_seed,
)
from tests.latro_kernels.gpu_resources import compile_kernel
from tests.latro_kernels.ops.linear_logprob import problem
from tests.latro_kernels.ops.op import Problem, assert_same, gate
from tests.latro_kernels.test_warp_specialized import (
    DEADLOCKS,
    MORE_THAN_ONE_BLOCK,
    RACES,
    SHAPE,
    SHAPES,
    SMALL,
    check_fit,
    each_capability,
    logits_of_a_thread,
)

# Instructions of a warp, as in test_store_free_compile.py, and with an offset, as of the entropy:
# on sm_90 for 64 x 256 logits, on sm_100 for 128 x 256.
MAX_EPILOGUE = {
    (90, ()): 730,
    (90, ("WITH_OFFSET",)): 1_020,
    (100, ()): 1_350,
    (100, ("WITH_OFFSET",)): 1_550,
}
# Bytes of a thread, with bias and softcap.
MAX_STACK = 16
ALL = slice(0, None)


def compiled(kernel: Any, chosen: tuple[str, ...], capability: int) -> Resources:
    types, constants, options = launch(kernel, chosen, capability, by_descriptor=True)
    return compile_kernel(kernel, types, constants, capability, **options)


@each_capability
@pytest.mark.parametrize("chosen", [(), ("WITH_OFFSET",), FEATURES["all"]], ids="+".join)
def test_it_fits(chosen: tuple[str, ...], capability: int) -> None:
    found = compiled(warp_specialized_grad_kernel, chosen, capability)
    limit = MAX_EPILOGUE.get((capability, chosen))
    check_fit(found, capability, stack=0 if limit else MAX_STACK)
    if limit:
        # A thread takes the exponential of each of its logits.
        assert logits_of_a_thread(capability) < found.epilogue <= limit
    if limit and capability == 90:
        assert found.epilogue < compiled(grad_kernel, chosen, 90).epilogue


@pytest.fixture(autouse=True)
def descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "has_descriptors", lambda device: True)
    monkeypatch.setattr(fused, "GROUP", 2)


def dz_by_autograd(given: Problem, dtype: torch.dtype) -> tuple[Tensor, RowGrad]:
    """Return dz from products that are rounded to `dtype`, and what the backward needs of rows."""
    products = given["hidden"].double() @ given["weight"].double().T
    products = products.to(dtype).requires_grad_()
    logits = products if given["bias"] is None else products + given["bias"].to(dtype)
    with_entropy = "entropy" in given.upstream
    found = reference(logits, given["target"], given["temperature"], given["softcap"])
    entropy = found.entropy
    assert entropy is not None
    assert found.log_sum_exp is not None
    g = given.upstream["logp"]
    h = given.upstream["entropy"] if with_entropy else torch.zeros_like(g)
    (g * found.logp + h * entropy).sum().backward()
    assert products.grad is not None
    z = logits.detach().to(torch.promote_types(dtype, torch.float32))
    if given["softcap"]:
        z = given["softcap"] * torch.tanh(z / given["softcap"])
    row_max = z.amax(1) / given["temperature"]
    rows = RowGrad(
        target=given["target"],
        logp=found.logp.detach().float(),
        row_max=row_max.float(),
        log_sum=(found.log_sum_exp.detach() - row_max).float(),
        grad_logp=g,
        grad_entropy=h if with_entropy else None,
        offset=(h * entropy.detach()).float() if with_entropy else None,
    )
    return products.grad, rows


def dz(
    given: Problem, simulator: Simulator, config: Config = SMALL, columns: slice = ALL
) -> Tensor:
    """Return dz of some columns, made in the simulator."""
    hidden, weight, bias = given["hidden"], given["weight"], given["bias"]
    columns = slice(*columns.indices(len(weight)))
    head = Head(
        hidden=hidden,
        weight=weight,
        bias=bias,
        temperature=given["temperature"],
        softcap=given["softcap"] or 0.0,
        backend="triton",
    )
    tile = Tile(
        rows=slice(0, len(hidden)),
        columns=columns,
        hidden=hidden,
        weight=weight[columns],
        bias=None if bias is None else bias[columns].float().contiguous(),
    )
    _, rows = dz_by_autograd(given, torch.float64)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(warp_specialized, "launch", simulator.launch)
        found = fused._dz(head, tile, rows, config)
    assert [name for name, _ in simulator.launched] == ["warp_specialized_grad_kernel"]
    return found.dz


def check_dz(given: Problem, found: Tensor, columns: slice = ALL) -> None:
    truth, _ = dz_by_autograd(given, torch.float64)
    unfused, _ = dz_by_autograd(given, found.dtype)
    gate("dz", found, truth[:, columns], unfused[:, columns])


@each_capability
@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_events_gives_the_same_bits(seed: int, capability: int) -> None:
    given = problem(SHAPE, torch.bfloat16, entropy=True)
    found, again = (dz(given, Simulator(s, capability=capability)) for s in (seed, seed + 1000))
    check_dz(given, found)
    assert_same({"dz": found}, {"dz": again})


@each_capability
@pytest.mark.parametrize("multiprocessors", [1, 2, 1000])
@pytest.mark.parametrize(("shape", "dtype", "options"), SHAPES)
def test_it_passes_the_gate(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    options: dict[str, Any],
    multiprocessors: int,
    capability: int,
) -> None:
    given = problem(shape, dtype, **options)
    simulator = Simulator(0, capability=capability, multiprocessors=multiprocessors)
    check_dz(given, dz(given, simulator))


@each_capability
@pytest.mark.parametrize("entropy", [False, True])
def test_a_slice_of_the_vocabulary(entropy: bool, capability: int) -> None:
    """Whose columns do not begin at 0, and in which few rows have their target."""
    given = problem(SHAPE, torch.bfloat16, bias=True, softcap=5.0, entropy=entropy)
    for columns in (slice(0, 64), slice(64, 203)):
        found = dz(given, Simulator(0, capability=capability), columns=columns)
        check_dz(given, found, columns)


@each_capability
def test_blocks_of_the_size_that_is_launched(capability: int) -> None:
    given = problem(MORE_THAN_ONE_BLOCK, torch.bfloat16, entropy=True)
    simulator = Simulator(0, capability=capability)
    check_dz(given, dz(given, simulator, blocks.WARP_SPECIALIZED))


@each_capability
def test_columns_of_probability_zero(capability: int) -> None:
    given = problem(SHAPE, torch.bfloat16, bias=True, entropy=True)
    bias = given["bias"].clone()
    bias[: 2 * SMALL.columns] = -torch.inf
    target = given["target"] % SMALL.columns + 4 * SMALL.columns
    given = given.but(bias=bias, target=target)
    found = dz(given, Simulator(0, capability=capability))
    assert not found[:, : 2 * SMALL.columns].any()
    check_dz(given, found)


@pytest.mark.parametrize(("capability", "wrong"), DEADLOCKS)
def test_a_wrong_order_that_hangs_is_found(capability: int, wrong: str) -> None:
    given, edit = problem(SHAPE, torch.bfloat16), DEADLOCKS[capability, wrong]
    for seed in range(3):
        with pytest.raises(DeadlockError):
            dz(given, Simulator(seed, edit, capability=capability))


@pytest.mark.parametrize(("capability", "wrong"), RACES)
def test_a_wrong_order_that_gives_wrong_results_is_found(capability: int, wrong: str) -> None:
    """By some of the seeds, as an AssertionError of the gate or of a barrier."""
    given, edit = problem(SHAPE, torch.bfloat16), RACES[capability, wrong]
    assert is_found_by_some_seed(
        lambda seed: check_dz(given, dz(given, Simulator(seed, edit, capability=capability)))
    )
