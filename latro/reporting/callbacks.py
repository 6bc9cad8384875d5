"""Show a run: a progress bar, `metrics.jsonl`, `progress.png` and tables of samples."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.table import Table
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from latro.files import append, finite, replacing
from latro.reporting.trackers import Report
from latro.terminal import Lasting, Terminal, progress_bar

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "progress.png"

_MOST_STRETCHES = 1000
"""Of a curve, which has fewer pixels in a row."""

Panels = Sequence[tuple[str, Sequence[str]]]
"""Four plots, each as its title and the names of its metrics."""


class MetricsFiles(TrainerCallback):
    """Appends every log to `metrics.jsonl`; draws `progress.png` at evaluations, saves and the end.

    At the start of training the metrics are rewritten from the trainer's state: so a resumed run
    drops what an interrupted one logged after its last checkpoint, including a half-written line.
    Nothing is written before: the folder may have another run's files.
    """

    def __init__(self, panels: Panels) -> None:
        self.panels = panels
        self._begun = False
        self._drawn = -1

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._begun = True
        self._drawn = -1
        if state.is_world_process_zero:
            with replacing(Path(args.output_dir) / METRICS_FILE) as temporary:
                temporary.write_text("".join(_line(e) for e in state.log_history), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._begun and state.is_world_process_zero:
            append(Path(args.output_dir) / METRICS_FILE, _line(state.log_history[-1]))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # An evaluation, a save and the end may follow each other with nothing logged between them.
        news = len(state.log_history) != self._drawn
        if self._begun and state.is_world_process_zero and news:
            self._drawn = len(state.log_history)
            draw_progress(state.log_history, Path(args.output_dir) / PLOT_FILE, self.panels)

    on_evaluate = on_save
    on_train_end = on_save


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(finite(entry)) + "\n"


def draw_progress(history: list[dict[str, float]], path: Path, panels: Panels) -> None:
    """Draw metrics over the updates into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6))
    FigureCanvasAgg(figure)
    # Fixed margins: to find them, a layout engine would draw all of it once more.
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.08, top=0.95, hspace=0.35, wspace=0.2)
    for axis, (title, names) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            points = thinned(points)
            if points:
                # Markers show where the points are on a line through only a few evaluations.
                marker = "o" if len(points) < 30 else None
                axis.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=name)
        if len(names) > 1 and axis.lines:
            axis.legend()
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lowest and the highest of each run of neighbours, where there are many points.

    A line through these looks as one through all, which has many to a pixel, and takes no longer to
    draw as a run goes on.
    """
    together = len(points) // _MOST_STRETCHES
    if together < 3:
        return points
    kept = []
    for first in range(0, len(points), together):
        stretch = points[first : first + together]
        # NaN is neither less nor more than anything.
        stretch = [point for point in stretch if not math.isnan(point[1])] or stretch
        ends = (min(stretch, key=itemgetter(1)), max(stretch, key=itemgetter(1)))
        kept += sorted(ends, key=itemgetter(0))
    return kept


class ProgressBar(TrainerCallback):
    """A progress bar over the updates, with the figures that show whether a run goes well."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            self.bar = progress_bar(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.title,
                unit="update",
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or not logs:
            return
        if "reward" in logs:
            self.bar.set_postfix(
                reward=f"{logs['reward']:.2f}",
                kl=f"{logs['kl']:.2f}",
                length=f"{logs['rationale_length']:.0f}",
                refresh=False,
            )
        elif "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        elif "eval_accuracy_greedy" in logs:
            sampled = logs.get("eval_accuracy_sampled", float("nan"))
            self.bar.write(
                f"update {state.global_step}: held-out accuracy "
                f"{logs['eval_accuracy_greedy']:.3f} greedy, {sampled:.3f} sampled",
                file=Lasting("stdout"),
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class CompletionsTable:
    """Prints the rationales of one prompt whenever the run logs."""

    def __init__(self, console: Terminal | None = None) -> None:
        self.console = console or Terminal()

    def __call__(self, step: int, report: Report) -> None:
        """Print a report's samples, if it has any."""
        if not report.samples:
            return
        first = report.samples[0]
        table = Table(title=f"update {step}", caption=f"{first.prompt!r} → {first.answer!r}")
        table.add_column("sampled rationale", overflow="fold")
        table.add_column("reward", justify="right")
        table.add_column("advantage", justify="right")
        for sample in report.samples:
            # repr makes line ends visible.
            cells = (repr(sample.rationale), f"{sample.reward:.2f}", f"{sample.advantage:+.2f}")
            table.add_row(*cells)
        self.console.print(table)
