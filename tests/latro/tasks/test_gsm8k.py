import json
import re
from pathlib import Path

import pytest

from latro.tasks import get_task

REAL_DATA = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="the GSM8K files are not at ../shared/data/gsm8k"
)
TASK = get_task("gsm8k")


def write(folder, name, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def problem(number, answer="7"):
    return {"question": f"What is problem {number}?", "answer": f"So it is.\n#### {answer}"}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "train.jsonl", *(problem(number) for number in range(200)))
    write(tmp_path, "test.jsonl", problem(1000, "1,200"), "", problem(1001, "-3"))
    return tmp_path


def test_rows_hold_the_question_and_the_canonical_answer(folder):
    rows = TASK.load("test", dataset_path=folder)
    assert rows["answer"] == ["1200", "-3"]
    assert rows[0]["prompt"].startswith("What is problem 1000?\n")
    assert 'Finish with "The answer is <number>"' in rows[0]["prompt"]


@pytest.mark.parametrize(
    ("solution", "rationale"),
    [
        ("He has 3*4=<<3*4=12>>12 pens.\nSo $<<12/2=6>>6.\n#### 6", "He has 3*4=12 pens.\nSo $6."),
        ("#### 6", ""),
    ],
)
def test_the_rationale_is_the_solution_without_calculator_marks(folder, solution, rationale):
    write(folder, "test.jsonl", {"question": "Why?", "answer": solution})
    assert TASK.load("test", dataset_path=folder)["rationale"] == [rationale]


def test_validation_is_a_part_of_train_that_train_lacks(folder):
    train = TASK.load("train", dataset_path=folder)["prompt"]
    validation = TASK.load("validation", dataset_path=folder)["prompt"]
    assert 0 < len(validation) < len(train)
    assert len({*train, *validation}) == len(train) + len(validation) == 200


def test_validation_does_not_depend_on_the_order_of_the_file(folder):
    before = set(TASK.load("validation", dataset_path=folder)["prompt"])
    write(folder, "train.jsonl", *(problem(number) for number in reversed(range(200))))
    assert set(TASK.load("validation", dataset_path=folder)["prompt"]) == before


def test_num_examples_draws_with_the_seed(folder):
    def load(seed):
        return TASK.load("train", dataset_path=folder, num_examples=20, seed=seed)["prompt"]

    assert len(set(load(1))) == 20
    assert load(1) == load(1) != load(2)
    assert len(TASK.load("test", dataset_path=folder, num_examples=20)) == 2


def test_hub_rows_go_the_same_way(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [problem(1), problem(2, "8")]

    monkeypatch.setattr("latro.tasks.gsm8k.load_dataset", load_dataset)
    assert TASK.load("test")["answer"] == ["7", "8"]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"answer": "#### 1"}, "expected a non-empty string at 'question', got None"),
        ({"question": "Why?", "answer": 3}, "expected a non-empty string at 'answer', got 3"),
        ({"question": "Why?", "answer": "It is 3."}, "expected one '#### ' in 'answer', got 0"),
        ({"question": "Why?", "answer": "#### 3\n#### 4"}, "got 2"),
        ({"question": "Why?", "answer": "#### three"}, "expected one number after '#### '"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(folder, bad, message):
    write(folder, "test.jsonl", problem(1), bad)
    with pytest.raises(ValueError, match=re.escape("test.jsonl:2: ")) as error:
        TASK.load("test", dataset_path=folder)
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset_path: there is no file .*train\.jsonl"):
        TASK.load("validation", dataset_path=tmp_path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(ValueError, match="no rows in split 'test'"):
        TASK.load("test", dataset_path=tmp_path)


@needs_real_data
@pytest.mark.parametrize(("splits", "count"), [(("train", "validation"), 7473), (("test",), 1319)])
def test_every_real_row_parses_and_its_answer_grades_itself_right(splits, count):
    rows = [row for split in splits for row in TASK.load(split, dataset_path=REAL_DATA)]
    assert len(rows) == count
    for row in rows:
        assert TASK.grade(f"Because. The answer is {row['answer']}", row)
        assert not TASK.grade(f"The answer is {row['answer']}1", row)
        assert row["rationale"]
        assert not re.search(r"<<|>>|####", row["rationale"])


@needs_real_data
def test_the_real_validation_split_is_about_a_fifteenth_of_train():
    assert len(TASK.load("validation", dataset_path=REAL_DATA)) == 465


def test_prompts_ask_for_the_answer_template(folder):
    task = get_task("gsm8k")
    task.answer_template = "#### Answer:"
    row = task.load("test", dataset_path=folder)[0]
    assert row["prompt"].endswith('Finish with "#### Answer: <number>".\n')
    assert task.grade(f"#### Answer: {row['answer']}", row)
