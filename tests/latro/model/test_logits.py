from __future__ import annotations

import pytest
import torch
from torch import nn

from latro.model.scoring import Scorer
from latro_kernels.integrations.logits import LogitForm, logit_form
from tests.latro.model.test_scoring import full_logits_logp
from tests.latro.other_models import other_model

FORMS = {
    "falcon_h1": ({"lm_head_multiplier": 0.3}, LogitForm(1.0, 0.3, None)),
    "hyperclovax": ({"logits_scaling": 0.3}, LogitForm(1.0, 0.3, None)),
    "recurrent_gemma": ({"logits_soft_cap": 2.0}, LogitForm(1.0, 1.0, 2.0)),
    "minicpm3": ({"dim_model_base": 8}, LogitForm(0.25, 1.0, None)),
    "inkling_text": ({"logits_mup_width_multiplier": 4.0}, LogitForm(0.25, 1.0, None)),
    "nanochat": ({"final_logit_softcapping": 2.0}, LogitForm(1.0, 1.0, 2.0)),
    "opt": ({}, LogitForm(1.0, 1.0, None)),
}


@pytest.mark.parametrize("architecture", FORMS)
def test_scales_and_caps_are_followed_whatever_their_names(tokenizer, rollouts, architecture):
    options, form = FORMS[architecture]
    model = other_model(architecture, tokenizer, **options)
    scorer = Scorer(model, temperature=0.7)
    assert scorer.logit_form == form
    groups = rollouts(2, 4)
    expected = full_logits_logp(model, [r for group in groups for r in group], 0.7)
    logp = scorer(scorer.collate(groups)).logp
    torch.testing.assert_close(logp.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_found_is_exact_in_every_dtype(tiny, dtype):
    model = tiny("granite", logits_scaling=6.0).to(dtype)
    assert logit_form(model) == LogitForm(1.0, 1 / 6, None)


def changed(model, change):
    """`model`, with `change` of its logits at the end of its forward."""
    own = model.forward

    def forward(**options):
        output = own(**options)
        output.logits = change(output.logits)
        return output

    model.forward = forward
    return model


@pytest.mark.parametrize("first", ["scale", "softcap"])
def test_a_scale_and_a_cap_are_followed_in_either_order(tiny, rollouts, first):
    model = tiny().double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    in_order = {
        "scale": lambda z: 2 * torch.tanh(3 * z / 2),
        "softcap": lambda z: 3 * 2 * torch.tanh(z / 2),
    }
    changed(model, in_order[first])
    groups = rollouts(2, 4)
    expected = full_logits_logp(model, [r for group in groups for r in group], 0.7)
    for kl in (False, True):
        scorer = Scorer(model, temperature=0.7, backend="reference")
        batch = scorer.collate(groups)
        scores = scorer(batch, scorer.reference(batch) if kl else None)
        # transformers' norms compute in fp32 even in an fp64 model.
        torch.testing.assert_close(scores.logp.double(), expected, rtol=1e-5, atol=1e-5)
        assert not kl or scores.row_kl.abs().max() == 0


def masked(logits):
    """All but one token as they are: log-probs of the others change by less than a check saw."""
    logits = logits.clone()
    logits[..., -1] = torch.finfo(logits.dtype).min
    return logits


@pytest.mark.parametrize(
    "change",
    [
        masked,
        lambda z: z + 1e-3 * z**3,
        lambda z: -z,
        lambda z: z.relu(),
        lambda z: z[..., :-1],
        lambda z: z * torch.linspace(1, 1.001, z.shape[-1], device=z.device),
    ],
)
def test_other_formulas_are_refused(tiny, change):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not compute its logits as"):
        Scorer(changed(tiny(), change))


def test_a_scale_that_is_trained_is_refused(tiny, tokenizer):
    model = tiny()
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="with a scale and a softcap that stay as they are"):
        Scorer(changed(model, lambda z: z * model.scale))
    model.scale.requires_grad_(False)
    # Dory's head has a scale for each token, which are all 1 at the start.
    with pytest.raises(ValueError, match="DoryForCausalLM does not compute its logits as"):
        Scorer(other_model("dory", tokenizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_between_trunk_and_head_is_refused(tiny, tokenizer, dtype):
    with pytest.raises(ValueError, match="BertLMHeadModel does not compute its logits as"):
        Scorer(other_model("bert", tokenizer).to(dtype))
    model = tiny().to(dtype)
    norm = nn.RMSNorm(32, dtype=dtype)
    head = model.lm_head
    # As a model of one's own may have it; its weights are still all 1.
    model.lm_head = nn.Sequential(norm, head)
    model.get_output_embeddings = lambda: head
    with pytest.raises(ValueError, match="LlamaForCausalLM does not compute its logits as"):
        Scorer(model)
