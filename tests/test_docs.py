"""The documentation: its links resolve, its Python runs and its commands are real.

A page's Python blocks run in order, in one namespace. Each command is parsed by its own program.
Commands in blocks after `<!-- run -->` are run in order, each with the limits below, in the folder
where the Python then runs. A page brings all that it needs: a block with a title is a file.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    # A warning about programs that run in this process.
    pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning"),
    # TRL uses the old name of a setting that transformers has renamed.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
]

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
TRAINING = (
    "--max_steps 2 --eval_strategy no --num_train_examples 16 --num_eval_examples 4 "
    "--max_completion_length 16"
)
LIMITS = {
    "latro.train": f"{TRAINING} --num_generations 2 --per_device_train_batch_size 2",
    "latro.sft": f"{TRAINING} --per_device_train_batch_size 2",
    "latro.evaluate": "--num_eval_examples 4",
    "latro.probe": "--num_eval_examples 4",
}
# Programs from elsewhere, whose arguments are not checked.
FOREIGN = {"cat", "cd", "git", "head", "jq", "mkdocs", "pip", "pytest", "sbatch", "tensorboard"}
FOREIGN |= {"vllm", "zensical"}
LAUNCHERS = {"accelerate", "torchrun"}


def of_pages(*marks: str) -> pytest.MarkDecorator:
    """Run a test once for each page with one of `marks`, or for all pages if there are none."""
    pages = [p for p in PAGES if not marks or any(mark in p.read_text("utf-8") for mark in marks)]
    return pytest.mark.parametrize("page", pages, ids=lambda p: p.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> Iterator[tuple[str, bool]]:
    """Yield the code of a page's fenced blocks, and whether `<!-- run -->` precedes it."""
    fence = rf"(<!-- run -->\n+)?^( *)```{language}\b[^\n]*\n(.*?)^\2```"
    for block in re.finditer(fence, page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE):
        yield textwrap.dedent(block[3]), block[1] is not None


def write_files(page: Path, folder: Path) -> None:
    """Write those blocks of a page that have a title, to files of that name."""
    fence = r'^```\w+ title="([^"]+)"\n(.*?)^```'
    for block in re.finditer(fence, page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE):
        (folder / block[1]).write_text(block[2], encoding="utf-8")


def indented(page: Path) -> Iterator[str]:
    """Yield a page's blocks that are indented by four spaces."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for block in re.finditer(r"(?:^    .*\n|^\n(?=    ))+", text, flags=re.MULTILINE):
        yield textwrap.dedent(block[0]).strip()


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words of each command, without its variables and redirections."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
            found = shlex.split(re.sub(r"'>'.*|'\|'.*", "", part))
            while found and re.fullmatch(r"[A-Z_]+=.*", found[0]):
                found.pop(0)
            if found:
                yield found


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the module or script of this repository that a command starts, and its arguments."""
    if words[0] not in {"python", *LAUNCHERS}:
        assert words[0] in FOREIGN, f"{words[0]}: neither Python nor among the FOREIGN programs"
        return None
    for at, word in enumerate(words[1:], start=1):
        if word == "-m":
            return words[at + 1], [w for w in words[at + 2 :] if w != "..."]
        if word.endswith(".py"):
            return word, [w for w in words[at + 1 :] if w != "..."]
    raise AssertionError(f"no program in {words}")


class Parsed(Exception):
    """A program has read its arguments."""


@pytest.fixture
def run(monkeypatch):
    """Return `run(program, arguments)`, which runs a module or a script in this process."""

    def start(name: str, arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        by_name = runpy.run_path if name.endswith(".py") else runpy.run_module
        by_name(name, run_name="__main__")

    return start


@pytest.fixture
def parse(monkeypatch, run):
    """Return `parse(program, arguments)`, which starts a program and stops it after parsing."""
    read = argparse.ArgumentParser.parse_known_args

    def stop(parser, *args, **kwargs):
        namespace, rest = read(parser, *args, **kwargs)
        if not parser.add_help:
            # This parser only looks for --config, before the others.
            return namespace, rest
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        raise Parsed

    def start(name: str, arguments: list[str]) -> None:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        monkeypatch.chdir(ROOT)
        with pytest.raises(Parsed):
            run(name, arguments)

    return start


@pytest.fixture
def offline(monkeypatch):
    """Refuse connections beyond this machine."""
    connect = socket.socket.connect

    def refuse(self, address):
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        if not local:
            raise OSError(f"an example of the documentation wants {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@of_pages()
def test_links_to_files_resolve(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    paths = [link.partition("#")[0] for link in links if "://" not in link]
    missing = [path for path in paths if path and not (page.parent / path).exists()]
    assert not missing


@of_pages()
def test_commands_are_read(page, parse):
    codes = [code for code, _ in blocks(page, "bash")]
    # Indented blocks may hold commands too.
    codes += [c for c in indented(page) if re.match(r"(CUDA_|python |pip |torchrun )", c)]
    found = [program(words) for code in codes for words in commands(code)]
    for started in filter(None, found):
        parse(*started)


def test_a_flag_that_does_not_exist_is_found(parse, capsys):
    with pytest.raises(SystemExit):
        parse("latro.train", ["--num_generation", "4"])
    assert "unrecognized arguments: --num_generation" in capsys.readouterr().err


@of_pages("```python", "<!-- run -->")
def test_a_page_runs(page, tmp_path, monkeypatch, run, offline):
    """Run the page's commands, and then its Python, which may read their output."""
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for code in (code for code, marked in blocks(page, "bash") if marked):
        for words in commands(code):
            started = program(words)
            if started is None:
                subprocess.run(words, check=True, timeout=60)
            else:
                name, arguments = started
                run(name, [*arguments, *shlex.split(LIMITS[name])])
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, (code, _) in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)
