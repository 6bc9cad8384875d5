from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BartConfig, BartForCausalLM, GPT2Config, GPT2LMHeadModel

from latro.model.packing import collate
from latro.model.scoring import Scorer
from scripts.make_tiny_model import ARCHITECTURES
from tests.latro.other_models import other_model

CPU = torch.device("cpu")


def full_logits_logp(model, rollouts, temperature):
    """Each row's log-prob from the model's own logits, one unpadded sequence at a time."""
    rows = []
    for r in rollouts:
        logits = model(input_ids=torch.tensor([r.input_ids])).logits[0].double() / temperature
        logp = logits.log_softmax(-1)
        first = len(r.prompt_ids) - 1
        rows += [logp[first + i, token] for i, token in enumerate(r.sampled_ids)]
        first += r.answer_start
        rows += [logp[first + j, token] for j, token in enumerate(r.answer_ids)]
    return torch.stack(rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_equal_the_models_own_logits(tiny, rollouts, architecture, temperature):
    # Values away from 1 (or from "none"), so that a scale left out or applied twice shows.
    options = {
        "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 8},
        "mistral": {"sliding_window": 8},
        "phi3": {"sliding_window": 8},
        "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 0.25},
    }.get(architecture, {})
    model = tiny(architecture, **options)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    groups = rollouts(2, 4)
    expected = full_logits_logp(model, [r for group in groups for r in group], temperature)
    scorer = Scorer(model, temperature=temperature)
    assert scorer.packed
    for packed in (True, False):
        scores = scorer(collate(groups, CPU, packed=packed))
        torch.testing.assert_close(scores.logp.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("architecture", ["jamba", "minimax", "xlstm"])
def test_a_state_that_looks_like_rounding_is_not_packed(tokenizer, architecture):
    """In bf16, what small layers make of another branch's tokens is below what is allowed."""
    model = other_model(architecture, tokenizer).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(4)
    assert Scorer(model).why_not_packed == "a layer reads tokens of other sequences"


@pytest.mark.parametrize("architecture", ["lfm2", "qwen3_5_text"])
def test_an_adapter_of_the_convolution_leaves_a_model_packed(tokenizer, architecture):
    model = other_model(architecture, tokenizer)
    (name, convolution), *_ = (
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv1d)
    )
    config = LoraConfig(target_modules=[name], r=convolution.groups)
    scorer = Scorer(get_peft_model(model, config))
    assert scorer.packed, scorer.why_not_packed


def test_a_row_of_more_positions_than_a_decoder_counts_is_not_packed():
    """BART counts positions along the row, and has a table of them."""
    config = BartConfig(
        vocab_size=97,
        d_model=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        max_position_embeddings=16,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    assert Scorer(BartForCausalLM(config)).why_not_packed == "index out of range in self"


@pytest.mark.parametrize("architecture", ["bloom", "mamba", "jamba"])
def test_what_cannot_be_packed_is_scored_padded(tokenizer, rollouts, caplog, architecture):
    model = other_model(architecture, tokenizer)
    attention = model.config._attn_implementation
    groups = rollouts(2, 4)
    expected = full_logits_logp(model, [r for group in groups for r in group], 1.0)
    scorer = Scorer(model)
    assert not scorer.packed
    assert model.config._attn_implementation == attention
    assert "own copy of the prompt, padded" in caplog.text
    logp = scorer(scorer.collate(groups)).logp
    torch.testing.assert_close(logp.double(), expected, rtol=2e-5, atol=2e-5)


def test_a_model_that_cannot_share_prefixes_is_as_it_was(tokenizer):
    """This one's layers ask for the name of their attention, and else leave their choice out."""
    model = other_model("deepseek_v32", tokenizer)
    ids = torch.arange(5, 45)[None]
    before = model(input_ids=ids, use_cache=False).logits
    assert not Scorer(model).packed
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_running_out_of_memory_does_not_count_as_being_unable_to_pack(tiny, monkeypatch):
    def attend(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("latro.model.attention._by_segment", attend)
    with pytest.raises(torch.OutOfMemoryError):
        Scorer(tiny())


def test_a_model_whose_trunk_is_not_found_is_refused(monkeypatch):
    # As code of a model's own may have it.
    monkeypatch.setattr(GPT2LMHeadModel, "base_model_prefix", "misspelt")
    monkeypatch.setattr(GPT2LMHeadModel, "get_output_embeddings", lambda self: self.lm_head)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="a trunk and a head, got GPT2LMHeadModel, which names no"):
        Scorer(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kl_equals_that_of_the_models_own_logits(tiny, rollouts, architecture):
    options = {
        "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 8},
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 0.25},
    }.get(architecture, {})
    models = [tiny(architecture, seed=seed, **options) for seed in (1, 2)]
    (group,) = rollouts(1, 4)
    batch = collate([group], CPU, packed=True)
    expected = []
    for r in group:
        log_p, log_q = (
            (m(input_ids=torch.tensor([r.input_ids])).logits[0].double() / 0.7).log_softmax(-1)
            for m in models
        )
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        first = len(r.prompt_ids) - 1
        answer = first + r.answer_start
        expected += [kl[first : first + len(r.sampled_ids)], kl[answer:][: len(r.answer_ids)]]
    policy, initial = (Scorer(m, temperature=0.7) for m in models)
    row_kl = policy(batch, initial.reference(batch)).row_kl
    torch.testing.assert_close(row_kl.double(), torch.cat(expected), rtol=1e-4, atol=1e-6)
    assert (policy(batch, policy.reference(batch)).row_kl == 0).all()


def test_padding_and_company_change_nothing(tiny, rollouts):
    scorer = Scorer(tiny())
    (group,) = rollouts(1, 4)
    together = scorer(scorer.collate([group])).logp
    apart = torch.cat([scorer(scorer.collate([[r]])).logp for r in group])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_autocast_scores_in_its_dtype(tiny, rollouts):
    model = tiny()
    (group,) = rollouts(1, 4)
    scorer = Scorer(model)
    batch = scorer.collate([group])
    exact = scorer(batch).logp
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = scorer(batch).logp
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1
    rounded.sum().backward()
    assert model.get_output_embeddings().weight.grad.dtype == torch.float32


def test_a_model_with_logits_of_its_own_making_is_refused(tiny):
    model = tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)

    def doubled(module, args, output):
        output.logits = output.logits * 2
        return output

    model.register_forward_hook(doubled)
    with pytest.raises(ValueError, match="does not compute its logits as"):
        Scorer(model)


@pytest.mark.parametrize(
    ("dtype", "size", "temperature"), [(torch.float32, 200, 1e-3), (torch.bfloat16, 20, 0.05)]
)
def test_a_low_temperature_multiplies_rounding_and_refuses_no_model(tiny, dtype, size, temperature):
    model = tiny().to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(size)
    assert Scorer(model, temperature=temperature).temperature == temperature

    class Shifted(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if getattr(output, "logits", None) is not None:
                output.logits[..., 0] += 1
            return output

    model = tiny().to(dtype)
    model.__class__ = Shifted
    with pytest.raises(ValueError, match="does not compute its logits as"):
        Scorer(model, temperature=temperature)


def test_the_checks_of_a_model_are_not_of_tf32(tiny):
    """TF32 rounds by more than a check of an fp32 model allows."""
    matmul = torch.backends.cuda.matmul
    model = tiny()
    seen = []
    model.model.register_forward_hook(lambda *_: seen.append(matmul.fp32_precision))
    given = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        Scorer(model)
        assert set(seen) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "high"
        assert matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(given)


def test_nan_weights_are_named(tiny):
    model = tiny().train()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite"):
        Scorer(model)
    assert model.training
