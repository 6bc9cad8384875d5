from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

from latro.tasks import read_own_data
from latro.tasks.base import SEVERAL

pytest.importorskip("math_verify", reason="the extra math is not installed")

from latro.tasks.mathematics import MathReader


@pytest.fixture(scope="module")
def reader():
    return MathReader()


@pytest.mark.parametrize(
    ("truth", "statement"),
    [
        ("x(x+1)", " $x^2+x$."),
        ("x(x+1)", " x^2 + x"),
        ("x(x+1)", ": **x² + x**"),
        ("x(x+1)", r" \boxed{x^2+x}"),
        ("x(x+1)", "\n\n$$\nx^2+x\n$$"),
        ("x(x+1)", r" \(x^2+x\) because \(y = 3\)"),
        ("x(x+1)", " $x^2 + x$ for all $x$"),
        (r"2\pi", " 2π"),
        (r"2\pi", " 2*pi"),
        (r"\frac{\sqrt{3}}{2}", " sqrt(3)/2"),
        (r"\frac{\sqrt{3}}{2}", " √3/2"),
        (r"\frac{1}{x}", " $x^{-1}$"),
        (r"\frac{1}{2}x", " 0.5x"),
        ("0.1x", " $0.2x/2$"),
        ("[0,1)", " [0, 1)"),
        (r"(-\infty,2]", " (-∞, 2]"),
        (r"x \ge 3", " x >= 3"),
        (r"x \ge 3", r" $[3,\infty)$"),
        (r"[3,\infty)", r" $x \ge 3$"),
        (r"\{1,2\}", r" $\{2,1\}$"),
        (r"\{1,2\}", " $1$ and $2$"),
        (r"\{1,2\}", " x = 1 or x = 2"),
        (r"\{1,2\}", " 1, 2"),
        ("(1,2)", " $1 < x < 2$"),
        ("1<x<2", " $(1,2)$"),
        ("(3,1)", " (3, 1)"),
        ("x=5", " 5"),
        ("5", " $x = 5$"),
        ("y=3x+2", " $2+3x$"),
        ("2x+1=0", " $4x+2=0$"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r" $\begin{pmatrix}1&2\\3&4\end{pmatrix}$"),
        ("9+9", " 18"),
        ("18", " eighteen"),
        ("18", " 18 because n=3"),
        ("2^{10}", " 1024"),
        (r"3 \text{ or } -3", r" $\pm 3$"),
        (r"x=3\text{ or }x=-3", " $x=-3$ or $x=3$"),
        (r"x=3 \mbox{ and } x=4", " x = 4 and x = 3"),
        (r"3 \text{ or } 4", r" $3 \text{ or } 4$"),
        ("6!", " 720!"),
        ("6!", " 6!"),
        ("6!", " $6!$."),
        ("720", r" \(6!\)"),
        ("720", r" \boxed{6!}"),
        (r"3\cdot 4!", " 72"),
        ("n!", " $n!$"),
        ("6", " 6!"),
        (r"\emptyset", r" $\varnothing$"),
        (r"\varnothing", " ∅"),
        (r"\{\}", r" $\emptyset$"),
        (r"\sqrt{2}", " $√2$"),
        ("x^2", " $x²$"),
        (r"(-\infty,2]", " $(-∞,2]$"),
        ("1,000", " $1{,}000$"),
        ("3/4", " 0.75"),
    ],
)
def test_equal_answers_have_one_string(reader, truth, statement):
    stated = reader.stated(statement, truth)
    assert stated
    assert stated == reader.truth(truth)


@pytest.mark.parametrize(
    ("truth", "statement"),
    [
        ("x(x+1)", " $x^2+x+1$"),
        ("x(x+1)", " not $x^2+x$"),
        ("x(x+1)", " $x^2+x$ or $x^3$"),
        ("x^2", " $x^2$, $x^3$"),
        ("x^2", " $x$ because $x^2$"),
        ("2x", " $2y$"),
        ("3x", " 3"),
        ("|x|", " $x$"),
        ("A", " $B$"),
        (r"2\pi", " 2"),
        (r"2\pi", " 6.28"),
        (r"\pi", " 3.14159265358979"),
        (r"\pi 10^{-20}", r" $2\pi 10^{-20}$"),
        (r"\sqrt{2}", " 1.4142135623730951"),
        (r"\sqrt{2}", r" $-\sqrt{2}$"),
        (r"\sqrt{2}", r" $\pm\sqrt{2}$"),
        (r"\sqrt{2}", r" $\frac{14142135623730950488}{10000000000000000000}$"),
        ("1/3", " 0.333333"),
        ("10", " $x + 3 = 10$"),
        ("[0,1)", " (0,1)"),
        ("[1,2]", r" $\{1,2\}$"),
        ("(1,2)", r" $\{1,2\}$"),
        ("(3,1)", " (4,1)"),
        ("(3,1)", r" $\{3,1\}$"),
        (r"\{1,2\}", " (1,2)"),
        (r"\{1\}", " [1,1]"),
        (r"\{1,2\}", " 1"),
        (r"\{1,2\}", " $1$, $2$ or $3$"),
        ("x=1,y=2", " $x=2,y=1$"),
        ("x<3", r" $x \le 3$"),
        ("x<3", " $x > 3$"),
        (r"\infty", r" $-\infty$"),
        ("2x+1=0", " $2x+1=1$"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r" $\begin{pmatrix}1&2\\3&5\end{pmatrix}$"),
        ("18", " more than 18"),
        ("6!", " 6"),
        ("6", " $6!$"),
        ("n!", " n"),
        ("x^2", " unclear"),
        ("x^2", ""),
    ],
)
def test_another_answer_has_another_string(reader, truth, statement):
    assert reader.truth(truth)
    assert reader.stated(statement, truth) != reader.truth(truth)


def test_wrong_answers_vote_together(reader):
    spelled = (" $x^2+x$", " x(x+1)", r" \boxed{x + x^2}", " $x^2 + x$. I hope so")
    assert len({reader.stated(statement, "y") for statement in spelled}) == 1


def test_statements_without_mathematics_state_nothing(reader):
    assert reader.stated(" unclear", "x") is None
    assert reader.stated(" $x$ is not far from $y$", "x") == SEVERAL


def test_an_answer_that_takes_for_ever_is_none_and_the_next_is_read(reader):
    assert reader.stated(r" $9^{9^{9^{9}}}$", "x") == SEVERAL
    assert reader.stated(" $x$", "x") == "x"


def test_threads_read_too(reader):
    read = []
    threads = [
        threading.Thread(target=lambda n=n: read.append(reader.stated(f" $x+{n}+1$", "x")))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read) == [f"x + {n + 1}" for n in range(4)]


def test_a_file_is_graded_as_mathematics(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps({"prompt": "Factor.", "answer": "x(x+1)"}) + "\n")
    task = read_own_data(str(path), grader="math")
    (row,) = task.load("test").to_list()
    assert task.description.endswith("(grader: math)")
    assert task.grade("The answer is $x^2+x$. I hope the answer is correct.", row)
    assert not task.grade("The answer is $x^2$. The answer is $x^2+x$.", row)


def test_an_answer_that_is_no_mathematics_is_named(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps({"prompt": "Who?", "answer": "Dr. Smith"}) + "\n")
    with pytest.raises(
        ValueError, match=r"my\.jsonl:1: grader math: expected mathematics at 'answer', got 'Dr\. S"
    ):
        read_own_data(str(path), grader="math")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"needs the package math-verify, pip install 'latro-kern"):
        MathReader()


def test_the_process_ends_with_its_reader():
    reader = MathReader()
    assert reader.stated(" $x$", "x") == "x"
    worker = reader._worker._process
    assert isinstance(worker, subprocess.Popen)
    del reader
    assert worker.poll() is not None
