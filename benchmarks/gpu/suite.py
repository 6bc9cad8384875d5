"""Everything that needs a GPU, by one command: built, tested, sanitized, measured.

    python benchmarks/gpu/suite.py --out results                   # all stages, under 8 minutes
    python benchmarks/gpu/suite.py --out results --peers wheels    # beside the peers in this folder
    python benchmarks/gpu/suite.py --out results --only chip,ops

It takes the checkout as it is, without network and without installing it. Stages, in this order:

- build: `csrc/`, in place, where a source is newer than a library;
- peers: the wheels of --peers, without what they depend on, into a folder that goes away again;
- tests: `pytest -m gpu`;
- sanitize: compute-sanitizer's memcheck and racecheck over every native kernel (`sanitize_run`);
- chip: copy bandwidth and bf16 GEMM rate of this GPU (`gpu.measure`, as forms and ops);
- tuning: the best block of products on this GPU, for the stages that follow (`triton.tuning`);
- logprob: `logprob_bench` at GPU shapes in bf16, beside the peers;
- forms: a memory budget of 3 GiB and a frozen head, with both GPU backends;
- head: the head study's sections full and filter;
- ops: `gather_logprob` and `group_advantage` beside a copy.

Each runs in a process of its own, within a limit of its own, and none stops another. One that
cannot run is skipped and says why, as is one for which --minutes leaves no time. What it printed is
in STAGE.log in --out, what it measured in a file beside that and, whole, in gpu_suite.json, which
is written anew after every stage: environment, stages, results by stage, and `gpu.goals`.

The table of stages and the table of goals are printed last. The exit status is 1 where a stage
failed, else 0: a skipped stage or a goal that is not met is no failure.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

from benchmarks.common import report
from benchmarks.gpu import goals as gpu_goals
from benchmarks.gpu.stages import ROOT, Outcome, Stage, run_all

_PROVIDERS = "latro-triton,latro-cuda,unfused,torch-chunked,trl,liger,liger-flce,cce"
_FEW_REPS = ("--reps", "5", "--seconds", "1")


def stages(out: Path, wheels: Path | None, installed: Path, data: Path | None) -> list[Stage]:
    """Make all stages, in order.

    Args:
        out: the folder for results.
        wheels: the folder of the peers' wheels, if there is one.
        installed: the folder that they are installed into.
        data: text for the head study's small model; None for the study's default.
    """
    python = sys.executable
    peers = sorted(map(str, wheels.glob("*.whl"))) if wheels else []
    pip = (python, "-m", "pip", "install", "--no-index", "--no-deps", "--target", str(installed))
    sanitizer = ("compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "9")
    # Importing torch under the sanitizer takes longer than the 10 s it waits for a first CUDA call.
    sanitizer += ("--launch-timeout", "0")
    sanitized = (python, "benchmarks/gpu/sanitize_run.py", "--out", str(out))
    measure = (python, "benchmarks/gpu/measure.py")
    bench = (python, "benchmarks/logprob_bench.py", "--dtype", "bf16", *_FEW_REPS)
    study = (*bench, "--study", "head", "--sections", "full,filter", "--out", str(out))
    if data:
        study += ("--data", str(data))
    return [
        Stage(
            "build",
            [(python, "setup.py", "build_ext", "--inplace")],
            limit_s=150,
            obstacles=[nothing_to_build],
            figure=lambda _: library_sizes(),
        ),
        Stage(
            "peers",
            [(*pip, *peers)],
            limit_s=30,
            obstacles=[lambda: no_wheels(wheels)],
            figure=lambda _: ", ".join("-".join(Path(p).name.split("-")[:2]) for p in peers),
        ),
        Stage(
            "tests",
            [(python, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={out / 'tests.xml'}")],
            limit_s=200,
            obstacles=[no_gpu],
            result=out / "tests.xml",
            figure=gpu_goals.tests_figure,
        ),
        Stage(
            "sanitize",
            [(*sanitizer, "--tool", tool, *sanitized) for tool in ("memcheck", "racecheck")],
            limit_s=120,
            obstacles=[no_gpu, partial(no_tool, "compute-sanitizer")],
            result=out / "sanitize.json",
            figure=gpu_goals.sanitize_figure,
            # The caching allocator carves tensors out of larger blocks: an access beyond a tensor
            # would stay inside of its block, where the sanitizer sees nothing wrong with it.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        Stage(
            "chip",
            [(*measure, "chip", "--out", str(out))],
            limit_s=30,
            obstacles=[no_gpu],
            result=out / "chip.json",
            figure=gpu_goals.chip_figure,
        ),
        Stage(
            "tuning",
            [
                (
                    python,
                    "-m",
                    "latro_kernels.linear_logprob.triton.tuning",
                    "--hidden",
                    "4096",
                    "--vocab",
                    "128256",
                )
            ],
            limit_s=60,
            obstacles=[no_gpu],
            figure=lambda _: fastest_block(),
        ),
        Stage(
            "logprob",
            [(*bench, "--device", "cuda", "--providers", _PROVIDERS, "--out", str(out))],
            limit_s=120,
            obstacles=[no_gpu],
            result=out / "logprob.json",
            figure=gpu_goals.logprob_figure,
        ),
        Stage(
            "forms",
            [(*measure, "forms", "--out", str(out))],
            limit_s=75,
            obstacles=[no_gpu],
            result=out / "forms.json",
            figure=gpu_goals.forms_figure,
        ),
        Stage(
            "head",
            [study],
            limit_s=90,
            obstacles=[no_gpu],
            result=out / "study_head.json",
            figure=gpu_goals.head_figure,
        ),
        Stage(
            "ops",
            [(*measure, "ops", "--out", str(out))],
            limit_s=45,
            obstacles=[no_gpu],
            result=out / "ops.json",
            figure=gpu_goals.ops_figure,
        ),
    ]


def no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA GPU"


def no_tool(name: str) -> str | None:
    return None if shutil.which(name) else f"no {name} on the PATH"


def no_wheels(wheels: Path | None) -> str | None:
    if wheels is None:
        return "no --peers"
    return None if any(wheels.glob("*.whl")) else f"no wheels in {wheels}"


def nothing_to_build() -> str | None:
    names = ["_cpu.so", "latro.h"] + ["_cuda.so"] * (no_tool("nvcc") is None)
    built = [ROOT / "latro_kernels" / name for name in names]
    sources = [ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    if not all(path.exists() for path in built):
        return None
    oldest = min(path.stat().st_mtime for path in built)
    newest = max(path.stat().st_mtime for path in sources)
    return "nothing to do: no source is newer than a library" if newest <= oldest else None


def fastest_block() -> str:
    """Name the last shape that was saved."""
    from latro_kernels.linear_logprob.triton import blocks

    entry = json.loads(blocks.SAVED.read_text())[-1]
    block = blocks.Config(**entry["config"])
    return (
        f"{block.rows} × {block.columns} × {block.depth}, {block.stages} stages: "
        f"{entry['milliseconds']:.2f} ms"
    )


def library_sizes() -> str:
    libraries = sorted((ROOT / "latro_kernels").glob("_*.so"))
    return ", ".join(f"{path.name} {path.stat().st_size / 2**20:.1f} MiB" for path in libraries)


def environment() -> dict[str, object]:
    """Add the GPU's own numbers and the compiler's version to `report.environment`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = report.environment(device, ("triton", "transformers"))
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        where["compute_capability"] = f"{chip.major}.{chip.minor}"
        where["multiprocessors"] = chip.multi_processor_count
        where["memory_bytes"] = chip.total_memory
    where["nvcc"] = None
    if no_tool("nvcc") is None:
        said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False)
        where["nvcc"] = next((s for s in said.stdout.splitlines() if "release" in s), None)
    return where


def conclusion(where: Mapping[str, object], results: Mapping[str, Any]) -> dict[str, object]:
    """Return what gpu_suite.json says beside stages and results."""
    goals = gpu_goals.goals(results)
    return {
        "environment": where,
        "goals": [asdict(goal) | {"met": goal.met} for goal in goals],
    }


def show(outcomes: Sequence[Outcome], results: Mapping[str, Any]) -> None:
    """Print the table of stages and that of goals."""
    console = report.console()
    table = Table(title="Stages", title_justify="left")
    table.add_column("stage", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("seconds", justify="right")
    table.add_column("figure, or why not")
    for of in outcomes:
        table.add_row(of.stage, of.status, f"{of.seconds:.0f}", of.said)
    console.print(table)
    console.print(gpu_goals.table(gpu_goals.goals(results)))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--only", help="stages, comma-separated; all by default")
    parser.add_argument("--peers", type=Path, help="folder of wheels of the peers")
    parser.add_argument("--data", type=Path, help="as of logprob_bench.py, for the head study")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all stages (default 8)")
    args = parser.parse_args(argv)
    # Stages run from the checkout, wherever this was called.
    for name in ("out", "peers", "data"):
        if getattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    if args.peers and not args.peers.is_dir():
        parser.error(f"--peers: expected a folder, got {str(args.peers)!r}")
    known = [stage.name for stage in stages(args.out, None, args.out, None)]
    args.only = [name.strip() for name in args.only.split(",")] if args.only else known
    for name in args.only:
        if name not in known:
            parser.error(f"--only: expected some of {', '.join(known)}, got {name!r}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    where = environment()
    record = args.out / "gpu_suite.json"
    with tempfile.TemporaryDirectory() as folder:
        installed = Path(folder)
        every = stages(args.out, args.peers, installed, args.data)
        outcomes, results = run_all(
            [stage for stage in every if stage.name in args.only],
            record,
            seconds=60 * args.minutes,
            paths=(ROOT, installed),
            conclude=partial(conclusion, where),
        )
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"written: {record}")
    show(outcomes, results)
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
