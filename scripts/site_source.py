"""Write the documentation's pages as any site builder reads them: plain Markdown, one folder.

A page under docs/ is written for a reader of the repository. It links to files beside it and
outside of docs/ (`[the formulas](../latro/objectives.py)`), shows files of the repository
(`--8<-- "examples/plain_loop.py"`), and has formulas between dollar signs. This script copies the
pages to a folder, and in the copies

- a file outside of docs/ that a page links to is copied to `repository/`, and the link leads there;
  a Markdown file becomes a page of its own, and the files that it links to are copied too;
- a shown file stands in place of the line that names it;
- a formula is MathML, which browsers show without a script and without a network.

So the builder needs no plugin and no hook:

    python scripts/site_source.py && mkdocs build --strict
"""

from __future__ import annotations

import argparse
import posixpath
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
OUTPUT = ROOT / "build" / "site_source"
"""The `docs_dir` of mkdocs.yml."""
REPOSITORY = "repository"
"""The folder of the site that holds files from outside of docs/."""

_LINK = re.compile(r"(\]\()([^)\s#:]+)([#)\s])")
_SNIPPET = re.compile(r'^--8<-- "([^"]+)"$', re.MULTILINE)
# Code is matched first so that a dollar sign or a link inside of it is left alone.
_CODE = r"(?P<code>^ *```.*?^ *```$|``.*?``|`[^`\n]*`)"
_FORMULA = re.compile(
    _CODE + r"|^\$\$\n(?P<display>.*?)^\$\$$|(?<![\\$])\$(?P<inline>[^$\n]+)\$",
    re.DOTALL | re.MULTILINE,
)
# The converter leaves what it does not know as it stands.
_UNREAD = re.compile(r"<m[a-z]+[^>]*>(&|\\[A-Za-z]+)</m")
_CODE_OR_LINK = re.compile(_CODE + "|" + _LINK.pattern, re.DOTALL | re.MULTILINE)


def write_site_source(output: Path) -> None:
    """Write the site's pages, and the files that they link to, into the folder `output`.

    Raises:
        FileNotFoundError: a page shows or links to a file that does not exist; names both.
    """
    if output.exists():
        shutil.rmtree(output)
    waiting = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / DOCS).rglob("*"))]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        if (ROOT / source).is_dir():
            continue
        target = output / site_path(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not source.endswith(".md"):
            shutil.copyfile(ROOT / source, target)
            continue
        page, linked = site_page(source)
        target.write_text(page, encoding="utf-8")
        waiting += sorted(linked - seen)
        seen |= linked


def site_path(source: str) -> str:
    """Return where the site has a file, given its path in the repository."""
    inside = source.startswith(f"{DOCS}/")
    return source.removeprefix(f"{DOCS}/") if inside else f"{REPOSITORY}/{source}"


def site_page(source: str) -> tuple[str, set[str]]:
    """Return the site's text of the page `source`, and the repository's files that it links to."""
    text = (ROOT / source).read_text(encoding="utf-8")
    linked: set[str] = set()

    def turn(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        if not (ROOT / target).is_file():
            raise FileNotFoundError(f"{source}: links to {link[2]}, which is no file")
        linked.add(target)
        here = posixpath.dirname(site_path(source)) or "."
        return f"{link[1]}{posixpath.relpath(site_path(target), here)}{link[3]}"

    text = _CODE_OR_LINK.sub(_outside_of_code(lambda m: _LINK.sub(turn, m[0])), text)
    text = _FORMULA.sub(_outside_of_code(_mathml), text)
    # Last, so that nothing in a shown file is taken for a link or a formula.
    return _SNIPPET.sub(lambda m: (ROOT / m[1]).read_text(encoding="utf-8").rstrip(), text), linked


def _outside_of_code(
    replace: Callable[[re.Match[str]], str],
) -> Callable[[re.Match[str]], str]:
    return lambda match: match[0] if match["code"] is not None else replace(match)


def _mathml(match: re.Match[str]) -> str:
    """Return the formula of a match as MathML on one line.

    Raises:
        ValueError: the converter does not know a command or an environment of the formula.
    """
    unread = "".join(_UNREAD.findall(convert(match["display"] or match["inline"])))
    if unread:
        raise ValueError(f"formula: {match[0]!r} has {unread}, which the converter does not read")
    if match["display"] is not None:
        formula = convert(match["display"].strip(), display="block")
        # Cells of a table are set in the small style of running text unless they ask for this one.
        formula = formula.replace("<mtable", '<mtable displaystyle="true"')
        return f"<div>{formula}</div>"
    inline = match["inline"].replace(r"\|", "|")
    # In a cell of a table a bar is written with a backslash before it. Python-Markdown ends the
    # paragraph where <math> begins a line, and lets <span> begin one.
    return f"<span>{convert(inline)}</span>"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        help=f"a folder that is not there; by default {OUTPUT.relative_to(ROOT)}, written anew",
    )
    output = parser.parse_args().output
    if output.exists() and output.resolve() != OUTPUT:
        parser.error(f"--output: expected a folder that is not there, got {output}")
    write_site_source(output)


if __name__ == "__main__":
    main()
