"""The two native libraries, bound through ctypes.

`setup.py` builds `csrc/` into `_cpu.so` and, where it finds nvcc, `_cuda.so`, and puts `latro.h`
beside them. A wheel has in place of `_cpu.so` one library for each of three levels of x86-64, all
with the same functions, and the best that this processor runs is loaded. A wrong argument type
would corrupt memory without a word, so the types are read from that header instead of being written
a second time here.

    call("latro_cpu_<op>_<step>", tensor, 3, 0.5, ...)

passes tensors by address, checks the number of arguments and turns a status into an exception.
Shapes, dtypes and strides are the caller's business.
"""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import Any

# Brings torch's libgomp into the process first. A library of ours that loaded its own would keep a
# second pool of threads beside torch's.
import torch

_HERE = Path(__file__).parent
# What a level of x86-64 (System V psABI) takes of a processor, in the words of /proc/cpuinfo;
# the best level first. setup.py builds a library for each.
_AVX2 = "avx avx2 bmi1 bmi2 f16c fma abm movbe"
_LEVELS = {
    "x86-64-v4": f"{_AVX2} avx512f avx512bw avx512cd avx512dq avx512vl",
    "x86-64-v3": _AVX2,
    "x86-64": "",
}
_SCALARS = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_DECLARATION = re.compile(
    r"LATRO_API\s+(?P<result>[^()]*?)(?P<name>latro_\w+)\s*\((?P<args>[^)]*)\)"
)
_CONSTANT = re.compile(r"\b(?P<name>LATRO_[A-Z0-9_]+)\s*=\s*(?P<value>-?\d+)")


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says what is missing."""


@functools.cache
def header() -> str:
    """Return the text of `latro.h`, without its comments."""
    path = _HERE / "latro.h"
    if not path.exists():
        raise BackendUnavailableError(
            f"the native libraries are not built: {path} is missing; run `pip install -e .`"
        )
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@functools.cache
def constants() -> dict[str, int]:
    """Return the enumerators of `latro.h`: status codes and dtype codes."""
    return {m["name"]: int(m["value"]) for m in _CONSTANT.finditer(header())}


@functools.cache
def signatures() -> dict[str, tuple[type, list[type]]]:
    """Return each exported function's result type and argument types, as ctypes."""
    return {
        m["name"]: (
            _ctype(m["result"]),
            [_ctype(arg) for arg in m["args"].split(",") if arg.strip() != "void"],
        )
        for m in _DECLARATION.finditer(header())
    }


def _ctype(declaration: str) -> type:
    if "*" in declaration:
        return (
            ctypes.c_char_p if re.match(r"\s*const char\s*\*\s*$", declaration) else ctypes.c_void_p
        )
    for name, ctype in _SCALARS.items():
        if re.search(rf"\b{name}\b", declaration):
            return ctype
    raise RuntimeError(f"latro.h: no ctypes equivalent for {declaration.strip()!r}")


def levels(cpuinfo: str) -> list[str]:
    """Return the levels of x86-64 that a processor runs, the best first.

    Args:
        cpuinfo: the text of /proc/cpuinfo. The kernel leaves out what it does not let programs use.
    """
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, flags=re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return [level for level, needed in _LEVELS.items() if flags.issuperset(needed.split())]


def library_file(name: str) -> Path:
    """Return the file that `library` loads, which need not exist."""
    path = _HERE / f"_{name}.so"
    if name == "cpu" and not path.exists():
        cpuinfo = Path("/proc/cpuinfo")
        for level in levels(cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""):
            of_level = _HERE / f"_cpu_{level}.so"
            if of_level.exists():
                return of_level
    return path


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """Load the library of "cpu" or "cuda" and give every function its types.

    Raises:
        BackendUnavailableError: the library was not built, or cannot be loaded here.
    """
    path = library_file(name)
    if not path.exists():
        hint = (
            "build it with `pip install -e .` where nvcc is on the PATH"
            if name == "cuda"
            else "build it with `pip install -e .`"
        )
        raise BackendUnavailableError(f"backend {name!r}: {path.name} is missing; {hint}")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailableError(f"backend {name!r}: {path.name}: {error}") from error
    for symbol, (result, arguments) in signatures().items():
        if symbol.startswith(f"latro_{name}_"):
            function = getattr(loaded, symbol, None)
            if function is None:
                raise BackendUnavailableError(
                    f"backend {name!r}: {path.name} has no {symbol}: it is older than latro.h; "
                    "run `pip install -e .`"
                )
            function.restype, function.argtypes = result, arguments
    return loaded


def available(name: str) -> bool:
    """Return whether the library of "cpu" or "cuda" can be loaded."""
    try:
        library(name)
    except BackendUnavailableError:
        return False
    return True


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Return whether `_cuda.so` is there, and was built for the architecture of this GPU too."""
    if not torch.cuda.is_available() or not available("cuda"):
        return False
    row = torch.zeros(4, dtype=torch.float32, device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    # Only a launch tells: the fold of one logit.
    inputs, sizes = (row, None, target), (1, 1, 0)
    state = (row[1:], row[2:], row[3:], None, None, None)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        try:
            call("latro_cuda_linear_logprob_fold", *inputs, *state, *sizes, 0.0, 1.0, stream)
        except RuntimeError:
            return False
    return True


def dtype_code(dtype: torch.dtype) -> int:
    """Return the header's code of an element type."""
    names = {torch.float32: "LATRO_F32", torch.bfloat16: "LATRO_BF16", torch.float16: "LATRO_F16"}
    return constants()[names[dtype]]


def call(symbol: str, *arguments: torch.Tensor | int | float | None) -> None:
    """Call an exported function; tensors go by address, None as a null pointer.

    Raises:
        BackendUnavailableError: the symbol's library is not there.
        RuntimeError: the function returned a status other than LATRO_OK.
    """
    function = _function(symbol)
    if len(arguments) != len(function.argtypes):
        raise TypeError(f"{symbol} takes {len(function.argtypes)} arguments, got {len(arguments)}")
    status = function(*[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments])
    if status != 0:
        raise RuntimeError(f"{symbol}: {_describe(_backend(symbol), status)}")


@functools.cache
def _function(symbol: str) -> Any:
    return getattr(library(_backend(symbol)), symbol)


def _backend(symbol: str) -> str:
    return symbol.split("_")[1]


def _describe(backend: str, status: int) -> str:
    for name, value in constants().items():
        if value == status < 0:
            return name
    if backend == "cuda":
        return library("cuda").latro_cuda_error_string(status).decode()
    return f"status {status}"
