import json
import re
from pathlib import Path

import pytest

from latro.tasks import get_task

REAL_DATA = Path(__file__).parents[4] / "shared" / "data" / "arc_challenge"
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="the ARC files are not at ../shared/data/arc_challenge"
)
TASK = get_task("arc_challenge")

TEXTS = ["the wind", "the wind and rain", "A rock", "Because of salt. And sand."]


def example(texts=TEXTS, labels="ABCD", answer="B"):
    return {"prompt": "", "answer": answer, "choices": {"label": [*labels], "text": list(texts)}}


def ai2_record(texts=TEXTS, labels="ABCD", answer="B"):
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    return {"id": "x", "question": {"stem": "What?", "choices": choices}, "answerKey": answer}


def hub_record(texts=TEXTS, labels="ABCD", answer="B"):
    choices = {"text": list(texts), "label": [*labels]}
    return {"id": "x", "question": "What?", "choices": choices, "answerKey": answer}


def write(folder, name, *records):
    (folder / name).write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("statement", "label"),
    [
        ("B", "B"),
        (" (B)", "B"),
        ("b", "B"),
        ("B.", "B"),
        (": **B**", "B"),
        ("option B", "B"),
        ("choice (B).", "B"),
        ("B) the wind and rain", "B"),
        ("(B) the wind and rain.", "B"),
        ("B: The wind and rain", "B"),
        ("B because it is wet", "B"),
        ("B because C is wrong", "B"),
        ("B, which is wet", "B"),
        ("<B>", "B"),
        ("“B”", "B"),
        ("B!", "B"),
        ("B?", "B"),
        ("{B}", "B"),
        ("B is right", "B"),
        ("**B** is the correct option.", "B"),
        ("B - it is wet", "B"),
        ("B – it is wet", "B"),
        ("B—it is wet", "B"),
        ("B (which is wet)", "B"),
        ("B. A higher wind dries it up.", "B"),
        ("B. I know it.", "B"),
        ("B. C is a stone.", "B"),
        ("B: A higher wind", "B"),
        ("B, I know it", "B"),
        ("B because a wind dries it up", "B"),
        ("B, the wind and rain, because it fits.", "B"),
        ("D, Because of salt. And sand, or so.", "D"),
        ("“the wind”", "A"),
        ("B\n\nQuestion: What of C?", "B"),
        ("the wind", "A"),
        ("The wind and rain.", "B"),
        ('"the wind".', "A"),
        ("the wind. It blows.", "A"),
        ("A rock", "C"),
        ("Because of salt. And sand.", "D"),
        ("because of salt.\nAnd sand", "D"),
    ],
)
def test_an_option_is_named_by_label_or_whole_text(statement, label):
    assert TASK.extract(f"C or D? The answer is {statement}", example()) == label


@pytest.mark.parametrize(
    "statement",
    [
        "",
        "E",
        "A or B",
        "(A) or (B)",
        "(a) or (b)",
        "a, b",
        "B (or C)",
        "B - C",
        "B: A and C",
        "B? No, C.",
        "B is right, C too",
        "B is a letter",
        "B. The wind. It blows.",
        "B. C.",
        "B, the wind and rain or the wind",
        "A/B",
        "A, B",
        "either A or B",
        "not B",
        "A stone",
        "A) the wind and rain",
        "wind",
        "the wind and",
        "the wind or the wind and rain",
        "Before noon",
    ],
)
def test_a_part_or_several_options_is_no_answer(statement):
    assert TASK.extract(f"The answer is {statement}", example()) is None


def test_without_the_template_there_is_no_answer():
    assert TASK.extract("(B)", example()) is None


def test_the_first_statement_counts():
    assert TASK.grade("The answer is B. The answer is A.", example())
    assert not TASK.grade("The answer is A. The answer is B.", example())


def test_case_counts_where_options_differ_in_nothing_else():
    row = example(["Ww only", "WW only", "ww"], "ABC")
    assert TASK.extract("The answer is WW only.", row) == "B"
    assert TASK.extract("The answer is wW only", row) is None


def test_two_options_with_one_text_are_not_told_apart_by_it():
    assert TASK.extract("The answer is ice", example(["ice", "ice", "fog"], "ABC")) is None


def test_a_label_that_is_another_options_text_is_the_label():
    row = example(["C", "NO", "O", "CO"], answer="C")
    assert TASK.extract("The answer is C.", row) == "C"
    assert TASK.extract("The answer is C. A good reason is given.", row) == "C"
    assert TASK.extract("The answer is 3", example(["3", "4", "5", "6"], "1234")) == "3"


@pytest.mark.parametrize(
    ("texts", "statement", "label"),
    [
        (["yes", "no"], "A, I know it.", "A"),
        (["yes", "no"], "A, no, I mean it", None),
        (["5", "15", "25"], "B: 15 apples", "B"),
        (["5", "15", "25"], "B (15)", "B"),
        (["5", "15", "25"], "B - 15 m", "B"),
        (["5", "15", "25"], "B (25)", None),
        (["ice", "fog"], "B because it is nice", "B"),
        (["ice", "fog"], "B because it is no ice", "B"),
        (["1 m", "1 m per s"], "B, 1 m per s, as asked", "B"),
        (["1 m", "1 m per s"], "A, 1 m per s, as asked", None),
        (["café", "tea"], "cafe\u0301", "A"),
        (["x", "!"], "", None),
    ],
)
def test_texts_are_looked_for_as_words_and_not_inside_the_option_named(texts, statement, label):
    row = example(texts, "ABC"[: len(texts)])
    assert TASK.extract(f"The answer is {statement}", row) == label


def test_digits_are_labels_and_measures_are_not():
    row = example(["3 metres", "1 metre", "2 metres"], "123")
    assert TASK.extract("The answer is (1)", row) == "1"
    assert TASK.extract("The answer is 3 metres", row) == "1"
    assert TASK.extract("The answer is 3 feet", row) is None


@pytest.mark.parametrize("labels", ["ABC", "ABCD", "ABCDE", "1234"])
def test_both_schemas_give_the_same_row(tmp_path, labels):
    texts = [f"text {label}" for label in labels]
    answer = labels[-1]
    write(tmp_path, "dev.jsonl", ai2_record(texts, labels, answer))
    write(tmp_path, "test.jsonl", hub_record(texts, labels, answer))
    ai2 = TASK.load("validation", dataset_path=tmp_path)[0]
    hub = TASK.load("test", dataset_path=tmp_path)[0]
    assert ai2 == hub
    assert ai2["answer"] == answer
    assert ai2["choices"] == {"label": [*labels], "text": texts}
    assert f"What?\n({labels[0]}) text {labels[0]}\n({labels[1]}) text" in ai2["prompt"]


def test_hub_rows_go_the_same_way(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [hub_record()]

    monkeypatch.setattr("latro.tasks.arc_challenge.load_dataset", load_dataset)
    assert TASK.load("validation")["answer"] == ["B"]
    assert asked == [(("allenai/ai2_arc", "ARC-Challenge"), {"split": "validation"})]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"answerKey": "A"}, "expected a non-empty string at 'question'"),
        ({**hub_record(), "choices": None}, "expected an object at 'choices', got None"),
        ({**hub_record(), "choices": {"label": ["A"]}}, "expected a list of strings at 'text'"),
        (hub_record(["x", "y"], "AB", "A"), "expected 3 to 5 choices"),
        (ai2_record(answer="E"), "expected 'answerKey' among the labels"),
        (ai2_record(["x", "y", "z"], "AAB", "A"), "expected 'answerKey' among the labels"),
        (hub_record(["x", "y", "z"], ["A", "B", "10"], "A"), "expected one letter or digit"),
        (
            {"question": {"stem": "What?", "choices": ["x"]}, "answerKey": "A"},
            "expected a list of objects at 'choices'",
        ),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, bad, message):
    write(tmp_path, "test.jsonl", ai2_record(), bad)
    with pytest.raises(ValueError, match=re.escape("test.jsonl:2: ")) as error:
        TASK.load("test", dataset_path=tmp_path)
    assert message in str(error.value)


@needs_real_data
@pytest.mark.parametrize(("split", "count"), [("train", 1119), ("validation", 299), ("test", 1172)])
def test_every_real_row_parses_and_its_answer_grades_itself_right(split, count):
    rows = TASK.load(split, dataset_path=REAL_DATA)
    assert len(rows) == count
    for row in rows:
        labels, texts = row["choices"]["label"], row["choices"]["text"]
        for label, text in zip(labels, texts, strict=True):
            for statement in (label, f"({label})", f"{label}. {text}", f"({label}) {text}"):
                assert TASK.grade(f"The answer is {statement}", row) == (label == row["answer"])
            if text not in labels:
                assert TASK.extract(f"The answer is {text}", row) == label


@pytest.fixture(scope="module")
def real_rows():
    return TASK.load("test", dataset_path=REAL_DATA).to_list()


@needs_real_data
@pytest.mark.parametrize(
    "statement",
    [
        "{label}. A good reason is given.",
        "{label}. I think so.",
        "{label}! {text}",
        "{label}, {text}, because it fits.",
        "{label} because it fits.",
        "{label} because {another} is wrong.",
        "{label}, since I know it.",
        "{label} ({text})",
        "{label} - {text}",
        "({label}) {text} I know.",
        "{label} is right",
        "<{label}>",
        "“{label}”",
    ],
)
def test_every_real_answer_is_read_from_what_models_write(real_rows, statement):
    assert len(real_rows) == 1172
    for row in real_rows:
        label = row["answer"]
        text = row["choices"]["text"][row["choices"]["label"].index(label)]
        another = next(other for other in row["choices"]["label"] if other != label)
        stated = statement.format(label=label, text=text, another=another)
        assert TASK.grade(f"The answer is {stated}", row)


@needs_real_data
@pytest.mark.parametrize(
    "statement",
    [
        "{a} or {b}",
        "{a}, {b}",
        "({a}) and ({b})",
        "{a}? No, {b}.",
        "{a}, {b} or I do not know",
    ],
)
def test_two_real_options_are_no_answer(real_rows, statement):
    for row in real_rows:
        a, b, *_ = row["choices"]["label"]
        stated = statement.format(a=a, b=b)
        assert TASK.extract(f"The answer is {stated}", row) is None


def test_prompts_ask_for_the_answer_template(tmp_path):
    write(tmp_path, "test.jsonl", ai2_record())
    task = get_task("arc_challenge")
    task.answer_template = "Option:"
    (row,) = task.load("test", dataset_path=tmp_path)
    assert row["prompt"].endswith('Finish with "Option: <label>".\n')
    assert task.grade("Option: B", row)
