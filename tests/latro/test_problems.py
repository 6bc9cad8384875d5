from __future__ import annotations

import pytest

from latro.config.data import DataArguments
from latro.problems import load_held_out, load_splits, load_task
from tests.latro.conftest import Sums


class _Overlapping(Sums):
    def _rows(self, split, path, num_examples, seed):
        return [{"prompt": f"{n}?", "answer": "1"} for n in range(4 if split == "test" else 3)]


def test_problems_that_are_trained_on_are_no_held_out_ones():
    with pytest.raises(ValueError, match="not trained on; 3 of the 4 of 'test' are"):
        load_splits(_Overlapping(), DataArguments(), 0, "test", None)


def test_train_and_held_out_problems_come_as_the_arguments_say():
    args = DataArguments(num_train_examples=5)
    train, held_out = load_splits(load_task(args), args, 0, "validation", 3)
    assert (len(train), len(held_out)) == (5, 3)


def test_data_of_ones_own_is_a_task_with_its_template(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text("prompt,answer\nWhat is 1?,one\n")
    args = DataArguments(dataset_name=str(path), answer_template="Answer:", grader="exact")
    task = load_task(args)
    held_out = load_held_out(task, "test", args, None)
    assert held_out["answer"][:] == ["one"]
    assert task.grade("Answer: One.", held_out[0])
    assert not task.grade("The answer is one.", held_out[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grader": "exact"}, "grader: expected with data of your own only, got 'exact'"),
        ({"dataset_config": "main"}, "dataset_config: expected with data of your own only"),
        (
            {"dataset_name": "my.jsonl", "dataset_path": "data"},
            r"dataset_path: expected with one of arc_challenge, .* got 'data' with 'my.jsonl'",
        ),
        ({"dataset_name": "gsm9k"}, "expected a task, a file, a folder or a hub id"),
    ],
)
def test_arguments_that_the_data_does_not_take_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_task(DataArguments(**settings))


@pytest.mark.parametrize("template", ["", " The answer is", "Answer: "])
def test_an_answer_template_has_no_space_around_it(template):
    with pytest.raises(ValueError, match="answer_template: expected words without white space"):
        DataArguments(answer_template=template)
