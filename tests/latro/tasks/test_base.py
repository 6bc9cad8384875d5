import pytest

from latro.tasks import TASKS, Task, get_task


def test_tasks_are_known_by_their_names():
    assert set(TASKS) == {"arc_challenge", "arithmetic", "arithmetic_choice", "gsm8k"}
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
