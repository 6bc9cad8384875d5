"""The Triton kernels compile for the GPUs that are named, here where there is none."""

from __future__ import annotations

import itertools

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


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["fold", "grad-fp32", "grad-bf16", "grad-fp16"])
def test_linear_logprob_compiles_without_spills(kernel: str, capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
        source = ASTSource(
            function, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert f"sm_{capability}" in compiled.asm["ptx"]
        assert len(compiled.asm["cubin"]) > 0
        # A local depot is where ptxas would find spilled or indexed arrays.
        assert ".local" not in compiled.asm["ptx"]
        assert compiled.metadata.shared <= 48 * 1024
