"""Where numbers were measured: the device, its threads and the versions of what computed them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch


def environment(device: torch.device, packages: Sequence[str] = ()) -> dict[str, object]:
    """Return date, device, threads and versions, ready for JSON.

    Args:
        device: a CUDA GPU is named as the driver names it, a CPU by its model and the vectors that
            torch uses on it, since clouds give unlike processors one name.
        packages: distributions whose versions are wanted beside Python's and torch's; `None` for
            one that is not installed.

    Returns:
        `date` (UTC, ISO 8601), `device`, `threads` (torch's in this process),
        `float32_matmul_precision`, `python`, `torch`, `cuda` (that torch was built for, or `None`),
        and each package under its name.
    """
    on_gpu = device.type == "cuda"
    return {
        # First: torch's own __version__ tells the build too, which its metadata may leave out.
        **{package: _version(package) for package in packages},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
