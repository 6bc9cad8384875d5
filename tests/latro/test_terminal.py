from __future__ import annotations

import io
import os
import sys

import pytest
from rich.table import Table

from benchmarks.common import report
from latro.terminal import Lasting, Terminal, one_line, progress_bar, shown

TEXTS = [
    "[INST] How many? [/INST]",
    "[/]",
    "[bold]not bold[/bold]",
    "[link=https://example.org]a link[/link]",
    "a folder/[red]",
    r"\[escaped\] \\[twice]",
    ":smile: 1:2",
    "100 % {braces} %s $x$",
]


def terminal(**options):
    return Terminal(file=io.StringIO(), width=200, **options)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_shown_to_the_letter_wherever_it_stands(text):
    console = terminal()
    console.print(text)
    assert console.file.getvalue() == f"{text}\n"
    table = Table(text, title=f"title {text}", caption=f"caption {text}", width=100)
    table.add_row(text)
    console = terminal()
    console.print(table)
    shown_table = console.file.getvalue()
    assert shown_table.count(text) == 4


@pytest.mark.parametrize("text", TEXTS)
def test_benchmarks_print_so_too(text, capsys):
    report.console().print(text)
    assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2J\x1b[31mred", r"\x1b[2J\x1b[31mred"),
        ("a\rb\bc\x07\x00", r"a\rb\x08c\x07\x00"),
        ("\x9b31m", r"\x9b31m"),
        ("left\u202eright\u2066", r"left\u202eright\u2066"),
        ("half \udc80", r"half \udc80"),
        ("two\u2028lines", r"two\u2028lines"),
        ("one\ttab\nand two lines", "one\ttab\nand two lines"),
        ("日本語 é 👩‍👩‍👧 می‌خواهم", "日本語 é 👩‍👩‍👧 می‌خواهم"),
    ],
)
def test_what_acts_on_a_terminal_is_spelled_out(text, expected):
    assert shown(text) == expected
    console = terminal(force_terminal=True, color_system=None, tab_size=1)
    console.print(text, soft_wrap=True)
    printed = console.file.getvalue().removesuffix("\n")
    assert printed.split() == expected.split()


def test_a_terminal_that_cannot_encode_a_text_shows_its_code():
    raw = io.BytesIO()
    console = Terminal(file=io.TextIOWrapper(raw, encoding="ascii"), width=80)
    table = Table(title="log π(y|x⊕z)", width=60)
    table.add_column("→")
    console.print(table)
    console.print("into café")
    console.file.flush()
    printed = raw.getvalue().decode("ascii")
    assert r"log \u03c0(y|x\u2295z)" in printed
    assert r"into caf\xe9" in printed


def test_an_ellipsis_that_a_terminal_cannot_encode_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    table = Table(show_edge=False)
    table.add_column("a column", no_wrap=True)
    table.add_row("a text that is cut to the width")
    Terminal(width=20).print(table)
    report.console(width=20).print(table)
    stream.flush()
    assert stream.buffer.getvalue().count(rb"\u2026") == 2


def test_a_message_is_one_line_of_bounded_length():
    assert one_line("first \n\n  second\r\n\x1b[1mthird\n") == r"first second\r \x1b[1mthird"
    assert one_line("a  folder/x: bad") == "a  folder/x: bad"
    long = one_line("begin " + "x" * 100_000 + " end")
    assert long.startswith("begin ")
    assert long.endswith(" end")
    assert len(long) < 5000


@pytest.mark.parametrize("show", ["terminal", "bar", "line of a bar"])
def test_a_reader_that_has_gone_ends_nothing(monkeypatch, show):
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115
    for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"lost")
    if show == "terminal":
        Terminal().print("shown")
    else:
        with progress_bar(total=2, mininterval=0) as bar:
            if show == "bar":
                bar.update(2)
            else:
                bar.write("shown", file=Lasting("stdout"))
    # What others write there is lost from now on, and no error.
    assert os.write(writer, b"lost") == 4
    monkeypatch.undo()
    stream.close()


def test_a_full_disk_under_the_output_ends_nothing(monkeypatch):
    full = open("/dev/full", "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", full)
    with pytest.raises(OSError, match="No space"):
        print("shown", file=sys.stderr)
    with progress_bar(total=2, mininterval=0) as bar:
        bar.update(2)
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space"):
        full.close()


def test_a_line_stands_above_a_bar(capfd):
    with progress_bar(total=2, mininterval=0, ascii=True) as bar:
        bar.write("a line", file=Lasting("stdout"))
    printed = capfd.readouterr()
    assert printed.out == "a line\n"
    # The bar is cleared before the line, and drawn again behind it.
    assert printed.err.count("0/2") >= 2
