"""The copy of the policy in another dtype: its weights, its memory, when it is refreshed."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from latro.config.engine import EngineArguments
from latro.engines import cast
from latro.engines.cast import CastEngine, cast_copy, rollout_dtype
from latro.engines.make import make_engine
from latro.engines.transformers import TransformersEngine
from tests.latro.other_models import other_model

PROMPTS = ["Tom has 9 pens. Tom gets 12. How many?", "Tom has 3.", "How"]
HALF = torch.bfloat16


def sampled(engine: TransformersEngine, tokenizer: Any, temperature: float = 1.0) -> list[Any]:
    return engine.generate(
        [tokenizer.encode(prompt) for prompt in PROMPTS],
        num_samples=3,
        max_new_tokens=12,
        temperature=temperature,
        seeds=[0, 1, 2],
    )


def with_larger_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Make each position choose a token of its own, which random models do not."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def own_bytes(model: PreTrainedModel, policy: PreTrainedModel) -> int:
    """Return the bytes of a copy's weights and buffers that are not the policy's own."""
    policys = {t.data_ptr() for t in (*policy.parameters(), *policy.buffers())}
    tensors = (*model.parameters(), *model.buffers())
    return sum(t.numel() * t.element_size() for t in tensors if t.data_ptr() not in policys)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3", "phi3"])
def test_samples_are_those_of_the_model_loaded_in_the_dtype(
    tiny: Any, tokenizer: Any, tmp_path: Path, architecture: str
) -> None:
    model = with_larger_weights(tiny(architecture))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=HALF)
    engine = CastEngine(model, tokenizer, HALF)
    for name, tensor in engine.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    frequencies = [b for name, b in engine.model.named_buffers() if name.endswith("inv_freq")]
    # In half precision they would turn far positions by whole radians.
    assert {buffer.dtype for buffer in frequencies} == {torch.float32}
    assert sampled(engine, tokenizer) == sampled(TransformersEngine(loaded, tokenizer), tokenizer)


def test_a_tied_head_is_tied_in_the_copy_and_the_policy_is_untouched(tiny: Any) -> None:
    model = tiny(tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    ours = cast_copy(model, HALF)
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert ours.get_output_embeddings().weight.dtype == HALF
    assert own_bytes(ours, model) == 2 * sum(p.numel() for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == torch.float32
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in ours.parameters())


def test_an_update_is_written_into_the_copy_in_place(tiny: Any, tokenizer: Any) -> None:
    model = with_larger_weights(tiny(tie_word_embeddings=True))
    engine = CastEngine(model, tokenizer, HALF)
    places = [p.data_ptr() for p in engine.model.parameters()]
    old = sampled(engine, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    assert sampled(engine, tokenizer) == old
    engine.update_weights(model, 1)
    assert [p.data_ptr() for p in engine.model.parameters()] == places
    new = sampled(engine, tokenizer)
    assert new != old
    assert new == sampled(CastEngine(model, tokenizer, HALF), tokenizer)


def test_tensors_that_need_no_cast_are_the_policys_own(tiny: Any, tokenizer: Any) -> None:
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    model = peft.get_peft_model(tiny().to(HALF), lora)
    adapter = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapter} == {torch.float32}
    engine = CastEngine(model, tokenizer, HALF)
    assert own_bytes(engine.model, model) == 2 * sum(p.numel() for p in adapter)
    with torch.no_grad():
        for parameter in adapter:
            parameter.normal_()
    engine.update_weights(model, 1)
    merged = copy.deepcopy(model).merge_and_unload()
    ids = torch.tensor([tokenizer.encode(PROMPTS[0])])
    ours, theirs = engine.model(ids).logits, merged(ids).logits
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=0, atol=0.02)


def test_full_precision_of_a_policy_that_has_it_is_no_copy(tiny: Any, tokenizer: Any) -> None:
    model = tiny()
    engine = CastEngine(model, tokenizer, torch.float32)
    assert own_bytes(engine.model, model) == 0
    # Mixed precision would round what is asked for in full.
    exact = sampled(TransformersEngine(model, tokenizer), tokenizer)
    with torch.autocast("cpu", HALF):
        assert sampled(engine, tokenizer) == exact


@pytest.mark.parametrize("kind", ["VeraConfig", "PveraConfig", "TinyLoraConfig"])
def test_the_factors_that_an_adapter_has_as_buffers_are_cast_too(
    tiny: Any, tokenizer: Any, kind: str
) -> None:
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(with_larger_weights(tiny()), config)
    engine = CastEngine(model, tokenizer, HALF)
    assert sampled(engine, tokenizer)
    factors = [b for module in engine.model.modules() for b in module._buffers.values()]
    kept = {b.dtype for b in factors if b is not None and b.dim() > 1 and b.is_floating_point()}
    assert kept == {HALF}
    assert all(b.dtype == torch.float32 for b in model.buffers() if b.is_floating_point())


def test_a_table_of_positions_is_cast_as_when_loaded(tokenizer: Any, tmp_path: Path) -> None:
    model = other_model("xglm", tokenizer)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=HALF)
    engine = CastEngine(model, tokenizer, HALF)
    assert {b.dtype for b in engine.model.buffers() if b.is_floating_point()} == {HALF}
    assert sampled(engine, tokenizer) == sampled(TransformersEngine(loaded, tokenizer), tokenizer)


def test_what_transformers_keeps_in_fp32_stays(tokenizer: Any) -> None:
    model = other_model("jamba", tokenizer)
    names = {name for name, _ in model.named_parameters() if name.endswith("A_log")}
    assert names
    model._keep_in_fp32_modules_strict = {"mamba*A_log"}
    ours = cast_copy(model, HALF)
    in_fp32 = {name for name, p in ours.named_parameters() if p.dtype == torch.float32}
    assert in_fp32 == names


@pytest.mark.parametrize("given", [{"avx512_bf16": True}, {"amx_bf16": True}, {"bf16": True}, {}])
def test_auto_is_bf16_where_the_processor_has_it_and_the_weights_are_fp32(
    tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, given: dict[str, bool]
) -> None:
    monkeypatch.setattr(cast.torch, "cpu", SimpleNamespace(get_capabilities=lambda: given))
    args = EngineArguments(rollout_dtype="auto")
    engine = make_engine(args, tiny(), tokenizer, folder="unused")
    assert engine.model.dtype == (HALF if given else torch.float32)
    assert type(engine) is (CastEngine if given else TransformersEngine)
    for model, sharded in ((tiny().to(HALF), False), (tiny(), True)):
        assert rollout_dtype("auto", model, sharded) is None


def test_what_cannot_be_copied_is_refused(tiny: Any, tokenizer: Any) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"^rollout_dtype: .* in shards.*'bfloat16'"):
        rollout_dtype("bfloat16", model, sharded=True)
    args = EngineArguments(rollout_engine="vllm", rollout_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"^rollout_dtype: .*'transformers'.*got 'vllm'"):
        make_engine(args, model, tokenizer, folder="unused")
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match=r"^rollout_dtype: .*quantised, got bfloat16 with Llama"):
        CastEngine(model, tokenizer, HALF)
    assert rollout_dtype("auto", model, sharded=False) is None


def test_training_samples_from_the_weights_of_each_update(make_trainer: Any) -> None:
    trainer = make_trainer(
        max_steps=3, rollout_dtype="bfloat16", eval_strategy="steps", eval_steps=1
    )
    generate, stale = trainer.engine.generate, []

    def checked(*args: Any, **options: Any) -> Any:
        pairs = zip(trainer.engine.model.parameters(), trainer.model.parameters(), strict=True)
        stale.append(any(not torch.equal(own, policys.to(HALF)) for own, policys in pairs))
        return generate(*args, **options)

    trainer.engine.generate = checked
    trainer.train()
    # Three rollouts, and greedy and sampled completions of three evaluations.
    assert stale == [False] * 9


def test_a_resumed_run_ends_with_the_same_bits(make_trainer: Any, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "rollout_dtype": "bfloat16", "save_strategy": "steps"}
    straight = make_trainer(**settings, save_steps=2)
    straight.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resumed = make_trainer(**settings, save_steps=2)
    resumed.train(resume_from_checkpoint=checkpoint)
    for ours, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_best_model_is_evaluated_with_its_own_weights(make_trainer: Any) -> None:
    trainer = make_trainer(
        max_steps=2,
        rollout_dtype="bfloat16",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_answer_logp",
        # The first checkpoint is then the best.
        greater_is_better=False,
    )
    trainer.train()
    trainer.evaluate()
    for own, policys in zip(
        trainer.engine.model.parameters(), trainer.model.parameters(), strict=True
    ):
        assert torch.equal(own, policys.to(HALF))


def test_the_ratio_of_the_policy_to_its_copy_is_logged(make_trainer: Any) -> None:
    for dtype, exact in (("bfloat16", False), ("float32", True)):
        trainer = make_trainer(max_steps=3, rollout_dtype=dtype)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "importance_ratio" in entry]
        assert len(logged) == 3
        for entry in logged:
            # Rounding of bf16, and no more than rounding after the weights have changed.
            assert entry["importance_ratio"] == pytest.approx(1, abs=1e-5 if exact else 0.02)
            assert (entry["importance_ratio_max"] > 1 + 1e-4) != exact
