"""A hook of MkDocs: files of the repository that pages link to become files of the site.

A page says `[the formulas](../latro/objectives.py)`, which a reader of the repository can follow.
The site has such a file as `repository/latro/objectives.py`, Markdown as a page of its own, and the
hook turns the link to it. Files that those pages link to are taken along.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "repository"
"""Of the site: where files that stand outside of docs/ go."""

_LINK = re.compile(r"(\]\()([^)\s#:]+)([#)\s])")
_FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to, and what these link to."""
    docs = Path(config.docs_dir).relative_to(ROOT).as_posix()
    waiting = [f"{docs}/{page.src_uri}" for page in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for target in _links(page):
            uri = _site_uri(target, docs)
            known = files.get_file_from_path(uri) is not None
            if known or target.startswith(f"{docs}/") or not (ROOT / target).is_file():
                continue
            added = File.generated(config, uri, abs_src_path=str(ROOT / target))
            added.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(added)
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn a page's links to where the site has the files."""
    docs = Path(config.docs_dir).relative_to(ROOT).as_posix()
    source = Path(str(page.file.abs_src_path)).relative_to(ROOT).as_posix()

    def turned(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        uri = _site_uri(target, docs)
        if files.get_file_from_path(uri) is None:
            return link[0]
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"{link[1]}{posixpath.relpath(uri, here)}{link[3]}"

    return _LINK.sub(turned, markdown)


def _links(page: str) -> Iterator[str]:
    """Paths within the repository that a page of it links to."""
    text = _FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for link in _LINK.finditer(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link[2]))
        if not target.startswith(os.pardir):
            yield target


def _site_uri(target: str, docs: str) -> str:
    inside = target.startswith(f"{docs}/")
    return target.removeprefix(f"{docs}/") if inside else f"{FOLDER}/{target}"
