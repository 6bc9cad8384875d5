from __future__ import annotations

import re

import pytest
from datasets import Dataset

from latro.rollout import chat_template, dataset_rows
from latro.rollout.answer_join import AnswerJoin
from latro.rollout.dataset_rows import check_dataset, check_rationales, encode_each
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import Sample
from tests.latro import frames
from tests.latro.frames import REPLY, SYSTEM, USER, framed


def test_a_prompt_that_ends_with_the_assistant_is_refused(tiny, with_bos):
    with_bos.chat_template = frames.CHATML
    rows = Dataset.from_dict({"prompt": [[USER], [USER, REPLY]], "answer": ["3", "3"]})
    join = AnswerJoin(with_bos, "The answer is", [with_bos.eos_token_id])
    message = "data: row 1: expected the last message to be the user's, got the assistant's; its"
    with pytest.raises(ValueError, match=message):
        check_dataset(rows, "data", tiny(vocab_size=len(with_bos)), join, 8)


def test_messages_that_the_template_refuses_are_named_with_their_row(tiny, with_bos):
    # Gemma's template does the same.
    with_bos.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    model = tiny(vocab_size=len(with_bos))
    join = AnswerJoin(with_bos, "The answer is", [with_bos.eos_token_id])
    dataset = Dataset.from_list([{"prompt": p, "answer": "3"} for p in ([USER], [SYSTEM, USER])])
    check_dataset(dataset.select([0]), "train_dataset", model, join, 8)
    with pytest.raises(
        ValueError, match=r"train_dataset: row 1: the chat template .*System role not supported"
    ):
        check_dataset(dataset, "train_dataset", model, join, 8)


LONG = "Tom has many pens. " * 9


@pytest.mark.parametrize("prompt", [LONG, [{"role": "user", "content": LONG}]])
def test_a_row_that_does_not_fit_is_named_by_how_its_prompt_begins(tiny, tokenizer, prompt):
    join = AnswerJoin(tokenizer, "The answer is", [tokenizer.eos_token_id])
    model = tiny(max_position_embeddings=64)
    rows = Dataset.from_list([{"prompt": prompt, "answer": "3", "rationale": "So. " * 60}])
    begins = f"its prompt begins '{LONG[:60]}'$"
    with pytest.raises(ValueError, match=rf"data: row 0: a prompt of .* drop the row; {begins}"):
        check_dataset(rows, "data", model, join, 64)
    with pytest.raises(ValueError, match=rf"data: row 0: prompt, .* drop the row; {begins}"):
        check_rationales(rows, "data", model, join)
    empty = Dataset.from_list([{"prompt": prompt, "answer": " "}])
    with pytest.raises(ValueError, match=rf"row 0: expected a non-empty answer, .*; {begins}"):
        check_dataset(empty, "data", model, join, 64)


@pytest.mark.parametrize("answer", ["The answer is 3", " the answer is: 3"])
def test_an_answer_that_has_the_template_already_is_refused(tiny, tokenizer, answer):
    join = AnswerJoin(tokenizer, "The answer is", [tokenizer.eos_token_id])
    rows = [{"prompt": "How many?", "answer": a} for a in ("The answer isn't 3", answer)]
    with pytest.raises(ValueError, match=r"data: row 1: expected an answer without the answer tem"):
        check_dataset(Dataset.from_list(rows), "data", tiny(), join, 8)


def test_a_rationale_that_would_change_its_rotary_frequencies_is_refused(tiny, tokenizer):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = tiny("phi3", rope_parameters=rope | factors, original_max_position_embeddings=24)
    join = AnswerJoin(tokenizer, "The answer is", [tokenizer.eos_token_id])

    def check(prompt_ids, max_completion_length):
        dataset = Dataset.from_list([{"prompt": tokenizer.decode(prompt_ids), "answer": "7"}])
        check_dataset(dataset, "data", model, join, max_completion_length)

    word = tokenizer.encode(" pens")
    (token,) = word
    answer = len(join([token], Sample([]), "7").answer_ids)
    # All tokens but the answer's last are read: exactly 24.
    most = 24 - 10 - (answer - 1)
    check([token] * 10, most)
    with pytest.raises(ValueError, match=r"row 0: a prompt of 10 tokens .* goes past the 24 up to"):
        check([token] * 10, most + 1)
    with pytest.raises(ValueError, match="a prompt of 24 tokens with a rationale of 1 and its"):
        check([token] * 24, 1)
    check([token] * 25, 500)
    # Without sampling, a sequence is read once, so either set of frequencies will do.
    check([token] * 24, 0)


def refusal(tiny, tokenizer, template, *prompts):
    made = framed(tokenizer, template)
    made.name_or_path = "org/hostile"
    rows = Dataset.from_list([{"prompt": prompt, "answer": "3"} for prompt in prompts])
    join = AnswerJoin(made, "The answer is", [made.eos_token_id])
    with pytest.raises(ValueError, match="the chat template of the tokenizer org/hostile") as error:
        check_dataset(rows, "data", tiny(vocab_size=len(made)), join, 8)
    return str(error.value)


@pytest.mark.parametrize(
    ("template", "prompts", "reason"),
    [
        ("[user][/user]", ["One and one?"], "leaves out what users say"),
        ("{{ messages[0].text }}!", ["One and one?", "Two?"], "row 1: .* as it does row 0"),
        ("{{ messages[0].content[:5] }}", ["What is 2?", "Is it?", "What is 3?"], "row 2: .*row 0"),
    ],
)
def test_a_template_that_drops_what_users_say_is_refused(
    tiny, tokenizer, template, prompts, reason
):
    message = refusal(tiny, tokenizer, template, *prompts)
    assert re.match(f"data: .*{reason}", message)
    assert "\n" not in message


def test_prompts_that_say_the_same_may_be_rendered_as_the_same(tiny, tokenizer):
    made = framed(
        tokenizer, "{% for m in messages if m.role == 'user' %}{{ m.content | trim }}{% endfor %}"
    )
    prompts = ["How many?", " How many?\n", [SYSTEM, USER], [USER], "How?"]
    rows = Dataset.from_list(
        [
            {
                "prompt": p if isinstance(p, list) else [{"role": "user", "content": p}],
                "answer": "3",
            }
            for p in prompts
        ]
    )
    join = AnswerJoin(made, "The answer is", [made.eos_token_id])
    check_dataset(rows, "data", tiny(vocab_size=len(made)), join, 8)


def many_rows(count):
    return Dataset.from_list(
        [
            {
                "prompt": f"How many of {i}?",
                "answer": str(i),
                "rationale": "Some.",
                "unread": "a" * 9,
            }
            for i in range(count)
        ]
    )


@pytest.mark.parametrize("template", [None, frames.LLAMA_3])
def test_the_check_asks_template_and_tokenizer_for_many_rows_at_once(
    tiny, with_bos, template, monkeypatch
):
    """A million rows, each rendered and encoded by itself, took an hour."""
    made = with_bos if template is None else framed(with_bos, template)
    join = AnswerJoin(made, "The answer is", [made.eos_token_id])
    requests = []
    ask = chat_template._ask
    monkeypatch.setattr(chat_template, "_ask", lambda r: requests.append(r) or ask(r))
    texts = []
    each = join.encoder.each
    monkeypatch.setattr(
        join.encoder, "each", lambda t, **options: texts.append(len(t)) or each(t, **options)
    )
    model, rows = tiny(vocab_size=len(made)), many_rows(200)
    longest = check_dataset(rows, "data", model, join, 8)
    assert texts == [64, 64, 64, 8]
    # One request more, with two conversations, asks whether users are left out.
    assert len(requests) == (4 + 2 if template else 0)
    check_rationales(rows, "data", model, join)
    ids = list(encode_each(rows, join))
    assert texts == [64, 64, 64, 8] * 3
    assert ids == [encode_prompt(made, prompt, join.frame) for prompt in rows["prompt"]]
    assert longest.prompt == max(map(len, ids))


def test_few_long_prompts_are_encoded_at_once(tiny, tokenizer, monkeypatch):
    monkeypatch.setattr(dataset_rows, "_CHARACTERS_AT_ONCE", 40)
    join = AnswerJoin(tokenizer, "The answer is", [tokenizer.eos_token_id])
    together = []
    encode = dataset_rows.encode_prompts
    monkeypatch.setattr(
        dataset_rows, "encode_prompts", lambda t, p, f: together.append(len(p)) or encode(t, p, f)
    )
    rows = Dataset.from_list(
        [{"prompt": "Tom has pens? " * (1 + i % 3), "answer": "3"} for i in range(9)]
    )
    check_dataset(rows, "data", tiny(), join, 8)
    assert sum(together) == 9
    assert max(together) == 2


def test_a_bad_row_behind_many_good_ones_is_named(tiny, with_bos):
    made = framed(
        with_bos,
        "{% if 'x' in messages[0].content %}{{ raise_exception('no x') }}{% endif %}"
        + frames.LLAMA_3,
    )
    join = AnswerJoin(made, "The answer is", [made.eos_token_id])
    model, good = tiny(vocab_size=len(made)), many_rows(100).to_list()
    for bad, told in (
        ({"prompt": "x?", "answer": "1"}, "row 100: .* refuses the messages: no x"),
        ({"prompt": "y?", "answer": ""}, "row 100: expected a non-empty answer"),
    ):
        rows = Dataset.from_list([*good, bad, *good])
        with pytest.raises(ValueError, match=told):
            check_dataset(rows, "data", model, join, 8)


def test_the_check_holds_no_prompt_in_memory(tiny, tokenizer):
    """The prompts of a dataset that is larger than memory were all held, to compare them."""
    made = framed(tokenizer, frames.LLAMA_3.replace("bos_token", "''"))
    join = AnswerJoin(made, "The answer is", [made.eos_token_id])
    rendered = dataset_rows._Rendered(join.frame, "data", many_rows(3))
    for index, prompt in enumerate(many_rows(3)["prompt"]):
        rendered.add(index, prompt, [index])
    assert sorted(rendered.first.values()) == [0, 1, 2]


@pytest.mark.parametrize("progress", [True, False])
def test_a_check_that_takes_long_shows_how_far_it_is(
    tiny, tokenizer, monkeypatch, capsys, progress
):
    join = AnswerJoin(tokenizer, "The answer is", [tokenizer.eos_token_id])
    check_dataset(many_rows(70), "train_dataset", tiny(), join, 8)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(dataset_rows, "_SECONDS_UNTIL_SHOWN", 0)
    check_dataset(many_rows(70), "train_dataset", tiny(), join, 8, progress=progress)
    shown = capsys.readouterr().err
    assert ("checking train_dataset" in shown and "70/70" in shown) == progress
    assert bool(shown) == progress


def test_a_template_that_takes_all_memory_is_refused_with_its_row(tiny, tokenizer):
    template = "{{ messages[0].content * (1 if messages[0].content == 'One?' else 10 ** 11) }}"
    message = refusal(
        tiny,
        tokenizer,
        f"{{% if messages[1] is not defined %}}{template}{{% endif %}}",
        "One?",
        "Two?",
    )
    assert message.startswith("data: row 1: ")
    assert "takes more than 2 GiB of memory; its prompt begins 'Two?'" in message
