"""Grading ends and raises nothing, whatever a model writes: an endless loop would stop a run."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latro.tasks import get_task
from latro.tasks.markup import first_line, first_sentence

CHOICES = {"label": list("ABCD"), "text": ["oxygen", "light energy", "3", "78° F"]}
EXAMPLES = {
    "gsm8k": {"answer": "18"},
    "arithmetic": {"answer": "18"},
    "arc_challenge": {"answer": "A", "choices": CHOICES},
}
PIECES = [
    *[":", ".", "!", "?", ",", ";", "\n", "\n\n", " ", "\t", "。", "\u200b", "...", "-", "−", "+"],
    *["=", "≈", "%", "^", "²", "½", "/", "|", "~", "#", "_", "*", "**", "`", "```", "$", "$$"],
    *[
        "\\",
        "\\\\",
        "{",
        "}",
        "\\boxed{",
        "\\text{",
        "\\frac{",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
        "[",
        "]",
    ],
    *[
        "(",
        ")",
        "'",
        '"',
        "’",
        "<b>",
        "</b>",
        "<sup>",
        "</sup>",
        "&nbsp;",
        "&lt;",
        "- ",
        "1. ",
        "• ",
    ],
    *[
        "The answer is",
        "A",
        "(C)",
        "18",
        "1,000",
        "3.5",
        "1e400",
        "twenty",
        "hundred",
        "half",
        "th",
    ],
    *["million", "k", "and", "or", "not", "both", "none of the above", "option", "oxygen", "dyguy"],
]
statements = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    # Patterns that backtrack are slow where the same is written again and again.
    st.builds(
        lambda unit, count, end: "".join(unit) * count + end,
        st.lists(st.sampled_from(PIECES), min_size=1, max_size=3),
        st.sampled_from([20, 300]),
        st.sampled_from(PIECES),
    ),
)
EMPTY_BEHIND_A_COLON = [
    "dyguy:.",
    ":.",
    "A:!",
    "so:\n.",
    "so:\n\n!\n",
    "so: .",
    "so:。",
    "x:.:.",
    "a:?",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("statement", EMPTY_BEHIND_A_COLON)
def test_nothing_stands_behind_a_colon(name: str, statement: str) -> None:
    get_task(name).extract(f"The answer is {statement}", EXAMPLES[name])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        ("B. It is light.", "B"),
        (": B", "B"),
        ("as follows:\n\n(B) light energy.", "as follows: (B) light energy"),
        ("as follows:\nthis:\nB", "as follows: this: B"),
        ("total:.", "total:"),
        ("total:\n.\nB", "total:"),
        (".", ""),
        ("", ""),
    ],
)
def test_a_sentence_goes_on_behind_a_colon(statement: str, sentence: str) -> None:
    assert first_sentence(statement) == sentence


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", EXAMPLES)
@settings(max_examples=300, deadline=5000)
@given(statement=statements)
def test_whatever_is_written(name: str, statement: str) -> None:
    task: Any = get_task(name)
    predicted = task.extract(f"The answer is {statement}", EXAMPLES[name])
    assert task.is_correct(predicted, EXAMPLES[name]) in (True, False)
    first_line(statement)
