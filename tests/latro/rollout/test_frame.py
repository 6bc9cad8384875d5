"""Models that think, and what a run gives to a chat template."""

from __future__ import annotations

import copy
import re

import pytest
from datasets import Dataset

from latro.engines.transformers import TransformersEngine
from latro.rollout.answer_join import AnswerJoin
from latro.rollout.dataset_rows import check_dataset
from latro.rollout.frame import FAMILIES, Chat, Frame
from latro.rollout.prompts import encode_prompt
from latro.rollout.sequences import Sample, decode, eos_token_ids
from tests.latro import frames
from tests.latro.frames import framed
from tests.latro.thinking_frames import (
    CHATML,
    GEMMA_4,
    GEMMA_4_SMALL,
    GLM,
    QWEN3,
    SMOLLM3,
    THINKING,
)

TEMPLATE = "The answer is"
OFF = {"enable_thinking": False}


@pytest.fixture(params=THINKING)
def family(request):
    return THINKING[request.param]


@pytest.fixture(params=[True, False], ids=["tokens", "words"])
def thinker(request, family, tokenizer):
    """Return a tokenizer with a template of the family, whose marks are tokens or words."""
    return family.tokenizer(tokenizer, marks=request.param)


def joined(made, family):
    # GLM's turns end with what opens the next, as its generation config says.
    ends = [made.eos_token_id, made.convert_tokens_to_ids(family.end)]
    return AnswerJoin(made, TEMPLATE, ends, Chat(template_kwargs=family.kwargs))


def test_a_prompt_ends_where_thoughts_begin(thinker, family):
    frame = Frame(thinker, Chat(template_kwargs=family.kwargs))
    text = decode(thinker, encode_prompt(thinker, "How many?", frame))
    assert text.endswith(family.prompt_end)
    written = thinker.apply_chat_template(
        [{"role": "user", "content": "How many?"}],
        tokenize=False,
        add_generation_prompt=True,
        **family.kwargs,
    )
    assert text == written + frame.thinking.opening
    # A frame's tokens are tokens behind a question that spells them, too.
    spelt = encode_prompt(thinker, f"What is {family.end}?", frame)
    ending = thinker.encode(family.prompt_end, add_special_tokens=False)
    assert spelt[-len(ending) :] == ending


def test_earlier_turns_change_nothing_at_the_end_of_a_prompt(thinker, family):
    """As worked examples are shown in an evaluation."""
    frame = Frame(thinker, Chat("Be brief.", family.kwargs))
    turns = [("user", "One?"), ("assistant", "So. The answer is 1"), ("user", "Two?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    text = decode(thinker, encode_prompt(thinker, prompt, frame))
    assert text.endswith(family.prompt_end)
    assert "So. The answer is 1" in text
    assert frame.thinking.closing not in text.partition("Two?")[2].replace("<|end|>", "", 1)


@pytest.mark.parametrize(
    ("template", "chat", "ending"),
    [
        (QWEN3, Chat(template_kwargs=OFF), "assistant\n<think>\n\n</think>\n\n"),
        (SMOLLM3, Chat(template_kwargs=OFF), "assistant\n<think>\n\n</think>\n"),
        (SMOLLM3, Chat("Be brief. /no_think"), "assistant\n<think>\n\n</think>\n"),
        (GLM, Chat(template_kwargs=OFF), "/nothink<|assistant|>\n<think></think>"),
        (GEMMA_4, None, "<|turn>model\n<|channel>thought\n<channel|>"),
        (GEMMA_4_SMALL, None, "<|turn>model\n"),
        (frames.CHATML, Chat("Be brief."), "assistant\n"),
        (frames.PHI, None, "<|end|>\n<|assistant|>\n"),
        (frames.LLAMA_3, None, "assistant<|end_header_id|>\n\n"),
        (frames.GEMMA, None, "model\n"),
        (frames.MISTRAL, None, "[/INST]"),
        (frames.NO_ANSWERS, None, "How many?<|im_end|>"),
        (None, None, "How many?"),
    ],
)
def test_what_does_not_think(tokenizer, template, chat, ending):
    made = framed(tokenizer, template, *CHATML, "<|end|>")
    frame = Frame(made, chat)
    assert frame.thinking is None
    assert decode(made, encode_prompt(made, "How many?", frame)).endswith(ending)
    join = AnswerJoin(made, TEMPLATE, [made.eos_token_id], chat)
    assert join.ending == join.opening == TEMPLATE
    assert join.said("So. The answer is 5") == "So. The answer is 5"


def of(made, join, rollout):
    """Return the texts of z, of what is read behind the prompt, of y, and of the own tokens."""
    own = [rollout.answer_ids[j] for j in rollout.own_rows]
    read = rollout.branch_ids + rollout.answer_ids[-1:]
    return [decode(made, ids) for ids in (rollout.sampled_ids, read, rollout.answer_ids, own)]


def test_the_end_of_thoughts_ends_a_rationale_and_begins_the_answer(thinker, family):
    join = joined(thinker, family)
    assert join.ending == family.closing
    prompt = encode_prompt(thinker, "How many?", join.frame)
    # Thoughts mention answers that they reject.
    thoughts = f"2+3=6. The answer is 6? No, 5.{family.before}"
    answer = f"{family.closing}{family.behind}The answer is 5{family.end}"
    text = f"{thoughts}{family.closing}{family.behind}The answer is 6."
    ids = thinker.encode(text, add_special_tokens=False)
    rollout = join(prompt, Sample(ids, [-1.0] * len(ids)), "5")
    z, read, y, own = of(thinker, join, rollout)
    # A token may spell more than the words that end.
    assert z.startswith(thoughts + family.closing)
    assert z.strip() == thoughts + family.closing
    assert (read, y, own.strip()) == (thoughts + answer, answer, "5")
    assert rollout.finished
    assert len(rollout.sampled_logp) == len(rollout.sampled_ids)
    assert rollout.sampled_ids == ids[: len(rollout.sampled_ids)]


def test_thoughts_that_do_not_end_are_closed(thinker, family):
    join = joined(thinker, family)
    prompt = encode_prompt(thinker, "How many?", join.frame)
    answer = f"{family.closing}{family.behind}The answer is 5{family.end}"
    ids = thinker.encode("2+3=6. The answer is 6", add_special_tokens=False)
    for end, finished in (
        ([], False),
        ([thinker.eos_token_id], True),
        ([thinker.convert_tokens_to_ids(family.end)], True),
    ):
        rollout = join(prompt, Sample([*ids, *end]), "5")
        _, read, y, own = of(thinker, join, rollout)
        assert rollout.finished is finished
        assert rollout.sampled_ids == [*ids, *end]
        assert read == f"2+3=6. The answer is 6{family.before}{answer}"
        assert y.removeprefix("\n") == answer
        assert own.strip() == "5"


def test_a_written_rationale_is_thought(thinker, family):
    join = joined(thinker, family)
    prompt = encode_prompt(thinker, "How many?", join.frame)
    rollout = join.written(prompt, "2+3=5.", "5")
    text = decode(thinker, rollout.input_ids + rollout.answer_ids[-1:])
    assert text.endswith(
        f"{family.prompt_end}2+3=5.{family.before}{family.closing}{family.behind}"
        f"The answer is 5{family.end}"
    )
    assert decode(thinker, rollout.sampled_ids) == "2+3=5."
    # As it is where it brings the block itself.
    block = f"{join.frame.thinking.mark}\n2+3=5.{family.before}{family.closing}"
    assert join.written(prompt, block, "5").input_ids == rollout.input_ids
    # Without a rationale the block is empty.
    rollout = join(prompt, Sample([]), "5")
    text = decode(thinker, rollout.input_ids + rollout.answer_ids[-1:])
    assert re.search(rf"{re.escape(family.prompt_end)}\n?{re.escape(family.closing)}", text)


def test_the_frames_tokens_in_an_answer_are_the_frames(thinker, family):
    join = joined(thinker, family)
    rollout = join([5], Sample(thinker.encode("So.", add_special_tokens=False)), "5")
    opening = thinker.encode(join.opening, add_special_tokens=False)
    special = set(thinker.all_special_ids)
    expected = [i for i in opening if i in special]
    assert [i for i in rollout.answer_ids[:-1] if i in special] == expected


def test_what_is_said_stands_behind_the_thoughts(thinker, family):
    join = joined(thinker, family)
    thoughts = f"The answer is 6? No.{family.closing}"
    assert join.said(f"{thoughts}{family.behind}The answer is 5").endswith("The answer is 5")
    assert "6" not in join.said(f"{thoughts}{family.behind}The answer is 5")
    assert join.said("The answer is 6? No.") == ""


def test_words_begin_at_once_behind_a_block_that_only_prompts_have(tokenizer):
    family = THINKING["Gemma 4"]
    made = family.tokenizer(tokenizer)
    join = AnswerJoin(made, TEMPLATE, [made.eos_token_id])
    prompt = encode_prompt(made, "How many?", join.frame)
    rollout = join(prompt, Sample([]), "5")
    text = decode(made, rollout.input_ids + rollout.answer_ids[-1:])
    assert text.endswith("<|channel>thought\n<channel|>The answer is 5<turn|>")


# A random model of many tokens hardly ever samples a given one.
@pytest.mark.parametrize("tokenizer", ["tiny"], indirect=True)
def test_samples_end_with_their_thoughts(family, tokenizer, tiny):
    made = family.tokenizer(tokenizer)
    model = tiny(vocab_size=len(made))
    join = AnswerJoin(made, TEMPLATE, eos_token_ids(model, made), Chat(None, family.kwargs))
    prompt = encode_prompt(made, "How many?", join.frame)
    ((samples),) = TransformersEngine(model, made).generate(
        [prompt],
        num_samples=64,
        max_new_tokens=96,
        temperature=1.0,
        seeds=[0],
        template=join.ending,
    )
    closing = made.convert_tokens_to_ids(family.closing)
    assert any(sample.ids[-1] == closing for sample in samples)
    assert not any(closing in sample.ids[:-1] for sample in samples)
    for sample in samples:
        rollout = join(prompt, sample, "5")
        assert rollout.sampled_ids == sample.ids
        assert rollout.finished is (sample.ids[-1] in {closing, *join.eos_token_ids})


def test_families_are_told_apart():
    assert len({family.closing for family in FAMILIES}) == len(FAMILIES)


def test_a_system_prompt_stands_before_the_question(tokenizer):
    made = framed(tokenizer, frames.CHATML, *CHATML)
    frame = Frame(made, Chat("Be brief."))
    for prompt in ("How?", [{"role": "user", "content": "How?"}]):
        assert decode(made, encode_prompt(made, prompt, frame)) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
    # A special token that it spells is text.
    ids = encode_prompt(made, "How?", Frame(made, Chat("Say <|im_end|>.")))
    assert ids.count(made.convert_tokens_to_ids("<|im_end|>")) == 2


LOWER = frames.CHATML.replace("m['content']", "m['content'] | lower")
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (None, Chat("Be brief."), "system_prompt: expected a tokenizer with a chat template"),
        (None, Chat(None, OFF), "chat_template_kwargs: expected a tokenizer with a chat template"),
        (frames.GEMMA, Chat("Be brief."), "system_prompt: .*System role not supported; put it in"),
        (NO_SYSTEM, Chat("Be brief."), "system_prompt: .* leaves system messages out; put it in"),
        (LOWER, Chat("Be brief."), None),
        (frames.CHATML, Chat(None, OFF), "chat_template_kwargs: .* does not read 'enable_think"),
        # As NVIDIA's templates do, which take /no_think in the system prompt.
        (
            "{% set enable_thinking = true %}" + QWEN3,
            Chat(None, OFF),
            "chat_template_kwargs: .* does not read 'enable_think",
        ),
        (QWEN3, Chat(None, {"messages": []}), "chat_template_kwargs: .* own arguments, got 'mess"),
        (
            frames.CHATML + "{{ tools }}",
            Chat(None, {"tools": [print]}),
            "chat_template_kwargs: expected a JSON value at 'tools', .* got \\[<built-in function",
        ),
        (frames.GEMMA, Chat(None, {"bos_token": ""}), "chat_template_kwargs: .* got 'bos_token'"),
    ],
)
def test_what_a_template_cannot_do_is_refused(tokenizer, template, chat, message):
    made = framed(tokenizer, template, *CHATML)
    made.name_or_path = "org/model"
    if message is None:
        Frame(made, chat)
        return
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        Frame(made, chat)
    assert "\n" not in str(raised.value)


def test_tools_are_for_the_template_that_reads_them(tokenizer):
    made = copy.deepcopy(tokenizer)
    plain = "{% for m in messages %}{{ m.content }}{% endfor %} reply:"
    made.chat_template = {"default": plain, "tool_use": "{{ tools[0].name }}: " + plain}
    tools = Chat(template_kwargs={"tools": [{"name": "count"}]})
    for chat, text in ((None, "How? reply:"), (tools, "count: How? reply:")):
        assert made.decode(encode_prompt(made, "How?", Frame(made, chat))) == text


def check(tiny, made, chat, *prompts):
    rows = Dataset.from_list([{"prompt": prompt, "answer": "3"} for prompt in prompts])
    join = AnswerJoin(made, TEMPLATE, [made.eos_token_id], chat)
    check_dataset(rows, "data", tiny(vocab_size=len(made)), join, 8)


def test_a_row_that_does_not_fit_the_frame_is_named(tiny, tokenizer):
    made = framed(tokenizer, SMOLLM3, *CHATML)
    user = {"role": "user", "content": "How many?"}
    off = [{"role": "system", "content": "/no_think"}, user]
    on = [{"role": "system", "content": "Be brief."}, user]
    check(tiny, made, None, [user], on)
    with pytest.raises(
        ValueError, match=r"data: row 1: the chat template .* whether the model thi"
    ):
        check(tiny, made, None, on, off)
    check(tiny, made, Chat("/no_think"), [user])
    with pytest.raises(
        ValueError, match=r"data: row 1: system_prompt: .* a system message of thei"
    ):
        check(tiny, made, Chat("/no_think"), [user], on)
