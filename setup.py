"""Builds `csrc/` with ninja: `_cpu.so` always, `_cuda.so` where nvcc is found.

The libraries export plain C symbols and are loaded through ctypes, so torch is not needed here and
one build serves every Python and torch. Settings, read when the package is built:

    CXX                  the C++ compiler (default: c++)
    LATRO_MARCH          the -march of the CPU library (default: native); "portable", for a wheel:
                         in place of `_cpu.so` one library for each of LEVELS, of which
                         latro_kernels/native.py loads the best that the processor runs
    LATRO_CUDA_ARCHS     the CUDA architectures, the last also as PTX (default: of 80;90;100 those
                         that nvcc knows)
    CUDACXX              nvcc, where it is not on the PATH; empty: build no _cuda.so
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
CUDA_ARCHS = ("80", "90", "100")
# Of x86-64: any, with AVX2, with AVX-512.
LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4")


def find_nvcc() -> str | None:
    setting = os.environ.get("CUDACXX")
    if setting is not None:
        if setting and shutil.which(setting) is None:
            raise SystemExit(f"CUDACXX: expected a compiler, got {setting!r}, which does not exist")
        return shutil.which(setting) if setting else None
    return shutil.which("nvcc")


def find_ninja() -> str:
    found = shutil.which("ninja")
    if found is None:
        import ninja

        found = str(Path(ninja.BIN_DIR) / "ninja")
    return found


def cpu_libraries() -> dict[str, str]:
    """Return the -march of each CPU library, by the library's name."""
    default = "native" if platform.machine() in ("x86_64", "AMD64", "aarch64") else ""
    march = os.environ.get("LATRO_MARCH", default)
    if march != "portable":
        return {"_cpu": march}
    if platform.machine() not in ("x86_64", "AMD64"):
        raise SystemExit(
            "LATRO_MARCH: expected a value of the compiler's -march on a processor other than "
            f"x86-64, got 'portable' on {platform.machine()}"
        )
    return {f"_cpu_{level}": level for level in LEVELS}


def cpu_flags(march: str) -> str:
    return (
        f"-O3 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -Wall {f'-march={march}' * bool(march)}"
    )


def cuda_archs(nvcc: str) -> list[str]:
    setting = os.environ.get("LATRO_CUDA_ARCHS")
    if setting is not None:
        return setting.split(";")
    # 100 is known from CUDA 12.8 on.
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    known = [a for a in CUDA_ARCHS if f"compute_{a}" in listed.stdout.split()]
    left_out = ", ".join(f"sm_{a}" for a in CUDA_ARCHS if a not in known)
    if not known:
        raise SystemExit(f"{nvcc} knows none of {left_out}; set LATRO_CUDA_ARCHS")
    if left_out:
        print(f"latro-kernels: {nvcc} does not know {left_out}; left out", file=sys.stderr)
    return known


def cuda_flags(nvcc: str) -> str:
    archs = cuda_archs(nvcc)
    targets = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
    targets.append(f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    # The static runtime: the library then loads, and can say that there is no GPU, anywhere.
    return f"-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden -cudart static {' '.join(targets)}"


def ninja_file(cuda: str | None, out: Path) -> str:
    """Return the build file for ninja: one object per source and library."""

    def quote(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    cxx = os.environ.get("CXX") or "c++"
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {cxx} $flags -I{CSRC} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cxxlink",
        f"  command = {cxx} -shared -fopenmp $in -o $out",
        "rule copy",
        "  command = cp $in $out",
    ]
    if cuda:
        lines += [
            "rule nvcc",
            f"  command = {cuda} $flags -I{CSRC} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvlink",
            f"  command = {cuda} -shared -cudart static $in -o $out",
        ]
    libraries = [
        (name, "cpu/*.cpp", "cxx", cpu_flags(march)) for name, march in cpu_libraries().items()
    ]
    if cuda:
        libraries.append(("_cuda", "cuda/*.cu", "nvcc", cuda_flags(cuda)))
    for name, pattern, compiler, flags in libraries:
        objects = []
        for source in sorted(CSRC.glob(pattern)):
            objects.append(f"{name}/{source.stem}.o")
            lines += [f"build {objects[-1]}: {compiler} {quote(source)}", f"  flags = {flags}"]
        link = {"cxx": "cxxlink", "nvcc": "nvlink"}[compiler]
        lines.append(f"build {quote(out / f'{name}.so')}: {link} {' '.join(objects)}")
    lines.append(f"build {quote(out / 'latro.h')}: copy {quote(CSRC / 'latro.h')}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """One ninja run in place of distutils' compiler, for all libraries together."""

    def get_ext_filename(self, fullname: str) -> str:
        # Plain C libraries: no Python version or ABI in the name.
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        cuda = find_nvcc()
        if cuda is None:
            print("latro-kernels: no nvcc on the PATH; _cuda.so is skipped", file=sys.stderr)
            self.extensions = [e for e in self.extensions if not e.name.endswith("_cuda")]
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        # In place whatever the install mode: a wheel collects the files as package data.
        (work / "build.ninja").write_text(
            ninja_file(cuda, ROOT / "latro_kernels"), encoding="utf-8"
        )
        subprocess.run([find_ninja(), "-v"], cwd=work, check=True)
        built = [*(f"{e.name.rpartition('.')[2]}.so" for e in self.extensions), "latro.h"]
        for library in (ROOT / "latro_kernels").glob("_c*.so"):
            # A library of an earlier build would be taken for this one's.
            if library.name not in built:
                library.unlink()
        if not (self.inplace or getattr(self, "editable_mode", False)):
            target = Path(self.build_lib) / "latro_kernels"
            target.mkdir(parents=True, exist_ok=True)
            for name in built:
                shutil.copy2(ROOT / "latro_kernels" / name, target / name)

    def get_outputs(self) -> list[str]:
        return [self.get_ext_fullpath(e.name) for e in self.extensions]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python 3: nothing in it links to Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(f"latro_kernels.{name}", sources=[]) for name in (*cpu_libraries(), "_cuda")
    ],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": PlatformWheel},
)
