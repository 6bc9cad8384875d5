from __future__ import annotations

import pytest
import torch
from torch import nn

from latro.model.dropout import disable_dropout
from scripts.make_tiny_model import two_layers
from tests.latro.other_models import other_model

RATE = 0.1
MODELS = {
    "opt": {
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "dropout": RATE,
        "attention_dropout": RATE,
        "layerdrop": RATE,
    },
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    "biogpt": {"hidden_dropout_prob": RATE, "attention_probs_dropout_prob": RATE},
    "bloom": {"n_layer": 2, "n_head": 4, "hidden_dropout": RATE, "attention_dropout": RATE},
    "falcon": {"hidden_dropout": RATE, "attention_dropout": RATE, "alibi": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": RATE, "embd_pdrop": RATE},
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2, "router_jitter_noise": 0.01},
}


@pytest.fixture
def with_dropout(tokenizer):
    """`with_dropout(architecture)`: a tiny model in training mode, with rates above 0."""

    def make(architecture, **options):
        options = {"pad_token_id": 0} | options
        return two_layers(architecture, tokenizer, **options).train()

    return make


def draws(model):
    """Whether two forwards in training mode differ."""
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    return not torch.equal(first, second)


@pytest.mark.parametrize("architecture", MODELS)
def test_training_draws_nothing(with_dropout, architecture):
    model = with_dropout(architecture, **MODELS[architecture])
    assert draws(model)
    disable_dropout(model)
    assert not draws(model)


@pytest.mark.parametrize("kind", ["boft", "oft"])
def test_dropout_of_an_adapters_own_class(tiny, kind):
    """Its classes are no `nn.Dropout`, and a new adapter, which changes nothing, shows no draw."""
    peft = pytest.importorskip("peft")
    make = {
        "boft": lambda: peft.BOFTConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], boft_block_size=4, boft_dropout=0.5
        ),
        "oft": lambda: peft.OFTConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4, r=0,
            module_dropout=0.5,
        ),
    }  # fmt: skip
    model = peft.get_peft_model(tiny(), make[kind]())
    disable_dropout(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    assert not draws(model.train())


def test_it_leaves_mode_and_random_state(with_dropout):
    for mode in (True, False):
        model = with_dropout("opt", **MODELS["opt"]).train(mode)
        before = torch.get_rng_state()
        disable_dropout(model)
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training == mode


def test_what_is_no_rate_stays(with_dropout):
    model = with_dropout("opt", **MODELS["opt"])
    model.model.drop_path = 7
    model.model.dropless = True
    model.model.drop_threshold = -1.5
    disable_dropout(model)
    assert (model.model.drop_path, model.model.dropless) == (7, True)
    assert model.model.drop_threshold == -1.5


class Noisy(nn.Module):
    """A layer whose noise no attribute names."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, 0.01

    def forward(self, x):
        y = self.inner(x)
        return y + self.scale * torch.randn_like(y) if self.training else y


def test_a_trunk_by_another_name_is_found(tokenizer):
    model = other_model("llama4_text", tokenizer).train()
    disable_dropout(model)
    assert not draws(model)


def test_other_noise_is_refused(tiny):
    model = tiny()
    model.model.layers[0].mlp = Noisy(model.model.layers[0].mlp)
    with pytest.raises(ValueError, match="model: LlamaForCausalLM draws random numbers in train"):
        disable_dropout(model)


def test_a_router_that_samples_experts_is_refused(with_dropout):
    model = with_dropout("phimoe", num_local_experts=4, num_key_value_heads=2)
    ids = torch.arange(5, 45)[None]
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        with pytest.raises(ValueError, match="model: PhimoeForCausalLM draws random numbers"):
            disable_dropout(model)
        # Its jitter noise is a threshold in evaluation too.
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_rates_of_an_adapter(tiny):
    peft = pytest.importorskip("peft")
    config = peft.LoHaConfig(
        target_modules=["q_proj", "up_proj"], rank_dropout=0.3, init_weights=False
    )
    model = peft.get_peft_model(tiny(), config).train()
    assert draws(model)
    disable_dropout(model)
    assert not draws(model)


def test_what_a_new_adapter_draws_shows(tiny):
    """It adds nothing yet, and so shows no draw of its own."""
    peft = pytest.importorskip("peft")
    config = peft.PveraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="model: LlamaForCausalLM draws random numbers in train"):
        disable_dropout(peft.get_peft_model(tiny(), config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_stays_as_it_was(tiny, dtype):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    model = peft.get_peft_model(tiny().to(dtype), config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    disable_dropout(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["opt", "mixtral"])
def test_the_policy_starts_as_its_reference(make_trainer, with_dropout, architecture):
    trainer = make_trainer(with_dropout(architecture, **MODELS[architecture]), max_steps=1)
    trainer.train()
    assert [e["kl"] for e in trainer.state.log_history if "kl" in e] == [0.0]
