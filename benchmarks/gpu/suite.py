"""Everything that needs a GPU, by one command: built, measured, tested, sanitized.

    python benchmarks/gpu/suite.py --out results                   # all stages, under 8 minutes
    python benchmarks/gpu/suite.py --out results --peers wheels    # beside the peers in this folder
    python benchmarks/gpu/suite.py --out results --only chip,ops
    python benchmarks/gpu/suite.py --out results --device cpu      # a rehearsal without a GPU

It takes the checkout as it is, without network and without installing it. Stages, in this order:

- build: `csrc/`, in place and for this GPU alone, where a source is newer than a library;
- chip: copy bandwidth and bf16 GEMM rate of this GPU (`gpu.chip`);
- tuning: the best block of products on this GPU, for the stages that follow, and on sm_90 whether
  the warp-specialised kernels are right and faster;
- head: `logprob_bench` of both GPU backends at GPU shapes in bf16;
- peers: the same beside other libraries, from the wheels in --peers;
- ops: `gather_logprob` and `group_advantage` beside a copy;
- forms: the head study's sections full, frozen and filter, with every memory budget;
- smoke: 40 of the tests that need a GPU, evenly spaced (`gpu.sample`);
- tests: the others;
- memcheck, racecheck: compute-sanitizer over every native kernel (`gpu.sanitize_run`).

Each runs in a process of its own, within a limit of its own, and none stops another. One that
cannot run is skipped and says why, as is one for which --minutes leaves no time. Two files stand in
--out, each written anew after every stage: gpu_suite.json has environment, stages, results by
stage, `gpu.goals` and `gpu.predicted`; gpu_suite.tar.gz has what every stage printed and wrote,
`tuned.json` among it.

The tables of stages, of goals, of published times and of what `gpu.model` predicts for this GPU are
printed last. The exit status is 1 where a stage failed, else 0: a skipped stage or a goal that is
not met is no failure.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

from benchmarks.common import report
from benchmarks.gpu import goals as gpu_goals
from benchmarks.gpu import predicted
from benchmarks.gpu.stages import ROOT, Outcome, Stage, run_all
from latro_kernels import environment

OURS = {"cuda": "latro-triton,latro-cuda", "cpu": "latro-cpu"}
PEERS = {"cuda": "unfused,torch-chunked,trl,liger,liger-flce,cce", "cpu": "trl,liger"}
"""Peers by device; a rehearsal neither waits for a compiler nor needs what only a GPU runs."""
WORKERS = {"cuda": 12, "cpu": 1}
FOLDERS = ("tests/latro_kernels", "tests/benchmarks/common", "tests/benchmarks/gpu")
"""Tests that need a GPU; to collect them takes torch and transformers, and no data sets."""
REST = {"cuda": FOLDERS, "cpu": ("tests/latro_kernels/test_group_advantage.py",)}
"""Where the stage of the other tests looks; a rehearsal has collected all in the one before."""
TUNING = "latro_kernels.linear_logprob.triton.tuning"
KERNELS = "regex=(forward|backward|fold|grad|draw|choose|group_advantage)_kernel"
"""The kernels that a sanitizer watches, which are ours and not those of cuBLAS."""


def stages(
    work: Path, *, device: str, wheels: Path | None, installed: Path, data: Path | None
) -> list[Stage]:
    """Make all stages, in order.

    Args:
        work: the folder for what they write.
        device: "cuda", or "cpu" for a rehearsal at sizes that say nothing.
        wheels: the folder of the peers' wheels, if there is one.
        installed: the folder that they are installed into.
        data: text for the head study's small model; None for the study's default.
    """
    python = sys.executable
    no_device = partial(no_gpu, device)
    at = ("--device", device, *(("--quick",) if device == "cpu" else ()))
    few_reps = ("--dtype", "bf16", "--reps", "5", "--seconds", "1")

    def script(name: str, folder: str, *options: str) -> tuple[str, ...]:
        return (python, f"benchmarks/{name}.py", *at, "--out", str(work / folder), *options)

    def bench(folder: str, *options: str) -> tuple[str, ...]:
        return script("logprob_bench", folder, *few_reps, *options)

    def measured(
        name: str,
        commands: Sequence[Sequence[str]],
        limit_s: float,
        *,
        file: str,
        figure: Callable[[Any], str],
    ) -> Stage:
        """Make a stage whose commands leave a JSON file in the folder of its name."""
        read = partial(read_json, work / name / file)
        return Stage(name, commands, limit_s, obstacles=[no_device], read=read, figure=figure)

    def tested(name: str, part: str, limit_s: float, folders: Sequence[str]) -> Stage:
        command = (python, "-m", "pytest", *folders, "-m", "gpu", "-v", "--tb=short")
        command += ("-n", str(WORKERS[device]), "-p", "benchmarks.gpu.sample", "--part", part)
        read = partial(counted_tests, work / f"{name}.log")
        obstacles = [no_device]
        return Stage(name, [command], limit_s, obstacles, read=read, figure=tests_figure)

    def sanitized(tool: str) -> Stage:
        # The tool waits 10 s for a first CUDA call, and to import torch under it takes longer.
        command = ("compute-sanitizer", "--tool", tool, "--launch-timeout", "0")
        command += ("--kernel-name", KERNELS, "--report-api-errors", "no", "--error-exitcode", "9")
        command += (python, "benchmarks/gpu/sanitize_run.py", "--out", str(work / tool))
        return Stage(
            tool,
            [command],
            limit_s=75,
            obstacles=[partial(no_gpu, "cuda"), partial(no_tool, "compute-sanitizer")],
            read=partial(read_json, work / tool / "sanitize.json"),
            figure=gpu_goals.sanitize_figure,
            # The caching allocator carves tensors out of larger blocks: an access beyond a tensor
            # would stay inside of its block, where the tool sees nothing wrong with it.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )

    wheel_files = sorted(map(str, wheels.glob("*.whl"))) if wheels else []
    pip = (python, "-m", "pip", "install", "--no-index", "--no-deps", "--target", str(installed))
    install = [(*pip, *wheel_files)] if wheel_files else []
    compare = bench("peers", "--providers", f"{OURS[device]},{PEERS[device]}")
    study = bench("forms", "--study", "head", "--sections", "full,frozen,filter")
    study += ("--data", str(data)) if data else ()
    return [
        Stage(
            "build",
            [(python, "setup.py", "build_ext", "--inplace")],
            limit_s=90,
            obstacles=[nothing_to_build],
            read=library_sizes,
            environment=one_architecture(),
        ),
        measured(
            "chip", [script("gpu/chip", "chip")], 20, file="chip.json", figure=gpu_goals.chip_figure
        ),
        Stage(
            "tuning",
            [(python, "-m", TUNING, "--hidden", "4096", "--vocab", "128256")],
            limit_s=65,
            obstacles=[partial(no_gpu, "cuda")],
            read=partial(saved_blocks, work),
            figure=fastest_block,
        ),
        measured(
            "head",
            [bench("head", "--providers", f"{OURS[device]},unfused")],
            120,
            file="logprob.json",
            figure=gpu_goals.logprob_figure,
        ),
        measured(
            "peers",
            [*install, compare],
            120,
            file="logprob.json",
            figure=gpu_goals.logprob_figure,
        ),
        measured(
            "ops",
            [script(name, "ops") for name in ("gather_logprob", "group_advantage")],
            45,
            file="ops.json",
            figure=gpu_goals.ops_figure,
        ),
        measured("forms", [study], 110, file="study_head.json", figure=gpu_goals.forms_figure),
        tested("smoke", "smoke", 100, FOLDERS),
        tested("tests", "rest", 200, REST[device]),
        sanitized("memcheck"),
        sanitized("racecheck"),
    ]


def no_gpu(device: str) -> str | None:
    return "no CUDA GPU" if device == "cuda" and not torch.cuda.is_available() else None


def no_tool(name: str) -> str | None:
    return None if shutil.which(name) else f"no {name} on the PATH"


def nothing_to_build() -> str | None:
    names = ["_cpu.so", "latro.h"] + ["_cuda.so"] * (no_tool("nvcc") is None)
    built = [ROOT / "latro_kernels" / name for name in names]
    sources = [ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    if not all(path.exists() for path in built):
        return None
    oldest = min(path.stat().st_mtime for path in built)
    newest = max(path.stat().st_mtime for path in sources)
    return "nothing to do: no source is newer than a library" if newest <= oldest else None


def one_architecture() -> dict[str, str]:
    """Return the setting that builds for the GPU that is here and for no other."""
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"LATRO_CUDA_ARCHS": f"{major}{minor}"}


def library_sizes() -> str:
    libraries = sorted((ROOT / "latro_kernels").glob("_*.so"))
    return ", ".join(f"{path.name} {path.stat().st_size / 2**20:.1f} MiB" for path in libraries)


def read_json(path: Path) -> Any | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def saved_blocks(work: Path) -> Any | None:
    """Copy `tuned.json` to what is kept; return what it holds."""
    from latro_kernels.linear_logprob.triton import blocks

    saved = read_json(blocks.saved_path())
    if saved is not None:
        report.write_json(work / "tuned.json", saved)
    return saved


def fastest_block(saved: Sequence[Mapping[str, Any]]) -> str:
    """Name the last shape that was saved."""
    block = saved[-1]["config"]
    form = ", warp-specialised" if block.get("warp_specialized") else ""
    return (
        f"{block['rows']} × {block['columns']} × {block['depth']}, {block['stages']} stages{form}: "
        f"{saved[-1]['milliseconds']:.2f} ms"
    )


def counted_tests(log: Path) -> dict[str, int]:
    """Count how tests ended, by what pytest's workers have printed up to the limit of the time."""
    line = re.compile(r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) ", re.MULTILINE)
    return dict(Counter(line.findall(log.read_text(encoding="utf-8", errors="replace"))))


def tests_figure(counts: Mapping[str, int]) -> str:
    """Say how many tests ended in which way."""
    return ", ".join(f"{count} {how.lower()}" for how, count in sorted(counts.items())) or "none"


def where_it_runs(device: torch.device) -> dict[str, object]:
    """Add the GPU's own numbers and the compiler's version to `environment`."""
    where = environment(device, ("triton", "transformers"))
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


def write(
    out: Path,
    work: Path,
    where: Mapping[str, object],
    outcomes: Sequence[Outcome],
    results: Mapping[str, Any],
) -> None:
    """Write the record of all stages so far, and the archive of what they have left in `work`."""
    goals = gpu_goals.goals(results)
    record = {
        "environment": where,
        "goals": [asdict(goal) | {"met": goal.met} for goal in goals],
        "predicted": [asdict(of) for of in predicted.compared(results, str(where["device"]))],
        "stages": [asdict(outcome) for outcome in outcomes],
        "results": results,
    }
    report.write_json(out / "gpu_suite.json", record)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path in sorted(work.rglob("*")):
            # The weights of the study's small model are larger than all else together.
            if path.is_file() and path.suffix != ".pt":
                archive.add(path, arcname=str(path.relative_to(work)))
    report.write_bytes(out / "gpu_suite.tar.gz", packed.getvalue())


def show(outcomes: Sequence[Outcome], results: Mapping[str, Any], device: str) -> None:
    """Print the tables of stages, of goals, of what others have published and of predictions."""
    console = report.console()
    rows = [(of.stage, of.status, f"{of.seconds:.0f}", of.said) for of in outcomes]
    headings = ("stage", "status", "seconds", "figure, or why not")
    table = report.table("Stages", headings, rows, names=2)
    table.columns[-1].justify = "left"
    console.print(table)
    console.print(gpu_goals.table(gpu_goals.goals(results)))
    console.print(gpu_goals.published_table(results))
    if found := predicted.compared(results, device):
        console.print(predicted.table(found))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=report.folder, required=True, help="folder for the two files")
    nowhere = Path()
    known = stages(nowhere, device="cpu", wheels=None, installed=nowhere, data=None)
    names = [stage.name for stage in known]
    parser.add_argument(
        "--only",
        type=report.some_of(names),
        default=",".join(names),
        help="stages, comma-separated; all by default",
    )
    parser.add_argument("--peers", type=Path, help="folder of wheels of the peers")
    parser.add_argument("--data", type=Path, help="as of logprob_bench.py, for the head study")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all stages (default 8)")
    parser.add_argument("--device", choices=list(OURS), default="cuda", help="cpu: a rehearsal")
    args = parser.parse_args(argv)
    # Stages run from the checkout, wherever this was called.
    for name in ("out", "peers", "data"):
        if getattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    if args.peers and not args.peers.is_dir():
        parser.error(f"--peers: expected a folder, got {str(args.peers)!r}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; return the exit status."""
    args = parse_args(argv)
    # So that what a stage has started is ended, and what is measured is written, on SIGTERM too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    on_gpu = torch.cuda.is_available() and args.device == "cuda"
    where = where_it_runs(torch.device("cuda" if on_gpu else "cpu"))
    with tempfile.TemporaryDirectory() as folder:
        work, installed = Path(folder) / "work", Path(folder) / "installed"
        work.mkdir()
        every = stages(
            work,
            device=args.device,
            wheels=args.peers,
            installed=installed,
            data=args.data,
        )
        outcomes, results = run_all(
            [stage for stage in every if stage.name in args.only],
            work,
            seconds=60 * args.minutes,
            paths=(ROOT, installed),
            after=partial(write, args.out, work, where),
        )
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"written: {args.out}/gpu_suite.json, gpu_suite.tar.gz")
    show(outcomes, results, device=str(where["device"]))
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
