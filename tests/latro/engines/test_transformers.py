from __future__ import annotations

import random
from contextlib import contextmanager

import pytest
import torch
from transformers import GenerationConfig

from latro.engines.decoding import MOST_ROWS
from latro.engines.transformers import TemplateStop, TransformersEngine, seed_of
from latro.model.sampling_form import SamplingForm
from latro.rollout.sequences import Sample
from scripts.make_tiny_model import ARCHITECTURES
from tests.latro.other_models import other_model

TEMPLATE = "The answer is"
STATEFUL = ["lfm2", "qwen3_5_text", "qwen3_next", "jamba", "bamba", "falcon_h1", "mamba", "mamba2"]
PROMPTS = ["Tom has 9 pens. Tom gets 12. How many?", "Tom has 3.", "How"]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "phi3", "qwen2", "gemma2"])
def test_shared_prefill_gives_what_the_model_alone_would_generate(tiny, tokenizer, architecture):
    # A window shorter than the prompts, where the architecture has one, must not change a thing.
    options = {"sliding_window": 8} if architecture in ("mistral", "gemma2") else {}
    model = tiny(architecture, **options)
    # Random models repeat one token; with larger weights each position has its own choice.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    assert_greedy_is_that_of_the_model_alone(model, tokenizer)


@pytest.mark.parametrize("architecture", STATEFUL)
def test_layers_that_keep_a_state_give_what_the_model_alone_would_generate(tokenizer, architecture):
    assert_greedy_is_that_of_the_model_alone(other_model(architecture, tokenizer), tokenizer)


def test_layers_that_keep_a_state_read_few_rows_at_once(tokenizer, monkeypatch):
    model = other_model("mamba2", tokenizer)
    engine = TransformersEngine(model, tokenizer)
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    options = {"num_samples": 2, "max_new_tokens": 6, "temperature": 1.0, "seeds": [0, 1, 2]}
    together = engine.generate(prompts, **options)
    monkeypatch.setitem(MOST_ROWS, "cpu", 4)
    rows = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: rows.append(len(args[0]))
    )
    apart = engine.generate(prompts, **options)
    hook.remove()
    assert max(rows) == 4
    assert [[s.ids for s in group] for group in apart] == [[s.ids for s in g] for g in together]


@contextmanager
def counted_tokens(model):
    """Yield a list that grows by the number of tokens of every forward through the trunk."""
    counts = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: counts.append(args[0].numel())
    )
    yield counts
    hook.remove()


def assert_prompts_are_read_once(model, tokenizer):
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    G, K, P = len(prompts), 5, max(map(len, prompts))
    engine = TransformersEngine(model, tokenizer)
    # The first call tries the model, where transformers samples from it.
    engine.generate(prompts, num_samples=1, max_new_tokens=1, temperature=1, seeds=[0, 1, 2])
    with counted_tokens(model) as counts:
        engine.generate(prompts, num_samples=K, max_new_tokens=1, temperature=1, seeds=[0, 1, 2])
    if isinstance(engine.form, SamplingForm):
        assert counts == [sum(len(prompt) for prompt in prompts)]
    else:
        # The prompt without its last token once, and the last token once per sample.
        assert counts == [G * (P - 1), G * K]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_goes_through_the_trunk_once_for_all_of_its_samples(tiny, tokenizer, architecture):
    assert_prompts_are_read_once(tiny(architecture), tokenizer)


@pytest.mark.parametrize("architecture", STATEFUL)
def test_layers_that_keep_a_state_read_a_prompt_once_too(tokenizer, architecture):
    assert_prompts_are_read_once(other_model(architecture, tokenizer), tokenizer)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_a_prompt_goes_once_through_a_trunk_with_adapters_too(tiny, tokenizer, architecture):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    assert_prompts_are_read_once(peft.get_peft_model(tiny(architecture), lora), tokenizer)


def test_a_prompt_of_one_token_has_nothing_to_share(tiny, tokenizer):
    for model, tokens in ((tiny(), 1), (other_model("lfm2", tokenizer), 3)):
        engine = TransformersEngine(model, tokenizer)
        engine.generate([[5]], num_samples=1, max_new_tokens=1, temperature=1, seeds=[0])
        with counted_tokens(model) as counts:
            (samples,) = engine.generate(
                [[5]], num_samples=3, max_new_tokens=1, temperature=1, seeds=[0]
            )
        assert counts == [tokens]
        assert len(samples) == 3


def test_a_model_that_returns_no_cache_is_refused(tokenizer):
    model = other_model("lfm2", tokenizer)
    model.register_forward_hook(lambda _, args, output: type(output)(logits=output.logits))
    with pytest.raises(ValueError, match=r"returns a cache .* got Lfm2ForCausalLM, which returns"):
        TransformersEngine(model, tokenizer).generate(
            [[5, 6]], num_samples=3, max_new_tokens=1, temperature=1, seeds=[0]
        )


def assert_greedy_is_that_of_the_model_alone(model, tokenizer):
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    shared = TransformersEngine(model, tokenizer).generate(
        prompts, num_samples=3, max_new_tokens=16, temperature=0, seeds=[0, 0, 0]
    )
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    alone = [
        model.generate(torch.tensor([p]), generation_config=plain)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert shared == [[Sample(ids)] * 3 for ids in alone]
    assert len(set(map(tuple, alone))) == len(prompts)


def test_a_model_that_does_not_know_padding_is_refused(tokenizer):
    with pytest.raises(ValueError, match="a cache of transformers, got RwkvForCausalLM"):
        TransformersEngine(other_model("rwkv", tokenizer), tokenizer)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("trocr", "counts positions along a padded row, got TrOCRForCausalLM, whose log-probs"),
        ("cpmant", "reads padding .*, got CpmAntForCausalLM, whose log-probs .* differ by"),
        ("bart", "generate samples from, got BartForCausalLM, where it fails: list index"),
    ],
)
def test_a_model_that_generate_samples_from_in_another_way_is_refused(
    tokenizer, architecture, message
):
    engine = TransformersEngine(other_model(architecture, tokenizer), tokenizer)
    with pytest.raises(ValueError, match=message):
        engine.generate([[5, 6]], num_samples=3, max_new_tokens=1, temperature=1, seeds=[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["bloom", "falcon", "mpt", "xglm", *STATEFUL])
def test_a_model_that_generate_samples_from_as_it_is_scored_is_taken(
    tokenizer, architecture, dtype
):
    model = other_model(architecture, tokenizer).to(dtype)
    samples = TransformersEngine(model, tokenizer).generate(
        [[5, 6, 7], [8]], num_samples=2, max_new_tokens=2, temperature=1, seeds=[0, 1]
    )
    assert [len(group) for group in samples] == [2, 2]


def test_a_prompts_samples_depend_on_its_seed_alone(tiny, tokenizer):
    engine = TransformersEngine(tiny(), tokenizer)
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    options = {"num_samples": 4, "max_new_tokens": 8, "temperature": 1.0}
    first = engine.generate(prompts, seeds=[1, 2, 3], **options)
    state = torch.get_rng_state()
    assert engine.generate(prompts, seeds=[1, 2, 3], **options) == first
    assert torch.equal(torch.get_rng_state(), state)
    other = engine.generate(prompts, seeds=[1, 5, 3], **options)
    assert [a == b for a, b in zip(first, other, strict=True)] == [True, False, True]
    # Samples do not depend on the prompts beside theirs either.
    assert engine.generate(prompts[1:2], seeds=[2], **options) == first[1:2]
    assert len({tuple(sample.ids) for sample in first[0]}) == 4


def long_rope(tiny, architecture, boundary=24):
    """Return a model with two sets of rotary frequencies; large weights make every token count."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": boundary,
    }
    model = tiny(
        architecture, rope_parameters=rope, original_max_position_embeddings=boundary
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("architecture", ["phi3", "llama"])
@pytest.mark.parametrize(
    "lengths",
    [(5, 60), (5, 12, 20, 23, 25, 26, 40), (25,), (25, 25, 11), (26, 25), (23, 22, 21), (1, 30)],
)
def test_a_long_rope_model_draws_from_what_it_scores(tiny, tokenizer, architecture, lengths):
    model = long_rope(tiny, architecture)
    numbers = random.Random(0)
    prompts = [[numbers.randrange(1, len(tokenizer)) for _ in range(n)] for n in lengths]
    engine = TransformersEngine(model, tokenizer)
    options = {"num_samples": 2, "max_new_tokens": 16, "temperature": 0}
    samples = engine.generate(prompts, seeds=[0] * len(prompts), **options)
    for prompt, group in zip(prompts, samples, strict=True):
        assert [group] == engine.generate([prompt], seeds=[0], **options)
        limit = 16 if len(prompt) > 24 else min(16, 24 - len(prompt))
        for ids in (sample.ids for sample in group):
            assert len(ids) == limit or ids[-1] == tokenizer.eos_token_id
            # The likeliest tokens where the whole sequence is read at once, as in scoring.
            logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[0]
            assert ids == logits[len(prompt) - 1 : -1].argmax(dim=1).tolist()


def test_a_long_rope_models_samples_do_not_depend_on_a_long_prompt_beside_them(tiny, tokenizer):
    engine = TransformersEngine(long_rope(tiny, "phi3"), tokenizer)
    options = {"num_samples": 4, "max_new_tokens": 8, "temperature": 1.0}
    short, long = [[5, 6, 7], [*range(1, 61)]]
    together = engine.generate([short, long], seeds=[1, 2], **options)
    assert together[:1] == engine.generate([short], seeds=[1], **options)
    assert together[1:] == engine.generate([long], seeds=[2], **options)


def test_a_prompt_as_long_as_the_short_frequencies_is_refused(tiny, tokenizer):
    engine = TransformersEngine(long_rope(tiny, "phi3"), tokenizer)
    with pytest.raises(ValueError, match=r"expected fewer or more than 24 tokens.* got 24"):
        engine.generate(
            [[*range(1, 25)]], num_samples=1, max_new_tokens=1, temperature=0, seeds=[0]
        )


def test_seeds_of_different_places_differ():
    seeds = {seed_of(a, b, c) for a in range(3) for b in range(20) for c in range(20)}
    assert len(seeds) == 1200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3) != seed_of(3, 2, 1)


def test_a_padding_token_that_is_the_end_token_is_no_special_case(tiny, tokenizer):
    engine = TransformersEngine(tiny(), tokenizer)
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    options = {"num_samples": 4, "max_new_tokens": 8, "temperature": 1.0, "seeds": [1, 2, 3]}
    without = engine.generate(prompts, **options)
    tokenizer.pad_token = tokenizer.eos_token
    try:
        assert engine.generate(prompts, **options) == without
    finally:
        tokenizer.pad_token = None


def test_the_whole_distribution_is_sampled_whatever_the_generation_config_says(tiny, tokenizer):
    model = tiny()
    own = GenerationConfig(top_k=1, repetition_penalty=2.0, eos_token_id=tokenizer.eos_token_id)
    model.generation_config = own
    prompt = tokenizer.encode(PROMPTS[0])
    (draws,) = TransformersEngine(model, tokenizer).generate(
        [prompt], num_samples=2000, max_new_tokens=1, temperature=0.5, seeds=[0]
    )
    assert model.generation_config is own
    counts = torch.bincount(torch.tensor([d.ids[0] for d in draws]), minlength=len(tokenizer))
    expected = (model(torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1) * 2000
    # Pearson's statistic has mean V - 1 and variance 2(V - 1) when the two agree.
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(tokenizer) - 1
    assert abs(statistic - freedom) < 6 * (2 * freedom) ** 0.5


def stopped(tokenizer, prompt, rows, template):
    """Return the length at which each row ends, fed token by token with an end token behind."""
    eos = tokenizer.eos_token_id
    width = max(map(len, rows)) + 1
    stop = TemplateStop(tokenizer, len(prompt), len(rows), [eos], template)
    for length in range(1, width + 1):
        step = [(prompt + r + [eos] * width)[: len(prompt) + length] for r in rows]
        done = stop(torch.tensor(step), torch.empty(0))
    assert done.all()
    return stop.lengths


def test_the_template_is_found_however_it_is_cut_into_tokens(tokenizer):
    prompt = tokenizer.encode("How many?")
    whole = tokenizer.encode(" so. The answer is 5 so")
    letters = [i for c in " so. The answer is 5 so" for i in tokenizer.encode(c)]
    until = len(" so. The answer is")
    assert letters != whole
    rows = [whole, letters, tokenizer.encode(" The answer"), tokenizer.encode(" so")]
    # The token after the template shows that its last word has ended. The end token ends the other
    # rows, and no row ends twice.
    assert stopped(tokenizer, prompt, rows, TEMPLATE) == [
        len(tokenizer.encode(" so. The answer is")) + 1,
        until + 1,
        len(rows[2]) + 1,
        len(rows[3]) + 1,
    ]


@pytest.mark.parametrize(
    ("template", "text", "ends"),
    [
        (
            TEMPLATE,
            "The answer isn't 6. so the answer IS 5. So",
            "The answer isn't 6. so the answer IS ",
        ),
        (TEMPLATE, "So the answer isé. The answer is“5", "So the answer isé. The answer is“"),
        (f"{TEMPLATE} ", "The answers. The answer is: 5", "The answers. The answer is:"),
        ("Answer:", "canswer: 4. Answer:5", "canswer: 4. Answer:"),
        ("answer", "answers, answering, answer 5", "answers, answering, answer "),
        ("\n\n", " So. \nTom\n\nTom", " So. \nTom\n\n"),
        ("答案是", "所以答案是5", "所以答案是"),
    ],
)
def test_a_row_ends_where_the_template_is_whole(tokenizer, template, text, ends):
    prompt = tokenizer.encode("How many?")
    row = [i for c in text for i in tokenizer.encode(c)]
    kept = [i for c in ends for i in tokenizer.encode(c)]
    assert stopped(tokenizer, prompt, [row], template) == [len(kept)]


def test_what_stands_before_the_window_is_not_forgotten(tokenizer):
    """A template inside a word ends no row, even if the word begins before the window."""
    prompt = tokenizer.encode("How many?")
    row = [i for c in "canswer:" + " 5" * 20 for i in tokenizer.encode(c)]
    assert stopped(tokenizer, prompt, [row], "Answer:") == [len(row) + 1]


def test_a_template_in_the_prompt_does_not_end_a_rationale(tokenizer):
    prompt = tokenizer.encode("Finish with The answer is")
    stop = TemplateStop(tokenizer, len(prompt), 1, [tokenizer.eos_token_id], TEMPLATE)
    assert not stop(torch.tensor([[*prompt, *tokenizer.encode(" 7")]]), torch.empty(0)).any()
