"""The report about records with chosen numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies.replicate.report import write_report
from studies.replicate.summary import Study

MAIN = "main-llama-arithmetic"


@pytest.fixture
def records(record):
    """Return records of seeds 1 to 3, with LaTRO above base and SFT on answers only."""
    values = {
        "base": ([0.5, 0.5, 0.5], [0.6, 0.6, 0.6]),
        "sft-answer": ([0.2, 0.3, 0.4], [0.2, 0.3, 0.4]),
        "sft-rationale": ([0.96, 0.97, 0.98], [0.97, 0.98, 0.99]),
        "latro": ([0.94, 0.95, 0.96], [0.93, 0.94, 0.95]),
    }
    return [
        record(f"{MAIN}-{method}-{seed}", accuracy_greedy=greedy, maj_8=voted)
        for method, both in values.items()
        for seed, (greedy, voted) in enumerate(zip(*both, strict=True), start=1)
    ]


def write(records, folder: Path) -> str:
    write_report(Study("python -m studies.replicate", 2, tuple(records)), folder)
    return (folder / "README.md").read_text()


def line(text: str, *beginning: str) -> str:
    """Return the one line of a table that begins with these cells."""
    (found,) = (row for row in text.splitlines() if row.startswith(f"| {' | '.join(beginning)} |"))
    return found


def test_the_main_table(records, tmp_path):
    text = write(records, tmp_path)
    section = text.split("## Does LaTRO gain?")[0]
    assert line(section, "llama", "arithmetic", "LaTRO") == (
        "| llama | arithmetic | LaTRO | 95.0 ± 1.0% | 94.0 ± 1.0% | 40.0 ± 0.0% | 20.0 ± 0.0 "
        "| -1.50 ± 0.00 | 3 |"
    )
    assert line(section, "llama", "arithmetic", "SFT, answers").startswith(
        "| llama | arithmetic | SFT, answers | 30.0 ± 10.0% |"
    )
    assert "12 cells took 18 minutes" in " ".join(section.split())
    assert "a CPU, Python 3.11, torch 2.13, transformers 5.23; 2026-01-02" in " ".join(
        section.split()
    )
    assert (tmp_path / "main.png").stat().st_size > 1000
    assert (tmp_path / "majority.png").stat().st_size > 1000


def test_gains_are_judged_by_two_deviations(records, tmp_path):
    text = write(records, tmp_path)
    section = text.split("## Does LaTRO gain?")[1].split("## Does a vote help?")[0]
    assert line(section, "llama", "arithmetic", "greedy") == (
        "| llama | arithmetic | greedy | **+45.0 ± 1.0** | **+65.0 ± 10.0** | -2.0 ± 1.4 |"
    )
    flat = " ".join(section.split())
    assert (
        "more than two deviations above base in 2 of 2, SFT, answers in 2 of 2 and SFT, worked "
        "rationales in 0 of 2 comparisons" in flat
    )
    # −2.0 is within 2 · 1.4 of zero, and −4.0 is not.
    assert (
        "- llama, arithmetic, greedy, against SFT, worked rationales: 95.0 ± 1.0% against "
        "97.0 ± 1.0%, -2.0 ± 1.4 points: within two deviations of no difference." in flat
    )
    assert "-4.0 ± 1.4 points: LaTRO is the lower by more than two deviations." in flat


def test_no_room_above_the_other_is_said(records, record, tmp_path):
    full = [
        record(f"{MAIN}-sft-rationale-{seed}", accuracy_greedy=value)
        for seed, value in ((1, 0.98), (2, 1.0), (3, 1.0))
    ]
    records = [r for r in records if r["method"] != "sft-rationale"] + full
    latro = [r for r in records if r["method"] == "latro"]
    for r in latro:
        r["metrics"]["accuracy_greedy"] = 0.99
    assert "the other leaves 0.7 points, less than two deviations" in " ".join(
        write(records, tmp_path).split()
    )


def test_votes_below_greedy_are_a_no(records, tmp_path):
    text = write(records, tmp_path)
    section = text.split("## Does a vote help?")[1]
    assert line(section, "llama", "arithmetic", "LaTRO").endswith("| 94.0 ± 1.0% | no |")
    assert "in 0 of 1 models and tasks" in " ".join(section.split())
    for r in records:
        r["metrics"]["maj@8"] = 0.99
    section = write(records, tmp_path).split("## Does a vote help?")[1]
    assert line(section, "llama", "arithmetic", "LaTRO").endswith("| 99.0 ± 0.0% | yes |")


def test_ablations(records, record, tmp_path):
    ablations = [
        record("ablation-beta=0.0-1", accuracy_greedy=0.90, maj_8=0.94),
        record("ablation-beta=0.0-2", accuracy_greedy=0.90, maj_8=0.95),
        record("ablation-kl=k3-1"),
    ]
    text = write([*records, *ablations], tmp_path)
    section = text.split("### `beta`")[1].split("###")[0]
    assert line(section, "0.0").startswith("| 0.0 | 90.0 ± 0.0% | 94.5 ± 0.7% |")
    assert line(section, "0.0").endswith("|  | 60 | 2 |")
    assert line(section, "0.05 (main)").startswith("| 0.05 (main) | 95.0 ± 1.0% | 94.0 ± 1.0% |")
    assert "0.0 is below in greedy (-5.0 ± 1.0 points)." in section
    assert "maj@8 (" not in section
    # A single seed has no deviation, so the report draws no conclusion from it.
    section = text.split("### `kl`")[1].split("##")[0]
    assert line(section, "k3").startswith("| k3 | 50.0% |")
    assert "deviations" not in section
    assert "### `num_generations`" not in text
    assert (tmp_path / "ablations.png").stat().st_size > 1000


def test_the_best_learning_rate_is_named(records, record, tmp_path):
    tuning = [
        record("tuning-sft-answer-learning_rate=0.0005-1", accuracy_greedy=0.2, maj_8=0.9),
        record("tuning-sft-answer-learning_rate=0.001-1", accuracy_greedy=0.3, maj_8=0.4),
        record("tuning-sft-answer-learning_rate=0.002-1", accuracy_greedy=0.3, maj_8=0.3),
    ]
    text = " ".join(write([*records, *tuning], tmp_path).split())
    assert "where it ties, is that of 0.001 for SFT, answers; the main cells have" in text
    assert "| SFT, answers | 0.0005 | 20.0% |" in text


def test_the_discussion_beside_it_is_taken_in(records, tmp_path):
    assert "## Discussion" not in write(records, tmp_path)
    (tmp_path / "discussion.md").write_text("Some words.\n")
    assert "## Discussion\n\nSome words.\n\n## What this can say" in write(records, tmp_path)


def test_a_study_under_way_is_reported_as_far_as_it_is(record, tmp_path):
    text = write([record(f"{MAIN}-latro-2"), record("main-phi3-arithmetic-base-2")], tmp_path)
    assert "| llama | arithmetic | greedy |  |  |  |" in text
    assert "Main cells have the seed 2." in text
    assert "1 seed gives no deviation" in " ".join(text.split())


def test_nothing_to_report_is_an_error(record, tmp_path):
    with pytest.raises(ValueError, match="expected a finished main cell"):
        write([record("ablation-kl=k3-1")], tmp_path)
