"""An output folder belongs to one run."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from latro.config.training import SMALL_MODEL
from latro.run.folder import LOCK_FILE, check_apart, delete, locked, to_replace
from latro.train import train

RUN = (
    *("--num_train_examples", "4", "--num_eval_examples", "2", "--max_steps", "1"),
    *("--num_generations", "2", "--max_completion_length", "4", "--use_cpu", "true"),
    *("--per_device_train_batch_size", "2", "--disable_tqdm", "true"),
)
HOLDER = """
import sys, time
from pathlib import Path
from latro.run.folder import locked
with locked(Path(sys.argv[1]), "output_dir: it"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path, warm):
    """Start a process that holds the lock of the folder `run`."""
    script = tmp_path / "holder.py"
    script.write_text(HOLDER)
    printed = tmp_path / "printed by the holder"
    process = warm.start(str(script), [tmp_path / "run" / LOCK_FILE], printed)
    while (printed / "stdout").read_text() != "held\n":
        assert process.poll() is None, process.wait()
        time.sleep(0.02)
    yield process
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_a_folder_that_another_process_trains_in_is_refused(holder, tmp_path, make_trainer):
    message = f"output_dir: .*run is in use by process {holder.pid} on .*; wait until"
    with pytest.raises(ValueError, match=message):
        train([*RUN, "--output_dir", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=message):
        make_trainer(max_steps=1).train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]


def test_a_killed_process_leaves_no_lock(holder, tmp_path, make_trainer):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    make_trainer(max_steps=1).train()
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_link_to_the_folder_is_the_folder(holder, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with (
        pytest.raises(ValueError, match="is in use by process"),
        locked(tmp_path / "link" / LOCK_FILE, "output_dir: link"),
    ):
        pass


def test_folders_that_only_a_lock_needed_go_with_it(tmp_path):
    lock = tmp_path / "a" / "b" / "lock"
    with locked(lock, "output_dir: a/b"):
        assert lock.exists()
    assert list(tmp_path.iterdir()) == []
    with locked(lock, "output_dir: a/b"):
        (tmp_path / "a" / "mine").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_lock_that_was_deleted_while_it_was_opened_is_made_anew(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    opened = os.open
    deleted = []

    def open_and_lose(path, *args, **kwargs):
        handle = opened(path, *args, **kwargs)
        if not deleted:
            deleted.append(path)
            os.unlink(path)
        return handle

    monkeypatch.setattr(os, "open", open_and_lose)
    with locked(lock, "output_dir: it"):
        assert lock.exists()
    assert deleted == [lock]


OWN_FILES = [
    *("README.md", "metrics.jsonl", "samples.jsonl", "progress.png", "results.json"),
    *("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json"),
    *("model.safetensors.index.json", "generation_config.json", "adapter_model.safetensors"),
    *("training_args.bin", "trainer_state.json", "tokenizer_config.json"),
]


@pytest.mark.parametrize("name", OWN_FILES)
def test_what_is_there_is_not_written_over(tmp_path, make_trainer, name):
    path = tmp_path / "run" / name
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"output_dir: .*run has {name} already") as caught:
        make_trainer(max_steps=1, overwrite_output_dir=False).train()
    assert "\n" not in str(caught.value)
    assert [p.name for p in path.parent.iterdir()] == [name]
    assert path.read_text() == "mine"


def test_what_a_run_does_not_write_stays_beside_it(tmp_path, make_trainer):
    names = ("log.txt", ".partial", "data.jsonl", "checkpoint-notes", "a.partial")
    (tmp_path / "run").mkdir()
    for name in names:
        (tmp_path / "run" / name).write_text("mine")
    trainer = make_trainer(max_steps=1, overwrite_output_dir=False, save_strategy="steps")
    trainer.train()
    trainer.save_model()
    # A trainer may overwrite its own files.
    trainer.train()
    trainer.save_model()
    for name in names:
        assert (tmp_path / "run" / name).read_text() == "mine"


def test_a_finished_run_is_overwritten_only_when_asked(tmp_path):
    argv = [*RUN, "--output_dir", str(tmp_path / "run"), "--save_strategy", "steps"]
    argv += ["--save_steps", "1"]
    train(argv)
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    with pytest.raises(ValueError, match="has the checkpoints of an earlier run"):
        train(argv)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"has README\.md, config.json, .* already"):
        train(argv)
    # A checkpoint in another folder does not make this folder the run's own.
    elsewhere = ("--resume_from_checkpoint", str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match=r"has README\.md, config.json, .* already"):
        train([*argv, *elsewhere])
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    (tmp_path / "checkpoint-1").rename(tmp_path / "run" / "checkpoint-99")
    train([*argv, "--overwrite_output_dir", "true"])
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    train([*argv, "--resume_from_checkpoint", "true"])


def test_one_command_begins_a_run_and_goes_on_with_it(tmp_path):
    """A scheduler starts it again, wherever it was killed: here while its first checkpoint came."""
    run = tmp_path / "run"
    (run / ".latro-partial").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("of an earlier start")
    argv = [*RUN, "--output_dir", str(run), "--save_strategy", "steps", "--save_steps", "1"]
    argv += ["--resume_from_checkpoint", "auto"]
    train(argv)
    assert not (run / ".latro-partial").exists()
    train([*argv, "--max_steps", "2"])
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "reward" in line] == [1, 2]


def test_such_a_command_writes_over_no_model(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_text("mine")
    auto = ("--resume_from_checkpoint", "auto", "--output_dir", str(run))
    with pytest.raises(ValueError, match=r"run has config\.json already"):
        train([*RUN, *auto])
    assert (run / "metrics.jsonl").read_text() == "mine"


def test_what_may_be_overwritten_stays_until_the_training_begins(tmp_path, make_trainer):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text("earlier")
    (tmp_path / "run" / "checkpoint-9").mkdir()
    kwargs = {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"speed": 2}}
    with pytest.raises(ValueError, match="lr_scheduler_type: cosine"):
        make_trainer(max_steps=1, overwrite_output_dir=True, **kwargs).train()
    assert path.read_text() == "earlier"
    assert (tmp_path / "run" / "checkpoint-9").exists()
    make_trainer(max_steps=1, overwrite_output_dir=True).train()
    assert '"reward"' in path.read_text()
    assert not (tmp_path / "run" / "checkpoint-9").exists()


def test_a_users_own_card_outlasts_a_resumed_run(tmp_path):
    argv = [*RUN, "--output_dir", str(tmp_path / "run"), "--save_strategy", "steps"]
    train(argv)
    card = tmp_path / "run" / "README.md"
    card.write_text("# What I found\n")
    resume = (*argv, "--resume_from_checkpoint", "true")
    with pytest.raises(ValueError, match=r"README.md is no model card of this run"):
        train(resume)
    assert card.read_text() == "# What I found\n"
    train([*resume, "--overwrite_output_dir", "true"])
    assert "latro" in card.read_text()


def test_the_folder_of_model_or_data_is_no_output(tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    model.mkdir()
    for path in Path(SMALL_MODEL).iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    data.mkdir()
    (data / "train.jsonl").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    before = {p: p.read_bytes() for p in model.iterdir()}
    for output, argv, argument in (
        (model, ("--model_name_or_path", str(model)), "model_name_or_path"),
        (tmp_path / "link", ("--model_name_or_path", str(model)), "model_name_or_path"),
        (model, ("--model_name_or_path", str(tmp_path / "link")), "model_name_or_path"),
        (tmp_path, ("--model_name_or_path", str(model)), "model_name_or_path"),
        (data, ("--dataset_name", str(data / "train.jsonl")), "dataset_name"),
        (data, ("--dataset_name", str(data)), "dataset_name"),
        (data, ("--dataset_name", "gsm8k", "--dataset_path", str(data)), "dataset_path"),
    ):
        for more in ((), ("--overwrite_output_dir", "true")):
            with pytest.raises(ValueError, match=f"is or holds {argument}'s .*, which the run"):
                train([*RUN, *argv, *more, "--output_dir", str(output)])
    assert before == {p: p.read_bytes() for p in model.iterdir()}
    # A folder below the model's overwrites nothing of it.
    check_apart(model / "run", [("model_name_or_path", str(model))])
    check_apart(tmp_path, [("dataset_name", "arithmetic"), ("dataset_path", None)])


def test_a_trainer_knows_the_folder_its_model_came_from(tmp_path, make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.model.config.name_or_path = str(tmp_path / "run")
    trainer.save_model()
    with pytest.raises(ValueError, match=r"output_dir: .* is or holds model's"):
        make_trainer(model=trainer.model, max_steps=1).train()
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_taken_over_a_folder_loses_the_run_of_before_alone(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "a").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "checkpoint-8").symlink_to(tmp_path / "elsewhere")
    for name in ("metrics.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    delete(to_replace(tmp_path, ["metrics.jsonl"], overwrite=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "notes.txt"]
    assert (tmp_path / "elsewhere" / "kept").exists()


SCRIPT = """
import sys
from pathlib import Path
from accelerate import PartialState
from latro.run.folder import locked_by_all
processes = PartialState(cpu=True)
try:
    with locked_by_all(Path(sys.argv[1]), "output_dir: it"):
        pass
except ValueError as error:
    assert "is in use by process" in str(error)
    print("refused", processes.process_index, flush=True)
processes.destroy_process_group()
"""


def test_all_processes_learn_that_the_main_one_is_refused(holder, tmp_path, warm):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    lock = tmp_path / "run" / LOCK_FILE
    done = warm.run_together(str(script), [lock], tmp_path / "printed", processes=2)
    assert sorted(done.stdout.split("\n")[:2]) == ["refused 0", "refused 1"]
