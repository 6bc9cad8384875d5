from __future__ import annotations

import tracemalloc

import pytest
from datasets import Dataset

from latro.evaluation.few_shot import SEPARATOR, cut_at_separator, draw_examples, with_examples
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import decode

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<reply>"
EXAMPLES = [
    {"prompt": "One and one?", "answer": "2", "rationale": "1+1=2.\n\n \nSo 2."},
    {"prompt": "Two and two?\n", "answer": "4", "rationale": "2+2=4."},
]
PROBLEMS = Dataset.from_list([{"prompt": "One and two?", "answer": "3"}])


@pytest.fixture
def chatting(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


def rows(*rationales):
    return Dataset.from_list(
        [
            {"prompt": f"Problem {i}?", "answer": "1", "rationale": r}
            for i, r in enumerate(rationales)
        ]
    )


def test_the_same_rows_with_a_rationale_are_drawn_each_time():
    train = rows("", "a", "b", "", "c", "d")
    drawn = draw_examples(train, PROBLEMS, 3)
    assert draw_examples(train, PROBLEMS, 3) == drawn
    assert len({row["prompt"] for row in drawn}) == 3
    assert all(row["rationale"] for row in drawn)


def test_a_draw_holds_no_rows_but_those_drawn():
    """All rows of the training split were made before a few of them were drawn."""
    peaks = []
    for count in (1_000, 10_000):
        train = rows(*["So it is. " * 20] * count)
        tracemalloc.start()
        draw_examples(train, PROBLEMS, 3)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # An index takes some 50 bytes; the row is one of 600.
    assert peaks[1] - peaks[0] < 9_000 * 150


def test_rows_without_any_rationale_show_answers_alone(tokenizer):
    train = Dataset.from_list([{"prompt": f"{i}?", "answer": str(i)} for i in range(3)])
    drawn = draw_examples(train, PROBLEMS, 3)
    (shown,) = with_examples(PROBLEMS, drawn, "The answer is", tokenizer)["prompt"]
    first = drawn[0]
    assert shown.startswith(f"{first['prompt']} The answer is {first['answer']}\n\n")


def test_a_problem_that_is_asked_is_not_shown():
    train = rows("a", "b", "c")
    asked = train.select([1])
    assert {row["rationale"] for row in draw_examples(train, asked, 2)} == {"a", "c"}
    with pytest.raises(ValueError, match=r"num_shots: expected at most 2, .*got 3"):
        draw_examples(train, asked, 3)


def test_no_examples_change_nothing(tokenizer):
    assert with_examples(PROBLEMS, [], "The answer is", tokenizer) is PROBLEMS


def test_as_text(tokenizer):
    (shown,) = with_examples(PROBLEMS, EXAMPLES, "The answer is", tokenizer)["prompt"]
    # Empty lines of a solution are removed, and a missing space after a problem is added.
    assert shown == (
        "One and one? 1+1=2.\nSo 2. The answer is 2\n\n"
        "Two and two?\n2+2=4. The answer is 4\n\n"
        "One and two?"
    )


def test_a_solution_states_its_answer_once(tokenizer):
    stating = [{**EXAMPLES[0], "rationale": "1+1=2. So the answer is 2."}]
    (shown,) = with_examples(PROBLEMS, stating, "The answer is", tokenizer)["prompt"]
    assert "1+1=2. So The answer is 2\n\n" in shown


def test_a_message_of_the_user_is_text_without_a_chat_template(tokenizer):
    def as_message(row):
        return {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}

    problems = Dataset.from_list([as_message(row) for row in PROBLEMS])
    examples = [as_message(row) for row in EXAMPLES]
    shown = with_examples(problems, examples, "The answer is", tokenizer)["prompt"]
    assert list(shown) == list(
        with_examples(PROBLEMS, EXAMPLES, "The answer is", tokenizer)["prompt"]
    )


def test_as_turns_where_there_is_a_chat_template(chatting):
    (shown,) = with_examples(PROBLEMS, EXAMPLES, "The answer is", chatting)["prompt"]
    assert [m["role"] for m in shown] == ["user", "assistant"] * 2 + ["user"]
    text = decode(chatting, encode_prompt(chatting, shown))
    assert text.endswith(
        "<assistant>2+2=4. The answer is 4</assistant><user>One and two?</user><reply>"
    )


def test_a_problems_system_message_stays_in_front(chatting):
    system = {"role": "system", "content": "Be brief."}
    problems = Dataset.from_list(
        [{"prompt": [system, {"role": "user", "content": "One and two?"}], "answer": "3"}]
    )
    examples = [{**EXAMPLES[1], "prompt": problems[0]["prompt"]}]
    (shown,) = with_examples(problems, examples, "The answer is", chatting)["prompt"]
    assert [m["role"] for m in shown] == ["system", "user", "assistant", "user"]
    assert shown[0] == system


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("2+2=4. The answer is 4\n\nTom has 3 pens", "2+2=4. The answer is 4"),
        ("2+2=4.\nThe answer is 4\n\n", "2+2=4.\nThe answer is 4"),
        ("\n\nTom", ""),
        ("2+2=4.\n The answer is 4\n", None),
        ("", None),
    ],
)
def test_a_completion_ends_before_the_first_separator(tokenizer, text, kept):
    ids = tokenizer.encode(text)
    cut = cut_at_separator(tokenizer, ids)
    if kept is None:
        assert cut is None
    else:
        assert cut == ids[: len(cut)]
        assert decode(tokenizer, cut) == kept


def test_a_token_that_reaches_into_the_separator_is_dropped():
    class Words:
        """A tokenizer of three tokens; the second spells the end of a sentence and a separator."""

        def decode(self, ids, **options):
            return "".join(["so", f".{SEPARATOR}", "Tom"][i] for i in ids)

    assert cut_at_separator(Words(), [0, 1, 2]) == [0]
