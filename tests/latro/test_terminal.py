from __future__ import annotations

import io

import pytest
from rich.table import Table

from benchmarks.common import report
from latro.terminal import Terminal, one_line, shown

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


def test_a_message_is_one_line_of_bounded_length():
    assert one_line("first \n\n  second\r\n\x1b[1mthird\n") == r"first second\r \x1b[1mthird"
    assert one_line("a  folder/x: bad") == "a  folder/x: bad"
    long = one_line("begin " + "x" * 100_000 + " end")
    assert long.startswith("begin ")
    assert long.endswith(" end")
    assert len(long) < 5000
