from __future__ import annotations

import json
from decimal import Decimal

import pytest

from latro.tasks.own_rows import own_row

USER = {"role": "user", "content": "How many?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def row(**fields):
    return own_row({"prompt": "How many?", "answer": "3", **fields}, "my.jsonl:17")


def test_a_row_holds_what_its_record_fills():
    assert row() == {"prompt": "How many?", "answer": "3"}
    assert row(id=7, rationale="", ground_truth=None, choices=None) == row()
    whole = row(rationale="1+2=3\n", ground_truth=" 3 ", choices=["2", "3"])
    assert whole["rationale"] == "1+2=3"
    assert whole["ground_truth"] == "3"
    assert whole["choices"] == {"label": ["A", "B"], "text": ["2", "3"]}


def test_a_prompt_is_kept_to_the_letter():
    assert row(prompt=" How many?\n\n")["prompt"] == " How many?\n\n"
    assert row(prompt=[SYSTEM, USER])["prompt"] == [SYSTEM, USER]


def test_messages_may_be_spelled_as_json():
    assert row(prompt=json.dumps([SYSTEM, USER]))["prompt"] == [SYSTEM, USER]
    assert row(prompt=json.dumps([USER], indent=1))["prompt"] == [USER]
    listed = "[{1, 2}, {3}] has how many sets?"
    assert row(prompt=listed)["prompt"] == listed
    with pytest.raises(ValueError, match=r"my\.jsonl:17: expected messages as JSON at 'prompt'"):
        row(prompt=str([SYSTEM, USER]))
    with pytest.raises(ValueError, match="the last message to be the user's, got 'system'"):
        row(prompt=json.dumps([USER, SYSTEM]))


def test_messages_from_a_table_carry_the_keys_of_all():
    assert row(prompt=[USER | {"name": None}])["prompt"] == [USER]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (42, "42"),
        (0.5, "0.5"),
        (3.0, "3.0"),
        (-1, "-1"),
        (" 4 ", "4"),
        (0.00001, "0.00001"),
        (1e16, "10000000000000000"),
        (-2.5e-7, "-0.00000025"),
        (10**400, "1" + "0" * 400),
        (Decimal("1.50"), "1.50"),
        (Decimal("1E+3"), "1000"),
    ],
)
def test_a_number_is_an_answer(given, text):
    assert row(answer=given)["answer"] == text
    assert row(ground_truth=given)["ground_truth"] == text


@pytest.mark.parametrize(
    "given", [None, True, "", "  ", float("nan"), float("inf"), Decimal("nan"), ["3"], {}]
)
def test_what_is_no_answer_is_refused(given):
    with pytest.raises(
        ValueError, match=r"my\.jsonl:17: expected a non-empty string at 'answer', got "
    ):
        row(answer=given)


def test_choices_may_bring_their_labels_or_come_from_a_cell():
    labelled = {"label": ["1", "2"], "text": ["red", "blue"]}
    assert row(choices=labelled)["choices"] == labelled
    assert row(choices='["red", "blue"]')["choices"] == {
        "label": ["A", "B"],
        "text": ["red", "blue"],
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": " "}, "non-empty string at 'prompt', got ' '"),
        ({"prompt": 3}, "a string or a list of messages at 'prompt', got 3"),
        ({"prompt": []}, "a string or a list of messages at 'prompt'"),
        ({"prompt": ["How many?"]}, "message 0: expected an object with role and content"),
        ({"prompt": [USER, SYSTEM]}, "the last message to be the user's, got 'system'"),
        ({"prompt": [{"role": "human", "content": "x"}]}, "system, user, assistant, got 'human'"),
        ({"prompt": [SYSTEM, {"role": "user", "content": ""}]}, "message 1: .* 'content', got ''"),
        ({"prompt": [{"role": "user", "content": [{"text": "x"}]}]}, "non-empty string at 'cont"),
        ({"prompt": [{"content": "x"}]}, r"expected role and content, got \['content'\]"),
        ({"prompt": [USER | {"name": "Tom"}]}, r"got \['content', 'name', 'role'\]"),
        ({"rationale": 3}, "expected a string at 'rationale', got 3"),
        ({"ground_truth": False}, "non-empty string at 'ground_truth', got False"),
        ({"prompt": "q \ud83d x"}, r"expected Unicode text at 'prompt', .* in 'q \\ud83d x'"),
        ({"prompt": [{"role": "user", "content": "\ud83d"}]}, "expected Unicode text at 'prompt'"),
        ({"answer": "\ud83d"}, "expected Unicode text at 'answer'"),
        ({"rationale": "\ud83d"}, "expected Unicode text at 'rationale'"),
        ({"choices": ["a", "\ud83d"]}, "expected Unicode text at 'choices'"),
        ({"choices": f"[{'9' * 5000}]"}, r"expected JSON at 'choices'"),
        ({"choices": "red"}, "expected JSON at 'choices', got 'red'"),
        ({"choices": 3}, "expected a list of texts, or an object .* got 3"),
        ({"choices": ["red"]}, "2 to 26 choices, .* got 1 labels and 1 texts"),
        ({"choices": ["red", ""]}, "list of strings as the choices' text"),
        ({"choices": {"text": ["a", "b"]}}, "list of strings as the choices' label, got None"),
        ({"choices": {"label": ["A"], "text": ["a", "b"]}}, "got 1 labels and 2 texts"),
        ({"choices": {"label": ["a", "A"], "text": ["a", "b"]}}, "of its own a label"),
        ({"choices": {"label": ["A1", "B"], "text": ["a", "b"]}}, "of its own a label"),
    ],
)
def test_a_malformed_record_is_named(fields, message):
    with pytest.raises(ValueError, match=rf"my\.jsonl:17: .*{message}"):
        row(**fields)


def test_a_missing_column_is_named_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"my\.csv:2: expected the columns prompt and answer, got question, answer"
    ):
        own_row({"question": "How many?", "answer": "3"}, "my.csv:2")
