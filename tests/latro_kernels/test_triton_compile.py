"""The Triton kernels compile for the GPUs that are named, here where there is none, and fit there.

A launch finds out which of its addresses and lengths are multiples of 16, and Triton compiles for
what it finds: the kernels are compiled for a launch where all are, and for one where none is.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu.compiled import CAPABILITIES, aligned
from tests.latro_kernels.gpu_resources import MEMORY_BOUND, compile_kernel, violations

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

ROW = "*fp32"
FOLD = {
    "tile_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "target_ptr": "*i64",
    "row_max_ptr": ROW,
    "sum_exp_ptr": ROW,
    "target_logit_ptr": ROW,
    "weighted_sum_ptr": ROW,
    "square_sum_ptr": ROW,
    "logit_sum_ptr": ROW,
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
    "offset_ptr": ROW,
    "grad_square_ptr": ROW,
    "logp_ptr": ROW,
    "row_max_ptr": ROW,
    "log_sum_ptr": ROW,
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
    "log_sum_p_squared_ptr": ROW,
    "mean_logit_ptr": ROW,
    "row_max_ptr": ROW,
    "log_sum_ptr": ROW,
    "target_logit_ptr": ROW,
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
    "offset_ptr": ROW,
    "grad_square_ptr": ROW,
    "logp_ptr": ROW,
    "row_max_ptr": ROW,
    "log_sum_ptr": ROW,
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
KL_SCALES = ("softcap_p", "temperature_p", "softcap_q", "temperature_q")
KL_NUMBERS = {"columns": "i32", **dict.fromkeys(KL_SCALES, "fp32")}
KL_STATE = ("max_p", "sum_exp_p", "max_q", "sum_exp_q", "anchor", "moment", "second")
KL_FOLD = KL_TILES | {f"{name}_ptr": ROW for name in KL_STATE} | KL_NUMBERS
KL_OF_ROW = ("grad_kl", "anchor", "mean", "max_p", "sum_exp_p", "max_q", "sum_exp_q")
KL_ROWS = {f"{name}_ptr": ROW for name in KL_OF_ROW}
GROUP_SUMS = {
    "logp_ptr": ROW,
    "ref_logp_ptr": ROW,
    "row_kl_ptr": ROW,
    "offsets_ptr": "*i64",
    "rewards_ptr": "*fp64",
    "answer_logp_ptr": ROW,
    "rationale_logp_ptr": ROW,
    "kl_ptr": ROW,
    "beta": "fp64",
}
GROUP_COEFFICIENTS = {
    "logp_ptr": ROW,
    "ref_logp_ptr": ROW,
    "offsets_ptr": "*i64",
    "finished_ptr": "*u8",
    "rewards_ptr": "*fp64",
    "reward_ptr": ROW,
    "advantage_ptr": ROW,
    "coefficient_ptr": ROW,
    "K": "i32",
    "scale": "fp64",
    "beta": "fp64",
    "answer_weight": "fp64",
}

# A kernel with a softcap, the entropy, log Σ p².
FLAGS = {
    "forward": ("HAS_SOFTCAP", "WITH_ENTROPY", "WITH_FURTHER_SUMS"),
    "backward": ("HAS_SOFTCAP", "WITH_OFFSET", "WITH_SQUARE"),
}
FLAGS |= {"fold": FLAGS["forward"], "grad": FLAGS["backward"]}
SOME_FLAGS = [(False, False), (True, False), (True, True)]

each_gpu = pytest.mark.parametrize("capability", CAPABILITIES)
# A compiler takes seconds: odd addresses on one chip, and of options none and all.
each_launch = pytest.mark.parametrize(
    ("is_aligned", "capability"),
    [*((True, capability) for capability in CAPABILITIES), (False, 90)],
    ids=[*(f"aligned-{capability}" for capability in CAPABILITIES), "odd-90"],
)


def flags(kernel: str, entropy: bool, square: bool) -> dict[str, bool]:
    """Return a kernel's flags; a softcap is there with the entropy."""
    return dict(zip(FLAGS[kernel], (entropy, entropy, square), strict=True))


def check(
    function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    *,
    resident: int = MEMORY_BOUND,
    **options: int,
) -> None:
    """Compile a kernel and hold it to its limits."""
    found = compile_kernel(function, signature, constants, capability, **options)
    assert violations(found, capability, resident=resident) == [], constants


def test_the_limits_are_read_from_the_compiler() -> None:
    """A kernel that may have too few registers spills, and that is seen."""
    from latro_kernels.gather_logprob import triton as kernels

    constants = dict.fromkeys(("HAS_SOFTCAP", "WITH_ENTROPY", "WITH_FURTHER_SUMS"), True)
    constants["BLOCK_V"] = kernels.BLOCK_V
    options = {"num_warps": kernels.NUM_WARPS, "maxnreg": 24}
    found = compile_kernel(kernels.forward_kernel, GATHER_FORWARD, constants, 90, **options)
    assert found.registers == 24
    assert found.threads == 32 * kernels.NUM_WARPS
    (wrong,) = violations(found, 90, resident=MEMORY_BOUND)
    assert "bytes of stack" in wrong


def test_a_descriptor_is_a_type_of_the_signature() -> None:
    """On sm_90 its block passes through shared memory."""

    @triton.jit
    def copy_kernel(x, y_ptr, BLOCK: tl.constexpr):
        k = tl.arange(0, BLOCK)
        tl.store(y_ptr + k[:, None] * BLOCK + k[None, :], x.load([0, 0]))

    signature = {"x": "tensordesc<bf16[64, 64]>", "y_ptr": "*bf16"}
    block = 64 * 64 * 2
    assert compile_kernel(copy_kernel, signature, {"BLOCK": 64}, 90).shared >= block


def test_a_signature_names_every_parameter() -> None:
    from latro_kernels.gather_logprob import triton as kernels

    signature = GATHER_FORWARD | {"surplus": "i32"}
    with pytest.raises(ValueError, match=r"\['BLOCK_V', 'surplus'\]"):
        compile_kernel(
            kernels.forward_kernel, signature, dict.fromkeys(FLAGS["forward"], False), 90
        )


@each_launch
@pytest.mark.parametrize("kernel", ["fold", "grad-fp32", "grad-bf16", "grad-fp16"])
def test_linear_logprob_fits(kernel: str, is_aligned: bool, capability: int) -> None:
    from latro_kernels.linear_logprob.triton import tiles as kernels

    name, _, dtype = kernel.partition("-")
    function = kernels.fold_kernel if name == "fold" else kernels.grad_kernel
    signature = dict(FOLD) if name == "fold" else GRAD | {"dtile_ptr": f"*{dtype}"}
    signature = aligned(signature) if is_aligned else signature
    for entropy, square in SOME_FLAGS:
        constants = {"HAS_BIAS": entropy, **flags(name, entropy, square)}
        check(function, signature, constants | {"BLOCK_V": kernels.BLOCK_V}, capability)


@each_launch
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_gather_logprob_fits(kernel: str, dtype: str, is_aligned: bool, capability: int) -> None:
    from latro_kernels.gather_logprob import triton as kernels

    function, signature = {
        "forward": (kernels.forward_kernel, GATHER_FORWARD | {"logits_ptr": f"*{dtype}"}),
        "backward": (
            kernels.backward_kernel,
            GATHER_BACKWARD | {"logits_ptr": f"*{dtype}", "dlogits_ptr": f"*{dtype}"},
        ),
    }[kernel]
    signature = aligned(signature) if is_aligned else signature
    for entropy, square in SOME_FLAGS:
        # Fewer threads do: to each, 16 logits are on their way.
        resident = 512 if not is_aligned or (square and kernel == "forward") else 768
        check(
            function,
            signature,
            flags(kernel, entropy, square) | {"BLOCK_V": kernels.BLOCK_V},
            capability,
            resident=resident,
            num_warps=kernels.NUM_WARPS,
        )


@each_launch
@pytest.mark.parametrize("kernel", ["fold", "grad-fp32", "grad-bf16", "grad-fp16"])
def test_linear_kl_fits(kernel: str, is_aligned: bool, capability: int) -> None:
    from latro_kernels.linear_kl import triton as kernels

    name, _, dtype = kernel.partition("-")
    function = kernels.fold_kernel if name == "fold" else kernels.grad_kernel
    signature = (
        KL_FOLD if name == "fold" else {**KL_TILES, "dz_ptr": f"*{dtype}", **KL_ROWS, **KL_NUMBERS}
    )
    signature = aligned(signature) if is_aligned else signature
    for plain, of_q in ((True, False), (False, False), (False, True)):
        constants = {
            "HAS_BIAS_P": not plain,
            "HAS_BIAS_Q": not plain,
            "HAS_SOFTCAP_P": not plain,
            "HAS_SOFTCAP_Q": not plain,
            "BLOCK_V": kernels.BLOCK_V,
        }
        if name == "grad":
            check(function, signature, constants | {"OF_Q": of_q}, capability)
        elif not of_q:
            check(function, signature, constants, capability)


@each_gpu
@pytest.mark.parametrize("form", ["k3", "exact", "nothing"])
def test_group_advantage_sums_fit(form: str, capability: int) -> None:
    from latro_kernels.group_advantage import triton as kernels

    constants = {
        "HAS_REF": form == "k3",
        "HAS_ROW_KL": form == "exact",
        "HAS_BETA": form != "nothing",
        "K3": form == "k3",
        "BLOCK_N": kernels.BLOCK_N,
    }
    absent = {"k3": ["row_kl_ptr"], "exact": ["ref_logp_ptr"]}
    constants |= dict.fromkeys(absent.get(form, ["ref_logp_ptr", "row_kl_ptr"]))
    check(kernels.sums_kernel, aligned(GROUP_SUMS), constants, capability)


@each_gpu
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("K", [2, 1024])
def test_group_advantage_coefficients_fit(K: int, full: bool, capability: int) -> None:
    from latro_kernels.group_advantage import triton as kernels

    # A group's rewards stand in registers, and leave them for fewer threads.
    resident = MEMORY_BOUND if K < 1024 else 512
    signature = aligned(GROUP_COEFFICIENTS)
    if K % 16 != 0:
        signature["K"] = "i32"
    constants = {
        "HAS_REF": full,
        "HAS_FINISHED": full,
        "HAS_BETA": True,
        "K3": full,
        "EXCLUDE_UNFINISHED": full,
        "BLOCK_K": K,
        "BLOCK_N": kernels.BLOCK_N,
    }
    constants |= {} if full else dict.fromkeys(("ref_logp_ptr", "finished_ptr"))
    check(kernels.coefficient_kernel, signature, constants, capability, resident=resident)
