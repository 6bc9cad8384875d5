from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro.config.model import ModelArguments
from latro.evaluate import evaluate
from latro.loading import load_model
from latro.model.scoring import Scorer
from latro.probe import probe
from latro.sft import sft
from latro.train import train


def test_pickled_weights_are_refused(tiny, tokenizer, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load .* Expected .* safetensors weights"):
        load_model(ModelArguments(model_name_or_path=str(tmp_path)))


def test_no_other_library_reads_the_tokenizer(tiny, tokenizer, tmp_path, monkeypatch):
    """With vLLM comes mistral-common, by which transformers reads a folder with a tekken.json."""
    asked = []
    read = AutoTokenizer.from_pretrained

    def noting(*names, **options):
        asked.append(options["mistral_format"])
        return read(*names, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", noting)
    load_model(ModelArguments(model_name_or_path=str(saved(tiny(), tokenizer, tmp_path))))
    assert asked == [False]


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_weights(change):
    """Return a change of a model's folder that applies `change` to the tensors in its one file."""

    def apply(folder):
        (path,) = folder.glob("*model.safetensors")
        weights = {name: tensor.clone() for name, tensor in change(load_file(path)).items()}
        save_file(weights, path, metadata={"format": "pt"})

    return apply


def with_json(name, **values):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        for key, value in values.items():
            content[key] = value
        (folder / name).write_text(json.dumps(content))

    return apply


def with_text(name, text):
    return lambda folder: (folder / name).write_text(text)


def without(*suffixes):
    return with_weights(lambda w: {n: t for n, t in w.items() if not n.endswith(suffixes)})


def in_shards(change):
    """Return a change of a model's folder that shards its weights, and then applies `change`."""

    def apply(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
        change(folder)

    return apply


def cut(folder):
    (path,) = folder.glob("*model.safetensors")
    path.write_bytes(path.read_bytes()[:200])


def in_tokenizer(change):
    def apply(folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return apply


HEAD, NORM = "lm_head.weight", "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
MODELS = {
    "three dropped": (
        without(HEAD, NORM, EMBEDDING),
        rf"LlamaForCausalLM, got 3 missing \({HEAD}, {EMBEDDING}, {NORM}\)",
    ),
    "prefixed": (
        with_weights(lambda w: {f"x.{name}": tensor for name, tensor in w.items()}),
        rf"21 missing \({HEAD}, .*, …\); 21 unexpected \(x\.{HEAD}, .*, …\)",
    ),
    "one more": (
        with_weights(lambda w: w | {"v_head.weight": torch.ones(3)}),
        r"got 1 unexpected \(v_head\.weight\)",
    ),
    "another shape": (
        with_weights(lambda w: w | {NORM: torch.ones(3)}),
        rf"got 1 of another shape \({NORM} \(3,\) for \(32,\)\)",
    ),
    "more layers": (with_json("config.json", num_hidden_layers=3), "9 missing .*layers.2"),
    "fewer layers": (with_json("config.json", num_hidden_layers=1), "9 unexpected .*layers.1"),
    "wider": (with_json("config.json", hidden_size=64), "21 of another shape"),
    "tied without either": (
        lambda folder: (
            without(HEAD, EMBEDDING)(folder),
            with_json("config.json", tie_word_embeddings=True)(folder),
        ),
        rf"1 missing \({EMBEDDING}\)|2 missing",
    ),
    "a shard lost": (
        in_shards(lambda folder: sorted(folder.glob("model-*"))[1].unlink()),
        "cannot load .*model-00002-of-",
    ),
    "an index of nothing": (
        in_shards(with_text("model.safetensors.index.json", "{}")),
        "cannot load .*KeyError: 'weight_map'",
    ),
    "a cut file": (cut, "cannot load .*SafetensorError: .*header"),
    "an empty file": (with_text("model.safetensors", ""), "cannot load .*header too small"),
    "a config that is no JSON": (with_text("config.json", "{"), "config.json' is not a valid JSON"),
    "a config of nothing": (with_text("config.json", "{}"), "Should have a `model_type` key"),
    "a config that is null": (with_text("config.json", "null"), "cannot load .*TypeError"),
    "an unknown kind": (with_json("config.json", model_type="nope"), "model type `nope`"),
    "no language model": (with_json("config.json", model_type="vit"), "ViTConfig"),
    "a size in words": (with_json("config.json", hidden_size="wide"), "expected int, got str"),
    "no heads": (with_json("config.json", num_attention_heads=0), "ZeroDivisionError"),
    "an unknown activation": (with_json("config.json", hidden_act="nope"), "KeyError: 'nope'"),
    "an unknown dtype": (with_json("config.json", dtype="nope"), "has no attribute 'nope'"),
    "a tokenizer that is no JSON": (with_text("tokenizer.json", "{"), "cannot load .*line 1"),
    "a tokenizer of nothing": (with_text("tokenizer.json", "{}"), "KeyError: 'added_tokens'"),
    "a tokenizer of another kind": (
        in_tokenizer(lambda content: content["model"].update(type="Nope")),
        "cannot load .*Exception: data did not match",
    ),
    "a token without a row": (
        in_tokenizer(lambda content: content["model"]["vocab"].update(zzz=5000)),
        "the tokenizer has 5001 tokens but the model's embedding has 395",
    ),
}


def load(folder):
    return load_model(ModelArguments(model_name_or_path=str(folder)))


@pytest.fixture(scope="module")
def whole(tiny, tokenizer, tmp_path_factory):
    return saved(tiny(), tokenizer, tmp_path_factory.mktemp("whole") / "model")


@pytest.mark.parametrize("case", MODELS)
def test_a_folder_that_is_no_whole_model_is_one_line_that_names_it(whole, tmp_path, case):
    change, message = MODELS[case]
    folder = shutil.copytree(whole, tmp_path / "model")
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert str(error.value).startswith("model_name_or_path: ")
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_model_makes_itself_need_not_be_in_the_file(tiny, tokenizer, tmp_path, tied):
    folder = saved(tiny(tie_word_embeddings=tied), tokenizer, tmp_path / "model")
    # Buffers that older versions saved, for each layer or once.
    with_weights(
        lambda w: (
            w
            | {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "model.rotary_emb.inv_freq": torch.ones(4),
            }
        )
    )(folder)
    assert (HEAD in load_file(folder / "model.safetensors")) != tied
    model, _ = load(folder)
    assert all(map(torch.equal, model.parameters(), tiny(tie_word_embeddings=tied).parameters()))


COMMANDS = {
    "train": (train, ("--output_dir",)),
    "sft": (sft, ("--output_dir",)),
    "evaluate": (evaluate, ("--output",)),
    "probe": (probe, ("--output",)),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_with_weights_that_are_not_there(whole, tmp_path, command):
    folder = shutil.copytree(whole, tmp_path / "model")
    without(HEAD, NORM, EMBEDDING)(folder)
    run, option = COMMANDS[command]
    output = tmp_path / "out.json"
    more = ("--dataset_name", "arithmetic", "--num_eval_examples", "4")
    with pytest.raises(ValueError, match=r"model_name_or_path: .* got 3 missing"):
        run(["--model_name_or_path", str(folder), *option, str(output), *more])
    assert not output.exists()


ADAPTER = "base_model.model.model.layers.0.self_attn.q_proj"
ADAPTERS = {
    "one dropped": (
        without("layers.0.self_attn.q_proj.lora_A.weight"),
        rf"a LORA adapter, got 1 missing \({ADAPTER}\.lora_A\.default\.weight\)",
    ),
    "prefixed": (
        with_weights(lambda w: {f"x.{name}": tensor for name, tensor in w.items()}),
        "cannot load .*KeyError: 'base_model.model.lm_head.weight'",
    ),
    "one more": (
        with_weights(lambda w: w | {"base_model.model.x.lora_A.weight": torch.ones(1)}),
        r"got 1 unexpected \(base_model\.model\.x\.lora_A\.weight\)",
    ),
    "another rank": (with_json("adapter_config.json", r=4), "size mismatch for .*lora_A"),
    "a layer more": (
        with_json("adapter_config.json", target_modules=["q_proj", "k_proj"]),
        "4 missing .*k_proj",
    ),
    "a layer fewer": (
        with_weights(lambda w: w | {n.replace("q_proj", "k_proj"): t for n, t in w.items()}),
        "4 unexpected .*k_proj",
    ),
    "no head": (without("lm_head.weight"), "KeyError: 'base_model.model.lm_head.weight'"),
    "another kind": (with_json("adapter_config.json", peft_type="IA3"), "an? IA3 adapter|IA3"),
    "an unknown kind": (with_json("adapter_config.json", peft_type="NOPE"), "KeyError: 'NOPE'"),
    "an unknown layer": (
        with_json("adapter_config.json", target_modules=["x"]),
        "No modules were targeted",
    ),
    "tokens that switch it on": (
        with_json("adapter_config.json", alora_invocation_tokens=[5]),
        "alora_invocation_tokens switch the adapter on inside of a sequence",
    ),
    "weights under it that are drawn": (
        with_json("adapter_config.json", init_lora_weights="pissa_niter_4"),
        "init_lora_weights='pissa_niter_4' changes the weights under the adapter",
    ),
    "tokens before the prompt": (
        with_json("adapter_config.json", peft_type="PROMPT_TUNING"),
        "PROMPT_TUNING adds tokens to every prompt",
    ),
    "a task's number": (with_json("adapter_config.json", peft_type="POLY"), "POLY needs a forw"),
    "no rank": (with_json("adapter_config.json", r="a"), "cannot load .*TypeError"),
    "no base model": (
        with_json("adapter_config.json", base_model_name_or_path="/nowhere/x"),
        "cannot load '/nowhere/x', the base model of",
    ),
    "a config that is no JSON": (with_text("adapter_config.json", "{"), "cannot load .*line 1"),
    "a cut file": (cut, "cannot load .*SafetensorError"),
}


@pytest.fixture(scope="module")
def adapter(whole, tmp_path_factory):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(whole), config)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_folder_that_is_no_whole_adapter_is_one_line_that_names_it(adapter, tmp_path, case):
    change, message = ADAPTERS[case]
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert str(error.value).startswith("model_name_or_path: ")
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_adapter_is_loaded_as_it_was_saved(adapter):
    folder, model = adapter
    loaded, _ = load(folder)
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    assert any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": ["<yes>", "<no>"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["trunk", "whole", "tokens", "embedding", "head"],
)
def test_an_adapter_over_a_resized_vocabulary(tiny, tokenizer, tmp_path, options):
    peft = pytest.importorskip("peft")
    saved(tiny(), tokenizer, tmp_path / "base")
    base, grown = load(tmp_path / "base")
    grown.add_tokens(["<yes>", "<no>"])
    # Some let the number of rows be a multiple of a power of 2.
    base.resize_token_embeddings(len(grown), pad_to_multiple_of=32)
    assert base.get_input_embeddings().weight.shape[0] > len(grown)
    if words := options.get("trainable_token_indices"):
        options = {"trainable_token_indices": grown.convert_tokens_to_ids(words)}
    model = peft.get_peft_model(base, peft.LoraConfig(**{"target_modules": ["q_proj"]} | options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    grown.save_pretrained(tmp_path / "adapter")
    if targets := options.get("target_modules"):
        # PEFT leaves the other one's new rows out of the file.
        other = "embed_tokens" if "lm_head" in targets else "lm_head"
        with pytest.raises(ValueError, match=rf"got 1 missing \(.*\.{other}\.weight\)"):
            load(tmp_path / "adapter")
        return
    loaded, tokens = load(tmp_path / "adapter")
    assert len(tokens) == len(grown)
    given = model.state_dict()
    assert loaded.state_dict().keys() == given.keys()
    assert all(torch.equal(found, given[name]) for name, found in loaded.state_dict().items())


def test_an_adapter_with_a_name_is_in_a_folder_of_that_name(adapter, whole, tmp_path):
    folder, model = adapter
    # As PEFT saves it, with a tokenizer beside it.
    shutil.copytree(folder, tmp_path / "run" / "policy")
    for file in folder.parent.joinpath(whole).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "run")
    loaded, tokenizer = load(tmp_path / "run")
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    assert tokenizer.name_or_path == str(tmp_path / "run")
    shutil.copytree(folder, tmp_path / "run" / "another")
    with pytest.raises(ValueError, match=r"expected one adapter in .*another and .*policy;"):
        load(tmp_path / "run")
    loaded, _ = load(tmp_path / "run" / "policy")
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_config_that_asks_for_tuples(tiny, tokenizer, tmp_path, architecture):
    saved(tiny(architecture), tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "return_dict": False}))
    assert Scorer(load(tmp_path)[0]).packed


class _Terminal:
    def readline(self):
        raise AssertionError("a prompt waits for an answer")

    def isatty(self):
        return True


def test_code_that_comes_with_a_model_runs_on_request_only(tiny, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "custom_llama"
    config["auto_map"] = {
        "AutoConfig": "custom.CustomConfig",
        "AutoModelForCausalLM": "custom.CustomModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class CustomConfig(LlamaConfig):\n"
        "    model_type = 'custom_llama'\n"
        "class CustomModel(LlamaForCausalLM):\n"
        "    config_class = CustomConfig\n"
    )
    monkeypatch.setattr(sys, "stdin", _Terminal())
    # The folder that transformers copies such code to.
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match=r"code of its own, .* pass --trust_remote_code true"):
        load_model(ModelArguments(model_name_or_path=str(folder)))
    assert not (tmp_path / "ran").exists()
    model, _ = load_model(ModelArguments(model_name_or_path=str(folder), trust_remote_code=True))
    assert type(model).__name__ == "CustomModel"
    assert (tmp_path / "ran").exists()
