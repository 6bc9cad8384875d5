from fractions import Fraction

import pytest

from latro.tasks import get_task, numeric
from latro.tasks.numeric import parse_number

TASK = get_task("gsm8k")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        (" 18.", 18),
        ("$1,200", 1200),
        ("1200.00", 1200),
        ("٣٫٥", Fraction(7, 2)),
        ("١٬٢٠٠", 1200),
        ("٥٠٪", 50),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("-3", -3),
        ("\u22123", -3),
        ("\u20133", -3),
        ("about \u2013$3", -3),
        ("= \u2013.5", Fraction(-1, 2)),
        ("18 \u2013 18 pens", 18),
        ("18 \u201318 pens", 18),
        ("eighteen \u2013 18", 18),
        (" \u2013 3", -3),
        ("x = \u2013 3", -3),
        ("-$3", -3),
        ("$-3", -3),
        ("€ 7", 7),
        ("\\$18", 18),
        ("**18**", 18),
        ("\\boxed{18}", 18),
        ("18 dollars", 18),
        ("18kg", 18),
        ("5%", 5),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("0.1", Fraction(1, 10)),
        ("007", 7),
        ("18, that is $18.00", 18),
        ("18 m2", 18),
        ("2.5e3", 2500),
        ("1E-05", Fraction(1, 100_000)),
        ("-$1,200e+2", -120_000),
        ("1e99", 10**99),
        ("3e", 3),
        ("3 euros", 3),
        ("3e\u2013", 3),
        ("5 + 3 = 8", 8),
    ],
)
def test_one_number_is_read_by_value(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "eighteen",
        "about 12 or 13",
        "12-13",
        "12\u201313",
        "10 - 3",
        "1 3/2",
        "3/0",
        "1,2",
        "12,0000",
        "1.200,00",
        "2e3x4",
        "1e3.5",
        "1e-3.5",
        "A1e3",
        "1e100",
        "1e-100",
        "1e9999999999",
        "1e-9999999999",
        "2x3",
        "1.2.3",
        "1/2/3",
        "A2",
        "1" * 101,
        "6!",
        "3 × (2)!",
        "1" * 10_000,
    ],
)
def test_no_number_or_several_is_no_answer(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("completion", "canonical"),
    [
        ("48 / 2 = 24. The answer is 24", "24"),
        ("The answer is 5. The answer is 6", "5"),
        ("The answer is 5. The answer is unclear", "5"),
        ("So the answer is: **1,200.00**.", "1200"),
        ("The answer is\n18", "18"),
        ("The answer is 18. She keeps 3 of 20.", "18"),
        ("The answer is 18\n\nQ: Tom has 4 pens.", "18"),
        ("The answer is 2.50", "5/2"),
        ("The answer is 18 for 3 days", None),
        ("The answer isn't 18", None),
        ("18", None),
        ("", None),
    ],
)
def test_only_the_first_statement_counts(completion, canonical):
    assert TASK.extract(completion, {"prompt": "What is 7 + 7?", "answer": "14"}) == canonical


def test_numbers_in_the_prompt_do_not_count():
    row = {"prompt": "The answer is 14. Is it?", "answer": "14"}
    assert TASK.extract("I do not know.", row) is None
    assert not TASK.grade("I do not know.", row)


def test_equal_values_get_equal_votes():
    row = {"prompt": "", "answer": "1200"}
    votes = {TASK.extract(f"The answer is {text}", row) for text in ("1200", "$1,200.00", "1200.")}
    assert votes == {"1200"}


def test_grading_is_exact_where_floats_are_not():
    row = {"prompt": "", "answer": "9007199254740993"}
    assert TASK.grade("The answer is 9,007,199,254,740,993", row)
    assert not TASK.grade("The answer is 9007199254740992", row)


def test_same_refuses_an_answer_that_is_no_number():
    with pytest.raises(ValueError, match="answer must be one number"):
        TASK.same("1", "twelve or 13 or 14")


@pytest.mark.parametrize("number", [0, 7, -3, 10, 1200, 2_000_000, 10**17, -(10**17) - 9])
def test_an_integer_alone_is_read_at_once_as_by_the_rule(number, monkeypatch):
    text = str(number)
    (by_the_rule,) = numeric._values(numeric.plain_figures(text, words=False))
    monkeypatch.setattr(numeric, "plain_figures", None)
    assert parse_number(text) == by_the_rule == number
