"""What a compiled kernel takes of a GPU, held to what the GPU has.

    assert violations(found, 90, resident=MEMORY_BOUND) == []

A test that reads a cubin is skipped where there is no cuobjdump.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.gpu import compiled
from benchmarks.gpu.compiled import KIB, NoCuobjdumpError, Resources, resident_threads

# A kernel gets more than this only where it asks for it (opts in), and then up to its chip's limit.
SHARED_LIMIT = 48 * KIB
# Threads of a multiprocessor, of its 2048, for a kernel that waits for memory: with 16 bytes on
# their way to each, that is 16 KiB, its share of an H100's bandwidth (25 bytes a nanosecond) by
# some 600 nanoseconds of latency.
MEMORY_BOUND = 1024
_TENSOR_MEMORY = 512  # columns, of compute capability 10


def _or_skip(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except NoCuobjdumpError as missing:
            pytest.skip(str(missing))

    return call


compile_kernel, dump, read = map(_or_skip, (compiled.compile_kernel, compiled.dump, compiled.read))


def violations(
    found: Resources,
    capability: int,
    *,
    resident: int = 1,
    shared_limit: int = SHARED_LIMIT,
    stack_limit: int = 0,
) -> list[str]:
    """Say what is wrong with a kernel; return an empty list if it fits.

    Args:
        found: the kernel's resources.
        capability: 80, 90 or 100.
        resident: threads that a multiprocessor has to hold at a time: `MEMORY_BOUND` where they
            wait for memory; 1, which is a block, where products keep it busy.
        shared_limit: bytes; one of `SHARED_OPT_IN` for a kernel that is launched with opting in.
        stack_limit: bytes of a thread, for a kernel that may spill outside of its hot loop.
    """
    wrong = []
    if found.stack > stack_limit:
        wrong.append(f"{found.stack} bytes of stack, as of spilled registers")
    if found.local > 0:
        wrong.append(f"{found.local} bytes of local memory")
    if found.shared > shared_limit:
        wrong.append(f"{found.shared} bytes of shared memory, expected at most {shared_limit}")
    if found.tensor_memory > _TENSOR_MEMORY:
        wrong.append(
            f"{found.tensor_memory} columns of tensor memory, expected at most {_TENSOR_MEMORY}"
        )
    if found.threads is None:
        wrong.append("no __launch_bounds__ to say how many threads it is launched with")
    elif (together := resident_threads(found, capability)) < resident:
        wrong.append(
            f"{together} threads at a time, expected at least {resident}: a block takes "
            f"{found.registers} registers by {found.threads} threads and {found.shared} bytes of "
            "shared memory"
        )
    return wrong
