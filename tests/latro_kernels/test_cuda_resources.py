"""What nvcc made of csrc/cuda: code for every GPU that is named, and kernels that fit on each."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu.compiled import CAPABILITIES, KIB, SHARED_OPT_IN, Resources
from latro_kernels import native
from tests.latro_kernels.gpu_resources import MEMORY_BOUND, dump, read, violations

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "latro_kernels/_cuda.so"
needs_cuda_library = pytest.mark.skipif(
    not native.available("cuda"), reason="_cuda.so was not built: there was no nvcc"
)


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[int | None, str], Resources]:
    return read(LIBRARY)


@needs_cuda_library
def test_the_library_has_code_for_every_gpu_and_ptx_for_later_ones() -> None:
    cubins = re.findall(r"\.sm_(\d+)\w*\.cubin", dump(LIBRARY, "--list-elf"))
    assert {int(capability) for capability in cubins} >= set(CAPABILITIES)
    programs = re.findall(r"\.sm_(\d+)\.ptx", dump(LIBRARY, "--list-ptx"))
    assert {int(capability) for capability in programs} == {max(CAPABILITIES)}


@needs_cuda_library
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_of_every_source_are_in_the_library(
    kernels: dict[tuple[int | None, str], Resources], capability: int
) -> None:
    names = " ".join(name for of, name in kernels if of == capability)
    sources = [p for p in (ROOT / "csrc/cuda").glob("*.cu") if "__global__" in p.read_text()]
    assert sources
    # The compiler names an anonymous namespace after its file.
    assert [p.name for p in sources if f"{p.stem}_cu_" not in names] == []


@needs_cuda_library
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_spills_and_every_one_leaves_room_for_enough_threads(
    kernels: dict[tuple[int | None, str], Resources], capability: int
) -> None:
    """All of these kernels wait for memory: products are cuBLAS's."""
    found = {
        name: violations(resources, capability, resident=MEMORY_BOUND)
        for (of, name), resources in kernels.items()
        if of == capability
    }
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


FITTING = Resources(registers=64, stack=0, shared=40 * KIB, local=0, threads=256)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"local": 8}, "8 bytes of local memory"),
        ({"shared": 48 * KIB + 1}, "49153 bytes of shared memory, expected at most 49152"),
        ({"tensor_memory": 1024}, "1024 columns of tensor memory, expected at most 512"),
        ({"threads": None}, "no __launch_bounds__"),
        # 256 threads by 72 registers: three blocks, where four would be 1024 threads.
        ({"registers": 65}, "768 threads at a time, expected at least 1024"),
        # Three blocks by 48 + 1 KiB of the 164.
        ({"shared": 48 * KIB}, "768 threads at a time, expected at least 1024"),
        ({"threads": 1056}, "0 threads at a time, expected at least 1024"),
    ],
)
def test_a_kernel_that_does_not_fit_is_told_why(change: dict[str, int], wrong: str) -> None:
    assert violations(replace(FITTING, shared=0), 80, resident=MEMORY_BOUND) == []
    found = violations(replace(FITTING, **change), 80, resident=MEMORY_BOUND)
    assert any(text.startswith(wrong) for text in found), found


def test_a_matrix_kernel_may_fill_a_multiprocessor_by_opting_in() -> None:
    for capability, limit in SHARED_OPT_IN.items():
        full = Resources(registers=255, stack=0, shared=limit, local=0, threads=256)
        assert violations(full, capability, shared_limit=limit) == []
        assert violations(full, capability) != []
        wide = replace(full, threads=512)
        (wrong,) = violations(wide, capability, shared_limit=limit)
        assert wrong.startswith(
            "0 threads at a time, expected at least 1: a block takes 255 registers"
        )
