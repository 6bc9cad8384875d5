from __future__ import annotations

import multiprocessing
import os

import pytest

from latro.rollout import chat_template
from latro.rollout.chat_template import end_of_turn, leaves_out_the_user, render
from latro.rollout.template_worker import CHARACTERS, MEMORY_BYTES, SECONDS
from tests.latro import frames
from tests.latro.frames import framed

MESSAGES = [
    {"role": "user", "content": "How many? é “ \u2028 <|im_end|>"},
    {"role": "assistant", "content": " Of what?\n"},
    {"role": "user", "content": "Pens."},
]


# The process that renders is the same for every tokenizer.
of_the_worker = pytest.mark.parametrize("tokenizer", ["tiny"], indirect=True)


@pytest.mark.parametrize(
    "template",
    [frames.CHATML, frames.PHI, frames.GEMMA, frames.LLAMA_3, frames.MISTRAL, frames.THINKING],
)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_renders_what_the_tokenizer_does(tokenizer, template, add_generation_prompt):
    made = framed(tokenizer, template)
    assert render(made, MESSAGES, add_generation_prompt=add_generation_prompt) == (
        made.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


@pytest.mark.parametrize(
    ("template", "tokens", "end"),
    [
        (frames.CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
        (frames.PHI, ["<|user|>", "<|assistant|>", "<|end|>"], "<|end|>"),
        (frames.GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
        (
            frames.LLAMA_3,
            ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            "<|eot_id|>",
        ),
        (frames.MISTRAL, ["[INST]", "[/INST]"], "the tokenizer's"),
        (
            frames.THINKING,
            ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<answer>", "</answer>"],
            "<|im_end|>",
        ),
        # A frame of words, or no frame, has no token that ends a turn.
        (frames.PLAIN, [], None),
        (frames.CHATML, [], "<|im_end|> if it is a token"),
        (frames.NOTHING, ["<|user|>", "<|assistant|>"], None),
        # The token between two turns, where the last turn has none.
        (frames.BETWEEN, [], "the tokenizer's"),
        (
            frames.NO_LAST_ANSWER,
            ["<|im_start|>", "<|im_end|>"],
            "<|im_end|> if it is the tokenizer's",
        ),
        (frames.NO_ANSWERS, ["<|im_end|>"], None),
    ],
)
def test_the_token_that_ends_a_turn(tokenizer, template, tokens, end):
    made = framed(tokenizer, template, *tokens)
    eos = made.eos_token
    expected = {
        "the tokenizer's": eos,
        "<|im_end|> if it is a token": "<|im_end|>" if "<|im_end|>" in made.get_vocab() else None,
        "<|im_end|> if it is the tokenizer's": eos if eos == "<|im_end|>" else None,
    }.get(end, end)
    found = end_of_turn(made, [made.eos_token_id])
    assert found == (None if expected is None else made.convert_tokens_to_ids(expected))


def test_what_opens_the_next_turn_ends_one_where_the_model_says_so(tokenizer):
    made = framed(tokenizer, frames.NOTHING, "<|user|>", "<|assistant|>")
    user = made.convert_tokens_to_ids("<|user|>")
    assert end_of_turn(made, [made.eos_token_id, user]) == user
    refusing = framed(tokenizer, frames.NO_LAST_ANSWER, "<|im_start|>", "<|im_end|>")
    end = refusing.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(refusing, [end]) == end


def test_an_end_token_that_is_not_listed_as_special_ends_a_turn(tokenizer):
    made = framed(tokenizer, frames.CHATML)
    made.add_tokens(["<|im_end|>"])
    assert end_of_turn(made, []) == made.convert_tokens_to_ids("<|im_end|>")


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"


@of_the_worker
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOP.replace("BODY", ""), f"does not end within {SECONDS} seconds"),
        ("{{ 'x' * 10 ** 11 }}", f"takes more than {MEMORY_BYTES >> 30} GiB of memory"),
        ("{{ 'x' | center(10 ** 11) }}", f"takes more than {MEMORY_BYTES >> 30} GiB of memory"),
        (f"{{{{ 'x' * {CHARACTERS + 1} }}}}", f"renders {CHARACTERS + 1} characters, more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 1 + 'x' }}", "refuses the messages: TypeError: unsupported operand"),
        ("{% include 'other' %}", "refuses the messages: TypeError"),
        ("{% for", "refuses the messages: TemplateSyntaxError: "),
        ("{{ raise_exception('First\nsecond') }}", "refuses the messages: First second$"),
    ],
)
def test_a_template_that_takes_too_much_or_fails_is_an_error_of_one_line(
    tokenizer, template, reason
):
    made = framed(tokenizer, template)
    made.name_or_path = "org/hostile"
    with pytest.raises(
        ValueError, match=f"the chat template of the tokenizer org/hostile .*{reason}"
    ) as raised:
        render(made, MESSAGES, add_generation_prompt=True)
    assert "\n" not in str(raised.value)
    # The next template is rendered again.
    made.chat_template = "{{ messages[0].content }}"
    assert render(made, MESSAGES, add_generation_prompt=True) == MESSAGES[0]["content"]


@of_the_worker
def test_a_worker_that_was_killed_is_named_and_replaced(tokenizer):
    made = framed(tokenizer, frames.CHATML)
    render(made, MESSAGES, add_generation_prompt=True)
    process = chat_template._worker(os.getpid())._process
    process.kill()
    process.wait()
    with pytest.raises(ValueError, match="ends the process that renders it: SIGKILL"):
        render(made, MESSAGES, add_generation_prompt=True)
    render(made, MESSAGES, add_generation_prompt=True)


def _render_in_child(tokenizer, results):
    texts = [
        render(tokenizer, [{"role": "user", "content": str(n)}], add_generation_prompt=True)
        for n in range(50)
    ]
    results.put(texts)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
@of_the_worker
def test_processes_that_were_forked_do_not_share_a_worker(tokenizer):
    """A Trainer's data loaders are forks, too."""
    made = framed(tokenizer, "{{ messages[0].content }}")
    expected = [str(n) for n in range(50)]
    render(made, MESSAGES, add_generation_prompt=True)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    children = [context.Process(target=_render_in_child, args=(made, results)) for _ in range(2)]
    for child in children:
        child.start()
    assert [results.get() for _ in children] == [expected, expected]
    for child in children:
        child.join()
    _render_in_child(made, results)
    assert results.get() == expected


@of_the_worker
def test_a_signal_to_the_group_does_not_end_the_worker(tokenizer):
    made = framed(tokenizer, "{{ messages[0].content }}")
    render(made, MESSAGES, add_generation_prompt=True)
    process = chat_template._worker(os.getpid())._process
    assert os.getpgid(process.pid) != os.getpgrp()
    assert process.poll() is None


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        ("[user][/user]", True),
        ("{% for m in messages %}{{ m['text'] }}{% endfor %}", True),
        ("{{ messages[0].content | lower }}", False),
        ("{{ messages[0].content | tojson }}", False),
        (frames.CHATML, False),
        ("{{ raise_exception('A system message comes first') }}", False),
    ],
)
def test_whether_a_template_has_what_users_say(tokenizer, template, left_out):
    assert leaves_out_the_user(framed(tokenizer, template)) is left_out
