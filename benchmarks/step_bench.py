"""One LaTRO update, and one whole step with its rollout: ours, the published algorithm, TRL.

    python benchmarks/step_bench.py --out benchmarks/results/step     # under ten minutes on 2 cores
    python benchmarks/step_bench.py --quick                           # a minute, which says nothing
    python benchmarks/step_bench.py --sections update --prompts 3

Contenders (see `step_contenders`): `LatroTrainer`; the published algorithm in our own words, whose
gradient is the same; TRL's `RLOOTrainer`, which cannot score answers, on the part that it can do.
All have the same model of random weights, prompts and samples, and take turns, repetition by
repetition. Sections:

- update: score given rollouts, loss, backward. Time; peak memory beyond the weights of the two
  models, gradients included, each contender in a process of its own on a CPU; what went through
  trunk and head, counted by hooks on the modules.
- step: the same, rollouts sampled. Rationales end at lengths drawn uniformly, by an end token made
  likely enough; the published algorithm samples all to the limit and cuts them at ours' lengths.
- scaling: the update over K, prompt length, rationale length and vocabulary.
- largest: one batch of 1, 2, 4, … prompts, until the memory does not hold it (GPU only).

Counted in an update of P-token prompts, R rationale tokens, their end included, and A answer
tokens: ours takes R + A rows per sequence through the head, and P + Σ (R − 1 + A − 1) tokens per
group through each trunk, since neither the end of the rationale nor that of the answer is read. In
a step's rollout ours reads P − 1 tokens of each prompt once, then one of each sequence at a time.

Written to --out after each section: step.json, step.png and step_scaling.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import report, step_measure, step_report
from benchmarks.step_contenders import MAKERS, Ours, Published, PublishedRecipe, Trl, absent
from benchmarks.step_measure import Row
from benchmarks.step_problem import CPU, GPU, QUICK, Setting, StepProblem

SECTIONS = ("update", "step", "scaling", "largest")
PACKAGES = ("transformers", "accelerate", "trl")
MOST_PROMPTS = 1024


def axes(setting: Setting) -> dict[str, list[Setting]]:
    """What is varied in scaling, each about a setting with half the rationales, half as long."""
    low, high = setting.rationale
    short = (max(1, low // 2), max(2, high // 2))
    base = replace(setting, G=1, K=max(2, setting.K // 2), rationale=short)
    return {
        "K": [replace(base, K=K) for K in (base.K // 2, base.K, 2 * base.K) if K >= 2],
        "P": [replace(base, P=P) for P in (max(1, setting.P // 3), setting.P, 4 * setting.P)],
        "R": [
            replace(base, rationale=(max(1, low * n // 4), max(2, high * n // 4)))
            for n in (1, 2, 4)
        ],
        "V": [replace(base, V=V) for V in (setting.V // 4, setting.V, 4 * setting.V)],
    }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--contenders", help="ours is always there")
    parser.add_argument("--prompts", type=int, help="G, prompts of an update")
    parser.add_argument("--reps", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which say nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(argv)
    on_gpu = torch.device(args.device).type == "cuda"
    args.sections = (args.sections or ",".join(SECTIONS[: 4 if on_gpu else 3])).split(",")
    # One batch of the published algorithm at the GPU's sizes may not fit.
    default = [name for name in MAKERS if not (on_gpu and name == Published.name)]
    args.contenders = args.contenders.split(",") if args.contenders else default
    for argument, names, known in (
        ("--sections", args.sections, SECTIONS),
        ("--contenders", args.contenders, MAKERS),
    ):
        if unknown := set(names) - set(known):
            parser.error(f"{argument}: expected some of {', '.join(known)}, got {unknown}")
    if Ours.name not in args.contenders:
        args.contenders.insert(0, Ours.name)
    args.setting = QUICK if args.quick else GPU if on_gpu else CPU
    if args.prompts:
        args.setting = replace(args.setting, G=args.prompts)
    return args


def measure_main(
    setting: Setting, names: Sequence[str], phases: Sequence[str], reps: int, device: torch.device
) -> list[Row]:
    """Counts and times of all contenders."""
    problem = StepProblem(setting, device)
    with step_measure.contenders(names, problem) as made:
        rows = step_measure.first_update(made, problem)
        if "update" in phases:
            step_measure.time_phase(rows, made, "update", problem, reps)
        if "step" in phases:
            # Sampling is the same in both of the published: one will do.
            both = {Published.name, PublishedRecipe.name} <= made.keys()
            some = [r for r in rows if not (both and r.contender == PublishedRecipe.name)]
            step_measure.time_phase(some, made, "step", problem, reps)
    return rows


def measure_scaling(
    setting: Setting, names: Sequence[str], device: torch.device
) -> dict[str, list[Row]]:
    """Counts and the time of one update each, by axis; the base is measured once."""
    measured: dict[Setting, list[Row]] = {}
    rows: dict[str, list[Row]] = {}
    for axis, settings in axes(setting).items():
        for point in settings:
            if point not in measured:
                problem = StepProblem(point, device)
                with step_measure.contenders(names, problem) as made:
                    measured[point] = step_measure.first_update(made, problem)
        rows[axis] = [row for point in settings for row in measured[point]]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the three files."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    reasons = {name: absent(name) for name in args.contenders}
    names = [name for name, why in reasons.items() if why is None]
    result = step_report.Result(
        environment=report.environment(device, PACKAGES),
        cannot_run=[f"{name}: {why}" for name, why in reasons.items() if why is not None],
    )

    phases = [phase for phase in step_measure.PHASES if phase in args.sections]
    if phases:
        result.rows = measure_main(args.setting, names, phases, args.reps, device)
        result.write(args.out)  # a run that is cut off keeps what it has timed
        step_measure.measure_memory(result.rows, device)
        result.write(args.out)
    if "scaling" in args.sections:
        published = [n for n in (Published.name, PublishedRecipe.name) if n in names]
        result.scaling = measure_scaling(args.setting, [Ours.name, *published[:1]], device)
        result.write(args.out)
    if "largest" in args.sections:
        limit = 2 if args.quick else MOST_PROMPTS
        for name in (Ours.name, Published.name, Trl.name):
            if absent(name) is not None:
                continue
            result.largest += step_measure.largest(name, args.setting, device, limit)
            result.write(args.out)
    result.show()
    print(f"step.json and its charts: {args.out}")


if __name__ == "__main__":
    main()
