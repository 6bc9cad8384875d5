"""`python -m studies.real_model`: LaTRO and SFT on SmolLM2-135M-Instruct, on real text.

It can be stopped at any time; the same command continues with the unfinished cells.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from latro.config.fields import setting
from latro.config.ranges import at_least
from latro.terminal import Terminal
from studies.cells import Cell, Failure, select
from studies.command import StudyArguments, exit_with, run_study
from studies.real_model.prepare import gguf_file
from studies.real_model.report import write_report
from studies.real_model.study import DATA_FOLDER, RAW_FILES, Scale, cells
from studies.records import Study


@dataclass
class RealModelArguments(StudyArguments):
    """The cells to run, their size, and the folders."""

    module = "studies.real_model"
    deciding = tuple(f.name for f in fields(Scale))

    output_dir: str = setting("runs/real_model", "The study's folder.")
    data_dir: str | None = setting(
        None, f"The folder with the raw files of {' and '.join(RAW_FILES)}, each in its own folder."
    )
    threads: int = setting(
        len(os.sched_getaffinity(0)), "Threads of a cell; of all cells at a time, jobs times that."
    )
    seeds: list[int] = field(
        default_factory=lambda: list(Scale.seeds), metadata={"help": "Of the main cells."}
    )
    max_steps: int = setting(Scale.max_steps, "Updates of each training run.")
    num_eval_examples: int = setting(Scale.num_eval_examples, "Problems of each evaluation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("threads", self.threads, 1)

    def cells(self) -> list[Cell]:
        """Return all cells of the study, once what the chosen ones need is there.

        Raises:
            ValueError: settings are bad, or the model or data are missing.
        """
        scale = Scale(tuple(self.seeds), self.max_steps, self.num_eval_examples)
        everything = cells(scale)
        needed = {cell.task for cell in select(everything, self.only)} & set(RAW_FILES)
        gguf_file()
        for task in sorted(needed):
            if self.data_dir is None or not (Path(self.data_dir) / task).is_dir():
                where = self.data_dir or "no folder"
                raise ValueError(
                    f"data_dir: expected a folder with {task}/ in it, got {where}; "
                    "or name other cells, as in --only 'main-arithmetic-*'"
                )
        if needed and self.data_dir is not None:
            self._link(Path(self.data_dir).resolve())
        return everything

    def _link(self, data: Path) -> None:
        """Let the cells' commands find the data in the study's own folder."""
        link = Path(self.output_dir) / DATA_FOLDER
        if link.exists() and not link.is_symlink():
            raise ValueError(
                f"output_dir: expected no {DATA_FOLDER} of another kind in it than the link to the "
                f"data, got {link}"
            )
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(data)


def real_model(argv: Sequence[str] | None = None, console: Terminal | None = None) -> list[Failure]:
    """Run the command, and return the cells that failed.

    Raises:
        ValueError: settings are bad, or the model or data are missing; nothing has been run.
    """
    args = RealModelArguments.parse(argv)
    return run_study(
        args,
        args.cells,
        kind=Study,
        write_report=write_report,
        threads=args.threads,
        console=console,
    )


def main() -> None:
    """Run the command, and exit as `studies.command.exit_with` says."""
    exit_with(RealModelArguments.module, real_model)


if __name__ == "__main__":
    main()
