"""What the commands of studies have in common: choosing cells, running them, writing the report."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

from transformers import HfArgumentParser

from latro.config.fields import setting
from latro.config.ranges import at_least
from latro.errors import told
from latro.files import write_json
from latro.terminal import Terminal, one_line
from studies.cells import Cell, Failure, finished, run_cells, select
from studies.records import CELLS_FILE, Study
from studies.report import REPORT_FILE


@dataclass
class StudyArguments:
    """The cells to run, and the output folder."""

    module: ClassVar[str]
    """What `python -m` runs."""
    deciding: ClassVar[tuple[str, ...]]
    """The settings that decide the numbers."""

    output_dir: str = setting("runs/study", "The study's folder.")
    jobs: int = setting(1, "Cells at a time.")
    only: list[str] = field(
        default_factory=lambda: ["*"],
        metadata={"help": "Run the cells with such names only, as 'main-*' or 'main-*-1'."},
    )
    report_only: bool = setting(
        False, f"Run nothing; write the report from the {CELLS_FILE} in output_dir."
    )

    def __post_init__(self) -> None:
        at_least("jobs", self.jobs, 1)

    @classmethod
    def parse(cls, argv: Sequence[str] | None) -> Any:
        """Return the arguments of a command line; None: this process's own."""
        parser = HfArgumentParser([cls], prog=f"python -m {cls.module}", allow_abbrev=False)
        args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if unknown:
            raise ValueError(f"unknown argument {' '.join(unknown)}")
        return args

    @property
    def command(self) -> str:
        """Return the command of the whole study, with all settings that decide the numbers."""
        words = ["python", "-m", self.module]
        usual = type(self)()
        for name in self.deciding:
            value = getattr(self, name)
            if value != getattr(usual, name):
                listed = value if isinstance(value, list) else [value]
                words += [f"--{name}", *map(str, listed)]
        return shlex.join(words)


def run_study(
    args: StudyArguments,
    everything: Callable[[], Sequence[Cell]],
    *,
    kind: type[Study],
    write_report: Callable[[Any, Path], None],
    threads: int = 1,
    console: Terminal | None = None,
) -> list[Failure]:
    """Run a study's chosen cells and write its report; return the cells that failed.

    Args:
        args: the command's.
        everything: returns all cells of the study.
        kind: the class of its records.
        write_report: writes the report of such records into a folder.
        threads: of each cell's processes.
        console: shows how it goes; None: this process's terminal.

    Raises:
        ValueError: settings are bad; nothing has been run.
    """
    console = console or Terminal()
    folder = Path(args.output_dir).resolve()
    shown = Path(args.output_dir) / REPORT_FILE
    if args.report_only:
        write_report(kind.read(folder), folder)
        console.print(f"written: {shown}")
        return []
    cells = everything()
    chosen = select(cells, args.only)

    def collect() -> Study:
        """Return what is finished of the whole study, whichever cells this call runs."""
        records = filter(None, (finished(cell, folder) for cell in cells))
        study = kind(args.command, args.jobs, tuple(records))
        write_json(folder / CELLS_FILE, study.as_json())
        return study

    failures = run_cells(
        chosen, folder, jobs=args.jobs, threads=threads, console=console, on_finish=collect
    )
    study = collect()
    if study.part("main"):
        write_report(study, folder)
        console.print(f"written: {shown}")
    for failure in failures:
        console.print(f"not finished: {failure.name}: {failure.reason}")
    return failures


def check_model_folder(folder: Path) -> None:
    """Check that a model may be written into a folder: a new one, or one that has a model already.

    Raises:
        ValueError: it is a file, or has something else in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: expected a folder, got the file {folder}")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(
            f"output_dir: expected a new folder, or a model's, which is replaced, got {folder}"
        )


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def exit_with(module: str, run: Callable[[], Sequence[object]]) -> NoReturn:
    """Run a study; exit with 1 where a cell failed, 130 and 143 for Ctrl-C and SIGTERM."""
    # Running cells are ended on the way out; by default SIGTERM would leave them running.
    signal.signal(signal.SIGTERM, _stop)
    try:
        failures = run()
    except (ValueError, OSError) as error:
        sys.exit(one_line(f"{module}: {told(error)}"))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1 if failures else 0)
