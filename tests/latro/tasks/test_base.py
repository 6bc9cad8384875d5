import pytest

from latro.tasks import TASKS, Task, get_task
from latro.tasks.numeric import NumericTask


def test_tasks_are_known_by_their_names():
    assert {"arc_challenge", "arithmetic", "arithmetic_choice", "gsm8k"} <= set(TASKS)
    for name in TASKS:
        task = get_task(name)
        assert isinstance(task, Task)
        assert task.name == name


def test_an_unknown_task_is_refused_with_the_names_there_are():
    with pytest.raises(
        ValueError, match="arc_challenge, arithmetic, arithmetic_choice, gsm8k; got 'gsm9k'"
    ):
        get_task("gsm9k")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_an_unknown_split_is_refused(name):
    with pytest.raises(ValueError, match="split must be one of train, validation, test; got 'dev'"):
        get_task(name).load("dev")


@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(name, count):
    with pytest.raises(ValueError, match=f"num_examples must be at least 1; got {count}"):
        get_task(name).load("test", num_examples=count)


def test_rows_may_leave_columns_out():
    rows = [
        {"prompt": "a", "answer": "five"},
        {"prompt": "b", "answer": "six", "ground_truth": "6", "rationale": "1 + 5"},
    ]

    class Spelled(NumericTask):
        name = "spelled"

        def _rows(self, split, path, num_examples, seed):
            return rows

    task = Spelled()
    first, second = task.load("train")
    assert first == {**rows[0], "ground_truth": None, "rationale": None}
    assert second == rows[1]
    assert task.truth(first) == "five"
    assert task.grade("The answer is 6.", second)


@pytest.mark.parametrize(
    ("template", "completion", "stated"),
    [
        ("Final answer:", "Final answer:5", "5"),
        ("####", "So.\n####5", "5"),
        ("\\boxed{", "It is \\boxed{5}.", "5"),
        ("The answer is", "The answer is5", None),
        ("The answer is", "The answer isn't 5", None),
        ("The answer is", "So the answer is 5", "5"),
    ],
)
def test_a_template_that_ends_in_a_word_is_a_word_of_its_own(template, completion, stated):
    task = get_task("gsm8k")
    task.answer_template = template
    assert task.extract(completion, {"prompt": "", "answer": "5"}) == stated


@pytest.mark.parametrize(
    ("completion", "stated"),
    [
        ("The answer is 5. I hope the answer is correct.", "5"),
        ("The answer is 5.\n\nQuestion: What is 4+5?\nThe answer is 9.", "5"),
        ("The answer is 5. Wait, the answer is 6.", "5"),
        ("The answer is 5, and the answer is not 6.", "5"),
        ("The answer is 5\nThe answer is 5 or 6", "5"),
        ("The answer is unclear. Let me see.\n\nSo the answer is 5.", "5"),
        ("I think the answer is a number. The answer is 5. The answer is 9.", "5"),
        ("The answer is: the answer is 5.", "5"),
        ("The answer is not 6. The answer is 5.", "5"),
        ("The answer is more than 4.\nThe answer is 5.", "5"),
        ("The answer is 5 or 6. The answer is 5.", "5"),
        # A statement on a later line may belong to another problem.
        ("The answer is 5 or 6.\n\nQuestion: What is 4+5?\nThe answer is 9.", None),
        ("The answer is 2\\pi.\nThe answer is 9.", None),
        ("I hope the answer is correct.", None),
        ("The answer is", None),
        ("", None),
    ],
)
def test_the_first_statement_that_holds_a_number_counts(completion, stated):
    assert get_task("gsm8k").extract(completion, {"answer": "5"}) == stated


@pytest.mark.parametrize(
    ("completion", "stated"),
    [
        ("The answer is B. I hope the answer is correct.", "B"),
        ("The answer is B.\n\nQuestion: Why?\nThe answer is C.", "B"),
        ("The answer is unclear. So the answer is (B). The answer is C.", "B"),
        ("The answer is not A. The answer is B.", "B"),
        ("The answer is A or B. The answer is B.", "B"),
        ("The answer is A or B.\n\nQuestion: Why?\nThe answer is C.", None),
    ],
)
def test_the_first_statement_that_holds_an_option_counts(completion, stated):
    row = {"answer": "B", "choices": {"label": list("ABC"), "text": ["ice", "fog", "rain"]}}
    assert get_task("arc_challenge").extract(completion, row) == stated


@pytest.mark.parametrize(
    ("template", "completion", "stated"),
    [
        ("\\boxed{", "\\boxed{\\frac{3}{4}}", "3/4"),
        ("\\boxed{", "\\boxed{18} and 20", "18"),
        ("\\boxed{", "\\boxed{9{,}500}", "9500"),
        ("\\boxed{", "So $\\boxed{x = 18}$, not 20", "18"),
        ("\\boxed{", "\\boxed{}. \\boxed{18}\n\\boxed{20}", "18"),
        ("\\boxed{", "\\boxed{3, 4}", None),
        ("####", "#### $1,800", "1800"),
        ("####", "#### -18\n#### 20", "-18"),
        ("Final answer:", "**Final Answer:** 18", "18"),
        ("Final answer:", "### Final answer:\n\n$$18$$", "18"),
        ("The answer is", "**The answer is 18**", "18"),
        ("The answer is", "$\\text{The answer is } 18$", "18"),
    ],
)
def test_marks_that_stand_around_the_template_too_are_none_of_the_answer(
    template, completion, stated
):
    task = get_task("gsm8k")
    task.answer_template = template
    assert task.extract(completion, {"answer": "18"}) == stated
