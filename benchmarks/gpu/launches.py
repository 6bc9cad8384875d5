"""What the kernels of fused `linear_logprob` are launched with, to compile them without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.compiled import aligned
from latro_kernels.linear_logprob.triton import blocks, warp_specialized
from latro_kernels.linear_logprob.triton.fused import GROUP, TILES

FEATURES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "entropy": ("WITH_ENTROPY", "WITH_OFFSET", "WITH_CACHED"),
    "all": (
        *("HAS_BIAS", "HAS_SOFTCAP", "WITH_ENTROPY", "WITH_CACHED", "WITH_BLOCK_MAX"),
        *("HAS_ROWS", "WITH_FILTER", "WITH_OFFSET"),
    ),
    "kept": ("WITH_CACHED", "IS_CACHED"),
}
FEATURES["squares"] = (*FEATURES["all"], "WITH_FURTHER_SUMS", "WITH_SQUARE")
# Of `forward_kernel` with a frozen head.
EXPONENTIALS = ("WITH_EXP",)
POINTERS = {"target_ptr": "*i64", "rows_ptr": "*i64", "active_ptr": "*i8"}
FLOATS = ("softcap", "temperature", "grad_filter", "limit", "factor")


def parameters(kernel: Any) -> list[Any]:
    """Return the parameters of a kernel, which may be one with heuristics."""
    return kernel.params if hasattr(kernel, "params") else kernel.fn.params


def is_gluon(kernel: Any) -> bool:
    """Return whether a kernel, which may be one with heuristics, is written in Gluon."""
    return (kernel if hasattr(kernel, "is_gluon") else kernel.fn).is_gluon()


def signature(
    kernel: Any, dtype: str, described: dict[str, tuple[int, int]] | None
) -> dict[str, str]:
    """Return the types of a launch whose lengths are multiples of 16.

    `described` has the blocks of operands that are given by descriptor.
    """
    types = {}
    for parameter in parameters(kernel):
        name = parameter.name
        if parameter.is_constexpr or name in ("stride_xh", "stride_wh"):
            continue
        if name in ("hidden", "weight"):
            of_block = "*{0}" if described is None else "tensordesc<{0}[{1}, {2}]{3}>"
            # In Gluon a launch says as well how blocks lie in shared memory.
            layout = f",{warp_specialized.LAYOUT!r}" if is_gluon(kernel) else ""
            types[name] = of_block.format(dtype, *(described or {}).get(name, ()), layout)
        elif name in ("a_ptr", "b_ptr", "dz_ptr", "exp_ptr"):
            types[name] = f"*{dtype}"
        elif name.endswith("_ptr"):
            types[name] = POINTERS.get(name, "*fp32")
        else:
            types[name] = "fp32" if name in FLOATS else "i32"
    return aligned(types)


def launch(
    kernel: Any, flags: tuple[str, ...], capability: int, *, by_descriptor: bool
) -> tuple[dict[str, str], dict[str, Any], dict[str, int]]:
    """Return types, constants and options of a launch in bf16, all lengths multiples of 16.

    Args:
        kernel: `forward_kernel`, `warp_specialized_kernel`, `grad_kernel` or `redo_kernel`.
        flags: the constexprs that are true.
        capability: 80, 90 or 100.
        by_descriptor: whether hidden and weight are given by descriptor.
    """
    config = blocks.start(capability // 10, torch.bfloat16)
    described = {
        "hidden": (config.rows, config.depth),
        "weight": (config.columns, config.depth),
    }
    named = {
        "DESCRIPTORS": by_descriptor,
        "BLOCK_N": config.rows,
        "BLOCK_V": config.columns,
        "BLOCK_H": config.depth,
        "GROUP": GROUP,
        "TILES": TILES,
        "STAGES": config.stages,
        "TENSOR_MEMORY": capability >= 100,
    }
    constants = {
        p.name: named.get(p.name, p.name in flags) for p in parameters(kernel) if p.is_constexpr
    }
    constants |= {p.name: 1 for p in parameters(kernel) if p.name in ("stride_xh", "stride_wh")}
    types = signature(kernel, "bf16", described if by_descriptor else None)
    if is_gluon(kernel):
        return types, constants, warp_specialized.options(tensor_memory=capability >= 100)
    return types, constants, {"num_warps": config.warps, "num_stages": config.stages}
