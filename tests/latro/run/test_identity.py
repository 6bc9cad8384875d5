"""A checkpoint is resumed only as the run that it belongs to."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from latro.config.training import SMALL_MODEL, SftConfig
from latro.run.checkpoints import MANIFEST, write_manifest
from latro.run.identity import RUN_FILE, rows_fingerprint, weights_fingerprint
from latro.sft import sft
from latro.sft_trainer import SftTrainer
from latro.train import train
from tests.latro.other_models import other_model

DEFAULTS = {"num_generations": 2, "max_completion_length": 4, "save_strategy": "steps"}


@pytest.fixture
def saved(make_trainer):
    """Return `make(**settings)`, like `make_trainer`, with a checkpoint after 2 of 4 updates."""

    def make(model=None, **settings):
        return make_trainer(model, **{**DEFAULTS, "max_steps": 4, "save_steps": 2, **settings})

    make().train()
    return make


def note_again(folder):
    """Write a changed checkpoint's manifest again."""
    (folder / MANIFEST).unlink()
    write_manifest(folder)


OF_ANOTHER_RUN = [
    ({"seed": 7}, "seed was 42, now 7"),
    ({"data_seed": 7}, "data_seed was None, now 7"),
    ({"num_generations": 3}, "num_generations was 2, now 3"),
    ({"per_device_train_batch_size": 4}, "prompts an update was 2, now 4"),
    ({"gradient_accumulation_steps": 2}, "prompts an update was 2, now 4"),
    ({"objective": "verifree"}, "objective was 'latro', now 'verifree'"),
    ({"learning_rate": 0.5}, "learning_rate was 0.01, now 0.5"),
    ({"lr_scheduler_type": "constant"}, "lr_scheduler_type was 'linear', now 'constant'"),
    ({"warmup_steps": 3}, "warmup_steps was 0, now 3"),
    ({"weight_decay": 0.1}, "weight_decay was 0.0, now 0.1"),
    ({"optim": "sgd"}, "optim was 'adamw_torch_fused', now 'sgd'"),
    ({"adam_beta2": 0.9}, "adam_beta2 was 0.999, now 0.9"),
    ({"max_grad_norm": 0.0}, "max_grad_norm was 1.0, now 0.0"),
    ({"beta": 0.5}, "beta was 0.05, now 0.5"),
    ({"kl": "k3"}, "kl was 'reward', now 'k3'"),
    ({"answer_weight": 0.5}, "answer_weight was 1.0, now 0.5"),
    ({"answer_weight_warmup_steps": 3}, "answer_weight_warmup_steps was 0, now 3"),
    ({"temperature": 0.5}, "temperature was 1.0, now 0.5"),
    ({"max_completion_length": 5}, "max_completion_length was 4, now 5"),
    ({"reward_tokens": "answer"}, "reward_tokens was 'all', now 'answer'"),
    ({"unfinished": "exclude"}, "unfinished was 'floor', now 'exclude'"),
    ({"bf16": True}, "bf16 was False, now True"),
    ({"dataloader_drop_last": True}, "dataloader_drop_last was False, now True"),
    (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2},
        "load_best_model_at_end was False, now True",
    ),
]


def test_a_setting_that_changes_results_is_refused_by_name(saved, tmp_path):
    # One checkpoint serves for all, since a refused run writes nothing.
    for setting, told in OF_ANOTHER_RUN:
        trainer = saved(use_cpu=True, **setting)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        for resume in (True, str(tmp_path / "run" / "checkpoint-2")):
            with pytest.raises(
                ValueError, match=r"^resume_from_checkpoint: .*of another run: "
            ) as e:
                trainer.train(resume_from_checkpoint=resume)
            assert told in str(e.value)
            assert "\n" not in str(e.value)
        assert all(map(torch.equal, before, trainer.model.parameters()))


def test_what_changes_no_result_is_told_in_one_line(saved, tmp_path, caplog):
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    whole = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    caplog.set_level(logging.WARNING, "latro")
    trainer = saved(token_budget=999, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=checkpoint)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "latro.run.identity"]
    assert "token_budget was 16384, now 999" in line
    assert "per_device_train_batch_size was 2, now 1" in line
    assert "gradient_accumulation_steps was 1, now 2" in line
    again = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor)


def test_what_has_no_part_in_the_training_is_free(saved, tmp_path, caplog):
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    caplog.set_level(logging.WARNING, "latro")
    trainer = saved(
        output_dir=str(tmp_path / "moved"),
        logging_steps=2,
        save_steps=1,
        dataloader_num_workers=1,
        run_name="again",
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    assert not [r for r in caplog.records if r.name == "latro.run.identity"]
    # The intervals of the arguments hold, not those in the checkpoint's state.
    moved = sorted(p.name for p in (tmp_path / "moved").glob("checkpoint-*"))
    assert moved == ["checkpoint-3", "checkpoint-4"]
    assert [e["step"] for e in trainer.state.log_history if "reward" in e] == [1, 2, 4]


def test_evaluations_decide_where_the_best_model_is_taken(make_trainer, dataset, caplog):
    best = {**DEFAULTS, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    few = dataset.select(range(5))
    for decides in (False, True):
        make_trainer(**best, load_best_model_at_end=decides).train()
        trainer = make_trainer(**best, load_best_model_at_end=decides)
        trainer.eval_dataset = few
        if not decides:
            trainer.train(resume_from_checkpoint=True)
            assert "held-out data was {'rows': 8" in caplog.text
            continue
        with pytest.raises(ValueError, match=r"held-out data was {'rows': 8"):
            trainer.train(resume_from_checkpoint=True)


def test_a_longer_run_goes_on_by_the_schedule_of_its_length(saved, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "latro")
    trainer = saved(max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "latro.run.identity"]
    assert line.endswith("otherwise: max_steps was 4, now 6")
    rates = [e["learning_rate"] for e in trainer.state.log_history if "reward" in e]
    # A log has the learning rate of its update.
    expected = [*(0.01 * (4 - n) / 4 for n in range(4)), *(0.01 * (6 - n) / 6 for n in (4, 5))]
    assert rates == pytest.approx(expected)


def test_other_weights_are_refused(saved, tiny):
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] += 1
    with pytest.raises(ValueError, match=r"initial weights was '\w{8}', now '\w{8}'"):
        saved(model).train(resume_from_checkpoint=True)


def test_a_config_with_a_number_that_json_lacks_is_compared(make_trainer, tokenizer):
    def trainer(limit, steps):
        model = other_model("bamba", tokenizer, time_step_limit=[0.0, limit])
        return make_trainer(model, **{**DEFAULTS, "max_steps": steps, "save_steps": 1})

    trainer(math.inf, 1).train()
    trainer(math.inf, 2).train(resume_from_checkpoint=True)
    message = r"time_step_limit was \[0.0, 'Infinity'\], now \[0.0, 5.0\]"
    with pytest.raises(ValueError, match=message):
        trainer(5.0, 2).train(resume_from_checkpoint=True)


def test_another_model_config_is_refused(saved, tiny):
    model = tiny()
    model.config.rms_norm_eps = 1e-3
    with pytest.raises(ValueError, match=r"model config: rms_norm_eps was 1e-06, now 0\.001"):
        saved(model).train(resume_from_checkpoint=True)


def test_another_reference_is_refused(saved, tiny, make_trainer):
    reference = tiny()
    with torch.no_grad():
        reference.model.norm.weight *= 2
    trainer = make_trainer(None, reference, **DEFAULTS, max_steps=4)
    with pytest.raises(ValueError, match="reference weights was"):
        trainer.train(resume_from_checkpoint=True)


def test_other_rows_are_refused(saved, dataset):
    rows = list(dataset)
    rows[0]["answer"] = "1"
    for other, told in (
        (Dataset.from_list(rows), "training data was {'rows': 8, 'crc32': "),
        (dataset.select(range(6)), "now {'rows': 6, 'crc32': "),
    ):
        with pytest.raises(ValueError, match=told):
            saved(train_dataset=other).train(resume_from_checkpoint=True)


def test_another_template_or_tokenizer_is_refused(saved, monkeypatch):
    trainer = saved()
    monkeypatch.setattr(trainer.task, "answer_template", "So it is")
    with pytest.raises(ValueError, match="answer template was 'The answer is', now 'So it is'"):
        trainer.train(resume_from_checkpoint=True)
    trainer = saved()
    monkeypatch.setattr(trainer.processing_class, "chat_template", "{{ messages }}")
    with pytest.raises(ValueError, match="chat template was"):
        trainer.train(resume_from_checkpoint=True)


def test_another_trainer_is_refused(saved, tiny, tokenizer, task, dataset, tmp_path):
    args = SftConfig(
        output_dir=str(tmp_path / "run"),
        target="answer",
        max_steps=4,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    trainer = SftTrainer(tiny(), args, dataset, tokenizer, task, eval_dataset=dataset)
    with pytest.raises(ValueError, match="trainer was 'LatroTrainer', now 'SftTrainer'"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_that_does_not_say_is_taken_with_a_warning(saved, tmp_path, caplog):
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / RUN_FILE).unlink()
        note_again(folder)
    trainer = saved(seed=7)
    trainer.train(resume_from_checkpoint=True)
    assert f"has no {RUN_FILE}" in caplog.text


def test_a_record_that_is_damaged_is_named(saved, tmp_path):
    folder = tmp_path / "run" / "checkpoint-4"
    message = rf"^resume_from_checkpoint: .*{RUN_FILE} cannot be read"
    for text in ("", "[]", '{"decides": 1, "told": {}}', '{"told": {}}', "{"):
        (folder / RUN_FILE).write_text(text)
        note_again(folder)
        with pytest.raises(ValueError, match=message):
            saved().train(resume_from_checkpoint=True)


def test_a_setting_that_came_later_is_told(saved, tmp_path, caplog):
    folder = tmp_path / "run" / "checkpoint-4"
    record = json.loads((folder / RUN_FILE).read_text())
    del record["decides"]["unfinished"]
    (folder / RUN_FILE).write_text(json.dumps(record))
    note_again(folder)
    saved().train(resume_from_checkpoint=True)
    assert "unfinished 'floor', unknown to the checkpoint" in caplog.text


def test_no_secret_is_noted(make_trainer, tmp_path):
    make_trainer(**DEFAULTS, max_steps=1, hub_token="hf_secret").train()
    text = (tmp_path / "run" / "checkpoint-1" / RUN_FILE).read_text()
    assert "learning_rate" in text
    assert "secret" not in text
    assert "hub_token" not in text


def test_an_adapter_s_base_and_settings_are_compared(tiny, tokenizer, tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def argv(*more):
        return [
            *("--model_name_or_path", str(tmp_path / "model"), "--use_peft", "true"),
            *("--output_dir", str(tmp_path / "run"), "--dataset_name", "arithmetic"),
            *("--num_train_examples", "4", "--num_eval_examples", "2", "--use_cpu", "true"),
            *("--num_generations", "2", "--max_completion_length", "4", "--max_steps", "2"),
            *("--per_device_train_batch_size", "2", "--disable_tqdm", "true"),
            *("--save_strategy", "steps", "--save_steps", "1", *more),
        ]

    train(argv())
    resume = ("--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-1"))
    train(argv(*resume))
    with pytest.raises(ValueError, match=r"adapter: r was 16, now 8"):
        train(argv(*resume, "--lora_r", "8"))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="initial weights was"):
        train(argv(*resume))


def test_the_command_refuses_another_run(tmp_path):
    argv = [
        *("--num_train_examples", "4", "--num_eval_examples", "2", "--max_steps", "2"),
        *("--max_completion_length", "64", "--use_cpu", "true", "--disable_tqdm", "true"),
        *("--per_device_train_batch_size", "2", "--save_strategy", "steps", "--save_steps", "1"),
        *("--output_dir", str(tmp_path / "run")),
    ]
    sft(argv)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    argv += ["--resume_from_checkpoint", "true"]
    for more, told in (
        (("--seed", "3"), "seed was 42, now 3; .*training data was"),
        (("--num_train_examples", "3"), "training data was {'rows': 4"),
        (("--target", "answer"), "target was 'rationale', now 'answer'"),
        (("--learning_rate", "0.5"), r"learning_rate was 0\.001, now 0\.5"),
    ):
        with pytest.raises(ValueError, match=f"^resume_from_checkpoint: .*{told}"):
            sft([*argv, *more])
    with pytest.raises(ValueError, match="trainer was 'SftTrainer', now 'LatroTrainer'"):
        train(argv)
    # A refused run has written nothing; only the lock has touched the folder.
    assert written == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}


def test_processes_are_told_and_as_many_prompts_an_update_go_on(tmp_path, warm):
    argv = [
        *("--model_name_or_path", str(SMALL_MODEL), "--num_train_examples", "8"),
        *("--num_eval_examples", "2", "--eval_on_start", "false", "--max_steps", "2"),
        *("--max_completion_length", "4", "--num_generations", "2", "--use_cpu", "true"),
        *("--disable_tqdm", "true", "--save_strategy", "steps", "--save_steps", "1"),
        *("--output_dir", str(tmp_path / "run")),
    ]
    train([*argv, "--per_device_train_batch_size", "2"])
    resume = ("--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-1"))

    def on_two(batch, code):
        arguments = [*argv, *resume, "--per_device_train_batch_size", batch]
        printed = tmp_path / f"printed with {batch}"
        return warm.run_together("latro.train", arguments, printed, processes=2, code=code)

    assert "prompts an update was 2, now 4" in on_two("2", code=1).stderr
    done = on_two("1", code=0)
    assert "processes was 1, now 2" in done.stderr


def test_fingerprints_find_a_change_anywhere(tiny):
    rows = [{"prompt": f"{n}?", "answer": str(n), "other": n} for n in range(5)]
    first = rows_fingerprint(Dataset.from_list(rows))
    assert first["rows"] == 5
    assert rows_fingerprint(Dataset.from_list(rows[::-1])) != first
    rows[4]["other"] = 9
    assert rows_fingerprint(Dataset.from_list(rows)) == first
    rows[4]["answer"] = "9"
    assert rows_fingerprint(Dataset.from_list(rows)) != first
    model = tiny()
    before = weights_fingerprint(model)
    assert weights_fingerprint(tiny()) == before
    for parameter in model.parameters():
        given = parameter.data.clone()
        parameter.data += 1
        assert weights_fingerprint(model) != before
        parameter.data = given
    assert weights_fingerprint(model) == before
