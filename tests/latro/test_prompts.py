from __future__ import annotations

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from latro.prompts import encode_prompt

CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[reply]"


@pytest.fixture
def with_bos(tokenizer):
    """A tokenizer that opens every text with a beginning-of-sequence token, as Llama's does."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<s>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    assert made.encode("pens")[0] == made.bos_token_id
    return made


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
