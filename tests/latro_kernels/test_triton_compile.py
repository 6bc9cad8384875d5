"""The Triton kernels compile for the GPUs that are named, here where there is none."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

triton = pytest.importorskip("triton")

ROW = "*fp32"
FOLD = {
    "tile_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "target_ptr": "*i64",
    "peak_ptr": ROW,
    "total_ptr": ROW,
    "picked_ptr": ROW,
    "weighted_ptr": ROW,
    "columns": "i32",
    "first_column": "i32",
    "softcap": "fp32",
    "temperature": "fp32",
}
GRAD = {
    "tile_ptr": "*fp32",
    "dtile_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "target_ptr": "*i64",
    "grad_logp_ptr": ROW,
    "grad_entropy_ptr": ROW,
    "logp_ptr": ROW,
    "entropy_ptr": ROW,
    "peak_ptr": ROW,
    "log_total_ptr": ROW,
    "columns": "i32",
    "first_column": "i32",
    "softcap": "fp32",
    "temperature": "fp32",
}


GATHER_FORWARD = {
    "logits_ptr": "*fp32",
    "target_ptr": "*i64",
    "logp_ptr": ROW,
    "entropy_ptr": ROW,
    "peak_ptr": ROW,
    "log_total_ptr": ROW,
    "stride_n": "i64",
    "V": "i32",
    "softcap": "fp32",
    "temperature": "fp32",
}
GATHER_BACKWARD = {
    "logits_ptr": "*fp32",
    "dlogits_ptr": "*fp32",
    "target_ptr": "*i64",
    "grad_logp_ptr": ROW,
    "grad_entropy_ptr": ROW,
    "logp_ptr": ROW,
    "entropy_ptr": ROW,
    "peak_ptr": ROW,
    "log_total_ptr": ROW,
    "stride_n": "i64",
    "stride_dn": "i64",
    "V": "i32",
    "softcap": "fp32",
    "temperature": "fp32",
}
KL_TILES = {
    "tile_p_ptr": "*fp32",
    "tile_q_ptr": "*fp32",
    "bias_p_ptr": "*fp32",
    "bias_q_ptr": "*fp32",
}
KL_NUMBERS = {"columns": "i32", "softcap": "fp32", "temperature": "fp32"}
KL_STATE = ("peak_p", "total_p", "peak_q", "total_q", "first", "second")
KL_FOLD = KL_TILES | {f"{name}_ptr": ROW for name in KL_STATE} | KL_NUMBERS
KL_ROWS = {f"{name}_ptr": ROW for name in ("grad_kl", "center", "peak", "log_total")}


def compile_without_spills(
    function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    **options: int,
) -> None:
    """Compile a kernel for a GPU with the shared memory and the registers that it has."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        function, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert f"sm_{capability}" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0
    # A local depot is where ptxas would find spilled or indexed arrays.
    assert ".local" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 48 * 1024


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["fold", "grad-fp32", "grad-bf16", "grad-fp16"])
def test_linear_logprob_compiles_without_spills(kernel: str, capability: int) -> None:
    from latro_kernels.triton import linear_logprob as kernels

    name, _, dtype = kernel.partition("-")
    function = kernels.fold_kernel if name == "fold" else kernels.grad_kernel
    signature = dict(FOLD) if name == "fold" else GRAD | {"dtile_ptr": f"*{dtype}"}
    for plain, entropy in itertools.product([True, False], repeat=2):
        constants = {
            "HAS_BIAS": not plain,
            "HAS_SOFTCAP": not plain,
            "WITH_ENTROPY": entropy,
            "BLOCK_V": kernels.BLOCK_V,
        }
        compile_without_spills(function, signature, constants, capability)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_gather_logprob_compiles_without_spills(kernel: str, dtype: str, capability: int) -> None:
    from latro_kernels.triton import gather_logprob as kernels

    function, signature = {
        "forward": (kernels.forward_kernel, GATHER_FORWARD | {"logits_ptr": f"*{dtype}"}),
        "backward": (
            kernels.backward_kernel,
            GATHER_BACKWARD | {"logits_ptr": f"*{dtype}", "dlogits_ptr": f"*{dtype}"},
        ),
    }[kernel]
    for softcap, entropy in itertools.product([True, False], repeat=2):
        constants = {
            "HAS_SOFTCAP": softcap,
            "WITH_ENTROPY": entropy,
            "BLOCK_V": kernels.BLOCK_V,
        }
        compile_without_spills(
            function, signature, constants, capability, num_warps=kernels.NUM_WARPS
        )


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["fold", "grad-fp32", "grad-bf16", "grad-fp16"])
def test_linear_kl_compiles_without_spills(kernel: str, capability: int) -> None:
    from latro_kernels.triton import linear_kl as kernels

    name, _, dtype = kernel.partition("-")
    function = kernels.fold_kernel if name == "fold" else kernels.grad_kernel
    signature = (
        KL_FOLD
        if name == "fold"
        else {**KL_TILES, "dtile_ptr": f"*{dtype}", **KL_ROWS, **KL_NUMBERS}
    )
    for plain in (True, False):
        constants = {
            "HAS_BIAS_P": not plain,
            "HAS_BIAS_Q": not plain,
            "HAS_SOFTCAP": not plain,
            "BLOCK_V": kernels.BLOCK_V,
        }
        compile_without_spills(function, signature, constants, capability)
