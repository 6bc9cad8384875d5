"""The kernels that fold products in registers compile for the GPUs that are named, and fit there.

Sums of a block fill the registers: what is folded of them may spill a little, once for a block. The
loop that multiplies may not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu.compiled import CAPABILITIES, SHARED_OPT_IN
from tests.latro_kernels.gpu_resources import compile_kernel, violations

pytest.importorskip("triton")

import triton

from benchmarks.gpu.launches import EXPONENTIALS, FEATURES, launch, parameters, signature
from latro_kernels.linear_logprob.triton import blocks, sparse_product
from latro_kernels.linear_logprob.triton.fused import GROUP, TILES
from latro_kernels.linear_logprob.triton.fused_forward import forward_kernel, merge_kernel
from latro_kernels.linear_logprob.triton.fused_frozen import (
    redo_kernel,
    rescale_kernel,
    shift_kernel,
)
from latro_kernels.linear_logprob.triton.fused_gradient import grad_kernel

# Bytes of a thread, where 128 sums stand in its registers.
MAX_STACK = 320
# Instructions of a warp of an H100 for 128 x 256 logits, in a block that is neither the last of the
# vocabulary nor holds a target, without bias, softcap and entropy.
MAX_EPILOGUE = {forward_kernel: 900, grad_kernel: 950}
# Likewise, of a frozen head: the exponentials are stored as well. Triton 3.6 takes them twice, once
# for the sum and once for the store.
MAX_FROZEN_EPILOGUE = 1900 if triton.__version__.startswith("3.6.") else 1250
# From sm_90 on operands are given by descriptor.
LAUNCHES = [(capability, features) for capability in CAPABILITIES for features in FEATURES]
# What of a launch is no multiple of 16, or is 1, where strides are not those of most models.
ODD = ("H", "stride_xn", "stride_wv")
STRIDES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "odd": (ODD, ("stride_xh", "stride_wh")),
    "turned": ((), ("stride_xn", "stride_wv")),
    "apart": ((*ODD, "stride_xh", "stride_wh"), ()),
}


@pytest.mark.parametrize(("capability", "features"), LAUNCHES)
@pytest.mark.parametrize("kernel", [forward_kernel, grad_kernel], ids=["forward", "grad"])
def test_products_fit(kernel: Any, capability: int, features: str) -> None:
    config = blocks.start(capability // 10, torch.bfloat16)
    by_descriptor = capability >= 90
    types, constants, options = launch(
        kernel, FEATURES[features], capability, by_descriptor=by_descriptor
    )
    found = compile_kernel(kernel, types, constants, capability, **options)
    limits = {"shared_limit": SHARED_OPT_IN[capability], "stack_limit": MAX_STACK}
    if features == "plain" or (config.columns == 128 and features != "squares"):
        limits["stack_limit"] = 0
    assert violations(found, capability, **limits) == []
    assert found.spills_in_products == 0
    if capability == 90 and by_descriptor:
        assert found.waits_in_products == 0
        if features == "plain":
            # The path that is counted takes the exponential of each of a thread's logits.
            logits = config.rows * config.columns // (32 * config.warps)
            assert logits < found.epilogue <= MAX_EPILOGUE[kernel]


@pytest.mark.parametrize(
    ("capability", "full"), [(80, False), (90, False), (90, True), (100, False)]
)
@pytest.mark.parametrize("kernel", [forward_kernel, redo_kernel], ids=["forward", "redo"])
def test_exponentials_of_a_frozen_head_fit(kernel: Any, capability: int, full: bool) -> None:
    names = ("HAS_BIAS", "HAS_SOFTCAP", "WITH_ENTROPY", "WITH_FURTHER_SUMS")
    flags = names if full else ()
    types, constants, options = launch(
        kernel, (*EXPONENTIALS, *flags), capability, by_descriptor=capability >= 90
    )
    found = compile_kernel(kernel, types, constants, capability, **options)
    limits = {"shared_limit": SHARED_OPT_IN[capability], "stack_limit": MAX_STACK if full else 0}
    assert violations(found, capability, **limits) == []
    assert found.spills_in_products == 0
    if capability == 90:
        assert found.waits_in_products == 0
        if kernel is forward_kernel and not full:
            assert 128 < found.epilogue <= MAX_FROZEN_EPILOGUE


def given_strides(
    types: dict[str, str], constants: dict[str, Any], strides: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return types and constants of a launch whose operands have other strides."""
    odd, ones = STRIDES[strides]
    of = dict.fromkeys(("H", "stride_xn", "stride_xh", "stride_wv", "stride_wh"), "i32:16")
    types = types | of | dict.fromkeys(odd, "i32")
    constants = {name: value for name, value in constants.items() if name not in of}
    return (
        {name: type_ for name, type_ in types.items() if name not in ones},
        constants | dict.fromkeys(ones, 1),
    )


@pytest.mark.parametrize(
    ("capability", "strides"), [*((80, strides) for strides in STRIDES), (90, "odd")]
)
@pytest.mark.parametrize("kernel", [forward_kernel, grad_kernel], ids=["forward", "grad"])
def test_products_of_any_strides_spill_nothing_in_the_loop(
    kernel: Any, capability: int, strides: str
) -> None:
    """Where there are descriptors, what none takes is copied: an odd H alone is left."""
    types, constants, options = launch(
        kernel, FEATURES["plain"], capability, by_descriptor=capability >= 90
    )
    types, constants = given_strides(types, constants, strides)
    found = compile_kernel(kernel, types, constants, capability, **options)
    limits = {"shared_limit": SHARED_OPT_IN[capability], "stack_limit": MAX_STACK}
    assert violations(found, capability, **limits) == []
    assert found.spills_in_products == 0
    assert found.waits_in_products == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", [forward_kernel, grad_kernel], ids=["forward", "grad"])
def test_products_of_fp32_fit(kernel: Any, capability: int) -> None:
    """They run where there is a filter."""
    config = blocks.start(capability // 10, torch.float32)
    chosen = (*FEATURES["squares"], "HAS_ROWS")
    constants = {p.name: p.name in chosen for p in parameters(kernel) if p.is_constexpr}
    constants |= {"BLOCK_N": config.rows, "BLOCK_V": config.columns, "BLOCK_H": config.depth}
    constants |= {"GROUP": GROUP, "stride_xh": 1, "stride_wh": 1}
    if kernel is forward_kernel:
        constants["TILES"] = TILES
    options = {"num_warps": config.warps, "num_stages": config.stages}
    types = signature(kernel, "fp32", None)
    found = compile_kernel(kernel, types, constants, capability, **options)
    limits = {"shared_limit": SHARED_OPT_IN[capability], "stack_limit": MAX_STACK}
    assert violations(found, capability, **limits) == []
    assert found.spills_in_products == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_sparse_product_fits(dtype: str, capability: int) -> None:
    config = blocks.start(capability // 10, torch.bfloat16 if dtype == "bf16" else torch.float32)
    # dz, whose columns stand side by side, and dz transposed.
    for rows, depth, unit_step in (
        (config.rows, config.columns, "stride_ak"),
        (config.columns, config.rows, "stride_am"),
    ):
        constants = {"ADD": True, "BLOCK_M": rows, "BLOCK_K": depth}
        constants["TRANSPOSED"] = unit_step == "stride_am"
        constants |= {unit_step: 1, "stride_bh": 1}
        constants["BLOCK_H"] = sparse_product.BLOCK_COLS
        constants["BLOCK_DEPTH"] = min(sparse_product.BLOCK_DEPTH, depth)
        types = signature(sparse_product.sparse_product_kernel, dtype, None)
        types |= {"active_ptr": "*i8:16", "stride_active_m": "i32", "stride_active_k": "i32"}
        found = compile_kernel(
            sparse_product.sparse_product_kernel, types, constants, capability, num_warps=8
        )
        limits = {"shared_limit": SHARED_OPT_IN[capability], "stack_limit": 64}
        assert violations(found, capability, **limits) == []
        assert found.spills_in_products == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_small_ones_fit(capability: int) -> None:
    for entropy, further in ((False, False), (True, False), (True, True)):
        constants = {"WITH_ENTROPY": entropy, "WITH_FURTHER_SUMS": further, "BLOCK_N": 64}
        found = compile_kernel(
            merge_kernel, signature(merge_kernel, "fp32", None), constants, capability
        )
        assert violations(found, capability) == []
    types = signature(rescale_kernel, "fp32", None)
    constants = {"HAS_SUM": True, "BLOCK_H": 1024}
    found = compile_kernel(rescale_kernel, types, constants, capability)
    assert violations(found, capability) == []
    types = signature(shift_kernel, "bf16", None)
    types |= {"hidden_ptr": "*bf16:16", "weight_ptr": "*bf16:16"}
    constants = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "BLOCK_H": 1024}
    constants |= {"stride_xh": 1, "stride_wh": 1}
    found = compile_kernel(shift_kernel, types, constants, capability)
    assert violations(found, capability) == []
