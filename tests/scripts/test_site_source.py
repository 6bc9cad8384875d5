"""Two builders make the documentation's site from the same pages, and a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("latex2mathml", reason="not installed: pip install -e '.[docs]'")

from scripts import site_source

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PAGE = "kernels/linear_logprob.html"
"""The page with the most formulas."""
MEASURE = """<script>
document.title = JSON.stringify([...document.querySelectorAll("math[display=block]")].map(
  m => [m.getBoundingClientRect().height / parseFloat(getComputedStyle(m).fontSize),
        m.querySelector("mfrac") !== null]));
</script>"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    site_source.write_site_source(folder)
    return folder


@pytest.fixture(scope="module", params=["mkdocs", "zensical"])
def site(request, source, tmp_path_factory):
    """Build the site in a folder that holds nothing but its pages and settings."""
    pytest.importorskip(request.param, reason="not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copyfile(ROOT / "mkdocs.yml", folder / "mkdocs.yml")
    shutil.copytree(source, folder / "build" / "site_source")
    done = subprocess.run(
        [sys.executable, "-m", request.param, "build", "--strict"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_a_page_leads_to_a_copy_of_a_file_outside_of_docs(site):
    assert "(../latro/objectives.py)" in (ROOT / "docs" / "method.md").read_text("utf-8")
    assert 'href="repository/latro/objectives.py"' in (site / "method.html").read_text("utf-8")
    copied = site / "repository" / "latro" / "objectives.py"
    assert copied.read_bytes() == (ROOT / "latro" / "objectives.py").read_bytes()


def test_a_link_within_docs_stays(site):
    assert 'href="scaling.html"' in (site / "many-devices.html").read_text("utf-8")


def test_markdown_becomes_a_page_and_the_files_that_it_links_to_are_copied(site):
    """index.md links to README.md, and that to others and back into docs/."""
    page = (site / "repository" / "index.html").read_text("utf-8")
    assert 'href="../scaling.html"' in page
    assert 'href="CONTRIBUTING.html"' in page
    assert (site / "repository" / "CONTRIBUTING.html").is_file()
    assert (site / "repository" / "benchmarks" / "results" / "default_run.png").is_file()


def test_a_shown_file_stands_in_the_page(site):
    page = (site / "your-trainer.html").read_text("utf-8")
    assert "--8&lt;--" not in page
    assert "plain_loop" in page


def test_no_page_needs_the_network(site):
    loaded = re.compile(r"""<(?:script|img|link)\b[^>]*\b(?:src|href)="?(?:https?:)?//[^>]*>""")
    for page in site.rglob("*.html"):
        found = loaded.findall(page.read_text("utf-8"))
        assert not [tag for tag in found if 'rel="canonical"' not in tag], page


def test_every_formula_is_mathml(source):
    written = shown = 0
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text("utf-8")
        for match in site_source._FORMULA.finditer(text):
            written += match["code"] is None
        copy = (source / page.relative_to(ROOT / "docs")).read_text("utf-8")
        shown += copy.count("<math ")
    assert shown == written > 50


def test_a_formula_does_not_break_its_sentence(site):
    """Python-Markdown takes `<math>` for a block where a line begins with it."""
    page = (site / PAGE).read_text("utf-8")
    for inline in re.finditer(r'(.{6})<math xmlns="[^"]*" display="inline">', page):
        assert inline[1] == "<span>"
    assert not re.search(r"</math>(</span>)?\s*</p>\s*<p>\s*[.,:;]", page)


def test_code_keeps_its_dollar_signs_and_links(tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    docs.mkdir()
    code = "`$a$` and ``[a](b.py)``\n\n```bash\necho $x $y\n```\n\n\\$5, "
    (docs / "page.md").write_text(f"{code}$x$\n")
    monkeypatch.setattr(site_source, "ROOT", tmp_path)
    text, linked = site_source.site_page("docs/page.md")
    assert text.startswith(f"{code}<span><math ")
    assert not linked


def test_a_link_to_nothing_names_the_page_and_the_link(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("[a](../missing.py)\n")
    monkeypatch.setattr(site_source, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"docs/page.md: links to \.\./missing.py"):
        site_source.site_page("docs/page.md")


@pytest.mark.parametrize(
    "formula", [r"\begin{aligned} a &= b \end{aligned}", r"\unheardof{x}"], ids=["table", "command"]
)
def test_a_formula_that_is_not_read_is_refused(tmp_path, monkeypatch, formula):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(f"${formula}$\n")
    monkeypatch.setattr(site_source, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="which the converter does not read"):
        site_source.site_page("docs/page.md")


def test_a_browser_shows_formulas_as_formulas(site, tmp_path):
    """A rendered fraction is higher than a line of text; raw LaTeX would be one line."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on the PATH")
    page = site / PAGE
    measured = page.with_name("measured.html")
    measured.write_text(page.read_text("utf-8").replace("</body>", f"{MEASURE}</body>"), "utf-8")
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-sync"),
            *("--disable-component-update", f"--user-data-dir={tmp_path}", "--dump-dom"),
            measured.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    measured.unlink()
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    heights = json.loads(title[1])
    assert len(heights) > 5
    assert all(height > 0.5 for height, _ in heights)
    tall = [height for height, has_fraction in heights if has_fraction]
    assert tall
    assert min(tall) > 1.5, heights


def test_a_folder_that_is_there_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes").write_text("mine")
    monkeypatch.setattr("sys.argv", ["site_source.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        site_source.main()
    assert "--output: expected a folder that is not there" in capsys.readouterr().err
    assert (tmp_path / "notes").read_text() == "mine"
