"""The report about records with chosen numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies.real_model.report import write_report
from studies.records import Study

MAIN = "main-arithmetic"


def write(records, folder: Path) -> str:
    write_report(Study("python -m studies.real_model", 1, tuple(records)), folder)
    return (folder / "README.md").read_text()


def line(text: str, *beginning: str) -> str:
    """Return the one line of a table that begins with these cells."""
    (found,) = (row for row in text.splitlines() if row.startswith(f"| {' | '.join(beginning)} |"))
    return found


def test_the_tables_of_two_methods(record, tmp_path):
    none = [-6.0, -8.0, -10.0, -12.0]
    latro = record(f"{MAIN}-latro-1", [-3.0, -4.0, -7.0, -8.0], none)
    base = record(f"{MAIN}-base-1", [-6.0, -8.0, -9.0, -11.0], none)
    text = write([latro, base], tmp_path)
    assert line(text, "arithmetic", "LaTRO", "1", "4") == (
        "| arithmetic | LaTRO | 1 | 4 | 50.0% [40.0, 60.0] | 55.0% | 40.0% | -8.50 | -5.50 ± 0.25 "
        "| -9.00 ± 0.25 | 3.50 ± 0.25 | 42 | 25% |"
    )
    # Differences 3, 4, 2, 3: mean 3, deviation sqrt(2 / 3), of the mean of four half of it.
    assert line(text, "arithmetic", "1", "LaTRO", "base").endswith(
        "| **+3.00 ± 0.41** | **+3.00 ± 0.41** |"
    )
    assert line(text, "arithmetic", "LaTRO", "1", "20").endswith(
        "| -9.00 | +1.50 | 25.0% | 31 | 12% |"
    )
    assert "2 cells took 4 minutes, with 2 threads each, on a CPU, torch 2.13" in " ".join(
        text.split()
    )
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_what_is_not_above_is_not_bold(record, tmp_path):
    none = [-6.0, -8.0, -10.0]
    latro = record(f"{MAIN}-latro-1", [-4.0, -6.0, -14.0], none)
    base = record(f"{MAIN}-base-1", [-6.0, -8.0, -10.0], none)
    text = write([latro, base], tmp_path)
    compared = line(text, "arithmetic", "1", "LaTRO", "base")
    assert compared.endswith("| +0.00 ± 2.00 | +0.00 ± 2.00 |")


def test_latro_after_sft_is_compared_with_what_latro_did_not_train(record, tmp_path):
    values = [-6.0, -8.0, -10.0]
    methods = ("sft-rationale", "latro", "sft-latro")
    text = write([record(f"{MAIN}-{m}-1", values, values) for m in methods], tmp_path)
    for latro in ("LaTRO", "SFT, then LaTRO"):
        line(text, "arithmetic", "1", latro, "SFT, worked rationales")
        assert f"| {latro} | LaTRO |" not in text
    # SFT's evaluations in training are of other problems.
    curves = text[text.index("## While it trains") :]
    assert "| arithmetic | SFT, then LaTRO | 1 | 20 |" in curves
    assert "SFT, worked rationales" not in curves[: curves.index("![")]


def test_seeds_and_tasks_are_not_compared_with_each_other(record, tmp_path):
    values = [-1.0, -2.0]
    records = [record(f"{MAIN}-latro-1", values, values), record(f"{MAIN}-base-2", values, values)]
    assert "No two methods of one task and seed" in write(records, tmp_path)


def test_trials_name_the_main_setting(record, tmp_path):
    values = [-1.0, -2.0]
    names = [
        "trial-arithmetic-latro-learning_rate=3e-06-1",
        "trial-arithmetic-latro-beta=0.0-1",
        f"{MAIN}-base-1",
    ]
    text = write([record(name, values, values) for name in names], tmp_path)
    assert line(text, "arithmetic", "LaTRO", "learning_rate = 3e-06 (as in main cells)").endswith(
        "| 1.25 |"
    )
    assert line(text, "arithmetic", "LaTRO", "beta = 0.0")
    assert "training.png" not in text


def test_trials_stand_beside_the_main_cell_while_they_train(record, tmp_path):
    names = (f"{MAIN}-latro-1", "trial-arithmetic-latro-beta=0.0-1")
    text = write([record(name, [-1.0, -2.0], [-1.0, -2.0]) for name in names], tmp_path)
    curves = text[text.index("## While it trains") : text.index("![")]
    for method in ("LaTRO", "LaTRO with beta = 0.0"):
        assert line(curves, "arithmetic", method, "1", "20")


def test_the_discussion_beside_the_report_is_in_it(record, tmp_path):
    (tmp_path / "discussion.md").write_text("What it means.\n")
    text = write([record(f"{MAIN}-base-1", [-1.0, -2.0], [-2.0, -3.0])], tmp_path)
    assert "## Discussion\n\nWhat it means.\n" in text


def test_there_is_no_report_without_a_main_cell(record, tmp_path):
    trial = record("trial-arithmetic-latro-beta=0.0-1", [-1.0, -2.0], [-1.0, -2.0])
    with pytest.raises(ValueError, match="expected a finished main cell"):
        write([trial], tmp_path)
    assert not (tmp_path / "README.md").exists()
