"""Decoding with keys in place: the same samples whatever stands beside a row, and whenever."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from latro.engines import decoding
from latro.engines.transformers import TransformersEngine
from latro.model.sampling_form import SamplingForm
from latro.model.scoring import Scorer
from latro.rollout.answer_join import AnswerJoin
from latro_kernels import decode_attention
from scripts.make_tiny_model import ARCHITECTURES
from tests.latro.other_models import other_model

# A window shorter than a prompt and its completion, where the architecture has one.
WINDOWS = {
    "mistral": {"sliding_window": 7},
    "phi3": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "gemma2": {"sliding_window": 7},
}
OTHERS = [
    ("gpt_oss", {"sliding_window": 7}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ("nemotron", {}),
    ("llama4_text", {"attention_chunk_size": 9}),
    ("llama4_text", {"no_rope_layers": [1, 0], "attention_chunk_size": 5, "floor_scale": 3}),
]
PROMPTS = ["Tom has 9 pens. Tom gets 12. How many?", "Tom has 3.", "How", "gets 4 pens", "5"]
SETTINGS = {"num_samples": 3, "max_new_tokens": 12, "temperature": 0.8}


@pytest.fixture
def prompts(tokenizer):
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture
def sharp(tiny):
    """Make models with larger weights, in which what is attended to matters."""

    def make(architecture="llama", **options):
        model = tiny(architecture, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
        return model

    return make


def scored(model, prompt, sample, temperature):
    """Return the log-prob of each sampled token, from the logits of the whole sequence."""
    logits = model(torch.tensor([prompt + sample.ids]), use_cache=False).logits[0].double()
    logp = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return logp.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]


@pytest.mark.parametrize(
    ("architecture", "windowed"),
    [*((name, False) for name in ARCHITECTURES), *((name, True) for name in WINDOWS)],
)
def test_samples_tell_the_log_probs_of_the_whole_sequence(
    sharp, tokenizer, prompts, architecture, windowed
):
    model = sharp(architecture, **(WINDOWS[architecture] if windowed else {})).double()
    check_log_probs(model, tokenizer, prompts)


def check_log_probs(model, tokenizer, prompts):
    engine = TransformersEngine(model, tokenizer)
    assert isinstance(engine.form, SamplingForm)
    samples = engine.generate(prompts, seeds=[1, 2, 3, 4, 5], **SETTINGS)
    for prompt, group in zip(prompts, samples, strict=True):
        for sample in group:
            expected = scored(model, prompt, sample, SETTINGS["temperature"])
            # Norms, and some rotary tables, are fp32 even in an fp64 model.
            torch.testing.assert_close(
                torch.tensor(sample.logp, dtype=torch.float64), expected, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize(("architecture", "options"), OTHERS)
def test_samples_of_other_models_tell_the_log_probs_of_the_whole_sequence(
    tokenizer, prompts, architecture, options
):
    model = other_model(architecture, tokenizer, **options).double()
    check_log_probs(model, tokenizer, prompts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "cohere", *WINDOWS])
def test_log_probs_err_no_more_than_a_whole_forwards(
    sharp, tokenizer, prompts, architecture, dtype
):
    model = sharp(architecture, **WINDOWS.get(architecture, {})).to(dtype)
    samples = TransformersEngine(model, tokenizer).generate(
        prompts, seeds=[1, 2, 3, 4, 5], **SETTINGS
    )
    own = [
        (prompt, sample) for prompt, group in zip(prompts, samples, strict=True) for sample in group
    ]
    plain = [scored(model, p, s, SETTINGS["temperature"]) for p, s in own]
    model.double()
    true = torch.cat([scored(model, p, s, SETTINGS["temperature"]) for p, s in own])
    ours = torch.cat([torch.tensor(s.logp, dtype=torch.float64) for _, s in own])
    allowed = 2 * (torch.cat(plain) - true).abs().max() + 1e-5
    assert (ours - true).abs().max() <= allowed


def test_sampled_log_probs_are_the_policys(sharp, tokenizer, prompts):
    """As scoring by packed rows has them, so that importance ratios are 1."""
    model = sharp()
    samples = TransformersEngine(model, tokenizer).generate(
        prompts, seeds=[1, 2, 3, 4, 5], **SETTINGS
    )
    scorer = Scorer(model, temperature=SETTINGS["temperature"])
    join = AnswerJoin(tokenizer, "The answer is", [tokenizer.eos_token_id])
    rollouts = [
        [join(prompt, sample, "7") for sample in group]
        for prompt, group in zip(prompts, samples, strict=True)
    ]
    batch = scorer.collate(rollouts)
    sampled = batch.engine_logp
    drawn = ~sampled.isnan()
    assert drawn.sum() == sum(len(r.sampled_ids) for group in rollouts for r in group)
    ratio = (scorer(batch).logp - sampled)[drawn].exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-4)


def test_greedy_samples_tell_no_log_probs(tiny, tokenizer, prompts):
    samples = TransformersEngine(tiny(), tokenizer).generate(
        prompts, num_samples=2, max_new_tokens=3, temperature=0, seeds=[0] * 5
    )
    assert all(sample.logp is None for group in samples for sample in group)


def ends_early(model, tokenizer):
    """Let the end token be sampled about every tenth time, so that rows end at all lengths."""
    head = torch.nn.Linear(32, len(tokenizer))
    with torch.no_grad():
        head.weight.copy_(model.get_output_embeddings().weight)
        head.bias.zero_()
        head.bias[tokenizer.eos_token_id] = math.log(len(tokenizer) / 10)
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(head)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("most", [1, 2, 7])
def test_prompts_that_wait_get_the_same_samples(
    sharp, tokenizer, prompts, monkeypatch, architecture, most
):
    model = ends_early(sharp(architecture, tie_word_embeddings=False), tokenizer).eval()
    engine = TransformersEngine(model, tokenizer)
    settings = SETTINGS | {"num_samples": 4, "max_new_tokens": 40}
    seeds = [1, 2, 3, 4, 5]
    alone = [
        engine.generate([prompt], seeds=[seed], **settings)[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    lengths = {len(sample.ids) for group in alone for sample in group}
    assert len(lengths) > 5
    alive = []
    monkeypatch.setitem(decoding.MOST_ROWS, "cpu", most)
    together = engine.generate(
        prompts, seeds=seeds, progress=lambda tokens, rows: alive.append((tokens, rows)), **settings
    )
    # To the bit, log-probs included.
    assert together == alone
    # No step has more rows than may be, and no prefill more than its last prompt's beyond them.
    steps = [tokens for tokens, _ in alive]
    assert sum(steps) == sum(len(sample.ids) for group in alone for sample in group)
    assert max(steps) <= most + 3
    assert alive[-1][1] == 0
    # What goes on after a step is in the next one, but for rows whose turn has not come.
    waited = [rows > tokens for (_, rows), (tokens, _) in pairwise(alive)]
    assert most == 7 or any(waited)


def test_keys_grow_and_rows_move_without_a_trace(sharp, tokenizer, prompts, monkeypatch):
    engine = TransformersEngine(
        ends_early(sharp(tie_word_embeddings=False), tokenizer).eval(), tokenizer
    )
    settings = SETTINGS | {"max_new_tokens": 90}
    expected = engine.generate(prompts, seeds=[1, 2, 3, 4, 5], **settings)
    monkeypatch.setattr("latro.model.decoding._FIRST_ROOM", 1)
    assert engine.generate(prompts, seeds=[1, 2, 3, 4, 5], **settings) == expected
    assert max(len(sample.ids) for group in expected for sample in group) > 16


def test_rows_are_as_many_as_their_keys_have_room_for(tiny, tokenizer, prompts, monkeypatch):
    engine = TransformersEngine(tiny(), tokenizer)
    # Two layers of two heads of 8, keys and values, fp32.
    assert engine.form.bytes_per_token == 2 * 2 * 8 * 2 * 4
    longest = max(map(len, prompts))
    tokens = 12 + -(-longest // 3)
    monkeypatch.setattr(decoding, "CPU_KEY_BYTES", 4 * tokens * engine.form.bytes_per_token)
    rows = []
    engine.generate(
        prompts, seeds=[0] * 5, progress=lambda tokens, _: rows.append(tokens), **SETTINGS
    )
    # A prefill samples for whole prompts, two of three rows at first; a step for four rows.
    assert rows[:2] == [6, 4]
    assert set(rows[1:]) <= {1, 2, 3, 4}


def test_a_model_is_as_it_was_after_an_error(tiny, tokenizer, prompts):
    model = tiny().train()
    engine = TransformersEngine(model, tokenizer)
    forwards = [module.__dict__.get("forward") for module in model.modules()]

    def stop(tokens, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, seeds=[0] * 5, progress=stop, **SETTINGS)
    assert model.training
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards


@pytest.mark.parametrize("architecture", ["lfm2", "mamba", "qwen3_next", "bloom"])
def test_models_that_keep_more_than_keys_are_left_to_transformers(tokenizer, caplog, architecture):
    model = other_model(architecture, tokenizer)
    with caplog.at_level("INFO"):
        engine = TransformersEngine(model, tokenizer)
    assert isinstance(engine.form, str)
    assert f"sampled from by transformers' generate: {engine.form}" in caplog.text
    told = []
    samples = engine.generate(
        [[5, 6], [7]],
        num_samples=2,
        max_new_tokens=4,
        temperature=1.0,
        seeds=[0, 1],
        progress=lambda *step: told.append(step),
    )
    assert sum(tokens for tokens, _ in told) == sum(len(s.ids) for group in samples for s in group)
    for sample in (sample for group in samples for sample in group):
        assert sample.logp is not None
        assert len(sample.logp) == len(sample.ids)
        assert all(logp <= 0 for logp in sample.logp)


def test_attention_that_looks_elsewhere_is_found_out(tiny, tokenizer, monkeypatch):
    def careless(query, key, value, kept, rows, **options):
        # Every row reads the first prompt.
        rows = replace(rows, prompt=torch.zeros_like(rows.prompt))
        return decode_attention(query, key, value, kept, rows, **options)

    monkeypatch.setattr("latro.model.decoding.decode_attention", careless)
    assert "its hidden states differ by" in TransformersEngine(tiny(), tokenizer).form


def test_a_template_ends_rows_beside_others(tiny, tokenizer):
    """Rows follow written tokens here, so that the rule is seen at work in the loop."""
    model = tiny()
    engine = TransformersEngine(model, tokenizer)
    texts = [" so. The answer is 5", " The answer isn't 5. The answer is 6", " so"]
    written = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    seeds = {}

    def follow(module, args, kwargs, output):
        rows = kwargs["head_rows"]
        for seed in rows.seed.tolist():
            seeds.setdefault(seed, len(seeds))
        tokens = [
            written[seeds[seed]][number]
            for seed, number in zip(rows.seed.tolist(), rows.number.tolist(), strict=True)
        ]
        return output._replace(token=torch.tensor(tokens))

    model.register_forward_hook(follow, with_kwargs=True)
    ((samples),) = engine.generate(
        [[5, 6]],
        num_samples=3,
        max_new_tokens=50,
        temperature=1.0,
        seeds=[0],
        template="The answer is",
    )
    lengths = [len(tokenizer.encode(text)) for text in (" so. The answer is", texts[1])]
    assert [len(sample.ids) for sample in samples] == [lengths[0] + 1, lengths[1], len(written[2])]


def test_a_seed_and_the_number_of_a_sample_make_a_row(tiny, tokenizer):
    """More samples of a prompt are the same ones and others, which are all different."""
    engine = TransformersEngine(tiny(), tokenizer)
    few, more = (
        engine.generate([[5, 6]], num_samples=n, max_new_tokens=6, temperature=1.0, seeds=[3])[0]
        for n in (3, 6)
    )
    assert [s.ids for s in more[:3]] == [s.ids for s in few]
    assert len({tuple(s.ids) for s in more}) == 6
