from __future__ import annotations

import pytest

from scripts.readme_tables import PAGES, TABLES, main, render
from scripts.tables import ROOT, markdown

TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}


def test_the_tables_are_those_of_the_results():
    main(["--check"])


@pytest.mark.parametrize("name", TABLES)
def test_every_table_stands_somewhere(name):
    assert any(f"<!-- begin {name} -->" in text for text in TEXTS.values())


def test_a_number_changed_by_hand_is_found():
    page = ROOT / "docs" / "results.md"
    assert "| unfused |" in TEXTS[page]
    assert render(TEXTS[page].replace("| unfused |", "| unfused! |"), page) == TEXTS[page]


def test_links_are_as_from_the_page():
    table = "<!-- begin step -->\n<!-- end step -->"
    assert "](benchmarks/results/step/" in render(table, ROOT / "README.md")
    assert "](../benchmarks/results/step/" in render(table, ROOT / "docs" / "results.md")


def test_markers_without_a_table_or_a_mate_are_named():
    with pytest.raises(ValueError, match=r"expected a table of default-run, .*, got 'steps'"):
        render("<!-- begin steps -->\n<!-- end steps -->", ROOT / "README.md")
    with pytest.raises(ValueError, match="one pair of markers of step, got 0"):
        render("<!-- begin step -->", ROOT / "README.md")


def test_markdown():
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --: |\n| 1 | 2 |"
