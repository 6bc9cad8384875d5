"""One LaTRO update, and one whole step with its rollout: ours, the published algorithm, TRL.

    python benchmarks/step.py --out benchmarks/results/step     # under ten minutes on 2 cores
    python benchmarks/step.py --compiled             # ours with --rollout_compile too, see below
    python benchmarks/step.py --quick                           # a minute, which says nothing
    python benchmarks/step.py --sections update --prompts 3
    python benchmarks/step.py --model_name_or_path runs/smollm2 --sections update   # a real head

Contenders (see `updates.contenders`): `LatroTrainer`; the published algorithm in our own words,
whose gradient is the same; TRL's `RLOOTrainer`, which cannot score answers, on the part that it can
do. All have the same model, of random weights unless one is named, and the same prompts and samples
of random tokens; they take turns, repetition by repetition. Sections:

- update: score given rollouts, loss, backward. Time; peak memory beyond the weights of the two
  models, gradients included, each contender in a process of its own on a CPU; what went through
  trunk and head, counted by hooks on the modules.
- step: the same, rollouts sampled. Rationales end at lengths drawn uniformly, by an end token made
  likely enough; the published algorithm samples all to the limit and cuts them at ours' lengths.
  `--compiled` adds ours with --rollout_compile, in fp32 and with --rollout_dtype bfloat16.
- scaling: the update over K, prompt length, rationale length and vocabulary, with random weights.
- largest: one batch of 1, 2, 4, … prompts, until the memory does not hold it (GPU only).

Counted in an update of P-token prompts, R rationale tokens, their end included, and A answer
tokens: ours takes R + A rows per sequence through the head, and P + Σ (R − 1 + A − 1) tokens per
group through each trunk, since neither the end of the rationale nor that of the answer is read. In
a step's rollout ours reads each prompt once, then one token of each sequence that has not ended.

Written to --out after each section: step.json, step.png and step_scaling.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks.common import report
from benchmarks.common.report import some_of
from benchmarks.updates import measure
from benchmarks.updates.contenders import Ours, OursCompiled, OursCompiledBf16, Trl
from benchmarks.updates.measure import MAKERS, Held, Row, absent
from benchmarks.updates.problem import CPU, GPU, QUICK, SHORT, Setting, StepProblem, of_model
from benchmarks.updates.published import Published, PublishedRecipe
from latro_kernels import environment

SECTIONS = ("update", "step", "scaling", "largest")
PACKAGES = ("transformers", "accelerate", "trl")
MOST_PROMPTS = 1024
COMPILED = (OursCompiled.name, OursCompiledBf16.name)

AXES = {
    "K": "K, rationales per prompt",
    "P": "P, prompt tokens",
    "R": "R, mean rationale tokens",
    "V": "V, vocabulary",
}


def axes(setting: Setting) -> dict[str, list[Setting]]:
    """Vary each of `AXES`, about a setting with half the rationales, half as long."""
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
    """Parse the command line; `setting` are the sizes of the update."""
    parser = report.arguments(__doc__, reps=3, quick="tiny sizes, which say nothing")
    parser.add_argument(
        "--sections", type=some_of(SECTIONS), help=f"comma-separated, of {', '.join(SECTIONS)}"
    )
    parser.add_argument("--contenders", type=some_of(MAKERS), help="ours is always there")
    parser.add_argument(
        "--compiled", action="store_true", help="ours with --rollout_compile too, and with bf16"
    )
    parser.add_argument("--prompts", type=report.count, help="G, prompts of an update")
    parser.add_argument(
        "--model_name_or_path", help="a model to take instead of random weights, in fp32"
    )
    args = parser.parse_args(argv)
    on_gpu = torch.device(args.device).type == "cuda"
    usual = len(measure.PHASES) if args.model_name_or_path else len(SECTIONS) if on_gpu else 3
    args.sections = args.sections or list(SECTIONS[:usual])
    # One batch of the published algorithm at the GPU's sizes may not fit.
    left_out = {Published.name} if on_gpu else set()
    ours = [Ours.name, *(COMPILED if args.compiled else [])]
    given = args.contenders or MAKERS.keys() - left_out - set(COMPILED)
    args.contenders = ours + [name for name in MAKERS if name in given and name not in ours]
    args.setting = QUICK if args.quick else GPU if on_gpu else CPU
    if args.model_name_or_path:
        if "scaling" in args.sections:
            parser.error("--sections: expected no scaling with a model, whose sizes are its own")
        try:
            args.setting = of_model(args.model_name_or_path, QUICK if args.quick else SHORT)
        except (OSError, ValueError) as error:
            parser.error(f"--model_name_or_path: {error}")
    if args.prompts:
        args.setting = replace(args.setting, G=args.prompts)
    return args


def measure_main(
    setting: Setting,
    names: Sequence[str],
    device: torch.device,
    *,
    phases: Sequence[str],
    reps: int,
) -> list[Row]:
    """Count and time all contenders."""
    problem = StepProblem(setting, device)
    with measure.contenders(names, problem) as made:
        rows = measure.first_update(made, problem)
        # Sampling is the same in both of the published: one will do.
        both = {Published.name, PublishedRecipe.name} <= made.keys()
        some = [row for row in rows if not (both and row.contender == PublishedRecipe.name)]
        for phase, timed in (("update", rows), ("step", some)):
            if phase in phases:
                measure.time_phase(timed, made, phase, problem=problem, reps=reps)
    return rows


def measure_scaling(
    setting: Setting, names: Sequence[str], device: torch.device
) -> dict[str, list[Row]]:
    """Count and time one update each, by axis; the base is measured once."""
    measured: dict[Setting, list[Row]] = {}
    rows: dict[str, list[Row]] = {}
    for axis, settings in axes(setting).items():
        for point in settings:
            if point not in measured:
                problem = StepProblem(point, device)
                with measure.contenders(names, problem) as made:
                    measured[point] = measure.first_update(made, problem)
        rows[axis] = [row for point in settings for row in measured[point]]
    return rows


@dataclass
class Result:
    """All that a run has measured so far; the rows of the scaling stand by axis, of `AXES`."""

    environment: Mapping[str, object]
    cannot_run: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    scaling: dict[str, list[Row]] = field(default_factory=dict)
    largest: list[Held] = field(default_factory=list)

    def write(self, out: Path) -> None:
        """Write step.json, and a chart of each section that has been measured."""
        report.write_json(
            out / "step.json",
            {
                "environment": self.environment,
                "cannot_run": self.cannot_run,
                "rows": [row.as_json() for row in self.rows],
                "scaling": {
                    axis: [row.as_json() for row in rows] for axis, rows in self.scaling.items()
                },
                "largest": [asdict(held) for held in self.largest],
            },
        )
        charts = {}
        if self.rows:
            charts["step.png"] = plot_rows(self.rows)
        if self.scaling:
            charts["step_scaling.png"] = plot_scaling(self.scaling)
        for name, figure in charts.items():
            figure.suptitle(report.where(self.environment), y=1.1, fontsize=9)
            report.write_png(out / name, figure)

    def show(self) -> None:
        """Print the tables."""
        console = report.console(width=140)
        for reason in self.cannot_run:
            console.print(f"cannot run: {reason}")
        if self.rows:
            console.print(rows_table(self.rows))
        if self.scaling:
            console.print(scaling_table(self.scaling))
        if self.largest:
            console.print(largest_table(self.largest))


def value(axis: str, row: Row) -> float:
    """Return where a row stands on an axis of `AXES`."""
    setting = row.setting
    if axis == "R":
        return sum(setting.lengths) / setting.K
    return {"K": setting.K, "P": setting.P, "V": setting.V}[axis]


def rows_table(rows: Sequence[Row]) -> Table:
    s = rows[0].setting
    phases = list(rows[0].times)
    headings = [""]
    for phase in phases:
        headings += [f"{phase} s\n(range)", "× ours"]
    headings += ["peak\nMiB", "forwards", "trunk\ntokens", "head\nrows"]
    headings += ["step's\nprompt tokens", "gradient's\ndifference"]

    def cells(row: Row) -> list[str]:
        cells = [row.contender]
        for phase in phases:
            timed = phase in row.times
            cells.append(report.span(row.times[phase]) if timed else "–")
            cells.append(f"{row.ratio[phase]:.2f}" if timed else "–")
        cells += [report.mib(row.peak, 0), str(len(row.passes))]
        cells += [f"{row.tokens:,}", f"{row.head_rows:,}"]
        cells.append("–" if row.prompt_tokens is None else f"{row.prompt_tokens:,}")
        cells.append("–" if row.gradient_error is None else f"{row.gradient_error:.0e}")
        return cells

    name = f"{s.model} " if isinstance(s.model, str) else ""
    title = f"{name}G={s.G} K={s.K} P={s.P} R={s.rationale[0]}–{s.rationale[1]} A={s.A} V={s.V}"
    return report.table(title, headings, map(cells, rows))


def scaling_table(scaling: Mapping[str, Sequence[Row]]) -> Table:
    rows = [
        (
            axis,
            f"{value(axis, row):.0f}",
            row.contender,
            f"{row.times['update'].median:.2f}",
            f"{row.ratio['update']:.2f}",
            f"{row.tokens:,}",
            f"{row.head_rows:,}",
        )
        for axis, of_axis in scaling.items()
        for row in of_axis
    ]
    headings = ("", "", "contender", "s", "× ours", "trunk tokens", "head rows")
    return report.table("update, scaling", headings, rows, names=0)


def largest_table(largest: Sequence[Held]) -> Table:
    rows = [
        (
            held.contender,
            str(held.G),
            str(held.sequences),
            f"{held.seconds:.2f}",
            f"{held.sequences / held.seconds:.1f}",
            report.mib(held.peak, 0),
        )
        for held in largest
    ]
    headings = ("contender", "prompts", "sequences", "s", "sequences/s", "peak MiB")
    return report.table("one batch, until it does not fit", headings, rows, names=0)


def plot_rows(rows: Sequence[Row]) -> Figure:
    """Draw seconds of each phase, and peak memory, a bar for each contender."""
    phases = list(rows[0].times)
    figure = Figure(figsize=(5 * (len(phases) + 1), 2.4))
    panels = figure.subplots(1, len(phases) + 1, squeeze=False, gridspec_kw={"wspace": 0.6})[0]
    for axis, phase in zip(panels, phases, strict=False):
        timed = [row for row in rows if phase in row.times]
        times = [row.times[phase] for row in timed]
        seconds = [time.median for time in times]
        labels = [f"  {row.times[phase].median:.1f}, × {row.ratio[phase]:.1f}" for row in timed]
        report.bars(axis, seconds, labels, names=[row.contender for row in timed], times=times)
        axis.set_title(f"{phase}, seconds")
    peaks = [(row.peak or 0) / 2**20 for row in rows]
    labels = [f" {report.mib(row.peak, 0)}" for row in rows]
    names = [row.contender for row in rows]
    report.bars(panels[-1], peaks, labels, names=names, color="tab:green")
    panels[-1].set_title("update, peak MiB beyond the weights")
    for axis in panels:
        axis.margins(x=0.45)
    return figure


def plot_scaling(scaling: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw seconds of an update over each axis, a line for each contender."""
    figure = Figure(figsize=(4 * len(scaling), 3.6))
    panels = figure.subplots(1, len(scaling), squeeze=False)[0]
    for panel, (axis, rows) in zip(panels, scaling.items(), strict=True):
        for name in dict.fromkeys(row.contender for row in rows):
            of_one = [row for row in rows if row.contender == name]
            points = [(value(axis, row), row.times["update"].median) for row in of_one]
            panel.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
            for row, point in zip(of_one, points, strict=True):
                if row.ratio["update"] != 1:
                    panel.annotate(f"× {row.ratio['update']:.1f}", point, fontsize=7)
        panel.set_xlabel(AXES[axis])
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds of an update")
    panels[0].legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the three files."""
    args = parse_args(argv)
    device = report.device_of(args)
    reasons = {name: absent(name) for name in args.contenders}
    names = [name for name, why in reasons.items() if why is None]
    result = Result(
        environment=environment(device, PACKAGES),
        cannot_run=[f"{name}: {why}" for name, why in reasons.items() if why is not None],
    )

    phases = [phase for phase in measure.PHASES if phase in args.sections]
    if phases:
        result.rows = measure_main(args.setting, names, device, phases=phases, reps=args.reps)
        result.write(args.out)  # a run that is cut off keeps what it has timed
        measure.measure_memory(result.rows, device)
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
            result.largest += measure.largest(name, args.setting, device, limit=limit)
            result.write(args.out)
    result.show()
    print(f"step.json and its charts: {args.out}")


if __name__ == "__main__":
    main()
