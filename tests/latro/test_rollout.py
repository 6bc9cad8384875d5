from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latro.rollout import AnswerJoin, Sample, decode, eos_token_ids

TEMPLATE = "The answer is"


@pytest.fixture
def join(tokenizer):
    return AnswerJoin(tokenizer, TEMPLATE, [tokenizer.eos_token_id])


def test_join_after_the_template_keeps_the_sampled_ids(tokenizer, join):
    prompt = tokenizer.encode("How many?")
    # Cut letter by letter, as a policy may; the ids are kept, not tokenised again.
    sampled = [i for c in " 2+3=5. The answer is" for i in tokenizer.encode(c)]
    rollout = join(prompt, Sample([*sampled, *tokenizer.encode(" 6")]), "5")
    assert rollout.sampled_ids == sampled
    assert rollout.finished
    assert decode(tokenizer, rollout.rationale_ids) == " 2+3=5. "
    assert decode(tokenizer, rollout.answer_ids) == "The answer is 5<|endoftext|>"
    assert rollout.input_ids + rollout.answer_ids[-1:] == (
        prompt + sampled + tokenizer.encode(" 5") + [tokenizer.eos_token_id]
    )


def test_join_after_the_end_token_scores_it_but_does_not_read_it(tokenizer, join):
    prompt = tokenizer.encode("How many?")
    text = tokenizer.encode(" 2+3=5.")
    rollout = join(prompt, Sample([*text, tokenizer.eos_token_id]), "5")
    assert rollout.sampled_ids == [*text, tokenizer.eos_token_id]
    assert rollout.finished
    assert rollout.rationale_ids == text
    assert decode(tokenizer, rollout.input_ids) == "How many? 2+3=5. The answer is 5"


def test_join_at_the_length_limit(tokenizer, join):
    rollout = join(tokenizer.encode("How many?"), Sample(tokenizer.encode(" 2+3")), "5")
    assert not rollout.finished
    assert rollout.answer_start == len(rollout.sampled_ids)
    assert decode(tokenizer, rollout.input_ids) == "How many? 2+3 The answer is 5"


@pytest.mark.parametrize(("prompt", "joint"), [("How many?", " "), ("How many?\n", "")])
def test_an_empty_rationale_is_scored(tokenizer, join, prompt, joint):
    eos = tokenizer.eos_token_id
    rollout = join(tokenizer.encode(prompt), Sample([eos]), "5")
    assert rollout.finished
    assert rollout.rationale_ids == []
    assert rollout.sampled_ids == [eos]
    assert decode(tokenizer, rollout.input_ids) == f"{prompt}{joint}The answer is 5"


def test_a_tokenizer_without_an_end_token_ends_answers_with_the_models(tiny, tokenizer):
    model = tiny()
    eos = tokenizer.eos_token_id
    tokenizer.eos_token = None
    try:
        assert eos_token_ids(model, tokenizer) == [eos]
        model.generation_config.eos_token_id = [eos, 5]
        assert eos_token_ids(model, tokenizer) == [eos, 5]
        assert AnswerJoin(tokenizer, TEMPLATE, [eos])([7], Sample([8]), "5").answer_ids[-1] == eos
        bare = AnswerJoin(tokenizer, TEMPLATE, [])([7], Sample([8]), "5")
        assert decode(tokenizer, bare.answer_ids).endswith("is 5")
    finally:
        tokenizer.eos_token = "<|endoftext|>"


@given(text=st.text(alphabet="Tom has59=.+é ", max_size=40), answer=st.integers(0, 10**6))
def test_any_rationale_reads_on_in_its_answer(tokenizer_text, text, answer):
    tokenizer, join = tokenizer_text
    rollout = join(tokenizer.encode("How?"), Sample(tokenizer.encode(text)), str(answer))
    read = decode(tokenizer, rollout.input_ids)
    space = "" if text[-1:].isspace() else " "
    assert read == f"How?{text}{space}The answer is {answer}"


@pytest.fixture(scope="session")
def tokenizer_text(tokenizer):
    return tokenizer, AnswerJoin(tokenizer, TEMPLATE, [tokenizer.eos_token_id])
