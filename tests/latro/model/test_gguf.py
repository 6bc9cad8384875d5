"""GGUF files are loaded as the models that they hold, which are plain models from then on."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro.config.engine import EngineArguments
from latro.config.model import ModelArguments
from latro.engines.make import make_engine
from latro.evaluate import evaluate
from latro.loading import load_model
from latro.model import gguf
from latro.probe import probe
from latro.run.identity import model_facts
from latro.sft import sft
from latro.train import train
from scripts.make_tiny_model import make_tokenizer
from tests.latro.gguf_files import dequantised, write_gguf

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
TEXT = "Tom has 12 pens.\n\nTom gets  7: “ü”.<|endoftext|> The answer is 19"


@pytest.fixture(scope="module")
def chatting(tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = TEMPLATE
    return chatting


@pytest.fixture(scope="module")
def file(tiny, chatting, tmp_path_factory):
    """Return a file that is alone in its folder."""
    return write_gguf(tmp_path_factory.mktemp("alone") / "tiny.gguf", tiny(), chatting)


def load(name, **more):
    return load_model(ModelArguments(model_name_or_path=str(name), **more))


def same(model, other):
    theirs = other.state_dict()
    return model.state_dict().keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("of_type", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_1], ids=str)
def test_the_model_has_the_dequantised_weights(tiny, chatting, tmp_path, of_type, tied):
    path = write_gguf(
        tmp_path / "model.gguf", tiny(tie_word_embeddings=tied), chatting, of_type=of_type
    )
    model, tokenizer = load(path)
    truth = dequantised(tiny(tie_word_embeddings=tied), of_type).eval()
    assert same(model, truth)
    ids = torch.tensor([chatting.encode(TEXT)])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, truth(input_ids=ids).logits)
    assert tokenizer.encode(TEXT) == ids[0].tolist()
    assert tokenizer.decode(ids[0]) == TEXT
    assert tokenizer.eos_token_id == chatting.eos_token_id
    assert tokenizer.chat_template == TEMPLATE
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_weights_come_in_the_dtype_that_is_asked_for(tiny, file):
    model, _ = load(file, dtype="bfloat16")
    assert same(model, tiny().bfloat16())


def test_what_is_saved_is_a_plain_model(file, tmp_path, monkeypatch):
    model, tokenizer = load(file)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    saved = (tmp_path / "config.json").read_text()
    assert "gguf" not in saved
    assert "A title" not in saved
    monkeypatch.setattr(gguf, "is_gguf_available", lambda: False)
    again, its_tokenizer = load(tmp_path)
    assert same(again, model)
    assert its_tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    assert its_tokenizer.chat_template == TEMPLATE
    # A run of the one may go on from a checkpoint of the other.
    facts = model_facts(model, tokenizer)
    assert model_facts(again, its_tokenizer)["decides"] == facts["decides"]
    assert facts["told"] == {"model": str(file)}


@pytest.mark.parametrize("kind", ["a file", "its folder", "a name in its folder", "of several"])
def test_a_file_is_named_in_each_way(tiny, chatting, file, tmp_path, kind):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = shutil.copy(file, folder / "a.gguf")
    if kind == "of several":
        write_gguf(folder / "b.gguf", tiny(seed=1), chatting)
    named = kind in ("a name in its folder", "of several")
    name = path if kind == "a file" else folder
    model, tokenizer = load(name, gguf_file="a.gguf" if named else None)
    assert same(model, tiny())
    assert model.config.name_or_path == model.name_or_path == tokenizer.name_or_path == str(path)


def test_a_file_comes_from_the_hub(tiny, file, monkeypatch):
    asked = []

    def download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(file)

    monkeypatch.setattr(gguf, "cached_file", download)
    monkeypatch.setattr("latro.loading.find_adapter_config_file", lambda *args, **kwargs: None)
    model, tokenizer = load("some/model", gguf_file="q/tiny.gguf", model_revision="v2")
    assert asked == [(("some/model", "q/tiny.gguf"), {"revision": "v2"})] * 2
    assert same(model, tiny())
    assert model.config.name_or_path == tokenizer.name_or_path == "some/model"


def test_nothing_else_is_read(tiny, chatting, file, tmp_path, monkeypatch):
    """A file's folder and the working directory have all that transformers would mix in."""
    folder = tmp_path / "folder"
    tiny(hidden_size=16, seed=1).save_pretrained(folder)
    other = AutoTokenizer.from_pretrained(_other_tokenizer(tmp_path))
    other.save_pretrained(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/no"}))
    (folder / "generation_config.json").write_text("[]")
    path = shutil.copy(file, folder / "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf", tiny(seed=2), chatting)
    model, tokenizer = load(path)
    assert same(model, tiny())
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.encode(TEXT) == chatting.encode(TEXT)
    assert tokenizer.special_tokens_map == {"eos_token": "<|endoftext|>"}


def _other_tokenizer(folder):
    other = make_tokenizer(["other words"], vocab_size=300)
    other.chat_template = "{{ messages }}"
    other.add_special_tokens({"bos_token": "<other>"})
    other.save_pretrained(folder / "other")
    return folder / "other"


def test_a_folder_with_a_config_is_what_it_was(tiny, tokenizer, chatting, tmp_path):
    """Many folders hold a model as safetensors, and a GGUF file made of it."""
    tiny().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write_gguf(tmp_path / "tiny.gguf", tiny(seed=1), chatting)
    assert same(load(tmp_path)[0], tiny())
    assert same(load(tmp_path, gguf_file="tiny.gguf")[0], tiny(seed=1))


DATA = ["--dataset_name", "arithmetic", "--num_eval_examples", "2"]
SAMPLING = ["--max_completion_length", "4"]
TRAINING = [
    *DATA,
    *("--num_train_examples", "8", "--max_steps", "2", "--per_device_train_batch_size", "2"),
    *("--learning_rate", "1e-3", "--use_cpu", "true", "--disable_tqdm", "true"),
    *("--eval_on_start", "false", "--report_to", "none"),
]


def test_every_command_takes_a_file(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(file, tmp_path / "base.gguf")
    model = ["--model_name_or_path", "base.gguf"]
    latro = [*TRAINING, *SAMPLING, "--num_generations", "2"]
    train([*model, *latro, "--output_dir", "latro", "--save_steps", "1"])
    sft([*model, *TRAINING, "--output_dir", "sft"])
    for output in ("latro", "sft"):
        assert not same(load(output)[0], load(file)[0])
        card = Path(output, "README.md").read_text(encoding="utf-8")
        assert "base_model" not in card
        assert "a model that is not on the hub" in card
    evaluation = [*DATA, *SAMPLING]
    before = evaluate([*model, *evaluation, "--num_samples", "0", "--output", "e.json"])
    assert before["model"]["model_name_or_path"] == "base.gguf"
    assert before["model"]["gguf_file"] is None
    probed = probe([*model, *evaluation, "--num_samples", "1", "--output", "p.json"])
    assert len(probed["problems"]) == 2
    # A run goes on from its checkpoint wherever its file has gone, but not with another file.
    finished = load("latro")[0]
    for name in os.listdir("latro"):
        if name != "checkpoint-1":
            path = Path("latro", name)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.renames("base.gguf", "elsewhere/moved.gguf")
    resumed = ["--output_dir", "latro", "--save_steps", "1", "--resume_from_checkpoint", "true"]
    moved = ["--model_name_or_path", "elsewhere", "--gguf_file", "moved.gguf"]
    train([*moved, *latro, *resumed])
    assert same(load("latro")[0], finished)


def test_a_run_of_another_file_is_another_run(tiny, chatting, file, tmp_path):
    other = write_gguf(tmp_path / "other.gguf", tiny(seed=1), chatting)
    ours, theirs = (model_facts(*load(path))["decides"] for path in (file, other))
    assert {name for name in ours if ours[name] != theirs[name]} == {"initial weights"}


def test_an_adapter_finds_its_file_again(file, tmp_path, monkeypatch):
    monkeypatch.chdir(file.parent)
    settings = ["--use_peft", "true", "--lora_r", "2", "--lora_target_modules", "q_proj"]
    output = tmp_path / "adapter"
    arguments = ["--model_name_or_path", file.name, *TRAINING, *settings]
    sft([*arguments, "--output_dir", str(output)])
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(file)
    model, tokenizer = load(output)
    assert same(model.unload(), load(file)[0])
    assert tokenizer.encode(TEXT) == load(file)[1].encode(TEXT)
    # Where the base model's folder is what is known, the argument says which file.
    config["base_model_name_or_path"] = str(file.parent)
    (output / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(file, file.parent / "more.gguf")
    try:
        with pytest.raises(ValueError, match=r"^gguf_file: expected one of more.gguf, tiny.gguf"):
            load(output)
        assert same(load(output, gguf_file="tiny.gguf")[0].unload(), load(file)[0])
    finally:
        (file.parent / "more.gguf").unlink()


def test_a_server_is_handed_plain_weights(file, fake, tmp_path):
    model, tokenizer = load(file)
    handed = []

    def loads(body):
        handed.append(AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]))
        return 200, {"results": [None]}

    args = EngineArguments(rollout_engine="vllm", vllm_url=fake.url)
    engine = make_engine(args, model, tokenizer, tmp_path)
    fake.answers["/collective_rpc"] = loads
    engine.update_weights(model, 1)
    assert same(handed[0], model)


def test_tensors_that_are_missing_are_named(tiny, chatting, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny(), chatting, without="up_proj")
    with pytest.raises(ValueError, match=r"tiny.gguf' the weights .* 2 missing .*0.mlp.up_proj"):
        load(path)


def test_the_package_is_needed(file, monkeypatch):
    monkeypatch.setattr(gguf, "is_gguf_available", lambda: False)
    with pytest.raises(ValueError, match="needs the package gguf, which is not installed") as error:
        load(file)
    assert str(error.value).startswith(f"model_name_or_path: {str(file)!r}")
    assert "pip install 'latro-kernels[gguf]'" in str(error.value)
