"""Read what a compiled kernel takes of a GPU out of its cubin, without a GPU.

    signature = aligned({"x_ptr": "*bf16", "N": "i32"})
    found = compile_kernel(kernel, signature, {"BLOCK": 128}, 90, num_warps=8)

`read` does the same for a library that nvcc built. The limits of GPUs are from "Technical
Specifications per Compute Capability" in the CUDA C++ Programming Guide.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

KIB = 1024
# Bytes of shared memory that a block may ask for, by compute capability.
SHARED_OPT_IN = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}
CAPABILITIES = tuple(SHARED_OPT_IN)

_WARP = 32
# Of one multiprocessor of each of these.
_REGISTERS, _THREADS, _BLOCKS = 65_536, 2048, 32
_REGISTER_STEP = 8  # a thread gets registers by the eight
_SHARED_OF_SYSTEM = KIB  # of every block; the chip has it beyond the largest block's

_FUNCTION = re.compile(r"^ *Function (\S+):\n(.*)$", re.MULTILINE)
# __launch_bounds__ in CUDA, num_warps in Triton: the size of a block, as x y z.
_BLOCK = re.compile(
    r"^\.nv\.info\.(?P<name>\S+)\n(?:[^.].*\n|\n)*?"
    r"\s*Attribute:\s*EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s*Value:\s*(?P<size>.*)$",
    re.MULTILINE,
)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);")
_PRODUCT = re.compile(r"\b(?:H|HG|UTC\w+)MMA\b")
# Reads sums from tensor memory; the warps that do multiply nothing themselves.
_LOAD_OF_SUMS = re.compile(r"\bLDTM\b")
_BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")


class NoCuobjdumpError(RuntimeError):
    """The program that reads cubins is not there."""


@dataclass(frozen=True)
class Resources:
    """What a block of a kernel takes.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread's stack frame: spilled registers, indexed arrays, and what a called
            function saves, as the division of doubles may.
        shared: bytes of a block; of a cubin without the dynamic ones, of which only a launch knows,
            and from compute capability 9 on with the KiB that the system takes.
        local: bytes of a thread's local memory outside of the frame.
        threads: the most that the kernel may be launched with, or None where it does not say.
        tensor_memory: columns of a block (compute capability 10).
        spills_in_products: instructions that touch local memory in loops that multiply matrices, or
            read sums from tensor memory, and hold no other loop; read for Triton kernels only.
        waits_in_products: how often such loops wait until no product is under way any more (compute
            capability 9); read for Triton kernels only.
        epilogue: instructions that a warp executes at least between the products of a block and
            those of the next, or the kernel's end, where exponentials are taken of the products; 0
            where none are. Where other warps multiply, into tensor memory: from a block's first
            sums to the next one's. Read for Triton kernels only.
    """

    registers: int
    stack: int
    shared: int
    local: int
    threads: int | None = None
    tensor_memory: int = 0
    spills_in_products: int = 0
    waits_in_products: int = 0
    epilogue: int = 0


@functools.cache
def cuobjdump() -> str | None:
    """Return the newest cuobjdump on the PATH, beside nvcc or in Triton; it reads cubins."""
    folders = []
    if nvcc := shutil.which("nvcc"):
        folders += [Path(nvcc).parent, Path(nvcc).resolve().parent]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    places = [shutil.which("cuobjdump"), *(shutil.which("cuobjdump", path=f) for f in folders)]
    return max(filter(None, places), key=_version, default=None)


def _version(program: str) -> tuple[int, ...]:
    text = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"\bV([\d.]+)", text)
    return tuple(map(int, version[1].split("."))) if version else ()


def dump(path: Path, *options: str) -> str:
    """Return what cuobjdump says of a library or a cubin.

    Raises:
        NoCuobjdumpError: there is none.
        RuntimeError: it fails.
    """
    program = cuobjdump()
    if program is None:
        raise NoCuobjdumpError("no cuobjdump: it comes with Triton and with the CUDA toolkit")
    command = [program, *options, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


def read(path: Path) -> dict[tuple[int | None, str], Resources]:
    """Return the resources of every kernel in a library or a cubin, by compute capability and name.

    A cubin holds code for one GPU and does not name it: the capability is None.
    """
    text = dump(path, "--dump-elf", "--dump-resource-usage")
    head, *rest = re.split(r"^arch = sm_(\d+)\w*\n", text, flags=re.MULTILINE)
    parts = zip(map(int, rest[::2]), rest[1::2], strict=True) if rest else [(None, head)]
    found = {}
    for capability, part in parts:
        threads = {match["name"]: match["size"] for match in _BLOCK.finditer(part)}
        for name, numbers in _FUNCTION.findall(part):
            of = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
            size = [int(axis, 16) for axis in threads.get(name, "").split()]
            found[capability, name] = Resources(
                registers=of["REG"],
                stack=of["STACK"],
                shared=of["SHARED"],
                local=of["LOCAL"],
                threads=math.prod(size) if size else None,
            )
    return found


def aligned(signature: dict[str, str]) -> dict[str, str]:
    """Return the signature of a launch whose addresses and integers are multiples of 16.

    Triton looks at the arguments of a launch, and compiles a kernel of its own, with wider loads,
    for those that are.
    """
    return {
        name: f"{type_}:16" if type_.startswith(("*", "i", "u")) else type_
        for name, type_ in signature.items()
    }


def compile_kernel(
    function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    **options: Any,
) -> Resources:
    """Compile a Triton kernel for a GPU that need not be there.

    Args:
        function: a function of `triton.jit` or `gluon.jit`, or one with heuristics, whose results
            are given here.
        signature: by parameter, "fp32", "i64", "*bf16" or "tensordesc<bf16[128, 64]>" (a
            `TensorDescriptor` with that block); see `aligned`. What a kernel does not specialise
            on counts as no multiple of 16, as in a launch.
        constants: the values of the other parameters, or of the same, and then these count:
            constexprs, pointers that are None, and integers that are 1, of which a launch makes
            constants as well.
        capability: 80, 90 or 100.
        options: what a launch takes besides the parameters: num_warps, num_stages, maxnreg.
    """
    compiled = compile_for(function, signature, constants, capability, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (found,) = read(Path(file.name)).values()
        # To disassemble takes half a second; it shows how matrices are multiplied.
        sass = dump(Path(file.name), "--dump-sass") if "mma" in compiled.asm["ptx"] else ""
    code = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(sass)]
    products = _product_loops(code)
    # Dynamic shared memory is what the launch asks for; a cubin knows only of the static one.
    return replace(
        found,
        shared=max(found.shared, compiled.metadata.shared),
        tensor_memory=compiled.metadata.tmem_size or 0,
        spills_in_products=sum("LDL" in text or "STL" in text for text in products),
        waits_in_products=sum("WARPGROUP.DEPBAR.LE gsb0, 0x0" in text for text in products),
        epilogue=_epilogue(code),
    )


def compile_for(
    function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    **options: Any,
) -> Any:
    """Return what Triton makes of a kernel, all its forms in `asm`; arguments as above."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime import Heuristics

    function = function.fn if isinstance(function, Heuristics) else function
    given = signature | dict.fromkeys(constants, "constexpr")
    if odd := set(given) ^ set(function.arg_names):
        raise ValueError(f"signature, constants: missing or of no parameter: {sorted(odd)}")
    plain = {p.name for p in function.params if p.do_not_specialize}
    if ones := plain & {name for name, value in constants.items() if value is not None}:
        raise ValueError(
            f"constants: a launch makes none of what is not specialised: {sorted(ones)}"
        )
    types = {name: given[name].removesuffix(":16") for name in function.arg_names}
    multiples = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if given[name].endswith(":16") and name not in plain
    }
    source_of = GluonASTSource if function.is_gluon() else ASTSource
    source = source_of(function, types, constexprs=constants, attrs=multiples)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _product_loops(code: list[tuple[int, str]]) -> list[str]:
    """Return the instructions of loops of products, or of reading them, that hold no other loop."""
    jumps = [(int(jump[1], 16), at) for at, text in code if (jump := _BRANCH.search(text))]
    loops = [(start, end) for start, end in jumps if start < end]
    found = []
    for start, end in loops:
        if any((start, end) != other and start <= other[0] <= other[1] <= end for other in loops):
            continue
        body = [text for at, text in code if start <= at <= end]
        if any(_PRODUCT.search(text) or _LOAD_OF_SUMS.search(text) for text in body):
            found += body
    return found


def _epilogue(code: list[tuple[int, str]]) -> int:
    """Return the fewest instructions from a product over an exponential to a product or the end.

    Or from the first that reads sums from tensor memory to itself, where that is in a loop.
    """
    number = {at: n for n, (at, _) in enumerate(code)}
    after: dict[int, list[int]] = {}
    for n, (_, text) in enumerate(code):
        jump = _BRANCH.search(text)
        always = re.match(r"(BRA|EXIT)\b", text)
        after[n] = [] if always else [n + 1]
        if jump and int(jump[1], 16) in number:
            after[n].append(number[int(jump[1], 16)])
    for n, (_, text) in enumerate(code):
        if _LOAD_OF_SUMS.search(text) and (round_ := _distances(after[n], after).get(n)):
            return round_ + 1
    before: dict[int, list[int]] = {n: [] for n in range(len(code) + 1)}
    for n, following in after.items():
        for m in following:
            before[m].append(n)
    products = [n for n, (_, text) in enumerate(code) if _PRODUCT.search(text)]
    ends = [n for n, (_, text) in enumerate(code) if re.match(r"EXIT\b", text)]
    since, until = _distances(products, after), _distances([*products, *ends], before)
    return min(
        (
            since[n] + until[n] - 1
            for n, (_, text) in enumerate(code)
            if "MUFU.EX2" in text and n in since and n in until
        ),
        default=0,
    )


def _distances(starts: list[int], neighbours: dict[int, list[int]]) -> dict[int, int]:
    """Return the number of steps from the nearest start, by instruction that can be reached."""
    steps = dict.fromkeys(starts, 0)
    queue = list(starts)
    for n in queue:
        for m in neighbours.get(n, ()):
            if m not in steps:
                steps[m] = steps[n] + 1
                queue.append(m)
    return steps


def resident_threads(found: Resources, capability: int) -> int:
    """Return how many threads of a kernel a multiprocessor holds at a time, in whole blocks."""
    assert found.threads is not None
    warps = -(-found.threads // _WARP)
    registers = -(-found.registers // _REGISTER_STEP) * _REGISTER_STEP * _WARP * warps
    shared = SHARED_OPT_IN[capability] + _SHARED_OF_SYSTEM
    blocks = min(
        _BLOCKS,
        _THREADS // (warps * _WARP),
        _REGISTERS // registers,
        shared // (found.shared + _SHARED_OF_SYSTEM),
    )
    return blocks * found.threads
