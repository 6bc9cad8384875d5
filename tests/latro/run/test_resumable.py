from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from latro.run.checkpoints import PARTIAL, damage
from latro.run.folder import LOCK_FILE
from latro.run.resumable import LongRunTrainer

pytestmark = pytest.mark.usefixtures("ordinary_signals")


@pytest.fixture
def make_trainer(tiny, tmp_path):
    """Return `make_trainer(**settings)`, which makes a plain language model's trainer."""

    def make(callbacks=None, model=None, **settings):
        ids = list(range(5, 21))
        dataset = Dataset.from_dict({"input_ids": [ids] * 8, "labels": [ids] * 8})
        settings = {"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 2, **settings}
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            logging_steps=1,
            **settings,
        )
        return LongRunTrainer(
            model=tiny() if model is None else model,
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset,
            callbacks=callbacks,
        )

    return make


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_appears_when_it_is_whole(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2, save_total_limit=1)
    save_rng_state = trainer._save_rng_state
    during = []

    def spy(folder):
        during.append(names(tmp_path / "run"))
        save_rng_state(folder)

    trainer._save_rng_state = spy
    trainer.train()
    own = [PARTIAL, LOCK_FILE]
    assert during == [own, [*own, "checkpoint-1"]]
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert damage(tmp_path / "run" / "checkpoint-2") is None


def test_what_a_crash_left_is_gone_after_the_next_start(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2)

    def crash(folder):
        if trainer.state.global_step == 2:
            raise SystemExit

    trainer._save_rng_state = crash
    with pytest.raises(SystemExit):
        trainer.train()
    assert names(tmp_path / "run") == [PARTIAL, "checkpoint-1"]
    trainer = make_trainer(max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_a_checkpoint_lacks_are_named(make_trainer, tiny, tmp_path, tied):
    make_trainer(max_steps=1, model=tiny(tie_word_embeddings=tied)).train()
    folder = tmp_path / "run" / "checkpoint-1"
    trainer = make_trainer(max_steps=2, model=tiny(tie_word_embeddings=tied))
    trainer.train(resume_from_checkpoint=str(folder))
    weights = load_file(folder / "model.safetensors")
    weights["x.weight"] = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors")
    trainer = make_trainer(max_steps=2, model=tiny(tie_word_embeddings=tied))
    message = r"got 1 missing \(model\.norm\.weight\) and 1 unexpected \(x\.weight\)"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(folder))


def test_the_best_model_is_known_by_its_last_name(make_trainer, tmp_path):
    trainer = make_trainer(
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        save_total_limit=2,
    )
    trainer.train()
    # The loss falls from step to step, so the first checkpoint stays, and the last.
    run = tmp_path / "run"
    assert names(run) == ["checkpoint-1", "checkpoint-4"]
    for folder in run.iterdir():
        assert damage(folder) is None
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(run / "checkpoint-1")


def test_resumed_from_the_last_update_it_makes_none(make_trainer):
    make_trainer(max_steps=3).train()
    trainer = make_trainer(max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_a_run_that_goes_back_sets_later_checkpoints_aside(make_trainer, tmp_path, caplog):
    run = tmp_path / "run"
    make_trainer(max_steps=4).train()
    trainer = make_trainer(max_steps=3, save_total_limit=3)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert "goes back to update 1; with its first checkpoint" in caplog.text
    assert "checkpoint-2, checkpoint-3, checkpoint-4 are set aside, as _superseded-*" in caplog.text
    aside = [f"_superseded-checkpoint-{step}" for step in (2, 3, 4)]
    assert names(run) == [*aside, "checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert not damage(run / aside[-1])
    # The newest is the run's own.
    trainer = make_trainer(max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_going_back_sets_nothing_aside_before_a_checkpoint_is_there(make_trainer, tmp_path):
    run = tmp_path / "run"
    make_trainer(max_steps=3).train()
    trainer = make_trainer(max_steps=2, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


class Signal(TrainerCallback):
    """Sends this process a signal during an update."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def test_a_signal_leaves_a_checkpoint(make_trainer, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer([Signal(signal.SIGTERM, 1)], save_strategy="no", eval_strategy="epoch")
    trainer.train()
    assert trainer.interruption.signal == signal.SIGTERM
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert not [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_processes_of_a_run_leaves_a_checkpoint(make_trainer, tmp_path, number):
    class ToAll(TrainerCallback):
        """Sends it as schedulers and terminals do; a loader's process tells its own parent."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                workers = [str(child.pid) for child in multiprocessing.active_children()]
                assert workers
                subprocess.run(["kill", f"-{number}", str(os.getpid()), *workers], check=True)
                # Time for a worker to end, and for torch to raise.
                time.sleep(0.5)

    trainer = make_trainer([ToAll()], save_strategy="no", dataloader_num_workers=1)
    trainer.train()
    assert trainer.interruption.signal == number
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("number", "make"), [(signal.SIGINT, os.pipe), (signal.SIGHUP, os.openpty)]
)
def test_a_signal_that_takes_the_output_away_leaves_a_checkpoint(
    make_trainer, tmp_path, number, make
):
    # As in `… 2>&1 | tee log`, where the terminal sends Ctrl-C to both; or as it is closed.
    trainer = make_trainer([Signal(number, 1)], save_strategy="no")
    reader, writer = make()
    os.close(reader)
    standard_error = os.dup(2)
    os.dup2(writer, 2)
    try:
        trainer.train()
        # Whoever else writes there goes on, too.
        os.write(2, b"more")
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)
        os.close(writer)
    assert trainer.interruption.signal == number
    assert names(tmp_path / "run") == ["checkpoint-2"]


class SignalAtTheEnd(TrainerCallback):
    """Sends this process SIGTERM at an event after the last update."""

    def __init__(self, event):
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("event", ["on_evaluate", "on_train_end"])
def test_a_signal_after_the_last_update_leaves_a_checkpoint_too(make_trainer, tmp_path, event):
    settings = {"save_strategy": "no", "eval_strategy": "epoch", "max_steps": 4}
    trainer = make_trainer([SignalAtTheEnd(event)], **settings)
    trainer.train()
    assert trainer.interruption.signal == signal.SIGTERM
    assert names(tmp_path / "run") == ["checkpoint-4"]
    assert damage(tmp_path / "run" / "checkpoint-4") is None
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert resumed.interruption.signal is None
    for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_saved_is_not_saved_again(make_trainer, tmp_path):
    trainer = make_trainer([SignalAtTheEnd("on_train_end")], save_strategy="steps", save_steps=2)
    save_rng_state = trainer._save_rng_state
    saved = []
    trainer._save_rng_state = lambda folder: saved.append(folder) or save_rng_state(folder)
    trainer.train()
    assert trainer.interruption.signal == signal.SIGTERM
    assert len(saved) == 2


def test_weights_alone_are_not_resumed_from(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_only_model=True).train()
    for resume in (True, str(tmp_path / "run" / "checkpoint-1")):
        with pytest.raises(ValueError, match="lacks the state of optimiser or schedule"):
            make_trainer(max_steps=2).train(resume_from_checkpoint=resume)


def test_an_error_leaves_the_handlers_as_they_were(make_trainer):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer()
    trainer.training_step = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before


SCRIPT = """
import os, signal, sys
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from latro.run.resumable import LongRunTrainer

class Signal(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

model, output = sys.argv[1:]
ids = list(range(5, 21))
dataset = Dataset.from_dict({"input_ids": [ids] * 16, "labels": [ids] * 16})
args = TrainingArguments(
    output_dir=output, use_cpu=True, disable_tqdm=True, report_to=[], save_strategy="no",
    max_steps=4, per_device_train_batch_size=1,
)
trainer = LongRunTrainer(
    model=AutoModelForCausalLM.from_pretrained(model),
    args=args,
    train_dataset=dataset,
    callbacks=[Signal()],
)
trainer.train()
assert trainer.interruption.signal == signal.SIGTERM, args.process_index
assert trainer.state.global_step == 2
"""


def test_two_processes_save_and_stop_together(tiny, tmp_path, warm):
    tiny().save_pretrained(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = tmp_path / "run"
    arguments = (tmp_path / "model", run)
    warm.run_together(str(script), arguments, tmp_path / "printed", processes=2)
    assert names(run) == ["checkpoint-2"]
    assert damage(run / "checkpoint-2") is None
    files = json.loads((run / "checkpoint-2" / "checkpoint_manifest.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "optimizer.pt"} <= set(files)


# At each update one process alone asks for something.
ONE_ASKS = """
    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == state.global_step % 2:
            asked = {1: "should_log", 2: "should_save", 3: "should_training_stop"}
            setattr(control, asked[state.global_step], True)
"""


def test_what_a_callback_asks_for_in_one_process_all_do(tiny, tmp_path, warm):
    tiny().save_pretrained(tmp_path / "model")
    script = tmp_path / "script.py"
    head, rest = SCRIPT.split("    def on_step_begin")
    asserts = """
assert trainer.interruption.signal is None
assert trainer.state.global_step == 3
assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1]
"""
    rest = rest[rest.index("\nmodel, output") : rest.index("assert trainer")]
    script.write_text(head + ONE_ASKS.lstrip("\n") + rest + asserts)
    run = tmp_path / "run"
    arguments = (tmp_path / "model", run)
    warm.run_together(str(script), arguments, tmp_path / "printed", processes=2)
    assert names(run) == ["checkpoint-2"]
    assert damage(run / "checkpoint-2") is None


def test_a_batch_of_one_that_does_not_fit_is_the_last_that_is_tried(make_trainer, monkeypatch):
    trainer = make_trainer(auto_find_batch_size=True, save_strategy="no")
    error, sizes = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), []

    def out_of_memory(*args):
        sizes.append(trainer._train_batch_size)
        raise error

    monkeypatch.setattr(trainer, "training_step", out_of_memory)
    with pytest.raises(ValueError, match=r"^auto_find_batch_size: .* 1 too: CUDA out .* 2 GiB\."):
        trainer.train()
    assert sizes == [2, 1]


def test_a_callback_with_a_state_may_join_a_run_that_goes_on(make_trainer, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    make_trainer(max_steps=1, **settings).train()
    resumed = make_trainer([EarlyStoppingCallback(9)], max_steps=2, **settings)
    resumed.train(resume_from_checkpoint=True)
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["EarlyStoppingCallback"]["args"] == {
        "early_stopping_patience": 9,
        "early_stopping_threshold": 0.0,
    }


@pytest.mark.parametrize("step", [0, 1])
def test_a_batch_size_is_found_before_the_first_update_only(make_trainer, monkeypatch, step):
    trainer = make_trainer(auto_find_batch_size=True, max_steps=3, save_strategy="no")
    training_step, began = trainer.training_step, []

    def out_of_memory_once(*args):
        if len(began) == 1 and trainer.state.global_step == step:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return training_step(*args)

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            began.append([p.detach().clone() for p in trainer.model.parameters()])

    trainer.add_callback(Begin())
    monkeypatch.setattr(trainer, "training_step", out_of_memory_once)
    if step:
        # A second beginning would train weights that have had an update.
        with pytest.raises(ValueError, match=r"^auto_find_batch_size: .* after update 1; resume"):
            trainer.train()
        assert len(began) == 1
    else:
        trainer.train()
        assert trainer._train_batch_size == 1
        assert all(map(torch.equal, *began))
