"""Weights of 4 and 8 bits under an adapter, and optimisers with states of 8 bits."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from latro import LatroConfig, LatroTrainer
from latro.config.engine import EngineArguments
from latro.config.model import ModelArguments, PeftArguments
from latro.engines.make import make_engine
from latro.engines.transformers import TransformersEngine
from latro.evaluate import evaluate
from latro.loading import load_model
from latro.model.adapters import lora_config, without_wrapper
from latro.model.quantized import (
    check_shardable,
    is_quantized,
    loading_options,
    quantization_config,
)
from latro.model.scoring import Scorer
from latro.model.weights_in_8_bits import WeightsIn8Bits, dequantized
from latro.probe import probe
from latro.reporting.run_summary import run_of
from latro.run.identity import RUN_FILE
from latro.sft import sft
from latro.train import train
from scripts.make_tiny_model import two_layers
from tests.latro.hostile import ROWS

KINDS = {
    "nf4": {"load_in_4bit": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nested": {"load_in_4bit": True, "use_bnb_nested_quant": True},
    "int8": {"load_in_8bit": True},
}
LORA = {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tiny, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    tiny(attention_bias=True, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder, kind, **more):
    return load_model(ModelArguments(str(folder), **KINDS[kind], **more))[0]


def weight_of(layer):
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return dequantized(layer.weight.data, layer.weight.SCB, torch.float32)


def plain_twin(folder, quantised):
    """Return a model that is not quantised, of the weights that the quantised one stands for."""
    model, _ = load_model(ModelArguments(str(folder)))
    layers = dict(quantised.named_modules())
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layers[name], (Linear4bit, WeightsIn8Bits)):
                layer.weight.copy_(weight_of(layers[name]))
    return model


def adapted(model):
    """Return a model with an adapter that adds something."""
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) / 10)
    return model


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_what_is_kept_is_quantised_and_the_rest_is_not(folder, kind):
    model = loaded(folder, kind)
    assert is_quantized(model)
    assert type(model.lm_head) is nn.Linear
    layers = [m for m in model.modules() if isinstance(m, (Linear4bit, WeightsIn8Bits))]
    assert len(layers) == 2 * 7
    assert not any(layer.weight.requires_grad for layer in layers)
    plain, _ = load_model(ModelArguments(str(folder)))
    assert not is_quantized(plain)
    assert model.num_parameters() == plain.num_parameters()
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            found = weight_of(model.get_submodule(name))
            far = (found - layer.weight).abs().max() / layer.weight.abs().max()
            # Half the largest step between the values that the bits stand for.
            assert far < (0.005 if kind == "int8" else 0.17)
    if kind != "int8":
        state = layers[0].weight.quant_state
        assert (state.quant_type, state.nested) == (
            "fp4" if kind == "fp4" else "nf4",
            kind == "nested",
        )


def test_a_width_that_bitsandbytes_reads_wrongly_is_refused(tiny, tokenizer, tmp_path):
    tiny(hidden_size=48, intermediate_size=112).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load_in_4bit: .* on a CPU.*q_proj has 48"):
        loaded(tmp_path, "nf4")
    assert is_quantized(loaded(tmp_path, "int8"))


def scored(scorer, groups):
    scores = scorer(scorer.collate(groups))
    scorer.model.zero_grad()
    scores.logp.sum().backward()
    grads = [p.grad.double() for p in scorer.model.parameters() if p.requires_grad]
    return [scores.logp.detach().double(), *grads]


def test_scores_and_gradients_are_those_of_the_weights_it_stands_for(folder, kind, rollouts):
    """Gated by what fp32 costs a model that is not quantised."""
    groups = rollouts(2, 3)
    model = loaded(folder, kind)
    twin = adapted(plain_twin(folder, model))
    scorer = Scorer(adapted(model))
    assert scorer.packed
    truth = scored(Scorer(copy.deepcopy(twin).double(), backend="reference"), groups)
    unfused = scored(Scorer(twin), groups)
    for ours, theirs, exact in zip(scored(scorer, groups), unfused, truth, strict=True):
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-5


def test_sampling_leaves_it_as_it_was(folder, kind, tokenizer, rollouts):
    """In eval mode bitsandbytes would pack 4 bits anew for some CPUs, without a gradient."""
    scorer = Scorer(adapted(loaded(folder, kind)))
    groups = rollouts(2, 3)
    before = scored(scorer, groups)
    TransformersEngine(scorer.model, tokenizer).generate(
        [tokenizer.encode("How many?")], num_samples=2, max_new_tokens=4, temperature=1.0, seeds=[1]
    )
    after = scored(scorer, groups)
    assert all(map(torch.equal, before, after))
    assert all(grad.any() for grad in after)
    # Rows do not depend on those beside them.
    with torch.no_grad():
        alone = torch.cat([scorer(scorer.collate([group])).logp for group in groups])
    torch.testing.assert_close(alone.double(), before[0])


def test_4_bits_compute_in_the_dtype_of_the_model(folder):
    model = loaded(folder, "nf4", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    kinds = {m.compute_dtype for m in model.modules() if isinstance(m, Linear4bit)}
    assert kinds == {torch.bfloat16}


def test_a_trained_bias_has_its_gradient(folder):
    model = loaded(folder, "int8")
    twin = plain_twin(folder, model)
    grads = []
    for each in (model, twin):
        bias = each.model.layers[0].self_attn.q_proj.bias
        bias.requires_grad_(True)
        each(input_ids=torch.arange(1, 9)[None]).logits.logsumexp(-1).sum().backward()
        grads.append(bias.grad)
    torch.testing.assert_close(*grads)


@pytest.fixture
def place(folder, tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "data.jsonl").write_text(lines)
    return tmp_path


def arguments(folder, place, *more):
    return [
        *("--model_name_or_path", str(folder), "--dataset_name", str(place / "data.jsonl")),
        *("--num_eval_examples", "2", "--max_steps", "4", "--per_device_train_batch_size", "2"),
        *("--max_completion_length", "6", "--learning_rate", "1e-2", "--save_strategy", "steps"),
        *("--save_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true", *more),
        *("--output_dir", str(place / "run")),
    ]


QLORA = ("--use_peft", "true", "--lora_target_modules", "all-linear", "--lora_r", "4")
FOUR = ("--load_in_4bit", "true", "--bnb_4bit_use_double_quant", "true")


@pytest.mark.parametrize("bits", [FOUR, ("--load_in_8bit", "true")], ids=["4", "8"])
def test_a_run_is_trained_resumed_evaluated_and_probed(folder, place, bits):
    """With 8-bit optimiser states; π_0 is the model with its adapter off."""
    argv = arguments(folder, place, *QLORA, *bits, "--num_generations", "4")
    train([*argv, "--optim", "adamw_8bit"])
    run = place / "run"
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    kl = [entry["kl"] for entry in lines if "reward" in entry]
    assert kl[0] == 0
    assert all(kl[1:])
    # The adapter is saved alone.
    assert not list(run.glob("model*.safetensors"))
    whole = load_file(run / "checkpoint-4" / "adapter_model.safetensors")
    facts = json.loads((run / "checkpoint-2" / RUN_FILE).read_text())["decides"]
    assert facts["model config: quantization_config"]["load_in_4bit"] is (bits is FOUR)
    resume = ("--optim", "adamw_8bit", "--resume_from_checkpoint", str(run / "checkpoint-2"))
    train([*argv, *resume])
    again = load_file(run / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    other = arguments(folder, place, *QLORA, "--num_generations", "4", *resume)
    with pytest.raises(ValueError, match="initial weights was"):
        train(other)
    shared = [
        *("--model_name_or_path", str(run), "--dataset_name", str(place / "data.jsonl")),
        *("--eval_split", "validation", "--num_samples", "1", "--max_completion_length", "6"),
    ]
    found = []
    for more in (bits, ()):
        evaluated = evaluate([*shared, *more, "--output", str(place / f"{len(more)}.json")])
        probed = probe([*shared, *more, "--output", str(place / f"probe-{len(more)}.json")])
        found.append((evaluated["metrics"], probed["summary"]))
    # The same adapter on weights that are not quantised is another model.
    assert found[0] != found[1]
    with pytest.raises(ValueError, match="load_in_"):
        evaluate([*shared, "--output", str(place / f"{len(bits)}.json")])


def test_the_answers_alone_may_be_learnt_by_sft(folder, place):
    results = sft(arguments(folder, place, *QLORA, *FOUR, "--target", "answer"))
    assert results["final"]["eval_answer_logp"] > results["base"]["eval_answer_logp"]


@pytest.fixture
def trainer_of(folder, tokenizer, task, dataset, tmp_path):
    def make(model, **settings):
        config = LatroConfig(
            output_dir=str(tmp_path / "run"),
            num_generations=2,
            max_completion_length=4,
            max_steps=2,
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
            **settings,
        )
        return LatroTrainer(model, config, dataset, tokenizer, task, eval_dataset=dataset)

    return make


def test_without_an_adapter_training_is_refused(folder, kind, trainer_of, place):
    with pytest.raises(ValueError, match=r"model: expected an adapter .* pass --use_peft true"):
        trainer_of(loaded(folder, kind))
    assert not (place / "run").exists()


def test_what_cannot_be_done_with_it_is_refused(folder, kind, tokenizer, trainer_of, tmp_path):
    model = get_peft_model(loaded(folder, kind), LoraConfig(**LORA))
    served = EngineArguments(rollout_engine="vllm")
    for each in (model, loaded(folder, kind)):
        with pytest.raises(ValueError, match="rollout_engine: expected transformers with weights"):
            make_engine(served, each, tokenizer, tmp_path)
        with pytest.raises(ValueError, match="model: expected weights that are not quantised"):
            check_shardable(each)
    with pytest.raises(ValueError, match=r"rollout_dtype: .* quantised"):
        trainer_of(model, rollout_dtype="bfloat16")


def test_what_transformers_loaded_is_trained_as_what_a_command_loads(folder, kind, trainer_of):
    config = quantization_config(ModelArguments(str(folder), **KINDS[kind]))
    plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    ends = []
    for model in (plain, loaded(folder, kind)):
        trainer = trainer_of(adapted(model), overwrite_output_dir=True, learning_rate=1e-2)
        layers = [m for m in model.modules() if isinstance(m, (Linear4bit, Linear8bitLt))]
        # As bitsandbytes has them, activations are rounded too, or a gradient is lost.
        assert all(isinstance(m, WeightsIn8Bits) for m in layers if isinstance(m, Linear8bitLt))
        assert not any(m.support_avx512bf16_for_cpu for m in layers if isinstance(m, Linear4bit))
        trainer.train()
        ends.append([p for p in trainer.model.parameters() if p.requires_grad])
    assert ends[0]
    assert all(map(torch.equal, *ends))


def test_the_card_tells_how_it_was_loaded(folder, trainer_of, tmp_path):
    told = {
        "nf4": {"load_in_4bit": "true", "bnb_4bit_quant_type": "nf4"},
        "nested": {"load_in_4bit": "true", "bnb_4bit_quant_type": "nf4"}
        | {"use_bnb_nested_quant": "true"},
        "int8": {"load_in_8bit": "true"},
    }
    for kind, options in told.items():
        model = get_peft_model(loaded(folder, kind), LoraConfig(**LORA))
        assert loading_options(model) == options
        trainer = trainer_of(model, overwrite_output_dir=True)
        bits = "8 bits" if kind == "int8" else "4 bits (nf4)"
        assert (
            run_of(trainer, tmp_path).adapter == f"a LORA adapter of rank 4 for weights in {bits}"
        )
    assert loading_options(load_model(ModelArguments(str(folder)))[0]) == {}


def test_the_package_is_named_where_it_is_missing(folder, monkeypatch):
    monkeypatch.setattr("latro.model.quantized.importlib.util.find_spec", lambda name: None)
    for name in ("load_in_4bit", "load_in_8bit"):
        with pytest.raises(ValueError, match=rf"{name}: needs .* 'latro-kernels\[quantization\]'"):
            load_model(ModelArguments(str(folder), **{name: True}))


def test_optimiser_states_of_8_bits(trainer_of, tiny):
    """Those of tensors with at least 4096 values; bitsandbytes keeps the others in 32."""
    model = tiny(hidden_size=64, intermediate_size=128)
    trainer = trainer_of(model, optim="adamw_8bit", learning_rate=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    assert all((p != before[name]).any() for name, p in model.named_parameters())
    states = trainer.optimizer.optimizer.state
    up = model.model.layers[0].mlp.up_proj.weight
    assert states[up]["state1"].dtype == torch.uint8
    assert states[model.model.norm.weight]["state1"].dtype == torch.float32


def test_an_adapter_on_the_weights_of_experts(tokenizer, trainer_of):
    """They are no layers' weights; with the adapter off the model is π_0."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = two_layers("qwen3_moe", tokenizer, head_dim=8, **experts)
    args = PeftArguments(use_peft=True, lora_target_parameters=["mlp.experts.gate_up_proj"])
    trainer = trainer_of(
        get_peft_model(model, lora_config(args, "main")), learning_rate=1e-2, optim="sgd"
    )
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".mlp.experts." in name and "lora_" in name for name in trained)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == 0 != kl[1]


def test_the_head_is_frozen(folder, kind):
    model = get_peft_model(loaded(folder, kind), LoraConfig(**LORA))
    scorer = Scorer(model)
    assert not scorer.causal.get_output_embeddings().weight.requires_grad
    assert type(without_wrapper(model).lm_head) is nn.Linear
