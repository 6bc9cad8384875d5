from __future__ import annotations

import pytest

from latro.answer_template import ends_in_a_word, template_pattern


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
