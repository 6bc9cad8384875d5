from __future__ import annotations

import copy
import json
import logging
import math
import re
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, Value

from latro.evaluate import evaluate
from latro.rollout.prompts import prompt_text
from latro.tasks import numeric, read_own_data
from latro.train import train
from tests.latro.rollout.test_prompts import CHAT
from tests.latro.tasks.test_records import ROWS, written

COLOURS = ["red", "blue", "green"]


def rows(count, start=0, **fields):
    return [{"prompt": f"What is {n}?", "answer": n, **fields} for n in range(start, start + count)]


def file_of(folder, records, name="my.jsonl"):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def folder_of(folder, **splits):
    for split, records in splits.items():
        file_of(folder, records, f"{split}.jsonl")
    return str(folder)


def prompts(task, split):
    return [prompt_text(prompt) for prompt in task.load(split)["prompt"]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_each_format_gives_the_same_rows(tmp_path, suffix):
    task = read_own_data(str(written(tmp_path, suffix)))
    assert task.load("test").to_list() == ROWS


def test_a_file_is_cut_by_the_prompts_and_its_test_is_all_of_it(tmp_path):
    task = read_own_data(file_of(tmp_path, rows(200)))
    train, held_out = set(prompts(task, "train")), set(prompts(task, "validation"))
    assert not train & held_out
    assert train | held_out == {f"What is {n}?" for n in range(200)}
    assert 10 <= len(held_out) <= 30
    assert prompts(task, "test") == [f"What is {n}?" for n in range(200)]


def test_rows_that_join_a_file_move_none(tmp_path):
    before = read_own_data(file_of(tmp_path, rows(100)))
    after = read_own_data(file_of(tmp_path, [*rows(100, start=100), *rows(100)]))
    for split in ("train", "validation"):
        assert set(prompts(before, split)) < set(prompts(after, split))


@pytest.mark.parametrize("start", range(0, 60, 3))
@pytest.mark.parametrize("count", [2, 3])
def test_two_prompts_are_enough_for_both_splits(tmp_path, start, count):
    task = read_own_data(file_of(tmp_path, rows(count, start)))
    assert len(prompts(task, "validation")) >= 1
    assert len(prompts(task, "train")) >= 1


def test_one_prompt_is_not(tmp_path):
    task = read_own_data(file_of(tmp_path, rows(1) * 3))
    assert len(task.load("train")) == 3
    with pytest.raises(ValueError, match=r"no split 'validation'; it has train, test"):
        task.load("validation")


def test_one_prompt_twice_stands_in_one_split_whatever_its_form(tmp_path):
    as_messages = [
        {**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows(40)
    ]
    task = read_own_data(file_of(tmp_path, rows(40) + as_messages))
    assert not set(prompts(task, "train")) & set(prompts(task, "validation"))
    assert len(prompts(task, "train")) + len(prompts(task, "validation")) == 80


def test_examples_are_drawn_by_the_seed(tmp_path):
    task = read_own_data(file_of(tmp_path, rows(50)))
    first = task.load("test", num_examples=5, seed=1)["answer"]
    assert len(first) == 5
    assert first == task.load("test", num_examples=5, seed=1)["answer"]
    assert first != task.load("test", num_examples=5, seed=2)["answer"]


def test_a_folder_has_the_splits_of_its_files(tmp_path):
    name = folder_of(tmp_path, train=rows(3), validation=rows(2, 10), test=rows(4, 20))
    task = read_own_data(name)
    assert [len(task.load(split)) for split in task.splits] == [3, 2, 4]


@pytest.mark.parametrize("held_out", ["dev", "val", "valid"])
def test_a_validation_split_may_have_its_other_names(tmp_path, monkeypatch, held_out):
    splits = {"train": rows(30), held_out: rows(2, 30)}
    expected = [f"What is {n}?" for n in (30, 31)]
    assert prompts(read_own_data(folder_of(tmp_path, **splits)), "validation") == expected
    hub = DatasetDict({name: Dataset.from_list(own) for name, own in splits.items()})
    monkeypatch.setattr("latro.tasks.own_data.load_dataset", lambda *args: hub)
    assert prompts(read_own_data("org/name"), "validation") == expected


def test_two_validation_splits_are_refused(tmp_path, monkeypatch):
    splits = {"train": rows(3), "dev": rows(2, 10), "validation": rows(2, 20)}
    with pytest.raises(
        ValueError, match=r"one file of 'validation' .*validation\.jsonl and dev\.j"
    ):
        read_own_data(folder_of(tmp_path, **splits))
    hub = DatasetDict({name: Dataset.from_list(own) for name, own in splits.items()})
    monkeypatch.setattr("latro.tasks.own_data.load_dataset", lambda *args: hub)
    with pytest.raises(
        ValueError, match="one split of 'validation' in org/name, got validation and"
    ):
        read_own_data("org/name")


def test_a_missing_validation_is_cut_from_train(tmp_path):
    task = read_own_data(folder_of(tmp_path, train=rows(100), test=rows(4, 100)))
    whole = read_own_data(file_of(tmp_path, rows(100)))
    assert prompts(task, "validation") == prompts(whole, "validation")
    assert prompts(task, "train") == prompts(whole, "train")
    assert len(task.load("test")) == 4


def test_a_missing_test_is_an_error_that_names_what_there_is(tmp_path):
    task = read_own_data(folder_of(tmp_path, train=rows(9)))
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        task.load("test")
    task = read_own_data(folder_of(tmp_path / "other", test=rows(9)))
    with pytest.raises(ValueError, match="has no split 'train'; it has test"):
        task.load("train")


def test_held_out_prompts_are_dropped_from_train_with_a_warning(tmp_path, caplog):
    name = folder_of(tmp_path, train=rows(8), validation=rows(3, 6), test=rows(2, 0))
    with caplog.at_level(logging.WARNING):
        task = read_own_data(name)
    assert prompts(task, "train") == [f"What is {n}?" for n in (2, 3, 4, 5)]
    assert [len(task.load(split)) for split in ("validation", "test")] == [3, 2]
    assert f"{name}: 4 rows of train are left out" in caplog.text


def test_a_hub_data_set_is_read_by_split(monkeypatch):
    asked = []

    def load_dataset(*args):
        asked.append(args)
        splits = {"train": rows(20), "test": rows(2, 20), "extra": [{"text": "no task"}]}
        return DatasetDict({name: Dataset.from_list(own) for name, own in splits.items()})

    monkeypatch.setattr("latro.tasks.own_data.load_dataset", load_dataset)
    task = read_own_data("org/name", config="main")
    assert asked == [("org/name", "main")]
    assert task.load("test").to_list() == [
        {"prompt": f"What is {n}?", "answer": str(n)} for n in (20, 21)
    ]
    assert len(task.load("train")) + len(task.load("validation")) == 20


def test_a_hub_data_set_with_a_malformed_row_or_other_splits_is_named(monkeypatch):
    splits = DatasetDict(train=Dataset.from_list([*rows(2), {"prompt": "x", "answer": None}]))
    monkeypatch.setattr("latro.tasks.own_data.load_dataset", lambda *args: splits)
    with pytest.raises(ValueError, match=r"org/name train row 2: .*'answer', got None"):
        read_own_data("org/name")
    splits["train_sft"] = splits.pop("train")
    with pytest.raises(ValueError, match="a split train, validation, test in org/name, got train_"):
        read_own_data("org/name")


def test_a_hub_data_set_in_single_precision_has_its_own_digits(monkeypatch):
    table = {"prompt": ["a", "b", "c"], "answer": [0.1, 2.5, 3.0]}
    kinds = Features(prompt=Value("string"), answer=Value("float32"))
    splits = DatasetDict(test=Dataset.from_dict(table, features=kinds))
    monkeypatch.setattr("latro.tasks.own_data.load_dataset", lambda *args: splits)
    assert read_own_data("org/name").load("test")["answer"] == ["0.1", "2.5", "3.0"]


def test_a_hub_data_set_that_cannot_be_had_is_named(monkeypatch):
    def load_dataset(*args):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("latro.tasks.own_data.load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"cannot load 'org/name' from the hub.*no route"):
        read_own_data("org/name")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm9k", "expected a task, a file, a folder or a hub id org/name, got 'gsm9k'"),
        ("data/none.jsonl", "there is no file data/none.jsonl"),
        ("a/b/c", "expected a task, a file, a folder or a hub id org/name, got 'a/b/c'"),
    ],
)
def test_a_name_of_nothing_is_refused(name, message):
    with pytest.raises(ValueError, match=f"dataset_name: {message}"):
        read_own_data(name)


def test_a_folder_or_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "rows.txt").write_text("")
    with pytest.raises(ValueError, match=r"rows\.txt: expected a file in \.jsonl, \.json"):
        read_own_data(str(tmp_path / "rows.txt"))
    with pytest.raises(ValueError, match="expected a file train, validation or test in"):
        read_own_data(str(tmp_path))
    folder_of(tmp_path, train=rows(2))
    (tmp_path / "train.csv").write_text("prompt,answer\nx,1\n")
    with pytest.raises(ValueError, match=r"one file of 'train' .*train\.jsonl and train\.csv"):
        read_own_data(str(tmp_path))
    with pytest.raises(ValueError, match="dataset_config: expected with a hub id only, got 'main'"):
        read_own_data(file_of(tmp_path, rows(2)), config="main")


def test_a_file_without_rows_and_a_malformed_row_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"my\.jsonl has no rows"):
        read_own_data(file_of(tmp_path, []))
    name = file_of(tmp_path, [*rows(16), {"prompt": "x", "answer": None}])
    with pytest.raises(
        ValueError, match=r"my\.jsonl:17: expected a non-empty string at 'answer', got None"
    ):
        read_own_data(name)


def test_one_conversation_makes_conversations_of_all(tmp_path):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 9?"}]
    task = read_own_data(file_of(tmp_path, [*rows(1), {"prompt": talk, "answer": 9}]))
    assert task.load("test")["prompt"][:] == [[{"role": "user", "content": "What is 0?"}], talk]


def test_optional_columns_are_there_for_all_rows_or_none(tmp_path):
    plain = read_own_data(file_of(tmp_path, rows(3)))
    assert plain.load("test").column_names == ["prompt", "answer"]
    some = [*rows(2), *rows(1, 2, rationale="two", ground_truth="2.0")]
    task = read_own_data(file_of(tmp_path, some))
    assert task.load("test")["rationale"][:] == ["", "", "two"]
    assert task.load("test")["ground_truth"][:] == ["0", "1", "2.0"]


def graded(folder, record, statement, grader=None):
    task = read_own_data(file_of(folder, [record]), grader=grader)
    return task.grader, task.grade(f"So. The answer is{statement}", task.load("test")[0])


@pytest.mark.parametrize(
    ("answer", "grader"),
    [
        ("42", "number"),
        (42, "number"),
        ("$1,200.50", "number"),
        ("-3/4", "number"),
        ("5 %", "number"),
        (0.00001, "number"),
        (1e16, "number"),
        ("1e-05", "number"),
        ("-2.5E+3", "number"),
        ("1e-05 m", "exact"),
        (10**400, "exact"),
        ("42 pens", "exact"),
        ("Room 5", "exact"),
        ("1-2", "exact"),
        ("12:30", "exact"),
        ("Paris", "exact"),
    ],
)
def test_the_grader_follows_from_the_answers(tmp_path, answer, grader):
    task = read_own_data(file_of(tmp_path, [{"prompt": "x", "answer": answer}]))
    assert task.grader == grader
    assert task.description.endswith(f"my.jsonl (grader: {grader})")


def test_it_follows_from_all_rows_and_from_the_ground_truth(tmp_path):
    mixed = [*rows(3), {"prompt": "x", "answer": "y"}]
    assert read_own_data(file_of(tmp_path, mixed)).grader == "exact"
    longer = [{"prompt": "x", "answer": "7, since 3+4=7", "ground_truth": 7}]
    assert read_own_data(file_of(tmp_path, [*rows(3), *longer])).grader == "number"


@pytest.mark.parametrize(
    ("answer", "statement", "right"),
    [
        ("Paris", " Paris.", True),
        ("Paris", ": **paris**", True),
        ("Paris", ' "Paris". It is in France.', True),
        ("Paris", " Paris\nand that is all", True),
        ("Paris", " Paris, France", False),
        ("Paris", " London", False),
        ("Paris", ' "Paris." It is in France.', True),
        ("Paris", " Paris! Or", True),
        ("Paris", " Paris Texas. Or", False),
        ("Dr. Smith", " Dr. Smith. Done.", True),
        ("Dr. Smith", " dr. Smith.\n\nDone.", True),
        ("Dr. Smith", " Dr. Jones. Done.", False),
        ("Dr. Smith", " Dr. Smithers. Done.", False),
        ("Dr. Smith", " Dr.", False),
        ("caf\u00e9", " Cafe\u0301.", True),
        ("cafe\u0301", " CAF\u00c9. Or", True),
        ("Paris", "", False),
        ("B", " (B)", True),
        ("B", " **(b)**.", True),
        ("(B)", " B.", True),
        ("B", " (A)", False),
        ("f(x)", " f(x)", True),
        ("(x+1)(x-1)", " x+1)(x-1", False),
        ("New  York", " New York", True),
        ("Dr. No", " Dr. No.", True),
        ("Dr. No", " Dr. No\nwas a film", True),
        ("x = 1\ny = 2", " x = 1\ny = 2", True),
        ("x = 1\ny = 2", " x = 1", False),
        ("!", " !", True),
        ("Paris", " \\boxed{Paris}", True),
        ("Paris", " $\\boxed{\\text{Paris}}$.", True),
        ("Paris", ":\n\\[\n\\text{Paris}\n\\]", True),
        ("Paris", " `Paris`", True),
        ("Paris", " _Paris_", True),
        ("Paris", " ~~London~~ Paris", True),
        ("Paris", " ~~Paris~~ London", False),
        ("Paris", ":\n- Paris", True),
        ("x + 1", " $x + 1$", True),
        ("New York", " **New** York", True),
        ("__init__", " __init__", True),
        ("__init__", " init", False),
        ("a*b", " ab", False),
        ("$x$", " $x$", True),
        ("$x$", " x", False),
        (".5", " .5.", True),
        (".5", " 5", False),
        ("5", " .5", False),
        ("5", " ...5", True),
        ("6!", " **6!**.", True),
        ("6!", " 6", False),
        ("6", " 6!", True),
        ("Paris!", " Paris", True),
        ("Paris", " Paris. I hope the answer is correct.", True),
        ("Paris", " Paris.\n\nQuestion: Which river?\nThe answer is Seine.", True),
        ("Seine", " Paris.\n\nQuestion: Which river?\nThe answer is Seine.", False),
    ],
)
def test_exact(tmp_path, answer, statement, right):
    record = {"prompt": "x", "answer": answer}
    assert graded(tmp_path, record, statement, "exact") == ("exact", right)


def test_equal_statements_vote_together(tmp_path):
    task = read_own_data(file_of(tmp_path, [{"prompt": "x", "answer": "Paris"}]))
    row = task.load("test")[0]
    said = (
        "London",
        "*london*.",
        "London. Or",
        "London\nOr",
        "\\boxed{London}",
        "`London`",
        "(London)",
    )
    assert {task.extract(f"The answer is {s}", row) for s in said} == {"london"}


def test_a_wrong_answer_has_as_many_sentences_as_the_right_one(tmp_path):
    task = read_own_data(file_of(tmp_path, [{"prompt": "x", "answer": "Dr. Smith"}]))
    row = task.load("test")[0]
    said = ("Dr. Jones", "Dr. Jones. Done.", "Dr. Brown. Done.", "Jones\nDone.\nOr", "")
    assert [task.extract(f"The answer is {s}", row) for s in said] == [
        "dr. jones",
        "dr. jones",
        "dr. brown",
        "jones done",
        None,
    ]


@pytest.mark.parametrize(
    ("statement", "right"), [(" $1,200.", True), (" 1200 dollars", True), (" 1201", False)]
)
def test_number(tmp_path, statement, right):
    record = {"prompt": "x", "answer": "1200.0"}
    assert graded(tmp_path, record, statement) == ("number", right)


@pytest.mark.parametrize("answer", ["B", "blue"])
@pytest.mark.parametrize(("statement", "right"), [(" (B).", True), (" Blue", True), (" C", False)])
def test_choice(tmp_path, answer, statement, right):
    record = {"prompt": "x", "answer": answer, "choices": COLOURS}
    assert graded(tmp_path, record, statement) == ("choice", right)


def test_the_trained_answer_stays_as_it_was_given(tmp_path):
    records = [{"prompt": "x", "answer": "blue", "choices": COLOURS}]
    (row,) = read_own_data(file_of(tmp_path, records)).load("test").to_list()
    assert (row["answer"], row["ground_truth"]) == ("blue", "B")


def test_a_completion_is_graded_against_the_ground_truth(tmp_path):
    record = {"prompt": "x", "answer": "7, since 3+4=7", "ground_truth": "7"}
    assert graded(tmp_path, record, " 7.") == ("number", True)
    assert graded(tmp_path, record, " 8, since 3+4=8") == ("number", False)


@pytest.mark.parametrize(
    ("record", "grader", "message"),
    [
        (
            {"answer": "many"},
            "number",
            "grader number: expected one number at 'answer', got 'many'",
        ),
        ({"answer": 1, "ground_truth": "no"}, "number", "one number at 'ground_truth', got 'no'"),
        ({"answer": "B"}, "choice", "grader choice: expected a list of texts at 'choices'"),
        (
            {"answer": "pink", "choices": COLOURS},
            None,
            "the text of one option at 'answer', got 'p",
        ),
        ({"answer": "a b", "choices": ["a b", "a b"]}, None, "the text of one option at 'answer'"),
    ],
)
def test_an_answer_that_the_grader_cannot_read_is_named(tmp_path, record, grader, message):
    name = file_of(tmp_path, [{"prompt": "x", **record}])
    with pytest.raises(ValueError, match=rf"my\.jsonl:1: .*{message}"):
        read_own_data(name, grader=grader)


def test_another_grader_may_be_asked_for(tmp_path):
    with_choices = {"prompt": "x", "answer": "blue", "choices": COLOURS}
    assert graded(tmp_path, with_choices, " blue", "exact") == ("exact", True)
    assert graded(tmp_path, with_choices, " B", "exact") == ("exact", False)
    with pytest.raises(
        ValueError, match="grader: expected one of exact, number, choice, math, got"
    ):
        graded(tmp_path, with_choices, " B", "f1")


def test_conversations_are_trained_on_and_evaluated(tiny, tokenizer, tmp_path):
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = CHAT
    with_template.save_pretrained(tmp_path / "model")
    tiny().save_pretrained(tmp_path / "model")
    talks = [
        {
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Tom has {n} pens. How many?"},
            ],
            "answer": f"{n}, since Tom has {n}",
            "ground_truth": n,
        }
        for n in range(20)
    ]
    shared = (
        *("--answer_template", "Answer:", "--max_completion_length", "8", "--seed", "1"),
        *("--num_eval_examples", "3"),
    )
    output = tmp_path / "run"
    results = train(
        [
            *("--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(output)),
            *("--dataset_name", file_of(tmp_path, talks[:16]), "--num_generations", "2"),
            *("--max_steps", "1", "--disable_tqdm", "true", "--use_cpu", "true"),
            *("--log_completions", "true", *shared),
        ]
    )
    assert results["final"]["step"] == 1
    test = file_of(tmp_path, talks[16:], "mytest.jsonl")
    result = evaluate(
        [
            *("--model_name_or_path", str(output), "--dataset_name", test),
            *("--num_samples", "1", "--majority", "1"),
            *("--output", str(tmp_path / "evaluation.json"), *shared),
        ]
    )
    assert result["problems"] == 3
    assert math.isfinite(result["metrics"]["answer_logp"])


def test_the_readmes_example_can_be_read(tmp_path):
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json title=\"my.jsonl\"\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "my.jsonl").write_text(block)
    task = read_own_data(str(tmp_path / "my.jsonl"))
    assert task.grader == "number"
    assert [len(task.load(split)) for split in task.splits] == [3, 1, 4]


def test_training_does_not_hold_out_what_it_trains_on(tmp_path):
    with pytest.raises(ValueError, match="eval_split: expected problems that are not trained on"):
        train(["--dataset_name", file_of(tmp_path, rows(20)), "--eval_split", "test"])


def test_the_check_of_numbers_reads_each_once(tmp_path, monkeypatch):
    """Data of a million rows was read at a few thousand rows a second."""
    read = []
    figures = numeric.plain_figures
    monkeypatch.setattr(
        numeric, "plain_figures", lambda text, **o: read.append(text) or figures(text, **o)
    )
    answers = ["1.5", 7, "-12", "1,200", "2.25"]
    records = [{"prompt": f"How many of {i}?", "answer": a} for i, a in enumerate(answers)]
    for grader in (None, "number"):
        task = read_own_data(str(file_of(tmp_path, records)), grader=grader)
        assert task.grader == "number"
        assert sorted(read) == ["1,200", "1.5", "2.25"]
        read.clear()
