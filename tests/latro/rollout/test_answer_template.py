from __future__ import annotations

import pytest

from latro.rollout.answer_template import (
    MOST_STOP_STRINGS,
    ending_pattern,
    ends_in_a_word,
    stop_strings,
    template_pattern,
)


@pytest.mark.parametrize(
    ("template", "text", "stated"),
    [
        ("The answer is", "So the answer is 5", [" 5"]),
        ("The answer is", "THE ANSWER IS: 5", [": 5"]),
        ("The answer is", "The answer isn't 5", []),
        ("The answer is", "The answer is't 5", []),
        ("The answer is", "The answer is5", []),
        ("The answer is ", "The answer isn't. The answer is 5", [" 5"]),
        ("The answer is", "6 = 6The answer is 6", [" 6"]),
        ("Answer", "Answers: 4. Answering: 5. Answer: 6", [": 6"]),
        ("Answer:", "canswer:4 Answer:5 _Answer: 6_", ["5 _Answer: 6_", " 6_"]),
        ("Answer: ", "Answer:5", ["5"]),
        ("####", "So.\n####5", ["5"]),
        ("\\boxed{", "It is \\boxed{5}.", ["5}."]),
        ("答案是", "所以答案是5", ["5"]),
        ("Réponse", "Réponses 4, réponse 5", [" 5"]),
    ],
)
def test_a_statement_is_opened_by_whole_words_in_any_case(template, text, stated):
    assert [text[m.end() :] for m in template_pattern(template).finditer(text)] == stated


@pytest.mark.parametrize("template", ["", " \n"])
def test_a_template_without_words_is_refused(template):
    with pytest.raises(ValueError, match="answer_template: expected words, got"):
        template_pattern(template)


def test_the_next_character_matters_behind_a_word():
    assert all(map(ends_in_a_word, ["The answer is", "The answer is ", "Réponse"]))
    assert not any(map(ends_in_a_word, ["Answer:", "####", "Answer: ", "答案是"]))


@pytest.mark.parametrize(
    ("template", "text", "ended"),
    [
        ("The answer is", "The answer is", False),
        ("The answer is", "The answer is ", True),
        ("The answer is", "The answer isn", False),
        ("The answer is", "The answer is\ufffd", False),
        ("The answer is", "The answer is\ufffd\ufffd.", True),
        ("The answer is ", "the answer is\n", True),
        ("Answer:", "Answer:", True),
        ("</think>", "So.\n</think>", True),
        ("</think>", "So.\n</think", False),
        ("<|end|>", "So.<|end|>", True),
        ("\n\n", "So.\n\n", True),
        ("\n\n", "So. \n So\n", False),
    ],
)
def test_a_completion_ends_where_its_template_is_known_to_be_whole(template, text, ended):
    assert (ending_pattern(template).search(text) is not None) is ended


@pytest.mark.parametrize(
    "template",
    ["The answer is", "Answer:", "####", "\n\n", "答案是", " A", "</think>", "<|end|>"],
)
def test_where_a_server_stops_at_a_string_a_completion_has_ended(template):
    strings = stop_strings(template)
    assert len(set(strings)) == len(strings) <= MOST_STOP_STRINGS
    for string in strings:
        assert ending_pattern(template).search(string)
        assert string.strip(" \n:*").casefold() in template.strip().casefold()


def test_the_usual_statements_are_among_a_servers_strings():
    strings = stop_strings("The answer is")
    for text in ("So. The answer is 5", "so the answer is 5", "6 - 1 = 5.\nThe answer is 5"):
        assert any(string in text for string in strings)
