from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
pytest.importorskip("material", reason="mkdocs-material is not installed")

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def test_a_file_outside_of_docs_is_taken_along_and_the_link_turned(site):
    assert "(../latro/objectives.py)" in (ROOT / "docs" / "method.md").read_text("utf-8")
    assert 'href="repository/latro/objectives.py"' in (site / "method.html").read_text("utf-8")
    taken = site / "repository" / "latro" / "objectives.py"
    assert taken.read_bytes() == (ROOT / "latro" / "objectives.py").read_bytes()


def test_links_within_docs_stay(site):
    assert 'href="scaling.html"' in (site / "many-devices.html").read_text("utf-8")


def test_markdown_is_a_page_and_what_it_links_to_is_taken_too(site):
    """index.md links to README.md, and that to others and back into docs/."""
    page = (site / "repository" / "index.html").read_text("utf-8")
    assert 'href="../scaling.html"' in page
    assert 'href="CONTRIBUTING.html"' in page
    assert (site / "repository" / "CONTRIBUTING.html").is_file()
    assert (site / "repository" / "benchmarks" / "results" / "default_run.png").is_file()
