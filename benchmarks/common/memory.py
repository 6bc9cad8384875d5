"""Peak memory of one call, over what was there before it.

CUDA: the caching allocator's own peak counter, in this process.

CPU: torch's profiler sees only what goes through torch's allocator, so it misses the buffers of
native code (`std::vector`, `aligned_alloc`, oneDNN scratch). The kernel's resident-set high-water
mark (`VmHWM`) sees every page, and is what is used here. Four things would make it lie, and each
is taken away:

- pages left by earlier work: the call runs in a process of its own;
- freed blocks that malloc keeps and hands out again, which look free of charge: blocks of 64 KiB
  and more are mapped and unmapped one by one (`mallopt`);
- transparent huge pages, which count 2 MiB for one touched byte: switched off (`prctl`);
- libraries, threads and code pages loaded on first use: the same call is made first on a tiny
  problem. It is not made first on the real one, whose cached scratch would then be missed.

On unfused log-softmax, whose buffers are torch's but for a few MiB in which the GEMM library
packs its operands, `VmHWM` and the profiler agree once those exist; a test holds them to it.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

P = TypeVar("P")
T = TypeVar("T")

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_HIGH_WATER = "5"  # proc(5): reset VmHWM to the current VmRSS
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_PR_SET_THP_DISABLE = 41  # linux/prctl.h
_PACKAGES = {"benchmarks", "latro", "latro_kernels"}


def can_measure(device: torch.device) -> str | None:
    """Return `None` if peak memory can be measured for `device` here, else why not."""
    if device.type == "cuda" or _CLEAR_REFS.exists():
        return None
    return "peak CPU memory needs Linux's /proc/self/clear_refs"


def in_fresh_process(function: Callable[..., T], *args: object) -> T:
    """Call `function(*args)` in a new process; both must pickle. Its exceptions are raised here.

    Raises:
        concurrent.futures.process.BrokenProcessPool: the process died (out of memory, a crash).
    """
    # Forked from a server that only ever imported what this process has of this repository by its
    # first call: as clean as 'spawn' and many seconds faster.
    ours = [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", *ours])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def make_malloc_honest() -> None:
    """Make this process's resident set follow what is allocated.

    This cannot be undone: call it in a process of its own.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 16)
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def measured(
    measure: Callable[[P], T],
    problem: P,
    device: torch.device,
    *,
    tiny: P,
    name: str,
    failures: tuple[type[BaseException], ...],
) -> T | None:
    """Return `measure(problem)`, which calls `peak_extra_bytes`, from where it is honest.

    Args:
        measure: this has to pickle on a CPU.
        problem: what is measured.
        device: on a CPU a process of its own measures.
        tiny: what that process measures first, for what is loaded on first use.
        name: whose memory it is; printed, with the reason, where None is returned.
        failures: what `measure` may raise where it cannot run.
    """
    why: object = can_measure(device)
    if why is None:
        try:
            if device.type == "cuda":
                return measure(problem)
            call = partial(_measured_honestly, tiny=tiny, threads=torch.get_num_threads())
            return in_fresh_process(call, measure, problem)
        except (*failures, BrokenProcessPool) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
    print(f"{name}: memory not measured: {why}", file=sys.stderr)
    return None


def _measured_honestly(measure: Callable[[P], T], problem: P, *, tiny: P, threads: int) -> T:
    make_malloc_honest()
    torch.set_num_threads(threads)
    measure(tiny)
    return measure(problem)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}")


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Measure the most bytes resident (CPU) or allocated (CUDA) in `call()` beyond those before.

    What `call` returns is counted: subtract results that are not to count. On CPU, call this
    after `make_malloc_honest` in a process of its own.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER, encoding="utf-8")
        before = _status_bytes("VmRSS")
        result = call()
        peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)
