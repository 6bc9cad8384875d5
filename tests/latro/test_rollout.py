from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from latro.rollout import AnswerJoin, TemplateStop, decode, eos_token_ids, generate

TEMPLATE = "The answer is"
PROMPTS = ["Tom has 9 pens. Tom gets 12. How many?", "Tom has 3.", "How"]


@pytest.fixture
def join(tokenizer):
    return AnswerJoin(tokenizer, TEMPLATE, [tokenizer.eos_token_id])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "phi3", "qwen2", "gemma2"])
def test_shared_prefill_gives_what_the_model_alone_would_generate(tiny, tokenizer, architecture):
    # A window shorter than the prompts, where the architecture has one, must not change a thing.
    options = {"sliding_window": 8} if architecture in ("mistral", "gemma2") else {}
    model = tiny(architecture, **options)
    # Flat random models repeat one token; larger weights make each position's choice its own.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    shared = generate(
        model, tokenizer, prompts, num_samples=3, max_new_tokens=16, temperature=0, seed=0
    )
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    for prompt, samples in zip(prompts, shared, strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=plain)
        assert samples == [alone[0, len(prompt) :].tolist()] * 3


def test_samples_depend_on_the_seed_alone(tiny, tokenizer):
    model = tiny()
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    options = {"num_samples": 4, "max_new_tokens": 8, "temperature": 1.0}
    first = generate(model, tokenizer, prompts, seed=1, **options)
    state = torch.get_rng_state()
    assert generate(model, tokenizer, prompts, seed=1, **options) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(model, tokenizer, prompts, seed=2, **options) != first
    assert len({tuple(ids) for ids in first[0]}) == 4


def test_a_padding_token_that_is_the_end_token_is_no_special_case(tiny, tokenizer):
    model = tiny()
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    options = {"num_samples": 4, "max_new_tokens": 8, "temperature": 1.0, "seed": 1}
    without = generate(model, tokenizer, prompts, **options)
    tokenizer.pad_token = tokenizer.eos_token
    try:
        assert generate(model, tokenizer, prompts, **options) == without
    finally:
        tokenizer.pad_token = None


def test_the_whole_distribution_is_sampled_whatever_the_generation_config_says(tiny, tokenizer):
    model = tiny()
    own = GenerationConfig(top_k=1, repetition_penalty=2.0, eos_token_id=tokenizer.eos_token_id)
    model.generation_config = own
    prompt = tokenizer.encode(PROMPTS[0])
    draws = generate(
        model, tokenizer, [prompt], num_samples=2000, max_new_tokens=1, temperature=0.5, seed=0
    )[0]
    assert model.generation_config is own
    counts = torch.bincount(torch.tensor([d[0] for d in draws]), minlength=len(tokenizer))
    expected = (model(torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1) * 2000
    # Pearson's statistic has mean V - 1 and variance 2(V - 1) when the two agree.
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(tokenizer) - 1
    assert abs(statistic - freedom) < 6 * (2 * freedom) ** 0.5


def test_the_template_is_found_however_it_is_cut_into_tokens(tokenizer):
    prompt = tokenizer.encode("How many?")
    eos = tokenizer.eos_token_id
    whole = tokenizer.encode(" so. The answer is")
    letters = [i for c in " so. The answer is" for i in tokenizer.encode(c)]
    assert letters != whole
    rows = [whole, letters, tokenizer.encode(" The answer"), [*tokenizer.encode(" so"), eos]]
    width = max(map(len, rows))
    stop = TemplateStop(tokenizer, len(prompt), len(rows), [eos], TEMPLATE)
    for length in range(1, width + 1):
        step = [(prompt + r + [eos] * width)[: len(prompt) + length] for r in rows]
        done = stop(torch.tensor(step), torch.empty(0))
    # Padding with the end token ends the third row where it begins, and no other row twice.
    assert stop.lengths == [len(whole), len(letters), len(rows[2]) + 1, len(rows[3])]
    assert done.tolist() == [True] * 4


def test_a_template_in_the_prompt_does_not_end_a_rationale(tokenizer):
    prompt = tokenizer.encode("Finish with The answer is")
    stop = TemplateStop(tokenizer, len(prompt), 1, [tokenizer.eos_token_id], TEMPLATE)
    assert not stop(torch.tensor([[*prompt, *tokenizer.encode(" 7")]]), torch.empty(0)).any()


def test_join_after_the_template_keeps_the_sampled_ids(tokenizer, join):
    prompt = tokenizer.encode("How many?")
    # Cut letter by letter, as a policy may; the ids are kept, not tokenised again.
    sampled = [i for c in " 2+3=5. The answer is" for i in tokenizer.encode(c)]
    rollout = join(prompt, [*sampled, *tokenizer.encode(" 6")], "5")
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
    rollout = join(prompt, [*text, tokenizer.eos_token_id], "5")
    assert rollout.sampled_ids == [*text, tokenizer.eos_token_id]
    assert rollout.finished
    assert rollout.rationale_ids == text
    assert decode(tokenizer, rollout.input_ids) == "How many? 2+3=5. The answer is 5"


def test_join_at_the_length_limit(tokenizer, join):
    rollout = join(tokenizer.encode("How many?"), tokenizer.encode(" 2+3"), "5")
    assert not rollout.finished
    assert rollout.answer_start == len(rollout.sampled_ids)
    assert decode(tokenizer, rollout.input_ids) == "How many? 2+3 The answer is 5"


@pytest.mark.parametrize(("prompt", "joint"), [("How many?", " "), ("How many?\n", "")])
def test_an_empty_rationale_is_scored(tokenizer, join, prompt, joint):
    eos = tokenizer.eos_token_id
    rollout = join(tokenizer.encode(prompt), [eos], "5")
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
        assert AnswerJoin(tokenizer, TEMPLATE, [eos])([7], [8], "5").answer_ids[-1] == eos
        bare = AnswerJoin(tokenizer, TEMPLATE, [])([7], [8], "5")
        assert decode(tokenizer, bare.answer_ids).endswith("is 5")
    finally:
        tokenizer.eos_token = "<|endoftext|>"


@given(text=st.text(alphabet="Tom has59=.+é ", max_size=40), answer=st.integers(0, 10**6))
def test_any_rationale_reads_on_in_its_answer(tokenizer_text, text, answer):
    tokenizer, join = tokenizer_text
    rollout = join(tokenizer.encode("How?"), tokenizer.encode(text), str(answer))
    read = decode(tokenizer, rollout.input_ids)
    space = "" if text[-1:].isspace() else " "
    assert read == f"How?{text}{space}The answer is {answer}"


@pytest.fixture(scope="session")
def tokenizer_text(tokenizer):
    return tokenizer, AnswerJoin(tokenizer, TEMPLATE, [tokenizer.eos_token_id])
