"""Malformed model folders end in one line that names them, exit code 1, and no lost file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tests.latro import frames
from tests.latro.gguf_files import write_gguf
from tests.latro.hostile import ROWS, Case, Place, refused
from tests.warm_process import WarmProcess

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(
    tiny: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a folder with a model and an adapter on it."""
    folder = tmp_path_factory.mktemp("good")
    tiny().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny(), settings).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Place:
    shutil.copytree(good / "model", tmp_path / "place" / "model")
    shutil.copytree(good / "adapter", tmp_path / "place" / "adapter")
    place = Place(tmp_path / "place")
    place.write_rows(*ROWS)
    return place


def cut(path: Path, share: float = 0.5) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Place], None]:
    """Return a case that changes the tensors of the model."""

    def spoil(place: Place) -> None:
        tensors = load_file(place.model / WEIGHTS)
        tensors = change(tensors) or tensors
        save_file(tensors, place.model / WEIGHTS, {"format": "pt"})

    return spoil


def config(**changes: Any) -> Callable[[Place], None]:
    return lambda place: place.edit_json("config.json", **changes)


def text(name: str, content: str | bytes) -> Callable[[Place], object]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda place: (place.model / name).write_bytes(raw)


def template(source: str) -> Callable[[Place], object]:
    return text("chat_template.jinja", source)


def given(**arguments: str) -> Callable[[Place], None]:
    return lambda place: place.arguments.update(arguments)


def asked(source: str, **arguments: str) -> Callable[[Place], None]:
    """Return a case with a chat template and what the command gives to it."""

    def spoil(place: Place) -> None:
        template(source)(place)
        place.arguments |= arguments

    return spoil


def sharded(place: Place) -> None:
    """Save the model in two shards and remove the second."""
    tensors = load_file(place.model / WEIGHTS)
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, place.model / file, {"format": "pt"})
    table = {name: file for file, own in halves.items() for name in own}
    (place.model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (place.model / WEIGHTS).unlink()
    (place.model / "model-2.safetensors").unlink()


def instead(make: Callable[[Path], object]) -> Callable[[Place], None]:
    """Return a case that puts something else in the model folder's place."""

    def spoil(place: Place) -> None:
        shutil.rmtree(place.model)
        make(place.model)

    return spoil


def adapter(change: Callable[[Path], object], base: str | None = None) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        folder = place.root / "adapter"
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(place.model) if base is None else base
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        change(folder)
        place.arguments["model_name_or_path"] = folder

    return spoil


def adapter_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Place], None]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file(change(tensors) or tensors, path, {"format": "pt"})

    return adapter(spoil)


def gguf(
    change: Callable[[Path], Mapping[str, object] | object], **options: Any
) -> Callable[[Place], None]:
    """Return a case that writes a GGUF file and changes it; `change` may return arguments."""

    def spoil(place: Place) -> None:
        model = AutoModelForCausalLM.from_pretrained(place.model)
        tokenizer = AutoTokenizer.from_pretrained(place.model)
        file = write_gguf(place.root / "tiny.gguf", model, tokenizer, **options)
        arguments = change(file)
        place.arguments["model_name_or_path"] = file
        if isinstance(arguments, dict):
            place.arguments |= arguments

    return spoil


def _in_a_folder(file: Path) -> dict[str, object]:
    """Put two copies of a file into a folder, and return the argument that names the folder."""
    folder = file.parent / "files"
    folder.mkdir()
    shutil.copy(file, folder / "a.gguf")
    file.rename(folder / "b.gguf")
    return {"model_name_or_path": folder}


_BROKEN = "cannot load '{root}/tiny.gguf': .* Expected a GGUF file that is whole"
FOLDERS = {
    "missing": Case(instead(lambda path: None), "model_name_or_path.*{model}"),
    "empty": Case(instead(Path.mkdir), "model_name_or_path.*{model}", "latro.evaluate"),
    "a file": Case(instead(lambda path: path.write_text("x")), "model_name_or_path.*{model}"),
    "a link loop": Case(instead(lambda p: p.symlink_to(p)), "model_name_or_path.*{model}"),
    "no config": Case(lambda p: (p.model / "config.json").unlink(), "{model}", "latro.probe"),
    "no weights": Case(lambda p: (p.model / WEIGHTS).unlink(), "{model}", "latro.evaluate"),
    "pickled weights": Case(
        lambda p: (p.model / WEIGHTS).rename(p.model / "pytorch_model.bin"), "{model}"
    ),
    "no tokenizer": Case(
        lambda p: [(p.model / f"tokenizer{s}.json").unlink() for s in ("", "_config")], "{model}"
    ),
    "brackets in its name": Case(
        lambda p: p.arguments.update(model_name_or_path=p.root / "[/bold]"),
        r"model_name_or_path.*\[/bold\]",
    ),
    "an escape in its name": Case(
        lambda p: p.arguments.update(model_name_or_path="\x1b[2J"), r"model_name_or_path.*\\x1b\[2J"
    ),
}
CONFIGS = {
    "cut": Case(lambda p: cut(p.model / "config.json"), "{model}"),
    "empty": Case(text("config.json", ""), "{model}", "latro.sft"),
    "a list": Case(text("config.json", "[1]"), "{model}", "latro.evaluate"),
    "a number": Case(text("config.json", "1"), "{model}"),
    "null": Case(text("config.json", "null"), "{model}"),
    "deep": Case(text("config.json", "[" * 100_000), "{model}"),
    "not UTF-8": Case(text("config.json", b"\xff\xfe\x00"), "{model}"),
    "no model type": Case(config(model_type=None, architectures=None), "{model}", "latro.probe"),
    "an unknown model type": Case(config(model_type="no-such"), "{model}.*no-such"),
    "a model type that is a number": Case(config(model_type=5), "{model}"),
    "an encoder and decoder": Case(config(model_type="t5"), "{model}"),
    "an encoder": Case(config(model_type="vit", architectures=["ViTModel"]), "{model}"),
    "a size in words": Case(config(hidden_size="large"), "{model}", "latro.evaluate"),
    "a size of 0": Case(config(hidden_size=0), "{model}"),
    "a negative size": Case(config(num_hidden_layers=-1), "{model}"),
    "a huge size": Case(config(vocab_size=10**15), "{model}"),
    "heads that do not divide": Case(config(num_attention_heads=5), "{model}"),
    "an activation that is none": Case(config(hidden_act="no-such"), "{model}.*no-such"),
    "quantised by what is none": Case(
        config(quantization_config={"quant_method": "no-such"}), "{model}.*no-such"
    ),
    "quantised by what is not installed": Case(
        config(quantization_config={"quant_method": "awq", "bits": 4}), "{model}"
    ),
    "code of its own": Case(
        config(
            model_type="own",
            auto_map={"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"},
        ),
        "{model}.*trust_remote_code",
    ),
}
WEIGHT_FILES = {
    "cut": Case(lambda p: cut(p.model / WEIGHTS), "{model}", "latro.evaluate"),
    "cut in the header": Case(lambda p: cut(p.model / WEIGHTS, 0.001), "{model}"),
    "empty": Case(text(WEIGHTS, b""), "{model}"),
    "text": Case(text(WEIGHTS, "version https://git-lfs.github.com/spec/v1"), "{model}"),
    "a header of many bytes": Case(text(WEIGHTS, b"\xff" * 8 + b"{}"), "{model}"),
    "a folder": Case(
        lambda p: ((p.model / WEIGHTS).unlink(), (p.model / WEIGHTS).mkdir()), "{model}"
    ),
    "a shard is missing": Case(sharded, "{model}", "latro.evaluate"),
    "an index that is cut": Case(
        lambda p: (sharded(p), cut(p.model / INDEX)), "{model}", "latro.probe"
    ),
    "an index of another shape": Case(lambda p: (sharded(p), text(INDEX, "[]")(p)), "{model}"),
    "three tensors are missing": Case(
        weights(lambda t: [t.pop(name) for name in sorted(t)[:3]] and None),
        "{model}.*(q_proj|layers|embed)",
        "latro.evaluate",
    ),
    "prefixed keys": Case(
        weights(lambda t: {f"module.{name}": value for name, value in t.items()}),
        "{model}.*(module|layers)",
    ),
    "tensors that are not the model's": Case(
        weights(lambda t: t.update(surplus=torch.zeros(2))), "{model}.*surplus"
    ),
    "another shape": Case(
        weights(lambda t: t.update({"model.norm.weight": torch.ones(5)})), "{model}.*norm"
    ),
}
TOKENIZERS = {
    "cut": Case(lambda p: cut(p.model / "tokenizer.json"), "{model}"),
    "a list": Case(text("tokenizer.json", "[]"), "{model}", "latro.evaluate"),
    "a config that is a list": Case(text("tokenizer_config.json", "[]"), "{model}"),
    "a class that is none": Case(
        lambda p: p.edit_json("tokenizer_config.json", tokenizer_class=5), "{model}"
    ),
    "more tokens than the model": Case(
        lambda p: p.edit_json(
            "tokenizer_config.json",
            added_tokens_decoder={
                "4000": {"content": "<new>", "special": True, "lstrip": False, "rstrip": False}
                | {"normalized": False, "single_word": False}
            },
            extra_special_tokens=[f"<new{i}>" for i in range(200)],
        ),
        "{model}.*tokenizer has",
    ),
    "generation settings that are cut": Case(
        lambda p: cut(p.model / "generation_config.json"), "{model}"
    ),
    "generation settings that are a list": Case(text("generation_config.json", "[]"), "{model}"),
}
TEMPLATES = {
    "a syntax error": Case(template("{% for %}"), "chat template of .*{model}"),
    "an error": Case(template("{{ raise_exception('no such role') }}"), "{model}.*no such role"),
    "an unknown name": Case(template("{{ messages.nothing.more }}"), "chat template.*{model}"),
    "a type error": Case(template("{{ messages + 1 }}"), "chat template.*{model}"),
    "a division by 0": Case(template("{{ 1 / 0 }}"), "chat template.*{model}"),
    "without end": Case(
        template("{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"),
        "chat template.*{model}",
        "latro.evaluate",
    ),
    "gigabytes": Case(template("{{ 'x' * 10**10 }}"), "chat template.*{model}"),
    "endless text": Case(
        template(
            "{% for i in range(10**5) %}{% for j in range(10**5) %}xy{% endfor %}{% endfor %}"
        ),
        "chat template.*{model}",
    ),
    "drops the text": Case(template("a question:"), "chat template.*{model}"),
    "nothing": Case(template(" "), "{model}"),
    "out of the sandbox": Case(
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "chat template.*{model}"
    ),
    "recursion": Case(
        template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), "chat template.*{model}"
    ),
    "a system prompt that it refuses": Case(
        asked(frames.GEMMA, system_prompt="Be brief."), "system_prompt: .*{model}.*not supported"
    ),
    "a system prompt that it drops": Case(
        asked("{{ messages[-1].content }}", system_prompt="Be brief."),
        "system_prompt: .*{model} leaves system messages out",
        "latro.sft",
    ),
    "a system prompt without one": Case(
        asked("", system_prompt="Be brief."), "system_prompt: .*{model}, which has none"
    ),
    "a system prompt of nothing": Case(
        asked(frames.CHATML, system_prompt=" "), "system_prompt: expected words"
    ),
    "an argument that it does not read": Case(
        asked(frames.CHATML, chat_template_kwargs='{"enable_thinkng": false}'),
        "chat_template_kwargs: .*{model} does not read 'enable_thinkng'",
        "latro.probe",
    ),
    "an argument that it is given": Case(
        asked(frames.CHATML, chat_template_kwargs='{"messages": []}'),
        "chat_template_kwargs: .*got 'messages'",
        "latro.evaluate",
    ),
    "arguments that are no JSON": Case(
        asked(frames.CHATML, chat_template_kwargs="enable_thinking=false"),
        "chat_template_kwargs: expected a JSON object, got 'enable_thinking=false'",
    ),
    "arguments that are a list": Case(
        asked(frames.CHATML, chat_template_kwargs="[1]"), "chat_template_kwargs: .*object, got '.1"
    ),
    "arguments that are deep": Case(
        asked(frames.CHATML, chat_template_kwargs="[" * 10**4), "chat_template_kwargs: .*object"
    ),
    "an argument that it fails at": Case(
        asked("{{ messages[0].content + more }}", chat_template_kwargs='{"more": 1}'),
        "chat template.*{model}.*TypeError",
    ),
    "an argument that never ends": Case(
        asked(
            "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}"
            "{{ messages[0].content }}",
            chat_template_kwargs='{"n": 99999}',
        ),
        "chat template.*{model} does not end",
    ),
}
ADAPTERS = {
    "its base is missing": Case(adapter(lambda f: None, "/nowhere/base"), "/nowhere/base"),
    "it names no base": Case(adapter(lambda f: None, ""), "{root}/adapter.*base model"),
    "its settings are cut": Case(
        adapter(lambda f: cut(f / "adapter_config.json")), "{root}/adapter", "latro.evaluate"
    ),
    "of a kind that is none": Case(
        adapter(
            lambda f: (f / "adapter_config.json").write_text(
                json.dumps(
                    json.loads((f / "adapter_config.json").read_text()) | {"peft_type": "NONE"}
                )
            )
        ),
        "{root}/adapter",
    ),
    "its weights are cut": Case(
        adapter(lambda f: cut(f / "adapter_model.safetensors")), "{root}/adapter", "latro.probe"
    ),
    "its weights are missing": Case(
        adapter(lambda f: (f / "adapter_model.safetensors").unlink()), "{root}/adapter"
    ),
    "weights of another shape": Case(
        adapter_weights(lambda t: {name: torch.zeros(3, 7) for name in t}), "{root}/adapter"
    ),
    "weights of another model": Case(
        adapter_weights(lambda t: {f"other.{name}": value for name, value in t.items()}),
        "{root}/adapter",
        "latro.evaluate",
    ),
    "a tensor is missing": Case(
        adapter_weights(lambda t: (t.pop(sorted(t)[0]), None)[1]), "{root}/adapter.*lora"
    ),
}
GGUF = {
    "missing": Case(gguf(lambda f: f.unlink()), "there is no file '{root}/tiny.gguf'"),
    "empty": Case(gguf(lambda f: f.write_bytes(b"")), "'{root}/tiny.gguf' is no GGUF file"),
    "a page of the hub": Case(
        gguf(lambda f: f.write_text("<!doctype html>")), "tiny.gguf' is no GGUF .*<!do", "latro.sft"
    ),
    "of a format of tomorrow": Case(
        gguf(lambda f: f.write_bytes(b"GGUF\x09" + f.read_bytes()[5:])),
        "'{root}/tiny.gguf': tiny.gguf is GGUF v9",
    ),
    "big-endian": Case(
        gguf(lambda f: f.write_bytes(b"GGUF\0\0\0\x03" + f.read_bytes()[8:])), "{root}/tiny.gguf"
    ),
    "cut in its settings": Case(gguf(lambda f: cut(f, 0.01)), _BROKEN),
    "cut in its tokens": Case(gguf(lambda f: cut(f, 0.05)), _BROKEN, "latro.probe"),
    "cut in its weights": Case(gguf(lambda f: cut(f, 0.6)), _BROKEN, "latro.evaluate"),
    "a byte is missing": Case(gguf(lambda f: f.write_bytes(f.read_bytes()[:-1])), _BROKEN),
    "more tensors than bytes": Case(
        gguf(lambda f: f.write_bytes(f.read_bytes()[:8] + b"\x7f" * 8 + f.read_bytes()[16:])),
        _BROKEN,
    ),
    "an unknown architecture": Case(
        gguf(lambda f: None, architecture="no-such"),
        "'{root}/tiny.gguf': GGUF model with architecture no-such",
        "latro.evaluate",
    ),
    "an encoder and decoder": Case(gguf(lambda f: None, architecture="t5"), "tiny.gguf.*T5Config"),
    "another architecture's settings": Case(gguf(lambda f: None, architecture="lfm2"), _BROKEN),
    "several, and none is named": Case(
        gguf(_in_a_folder), "gguf_file: expected one of a.gguf, b.gguf, .*'{root}/files'"
    ),
    "another than those": Case(
        gguf(lambda f: _in_a_folder(f) | {"gguf_file": "c.gguf"}),
        "gguf_file: there is no file 'c.gguf' in '{root}/files'; its GGUF files: a.gguf, b.gguf",
        "latro.evaluate",
    ),
    "named in a folder without one": Case(
        gguf(lambda f: {"model_name_or_path": f.parent / "model", "gguf_file": "a.gguf"}),
        "gguf_file: there is no file 'a.gguf' in '{model}'; its GGUF files: none",
    ),
    "named twice": Case(
        gguf(lambda f: {"gguf_file": "tiny.gguf"}),
        "gguf_file: expected a folder or a hub id .* with the file '{root}/tiny.gguf'",
        "latro.probe",
    ),
    "of no model": Case(
        lambda p: p.arguments.update(gguf_file="a.gguf", model_name_or_path=None),
        "gguf_file: expected model_name_or_path with it.*got 'a.gguf' alone",
    ),
}
QUANTISED = {
    "without an adapter": Case(given(load_in_8bit="true"), "model: expected an adapter on weights"),
    "too narrow": Case(
        given(load_in_4bit="true"),
        "load_in_4bit: expected layers of a width that 64 divides.*has 32",
        "latro.evaluate",
    ),
    "in two ways": Case(
        given(load_in_4bit="true", load_in_8bit="true"),
        "load_in_8bit: expected one of",
        "latro.sft",
    ),
    "by halves": Case(
        given(bnb_4bit_quant_type="fp4"), "bnb_4bit_quant_type: expected --load_in_4bit true"
    ),
    "in scales alone": Case(
        given(load_in_8bit="true", use_bnb_nested_quant="true"),
        "use_bnb_nested_quant: expected --load_in_4bit true with it",
        "latro.probe",
    ),
    "from GGUF": Case(
        gguf(lambda f: {"load_in_8bit": "true"}), "load_in_4bit and load_in_8bit take no GGUF file"
    ),
    "with an adapter on nothing": Case(
        given(load_in_8bit="true", use_peft="true", lora_target_parameters="no.such"),
        "no.such",
    ),
    "with an adapter that is not asked for": Case(
        given(lora_target_parameters="mlp.experts.gate_up_proj"),
        "lora_target_parameters: expected --use_peft true with it",
    ),
}
FAMILIES = {
    "quantised": QUANTISED,
    "gguf": GGUF,
    "folder": FOLDERS,
    "config": CONFIGS,
    "weights": WEIGHT_FILES,
    "tokenizer": TOKENIZERS,
    "template": TEMPLATES,
    "adapter": ADAPTERS,
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{family}: {name}")
        for family, cases in FAMILIES.items()
        for name, case in cases.items()
    ],
)
def test_a_hostile_model_is_refused(
    case: Case, place: Place, warm: WarmProcess, tmp_path: Path
) -> None:
    refused(case, place, warm, tmp_path / "printed")
