from collections import Counter
from itertools import islice

import pytest

from latro.tasks import get_task
from latro.tasks.arithmetic_choice import LABELS, ChoiceProblem

TASK = get_task("arithmetic_choice")
PROBLEM = ChoiceProblem(10, (-2, 7), "Tom", "pens", ("loses", "gets"), options=(13, 15, 16, 14))


def test_a_problem_reads_as_documented():
    assert PROBLEM.row == {
        "prompt": "Tom has 10 pens. Tom loses 2. Tom gets 7. How many? 13 (A) 15 (B) 16 (C) 14 (D)",
        "answer": "B",
        "rationale": "10 - 2 = 8. 8 + 7 = 15 (B).",
        "choices": {"label": ["A", "B", "C", "D"], "text": ["13", "15", "16", "14"]},
    }


def test_a_slip_has_no_label():
    assert PROBLEM.steps(slip=(0, 1)) == ["10 - 2 = 9.", "9 + 7 = 16."]


@pytest.mark.parametrize(
    ("statement", "label"),
    [
        ("B", "B"),
        ("(b).", "B"),
        ("15", "B"),
        ("15.", "B"),
        ("(B) 15", "B"),
        ("(B) 16", None),
        ("1", None),
        ("17", None),
        ("B or C", None),
        ("E", None),
    ],
)
def test_an_option_is_named_by_label_or_number(statement, label):
    completion = f" 10 - 2 = 8. The answer is {statement}"
    assert TASK.extract(completion, PROBLEM.row) == label
    assert TASK.grade(completion, PROBLEM.row) == (label == "B")


def test_the_options_are_four_neighbouring_numbers_with_the_sum_among_them():
    for problem in islice(TASK.problems("train", 0), 1000):
        lowest = min(problem.options)
        assert lowest >= 0
        assert sorted(problem.options) == list(range(lowest, lowest + 4))
        assert problem.options["ABCD".index(problem.answer)] == problem.total


def test_neither_position_nor_size_tells_the_answer():
    problems = list(islice(TASK.problems("train", 0), 4000))
    positions = Counter(problem.answer for problem in problems)
    # Below three the options cannot reach to both sides: there are no negative numbers of things.
    sizes = Counter(p.total - min(p.options) for p in problems if p.total >= 3)
    for counts in (positions, sizes):
        assert len(counts) == len(LABELS)
        # A binomial share strays by 0.7 points.
        assert all(abs(n / counts.total() - 1 / 4) < 0.03 for n in counts.values())


def test_the_problems_and_their_split_are_those_of_arithmetic():
    plain = get_task("arithmetic")
    for split in ("train", "validation"):
        stories = [p[: p.index("?") + 1] for p in TASK.load(split, num_examples=50)["prompt"]]
        assert stories == plain.load(split, num_examples=50)["prompt"]


def test_the_seed_fixes_the_options():
    first = TASK.load("test", num_examples=20, seed=1)["prompt"]
    assert first == TASK.load("test", num_examples=20, seed=1)["prompt"]
    assert first != TASK.load("test", num_examples=20, seed=2)["prompt"]
