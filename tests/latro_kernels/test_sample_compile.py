"""linear_sample's Triton kernels compile for the GPUs that are named, and fit there."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.gpu.compiled import CAPABILITIES, SHARED_OPT_IN, aligned, compile_for
from tests.latro_kernels.gpu_resources import MEMORY_BOUND, compile_kernel, violations

pytest.importorskip("triton")

import triton

from benchmarks.gpu.launches import parameters, signature
from latro_kernels.linear_logprob.triton import blocks
from latro_kernels.linear_logprob.triton.fused import GROUP, TILES
from latro_kernels.linear_logprob.triton.fused_forward import forward_kernel
from latro_kernels.linear_sample.triton import draw, tiles
from latro_kernels.linear_sample.triton.fused_kernel import sample_kernel

# Instructions of a warp of an H100 for 128 x 256 logits, by the rows that noise is made for; the
# sums alone take some 1300.
MAX_EPILOGUE = {128: 8000, 16: 2600}
# Bytes of a thread, of the kernel with a softcap, a bias and a rank's first column.
MAX_STACK = 64
# And of the others: Triton 3.6 spills two registers, outside of the loop that multiplies.
MAX_PLAIN_STACK = 8 if triton.__version__.startswith("3.6.") else 0
NONE: tuple[str, ...] = ()
ALL = ("HAS_BIAS", "HAS_SOFTCAP", "HAS_FIRST")
TYPES = {name: "*i64" for name in ("seed_ptr", "position_ptr", "first_ptr", "token_ptr")}
TYPES |= {"columns_ptr": "*i32"}


def launch(
    kernel: Any, capability: int, flags: tuple[str, ...], drawn_rows: int
) -> tuple[dict[str, str], dict[str, Any], dict[str, int]]:
    """Return types, constants and options of a launch whose lengths are multiples of 16."""
    config = blocks.start(capability // 10, torch.bfloat16)
    constants = {p.name: p.name in flags for p in parameters(kernel) if p.is_constexpr}
    described = {
        "hidden": (config.rows, config.depth),
        "weight": (config.columns, config.depth),
    }
    constants |= {
        "DESCRIPTORS": capability >= 90,
        "BLOCK_N": config.rows,
        "BLOCK_V": config.columns,
        "BLOCK_H": config.depth,
        "TILES": TILES,
        "GROUP": GROUP,
        "stride_xh": 1,
        "stride_wh": 1,
    }
    if kernel is sample_kernel:
        constants["DRAWN_ROWS"] = drawn_rows
    types = signature(kernel, "bf16", described if capability >= 90 else None)
    names = {p.name for p in parameters(kernel)}
    types |= {name: f"{of}:16" for name, of in TYPES.items() if name in names}
    return types, constants, {"num_warps": config.warps, "num_stages": config.stages}


@pytest.mark.parametrize(
    ("capability", "flags", "drawn_rows"),
    [
        (80, NONE, 64),
        (80, ALL, 16),
        (90, NONE, 128),
        (90, NONE, 16),
        (90, ("GREEDY",), 128),
        (90, ALL, 128),
        (100, NONE, 128),
        (100, NONE, 32),
    ],
)
def test_drawing_fits(capability: int, flags: tuple[str, ...], drawn_rows: int) -> None:
    """The loop that multiplies spills nothing, and what comes after it next to nothing."""
    types, constants, options = launch(sample_kernel, capability, flags, drawn_rows)
    found = compile_kernel(sample_kernel, types, constants, capability, **options)
    stack = MAX_STACK if flags == ALL else MAX_PLAIN_STACK
    limits = {"shared_limit": SHARED_OPT_IN[capability], "stack_limit": stack}
    assert violations(found, capability, **limits) == []
    assert found.spills_in_products == 0
    if capability == 90:
        assert found.waits_in_products == 0
        if flags == NONE:
            # The path that is counted takes the exponential of each of a thread's logits.
            assert 128 < found.epilogue <= MAX_EPILOGUE[drawn_rows]


def test_a_token_alone_can_be_drawn() -> None:
    """A launch makes constants of a vocabulary and a hidden size that are 1."""
    types, constants, options = launch(sample_kernel, 90, NONE, 16)
    constants |= {"end": 1, "H": 1}
    found = compile_kernel(sample_kernel, types, constants, 90, **options)
    assert violations(found, 90, shared_limit=SHARED_OPT_IN[90]) == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_logits_are_folded_as_linear_logprob_folds_them(capability: int) -> None:
    """A thread has the same columns of a row in both kernels: their sums have the same bits."""
    sums = []
    for kernel, flags in ((forward_kernel, ("WITH_ENTROPY",)), (sample_kernel, NONE)):
        types, constants, options = launch(kernel, capability, flags, 128)
        text = compile_for(kernel, types, constants, capability, **options).asm["ttgir"]
        layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", text, re.MULTILINE))
        found = re.findall(
            r'"tt\.reduce"\(%(?:e|moment)\w*\).*\n.*\n.*arith\.addf.*\n.*\n.*: \((.*), (#\w+)>\)',
            text,
        )
        sums.append(Counter((shape, layouts[layout]) for shape, layout in found))
    assert sums[0] == sums[1]
    # Sums of e and of their moments, in each quarter of a block.
    assert sums[0].total() == 8


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_drawing_from_a_tile_fits(capability: int) -> None:
    names = (p.name for p in parameters(tiles.draw_kernel) if not p.is_constexpr)
    types = {name: TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    types = aligned(types | {"softcap": "fp32", "temperature": "fp32"})
    kernel = tiles.draw_kernel
    for flags, ones in (NONE, NONE), (ALL, NONE), (NONE, ("columns",)):
        constants = {p.name: p.name in flags for p in parameters(kernel) if p.is_constexpr}
        constants |= {"PART": tiles.PART, "BLOCK_V": tiles.BLOCK_V} | dict.fromkeys(ones, 1)
        found = compile_kernel(kernel, types, constants, capability)
        assert violations(found, capability, resident=MEMORY_BOUND) == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_choosing_fits(capability: int) -> None:
    types = signature(draw.choose_kernel, "fp32", None)
    types |= {"token_ptr": "*i64:16", "columns_ptr": "*i32:16"}
    constants = {"BLOCK_N": draw.CHOSEN_ROWS, "SPLITS": draw.SPLITS}
    found = compile_kernel(draw.choose_kernel, types, constants, capability)
    assert violations(found, capability, resident=MEMORY_BOUND) == []
