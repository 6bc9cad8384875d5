"""The command of the study."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest

from latro.terminal import Terminal
from studies.replicate import __main__ as command

pytestmark = pytest.mark.long


@pytest.mark.usefixtures("forked")
def test_a_small_study_from_pretraining_to_its_report_and_on_again(tmp_path: Path):
    small = "--max_steps 1 --pretrain_steps 1 --num_eval_examples 4 --jobs 2"
    names = ["main-llama-arithmetic-sft-answer-1", "main-mistral-arithmetic_choice-latro-1"]
    argv = [*shlex.split(small), "--output_dir", str(tmp_path), "--only", *names]
    assert command.replicate(argv) == []
    document = json.loads((tmp_path / "cells.json").read_text())
    made = [record["name"] for record in document["cells"]]
    bases = ["base-mistral-arithmetic", "base-mistral-arithmetic_choice"]
    assert made == [*bases, *names]
    shown = "python -m studies.replicate --max_steps 1 --num_eval_examples 4 --pretrain_steps 1"
    assert document["command"] == shown
    for record in document["cells"]:
        if record["part"] == "main":
            assert record["problems"] == 4
            assert record["metrics"].keys() >= {"accuracy_greedy", "maj@1", "maj@8", "answer_logp"}
    report = (tmp_path / "README.md").read_text()
    assert "| mistral | arithmetic_choice | LaTRO |" in report
    assert str(tmp_path) not in report + json.dumps(document)
    assert {path.name for path in tmp_path.iterdir()} >= {"main.png", "majority.png"}
    assert list((tmp_path / "work").iterdir()) == []
    # All records exist, so nothing is run again and the report is the same.
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert command.replicate(argv) == []
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert (tmp_path / "README.md").read_text() == report


def test_the_report_alone_comes_from_the_collected_cells(record, tmp_path):
    cells = [record("main-llama-arithmetic-latro-1")]
    document = {"command": "python -m studies.replicate", "jobs": 2, "cells": cells}
    (tmp_path / "cells.json").write_text(json.dumps(document))
    console = Terminal(file=io.StringIO(), width=200)
    arguments = ["--report_only", "true", "--output_dir", str(tmp_path)]
    assert command.replicate(arguments, console) == []
    assert "| llama | arithmetic | LaTRO |" in (tmp_path / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {
        *("README.md", "cells.json", "main.png", "majority.png")
    }


def test_the_shown_command_has_what_decides_the_numbers():
    arguments = command.ReplicateArguments(seeds=[4, 5], only=["main-*"], jobs=7)
    arguments.output_dir = "elsewhere"
    assert arguments.command == "python -m studies.replicate --seeds 4 5"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--jobs 0", "jobs: expected at least 1, got 0"),
        ("--seeds 1 1", "seeds: expected different ones"),
        ("--only nothing-like-it", "only: expected patterns of cell names"),
        ("--report_only true", "expected a study's cells.json"),
        ("--nothing 3", "unknown argument --nothing 3"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(argv, message, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    words = [*shlex.split(argv), "--output_dir", str(folder)]
    monkeypatch.setattr("sys.argv", ["replicate", *words])
    with pytest.raises(SystemExit, match=f"studies.replicate: .*{message}"):
        command.main()
    assert not folder.exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"command": "", "jobs": 1, "cells": [{}]}'])
def test_a_damaged_record_is_one_line(content, tmp_path, monkeypatch):
    (tmp_path / "cells.json").write_text(content)
    words = ["--report_only", "true", "--output_dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["replicate", *words])
    with pytest.raises(SystemExit, match=r"studies.replicate: output_dir: .*cells.json"):
        command.main()


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "study").write_text("mine")
    monkeypatch.setattr("sys.argv", ["replicate", "--output_dir", str(tmp_path / "study")])
    with pytest.raises(SystemExit, match=r"studies.replicate: .*study: File exists"):
        command.main()


@pytest.mark.parametrize(
    ("outcome", "status"), [([], 0), (["a failure"], 1), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(outcome, status, monkeypatch, ordinary_signals):
    def replicate():
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(command, "replicate", replicate)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == status


def test_sigterm_ends_the_command_in_order(monkeypatch, ordinary_signals):
    import signal

    def replicate():
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(command, "replicate", replicate)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 143
