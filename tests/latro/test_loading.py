from __future__ import annotations

import json
import sys

import pytest
import torch

from latro.config import DataArguments, ModelArguments
from latro.loading import load_held_out, load_model, load_splits, load_task
from tests.latro.conftest import Sums


def test_pickled_weights_are_refused(tiny, tokenizer, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load .* Expected .* safetensors weights"):
        load_model(ModelArguments(model_name_or_path=str(tmp_path)))


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
    # Where transformers copies such code to import it.
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match=r"code of its own, .* pass --trust_remote_code true"):
        load_model(ModelArguments(model_name_or_path=str(folder)))
    assert not (tmp_path / "ran").exists()
    model, _ = load_model(ModelArguments(model_name_or_path=str(folder), trust_remote_code=True))
    assert type(model).__name__ == "CustomModel"
    assert (tmp_path / "ran").exists()


class _Overlapping(Sums):
    def _rows(self, split, path, num_examples, seed):
        return [{"prompt": f"{n}?", "answer": "1"} for n in range(4 if split == "test" else 3)]


def test_problems_that_are_trained_on_are_no_held_out_ones():
    with pytest.raises(ValueError, match="not trained on; 3 of the 4 of 'test' are"):
        load_splits(_Overlapping(), DataArguments(), 0, "test", None)


def test_train_and_held_out_problems_come_as_the_arguments_say():
    args = DataArguments(num_train_examples=5)
    train, held_out = load_splits(load_task(args), args, 0, "validation", 3)
    assert (len(train), len(held_out)) == (5, 3)


def test_data_of_ones_own_is_a_task_with_its_template(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text("prompt,answer\nWhat is 1?,one\n")
    args = DataArguments(dataset_name=str(path), answer_template="Answer:", grader="exact")
    task = load_task(args)
    held_out = load_held_out(task, "test", args, None)
    assert held_out["answer"][:] == ["one"]
    assert task.grade("Answer: One.", held_out[0])
    assert not task.grade("The answer is one.", held_out[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grader": "exact"}, "grader: expected with data of your own only, got 'exact'"),
        ({"dataset_config": "main"}, "dataset_config: expected with data of your own only"),
        (
            {"dataset_name": "my.jsonl", "dataset_path": "data"},
            r"dataset_path: expected with one of arc_challenge, .* got 'data' with 'my.jsonl'",
        ),
        ({"dataset_name": "gsm9k"}, "expected a task, a file, a folder or a hub id"),
    ],
)
def test_arguments_that_the_data_does_not_take_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_task(DataArguments(**settings))


@pytest.mark.parametrize("template", ["", " The answer is", "Answer: "])
def test_an_answer_template_has_no_space_around_it(template):
    with pytest.raises(ValueError, match="answer_template: expected words without white space"):
        DataArguments(answer_template=template)
