"""Shared parts of tests with hostile input: a good model, data and command line to spoil."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.warm_process import WarmProcess

PROMPTS = [f"Tom has {a} pens. Tom gets {b}. How many?" for a in range(2, 8) for b in range(2, 8)]
ROWS = [
    {"prompt": prompt, "answer": str(i % 7 + 4), "rationale": "Tom has some."}
    for i, prompt in enumerate(PROMPTS)
]

_ARGUMENTS: Mapping[str, Mapping[str, object]] = {
    "latro.train": {"num_generations": 2, "max_completion_length": 4, "eval_on_start": "false"},
    "latro.sft": {},
    "latro.evaluate": {"num_samples": 0, "max_completion_length": 4},
    "latro.probe": {"num_samples": 1, "max_completion_length": 4},
}
_TRAINING: Mapping[str, object] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "use_cpu": "true",
    "disable_tqdm": "true",
    "report_to": "none",
}


@dataclass
class Place:
    """A folder with what a command reads, which cases spoil."""

    root: Path
    arguments: dict[str, object] = field(default_factory=dict)
    """Arguments that replace those of a good command line; None leaves one out."""

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def data(self) -> Path:
        return self.root / "data.jsonl"

    @property
    def output(self) -> Path:
        return self.root / "output"

    def edit_json(self, name: str, **changes: Any) -> None:
        """Change entries of a JSON file of the model."""
        path = self.model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def write_rows(self, *rows: object) -> None:
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def command_line(self, command: str) -> list[object]:
        training = command in ("latro.train", "latro.sft")
        settings: dict[str, object] = {
            "model_name_or_path": self.model,
            "dataset_name": self.data,
            "num_eval_examples": 2,
            **_ARGUMENTS[command],
        }
        if training:
            settings |= {"output_dir": self.output, **_TRAINING}
        else:
            settings |= {"output": self.output / "result.json", "eval_split": "validation"}
        settings |= self.arguments
        given = {name: value for name, value in settings.items() if value is not None}
        return [word for name, value in given.items() for word in (f"--{name}", value)]


@dataclass(frozen=True)
class Case:
    """One hostile input."""

    spoil: Callable[[Place], object]
    told: str
    """A pattern for the error line; {model}, {data}, {output} and {root} stand for the paths."""
    command: str = "latro.train"


def refused(case: Case, place: Place, warm: WarmProcess, printed: Path) -> None:
    """Check that the command ends in one line that names the fault, and changes no file."""
    case.spoil(place)
    before = snapshot(place.root)
    told_in_one_line(case, place, warm, printed)
    # The Trainer makes its folder before the engine finds that there is no server.
    assert snapshot(place.root) in (before, {**before, "output": None})


def told_in_one_line(
    case: Case, place: Place, warm: WarmProcess, printed: Path, stdout: str | None = None
) -> None:
    """Check that the command ends in one line that names the fault, with exit code 1."""
    arguments = place.command_line(case.command)
    # A template without end is given 5 s of processor time, which may take far longer where others
    # compute too.
    finished = warm.start(case.command, arguments, printed, stdout=stdout).wait(120)
    assert finished.code == 1, finished
    assert finished.stderr.count("\n") == 1, finished.stderr[-1000:]
    line = finished.stderr.rstrip("\n")
    assert line.startswith(f"{case.command}: "), line
    assert len(line) < 5000
    told = case.told
    for name in ("model", "data", "output", "root"):
        told = told.replace(f"{{{name}}}", re.escape(str(getattr(place, name))))
    assert re.search(told, line), line


def snapshot(folder: Path) -> dict[str, object]:
    """Return all paths below a folder: files with content, links with target, and folders."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = path.readlink()
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found
