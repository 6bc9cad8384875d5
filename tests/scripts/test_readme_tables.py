from __future__ import annotations

from pathlib import Path

import pytest

from scripts.readme_tables import main, markdown, render

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_results():
    main(["--check"])


def test_a_number_changed_by_hand_is_found():
    assert "| unfused |" in README
    assert render(README.replace("| unfused |", "| unfused! |")) == README


def test_missing_markers_are_named():
    with pytest.raises(ValueError, match="markers of default-run, got 0"):
        render("no markers")


def test_markdown():
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --: |\n| 1 | 2 |"
