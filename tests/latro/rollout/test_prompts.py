from __future__ import annotations

import copy

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from latro.rollout.prompts import encode_prompt, encode_prompts, prompt_text
from tests.latro import frames
from tests.latro.frames import REPLY, SYSTEM, USER, framed

CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[reply]"


def test_a_plain_prompt_is_tokenised_as_the_tokenizer_does(tokenizer, with_bos):
    assert encode_prompt(tokenizer, "How many?") == tokenizer.encode("How many?")
    assert encode_prompt(with_bos, "How many?") == with_bos.encode("How many?")


def test_a_chat_template_writes_the_only_beginning_of_sequence(with_bos):
    with_bos.chat_template = CHAT
    ids = encode_prompt(with_bos, "How many?")
    assert with_bos.decode(ids) == "<s>[user]How many?[reply]"
    assert ids.count(with_bos.bos_token_id) == 1


def test_an_end_token_that_the_tokenizer_adds_is_taken_off(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {made.eos_token}", special_tokens=[(made.eos_token, made.eos_token_id)]
    )
    assert made.encode("pens")[-1] == made.eos_token_id
    assert encode_prompt(made, "How many?") == tokenizer.encode("How many?")


def test_messages_go_through_the_chat_template_once(with_bos):
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    with_bos.add_special_tokens({"additional_special_tokens": marks})
    with_bos.chat_template = frames.LLAMA_3
    ids = encode_prompt(with_bos, [SYSTEM, USER, REPLY, {"role": "user", "content": "Pens."}])
    spelled = "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}"
        for role, content in (
            ("system", "Be brief.<|eot_id|>"),
            ("user", "How many?<|eot_id|>"),
            ("assistant", "Of what?<|eot_id|>"),
            ("user", "Pens.<|eot_id|>"),
            ("assistant", ""),
        )
    )
    assert with_bos.decode(ids) == f"<s>{spelled}"
    assert ids.count(with_bos.bos_token_id) == 1
    reference = with_bos.apply_chat_template(
        [USER], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(with_bos, [USER]) == encode_prompt(with_bos, "How many?") == reference


def test_a_plain_prompt_that_opens_with_the_beginning_token_has_it_once(with_bos):
    assert encode_prompt(with_bos, "<s>How many?") == encode_prompt(with_bos, "How many?")


def test_without_a_template_one_message_of_the_user_is_a_string(tokenizer, with_bos):
    for one in (tokenizer, with_bos):
        assert encode_prompt(one, [USER]) == encode_prompt(one, "How many?")


@pytest.mark.parametrize("prompt", [[SYSTEM, USER], [REPLY]])
def test_without_a_template_a_conversation_is_refused(tokenizer, prompt):
    made = copy.deepcopy(tokenizer)
    made.name_or_path = "org/base"
    with pytest.raises(ValueError, match=r"tokenizer org/base has no chat template: .* messages"):
        encode_prompt(made, prompt)


def test_what_a_table_fills_in_is_not_in_a_message(with_bos):
    """As `thinking` is, which templates look for in every message."""
    with_bos.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if 'thinking' in m %}{{ m.thinking }}{% endif %}"
        "{% endfor %}"
    )
    messages = [USER, {**REPLY, "thinking": "Hm."}, USER]
    (row,) = Dataset.from_list([{"prompt": messages}])
    assert row["prompt"][0]["thinking"] is None
    assert encode_prompt(with_bos, row["prompt"]) == encode_prompt(with_bos, messages)


def test_a_prompt_as_text():
    assert prompt_text("How many?") == prompt_text([USER]) == "How many?"
    assert prompt_text([SYSTEM, USER]) == "system: Be brief.\nuser: How many?"


@pytest.mark.parametrize("template", [None, frames.LLAMA_3])
def test_prompts_together_have_the_ids_of_each_alone(tokenizer, with_bos, template):
    for given in (tokenizer, with_bos):
        made = given if template is None else framed(given, template)
        asked = [
            "How many?",
            "",
            f"Is it {made.eos_token}?",
            "<s>So",
            [USER],
            "é 答案",
            "Tom " * 50,
        ]
        assert encode_prompts(made, asked) == [encode_prompt(made, prompt) for prompt in asked]
        assert encode_prompts(made, []) == []
