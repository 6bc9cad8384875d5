"""The card that a trainer writes about its run."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from latro.config.data import DataArguments
from latro.reporting.run_summary import run_of
from latro.tasks import OwnData


class Exact(OwnData):
    """A user's own data with exact comparison."""

    grader = "exact"

    def same(self, predicted, answer):
        return predicted == answer

    def _canonical(self, statement, example):
        return statement.strip()


def test_the_saved_model_is_told_of_with_its_first_and_last_evaluation(make_trainer, tmp_path):
    folder = tmp_path / "run"
    trainer = make_trainer(
        max_steps=2, eval_on_start=True, eval_strategy="steps", eval_steps=2, beta=0.5
    )
    trainer.train()
    trainer.save_model()
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "| 8 held-out problems | update 0 | update 2 |" in text
    assert "Before, " in text
    assert "After, " in text
    assert "](progress.png)" in text
    run = run_of(trainer, folder)
    settings = {s.name: (s.value, s.default) for s in run.settings}
    assert settings["beta"] == (0.5, 0.05)
    assert settings["max_steps"] == (2, -1)
    assert "output_dir" not in settings
    assert "hub_token" not in settings
    assert "num_train_epochs" not in settings
    # The command does not know the toy task.
    assert run.held_out.command is None
    trainer.data = DataArguments(dataset_name="gsm8k", dataset_path="my data", num_train_examples=4)
    command = run_of(trainer, folder).held_out.command
    assert command.startswith(f"python -m latro.evaluate --model_name_or_path {folder} ")
    assert " --dataset_name gsm8k --dataset_path 'my data' --eval_split validation " in command
    assert "num_train_examples" not in command
    # The Trainer completes the hub id when pushing.
    trainer.args.push_to_hub, trainer.hub_model_id = True, "me/run"
    command = run_of(trainer, folder).held_out.command
    assert command.startswith("python -m latro.evaluate --model_name_or_path me/run ")


def test_a_run_without_evaluations_has_a_card(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.save_model(str(tmp_path / "elsewhere"))
    text = (tmp_path / "elsewhere" / "README.md").read_text(encoding="utf-8")
    assert "0 updates" in text
    assert "progress.png" not in text
    assert not (tmp_path / "run" / "README.md").exists()


def test_what_the_hub_is_told_stands_in_the_front_matter(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.create_model_card(
        license="mit", tags="mine", model_name="name", finetuned_from="org/base", dataset_tags="a/b"
    )
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.license == "mit"
    assert card.data.tags == ["latro", "mine"]
    assert card.data.base_model == "org/base"
    assert card.data.datasets == ["a/b"]
    assert "# name\n" in card.text


def test_the_best_model_s_evaluation_is_shown(make_trainer, tmp_path):
    trainer = make_trainer(load_best_model_at_end=True, save_strategy="best", eval_strategy="steps")
    trainer.state.log_history = [{"step": s, "eval_accuracy_greedy": s / 10} for s in (0, 2, 4)]
    trainer.state.global_step = 4
    trainer.state.best_global_step = 2
    run = run_of(trainer, tmp_path)
    assert (run.update, run.before["step"], run.after["step"]) == (2, 0, 2)


def test_own_data_is_named_as_a_data_set_where_it_is_on_the_hub(make_trainer, tmp_path):
    trainer = make_trainer()
    rows = {"train": [{"prompt": "1?", "answer": "1"}]}
    for name, dataset in (("org/name", "org/name"), (str(tmp_path / "my.jsonl"), None)):
        trainer.task = Exact(name, rows)
        run = run_of(trainer, tmp_path)
        assert run.dataset == dataset
        assert name in run.task


def test_an_adapter_s_card_is_ours(make_trainer, tiny, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=3, target_modules=["q_proj"]))
    trainer = make_trainer(model, max_steps=1)
    trainer.save_model()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.tags == ["latro"]
    assert "a LORA adapter of rank 3 on a model that is not on the hub" in card.text
