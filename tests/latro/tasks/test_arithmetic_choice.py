from collections import Counter
from itertools import islice

import pytest

from latro.tasks import get_task
from latro.tasks.arithmetic_choice import LABELS, ChoiceProblem

TASK = get_task("arithmetic_choice")
PROBLEM = ChoiceProblem(10, (-2, 7), "Tom", "pens", ("loses", "gets"), options=(14, 15, 16, 17))


def test_a_problem_reads_as_documented():
    assert PROBLEM.row == {
        "prompt": "Tom has 10 pens. Tom loses 2. Tom gets 7. How many? (A) 14 (B) 15 (C) 16 (D) 17",
        "answer": "15",
        "ground_truth": "B",
        "rationale": "10 - 2 = 8. 8 + 7 = 15.",
        "choices": {"label": ["A", "B", "C", "D"], "text": ["14", "15", "16", "17"]},
    }


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
        ("18", None),
        ("15.5", None),
        ("15-17", None),
        ("15,2", None),
        ("15:2", None),
        ("15 m", None),
        ("15/2", None),
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
        lowest = problem.options[0]
        assert lowest >= 0
        assert problem.options == tuple(range(lowest, lowest + 4))
        assert problem.options["ABCD".index(problem.row["ground_truth"])] == problem.total


def test_the_right_option_has_any_place():
    # Below three the options cannot lie on both sides, as numbers of things are not negative.
    problems = (p for p in islice(TASK.problems("train", 0), 4000) if p.total >= 3)
    counts = Counter(problem.row["ground_truth"] for problem in problems)
    assert len(counts) == len(LABELS)
    # The standard deviation of the share is 0.7 points.
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
