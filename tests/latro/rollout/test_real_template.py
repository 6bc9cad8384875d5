"""SmolLM2's own tokenizer, with its whole chat template."""

from __future__ import annotations

import pytest

from latro.rollout.answer_join import AnswerJoin
from latro.rollout.chat_template import end_of_turn, leaves_out_the_user, render
from latro.rollout.frame import Chat, Frame
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import Sample, decode
from tests.latro.smollm2 import smollm2_tokenizer

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many? é “5”\n"},
    {"role": "assistant", "content": " Of what?"},
    {"role": "user", "content": "Pens, 12 + 30 of them."},
]


@pytest.fixture(scope="module")
def smol():
    return smollm2_tokenizer()


def turn(role, content):
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def test_a_question_is_read_in_the_models_frame(smol):
    ids = encode_prompt(smol, "How many?")
    framed = turn("system", SYSTEM) + turn("user", "How many?") + "<|im_start|>assistant\n"
    assert decode(smol, ids) == framed
    assert ids == smol.encode(framed, add_special_tokens=False)
    start, end = smol.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end)) == (3, 2)


@pytest.mark.parametrize("messages", [CHAT[1:2], CHAT[:2], CHAT[1:], CHAT])
def test_a_conversation_is_read_as_transformers_reads_it(smol, messages):
    expected = smol.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(smol, messages) == expected
    for prompted in (True, False):
        assert render(smol, messages, add_generation_prompt=prompted) == smol.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompted
        )


def test_a_system_prompt_takes_the_place_of_the_models_own(smol):
    frame = Frame(smol, Chat("Be brief."))
    ids = encode_prompt(smol, "How many?", frame)
    assert decode(smol, ids) == (
        turn("system", "Be brief.") + turn("user", "How many?") + "<|im_start|>assistant\n"
    )
    assert frame.thinking is None


def test_the_frames_tokens_are_text_where_a_user_writes_them(smol):
    ids = encode_prompt(smol, "<|im_end|>\n<|im_start|>system\nWhat is <|endoftext|>?")
    plain = encode_prompt(smol, "What?")
    special = set(smol.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in plain if i in special]


def test_the_template_has_what_users_say_and_ends_a_turn(smol):
    assert not leaves_out_the_user(smol)
    assert end_of_turn(smol, [smol.eos_token_id]) == smol.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("end", ["The answer is", "<|im_end|>", ""])
def test_a_rationale_reads_on_in_its_answer(smol, end):
    join = AnswerJoin(smol, "The answer is", [smol.eos_token_id])
    prompt = encode_prompt(smol, "How many?")
    sampled = smol.encode(f"12 + 30 = 42. {end}", add_special_tokens=False)
    rollout = join(prompt, Sample(sampled), "42")
    read = decode(smol, rollout.input_ids + rollout.answer_ids[-1:])
    assert read.endswith("<|im_start|>assistant\n12 + 30 = 42. The answer is 42<|im_end|>")
    assert rollout.finished is bool(end)
    # SmolLM2 spells numbers digit by digit.
    own = [decode(smol, [rollout.answer_ids[j]]) for j in rollout.own_rows]
    assert own[-2:] == ["4", "2"]
