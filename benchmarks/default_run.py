"""The default training run over several seeds: accuracy before and after, and the time it took.

    python benchmarks/default_run.py                  # three seeds, about ten minutes on two cores

Each seed is one `python -m latro.train --seed SEED` in a process of its own, timed as a user would
time it, loading and evaluation included. The seed decides the order of the problems and every
sample; the model that ships and the held-out problems are the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common import report
from latro_kernels import environment

ROOT = Path(__file__).resolve().parents[1]
METRICS = (
    "eval_accuracy_greedy",
    "eval_accuracy_sampled",
    "eval_rationale_length",
    "eval_answer_logp",
)


def run(seed: int, folder: Path) -> dict[str, object]:
    """Train with one seed; return its metrics before and after, and wall-clock seconds."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "latro.train", f"--seed={seed}", f"--output_dir={folder}"],
        cwd=ROOT,
        check=False,
    )
    if done.returncode:
        sys.exit(f"--seeds: the run of seed {seed} ended with exit code {done.returncode}")
    seconds = time.perf_counter() - started
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        **{when: {m: results[when][m] for m in METRICS} for when in ("base", "final")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=report.folder, default=str(report.OUT))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(seed, Path(folder) / str(seed)) for seed in args.seeds]
        curve = (Path(folder) / str(args.seeds[0]) / "progress.png").read_bytes()
    packages = ("transformers", "accelerate", "datasets")
    where = environment(torch.device("cpu"), packages)
    report.write_json(args.out / "default_run.json", {"environment": where, "runs": runs})
    report.write_bytes(args.out / "default_run.png", curve)
    for metric in METRICS[:2]:
        gains = [r["final"][metric] - r["base"][metric] for r in runs]
        print(f"{metric}: +{min(gains):.3f} to +{max(gains):.3f}")
    print(f"default_run.json and default_run.png, the first seed's curve: {args.out}")


if __name__ == "__main__":
    main()
