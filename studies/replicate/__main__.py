"""`python -m studies.replicate`: the paper's main table and ablations with models for a CPU.

It can be stopped at any time; the same command continues with the unfinished cells.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType

from transformers import HfArgumentParser

from latro.config.fields import setting
from latro.files import write_json
from latro.terminal import Terminal, one_line
from studies.replicate.cells import Failure, finished, run_cells
from studies.replicate.report import REPORT_FILE, write_report
from studies.replicate.study import Scale, cells, select
from studies.replicate.summary import CELLS_FILE, Study


@dataclass
class ReplicateArguments:
    """The cells to run, their size, and the output folder."""

    output_dir: str = setting("runs/replicate", "The study's folder.")
    seeds: list[int] = field(
        default_factory=lambda: list(Scale.seeds), metadata={"help": "Of the main cells."}
    )
    ablation_seeds: int = setting(
        Scale.ablation_seeds, "Ablations run with the first so many of the seeds."
    )
    jobs: int = setting(
        len(os.sched_getaffinity(0)), "Cells at a time, each in processes of one thread."
    )
    only: list[str] = field(
        default_factory=lambda: ["*"],
        metadata={"help": "Run the cells with such names only, as 'main-*' or 'ablation-beta=*'."},
    )
    max_steps: int = setting(Scale.max_steps, "Updates of each training run.")
    num_eval_examples: int = setting(
        Scale.num_eval_examples, "Held-out problems of each evaluation."
    )
    pretrain_steps: int | None = setting(
        None, "Of each base model; without it as studies.replicate.pretrain has it."
    )
    report_only: bool = setting(
        False, f"Run nothing; write the report from the {CELLS_FILE} in output_dir."
    )

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs: expected at least 1, got {self.jobs}")

    @property
    def scale(self) -> Scale:
        return Scale(
            tuple(self.seeds),
            self.ablation_seeds,
            self.max_steps,
            self.num_eval_examples,
            self.pretrain_steps,
        )

    @property
    def command(self) -> str:
        """Return the command of the whole study, with all settings that decide the numbers."""
        words = ["python", "-m", "studies.replicate"]
        usual = ReplicateArguments()
        for name in (f.name for f in fields(Scale)):
            value = getattr(self, name)
            if value != getattr(usual, name):
                listed = value if isinstance(value, list) else [value]
                words += [f"--{name}", *map(str, listed)]
        return shlex.join(words)


def replicate(argv: Sequence[str] | None = None, console: Terminal | None = None) -> list[Failure]:
    """Run the command, and return the cells that failed.

    Raises:
        ValueError: settings are bad; nothing has been run.
    """
    parser = HfArgumentParser(
        [ReplicateArguments], prog="python -m studies.replicate", allow_abbrev=False
    )
    (args,) = parser.parse_args_into_dataclasses(argv)
    console = console or Terminal()
    folder = Path(args.output_dir).resolve()
    if args.report_only:
        write_report(Study.read(folder), folder)
        console.print(f"written: {Path(args.output_dir) / REPORT_FILE}")
        return []
    everything = cells(args.scale)
    chosen = select(everything, args.only)

    def collect() -> Study:
        """Return what is finished of the whole study, whichever cells this call runs."""
        records = filter(None, (finished(cell, folder) for cell in everything))
        study = Study(args.command, args.jobs, tuple(records))
        write_json(folder / CELLS_FILE, study.as_json())
        return study

    failures = run_cells(chosen, folder, jobs=args.jobs, console=console, on_finish=collect)
    study = collect()
    if study.pairs():
        write_report(study, folder)
        console.print(f"written: {Path(args.output_dir) / REPORT_FILE}")
    for failure in failures:
        console.print(f"not finished: {failure.name}: {failure.reason}")
    return failures


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Run the command; exit with 1 where a cell failed, 130 and 143 for Ctrl-C and SIGTERM."""
    # Running cells are ended on the way out; by default SIGTERM would leave them running.
    signal.signal(signal.SIGTERM, _stop)
    try:
        failures = replicate()
    except ValueError as error:
        sys.exit(one_line(f"studies.replicate: {error}"))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
