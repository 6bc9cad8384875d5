"""`python -m studies.replicate`: the paper's main table and ablations with models for a CPU.

It can be stopped at any time; the same command continues with the unfinished cells.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from latro.config.fields import setting
from latro.terminal import Terminal
from studies.cells import Failure
from studies.command import StudyArguments, exit_with, run_study
from studies.replicate.report import write_report
from studies.replicate.study import Scale, cells
from studies.replicate.summary import Study


@dataclass
class ReplicateArguments(StudyArguments):
    """The cells to run, their size, and the output folder."""

    module = "studies.replicate"
    deciding = tuple(f.name for f in fields(Scale))

    output_dir: str = setting("runs/replicate", "The study's folder.")
    jobs: int = setting(
        len(os.sched_getaffinity(0)), "Cells at a time, each in processes of one thread."
    )
    seeds: list[int] = field(
        default_factory=lambda: list(Scale.seeds), metadata={"help": "Of the main cells."}
    )
    ablation_seeds: int = setting(
        Scale.ablation_seeds, "Ablations run with the first so many of the seeds."
    )
    max_steps: int = setting(Scale.max_steps, "Updates of each training run.")
    num_eval_examples: int = setting(
        Scale.num_eval_examples, "Held-out problems of each evaluation."
    )
    pretrain_steps: int | None = setting(
        None, "Of each base model; without it as studies.replicate.pretrain has it."
    )

    @property
    def scale(self) -> Scale:
        return Scale(
            tuple(self.seeds),
            self.ablation_seeds,
            self.max_steps,
            self.num_eval_examples,
            self.pretrain_steps,
        )


def replicate(argv: Sequence[str] | None = None, console: Terminal | None = None) -> list[Failure]:
    """Run the command, and return the cells that failed.

    Raises:
        ValueError: settings are bad; nothing has been run.
    """
    args = ReplicateArguments.parse(argv)
    return run_study(
        args,
        lambda: cells(args.scale),
        kind=Study,
        write_report=write_report,
        console=console,
    )


def main() -> None:
    """Run the command, and exit as `studies.command.exit_with` says."""
    exit_with(ReplicateArguments.module, replicate)


if __name__ == "__main__":
    main()
