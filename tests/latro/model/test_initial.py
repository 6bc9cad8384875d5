"""π_0 of a policy whose adapter came trained, or is of a kind that is not known to begin with 0."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from latro.model.initial import INITIAL_FILE, AdapterOff, InitialAdapter, adds_nothing
from latro.model.scoring import Scorer
from latro.train import train
from latro.update.coefficients import ObjectiveCoefficients
from tests.latro.formula import formula_loss
from tests.latro.model.test_adapters import (  # noqa: F401
    HEADS,
    SMALL,
    adapted,
    gradient_of,
    lora,
    make_trainer,
    model_dir,
    moved,
)

peft = pytest.importorskip("peft", reason="the package peft is not installed")

LM = {"task_type": "CAUSAL_LM"}
ATTENTION = ["q_proj", "v_proj"]
CONFIGS = {
    "lora": lora,
    "head": lambda: lora(**HEADS["adapted"]),
    "whole head": lambda: lora(**HEADS["whole"]),
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "lora_bias": lambda: lora(lora_bias=True),
    "bias": lambda: lora(bias="lora_only"),
    "embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "tokens": lambda: lora(trainable_token_indices={"embed_tokens": [1, 2, 40]}),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "noise": lambda: lora(init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(**LM, target_modules=ATTENTION, feedforward_modules=[]),
    "loha": lambda: peft.LoHaConfig(**LM, r=4, target_modules=ATTENTION),
    "lokr": lambda: peft.LoKrConfig(**LM, r=4, target_modules=ATTENTION),
    "oft": lambda: peft.OFTConfig(**LM, r=0, oft_block_size=8, target_modules=ATTENTION),
    "vera": lambda: peft.VeraConfig(**LM, r=4, target_modules=["q_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(**LM, init_r=4, total_step=10, target_modules=ATTENTION),
}
NEW_AND_OFF = {"lora", "head", "whole head", "rslora", "lora_bias", "embedding"}


def kls(trainer):
    return [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_reference_is_the_initial_model_to_the_bit(
    make_trainer,  # noqa: F811
    tiny,
    rollouts,
    kind,
    trained,
):
    model = peft.get_peft_model(tiny(attention_bias=True), CONFIGS[kind]())
    if trained:
        moved(model)
    initial = Scorer(copy.deepcopy(model))
    trainer = make_trainer(model, max_steps=2, lr_scheduler_type="constant")
    assert isinstance(trainer.ref_scorer, AdapterOff) == (kind in NEW_AND_OFF and not trained)
    trainer.train()
    first, second = kls(trainer)
    assert first == 0.0
    assert second != 0.0
    batch = trainer.scorer.collate(rollouts(2, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not torch.equal(trainer.scorer(batch).logp, initial(batch).logp)
    assert torch.equal(trainer.ref_scorer(batch).logp, initial(batch).logp)
    ours, theirs = trainer.ref_scorer.reference(batch), initial.reference(batch)
    assert torch.equal(ours.hidden, theirs.hidden)
    assert torch.equal(ours.weight, theirs.weight)
    assert not ours.hidden.requires_grad
    # The policy is as it was, to the bit.
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kl", ["reward", "k3", "exact"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("token_budget", [10**6, 1])
def test_gradients_equal_autograd_through_the_formula(
    make_trainer,  # noqa: F811
    tiny,
    rollouts,
    kl,
    head,
    token_budget,
):
    base = tiny(seed=1).double()
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(10)
    model = adapted(base, **HEADS[head])
    initial, groups = copy.deepcopy(model), rollouts(3, 4)
    settings = {"beta": 0.3, "answer_weight": 0.7, "kl": kl, "unfinished": "floor"}
    trainer = make_trainer(model, backend="reference", token_budget=token_budget, **settings)
    moved(model, far=0.02)
    reference = copy.deepcopy(model)
    ours = gradient_of(trainer, groups)
    formula_loss(reference, initial, groups, **settings).backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        # transformers' norms compute in fp32 even in an fp64 model; all else here is fp64.
        atol = 1e-6 * gradient.abs().max()
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("kl", ["reward", "exact"])
@pytest.mark.parametrize("head", HEADS)
def test_autocast_keeps_no_weight_of_the_reference(make_trainer, tiny, kl, head):  # noqa: F811
    """Autocast keeps half precision copies of fp32 weights, by their place in memory."""
    model = adapted(tiny(), **HEADS[head])
    trainer = make_trainer(model, max_steps=1, bf16=True, kl=kl)
    moved(model)
    seen = []

    class Watched(ObjectiveCoefficients):
        def __call__(self, batches, scores, **more):
            seen.append((batches, [s.logp.detach() for s in scores]))
            return super().__call__(batches, scores, **more)

    trainer.update.coefficients = Watched(trainer.args)
    before = Scorer(copy.deepcopy(model))
    trainer.train()
    ((batch, *_), (logp, *_)) = seen[0]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logp, before(batch).logp)


def test_all_adapters_that_are_on_are_in_the_reference(make_trainer, tiny, rollouts):  # noqa: F811
    model = adapted(tiny(), target_modules=["q_proj"])
    model.add_adapter("frozen", lora(target_modules=["v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    initial = Scorer(copy.deepcopy(model))
    trainer = make_trainer(model, max_steps=2)
    trainer.train()
    batch = trainer.scorer.collate(rollouts(1, 4))
    assert torch.equal(trainer.ref_scorer(batch).logp, initial(batch).logp)
    assert kls(trainer)[0] == 0.0


def test_a_new_adapter_on_a_frozen_one_that_is_not_zero(make_trainer, tiny, rollouts):  # noqa: F811
    model = peft.get_peft_model(tiny(), lora(target_modules=["q_proj"]))
    assert adds_nothing(model)
    model.add_adapter("frozen", lora(target_modules=["v_proj"], init_lora_weights=False))
    assert not adds_nothing(model)


@pytest.mark.parametrize("given", ["the first", "the checkpoint's"])
@pytest.mark.parametrize("head", ["adapted", "whole"])
def test_a_run_that_goes_on_has_the_reference_it_began_with(
    make_trainer,  # noqa: F811
    tiny,
    tmp_path,
    head,
    given,
):
    straight = make_trainer(
        adapted(tiny(), **HEADS[head]), save_strategy="steps", save_steps=2, beta=0.5
    )
    straight.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    model = adapted(tiny(), **HEADS[head])
    if given == "the checkpoint's":
        model = peft.PeftModel.from_pretrained(tiny(), checkpoint, is_trainable=True)
    resumed = make_trainer(model, output_dir=str(tmp_path / "again"), beta=0.5)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert kls(resumed) == kls(straight)
    ends = [trainer.model.state_dict() for trainer in (straight, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_that_began_with_zeros_keeps_the_base_as_its_reference(
    make_trainer,  # noqa: F811
    tiny,
    tmp_path,
):
    straight = make_trainer(tiny(), lora(), save_strategy="steps", save_steps=2, beta=0.5)
    straight.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not (checkpoint / INITIAL_FILE).exists()
    model = peft.PeftModel.from_pretrained(tiny(), checkpoint, is_trainable=True)
    resumed = make_trainer(model, output_dir=str(tmp_path / "again"), beta=0.5)
    assert isinstance(resumed.ref_scorer, InitialAdapter)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert isinstance(resumed.ref_scorer, AdapterOff)
    assert kls(resumed) == kls(straight)


def test_a_checkpoint_of_another_adapter_is_refused(make_trainer, tiny, tmp_path):  # noqa: F811
    make_trainer(adapted(tiny()), save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    other = make_trainer(adapted(tiny(), target_modules=["q_proj"]), output_dir=str(tmp_path / "b"))
    with pytest.raises(ValueError, match=f"{INITIAL_FILE}: expected the 4 weights .* got 28 of"):
        other._load_optimizer_and_scheduler(str(checkpoint))


@pytest.mark.parametrize("trained", [False, True])
def test_the_commands(model_dir, tmp_path, trained):  # noqa: F811
    base, run = tmp_path / "adapter", tmp_path / "run"
    from transformers import AutoModelForCausalLM

    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), lora())
    (moved(model) if trained else model).save_pretrained(base)
    few = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2")
    argv = ["--model_name_or_path", str(base), *SMALL, *few, "--output_dir", str(run)]
    train(argv)

    def logged():
        return {
            entry["step"]: entry["kl"]
            for entry in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if "kl" in entry
        }

    straight = logged()
    assert straight[1] == 0.0
    # A checkpoint has what the run began with, and the model that is left has not.
    found = {p.relative_to(run).as_posix() for p in run.rglob("*.safetensors")}
    assert "adapter_model.safetensors" in found
    assert {f"checkpoint-{n}/{INITIAL_FILE}" for n in (2, 4)} <= found or not trained
    assert INITIAL_FILE not in found
    kept = load_file(run / "adapter_model.safetensors")
    assert kept.keys() == load_file(base / "adapter_model.safetensors").keys()
    for folder in (run / "checkpoint-4",):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink()
        folder.rmdir()
    train([*argv, "--resume_from_checkpoint", "true"])
    assert logged() == straight
    again = load_file(run / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_tied_adapters_change_places_as_one(make_trainer, tiny, rollouts):  # noqa: F811
    def build():
        base = tiny(tie_word_embeddings=True)
        return adapted(base, target_modules=["embed_tokens"], ensure_weight_tying=True)

    model, initial = build(), Scorer(build())
    trainer = make_trainer(model, max_steps=2, learning_rate=1e-3)
    trainer.train()
    batch = trainer.scorer.collate(rollouts(1, 4))
    before = [parameter.clone() for parameter in model.parameters()]
    assert torch.equal(trainer.ref_scorer(batch).logp, initial(batch).logp)
    assert all(map(torch.equal, before, model.parameters()))
    assert kls(trainer)[0] == 0.0


def test_nothing_more_is_trained_counted_or_kept_in_the_model(make_trainer, tiny):  # noqa: F811
    model = adapted(tiny())
    names = [name for name, _ in model.named_parameters()]
    counted = model.num_parameters(), model.num_parameters(only_trainable=True)
    trainer = make_trainer(model, max_steps=1)
    trainer.train()
    assert list(model.peft_config) == ["default"]
    assert [name for name, _ in model.named_parameters()] == names
    assert (model.num_parameters(), model.num_parameters(only_trainable=True)) == counted
