"""Weights are handed to vLLM by the names that a saved model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from latro.engines.vllm_weights import merged, named_weights


def mixture() -> PreTrainedModel:
    """Return a model whose experts are one tensor here, and one each in files."""
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("kind", ["llama", "mixture", "adapter"])
def test_names_and_values_are_those_of_files(kind: str, tiny: Any, tmp_path: Path) -> None:
    model: Any = mixture() if kind == "mixture" else tiny()
    if kind == "adapter":
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, lora)
    merged(model).save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    found = named_weights(model)
    assert found.keys() == files.keys()
    if kind == "mixture":
        assert any(".experts.1." in name for name in found)
    for name, tensor in files.items():
        assert torch.equal(found[name], tensor), name


def test_a_whole_state_dict_stands_for_the_models_own(tiny: Any) -> None:
    given = {name: tensor + 1 for name, tensor in tiny().state_dict().items()}
    found = named_weights(tiny(), given)
    assert all(found[name] is tensor for name, tensor in given.items())
