"""A resumed run has the evaluations and the best model of one that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from latro.reporting.callbacks import MetricsFiles

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("ordinary_signals")]

BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_answer_logp"}
STEPS = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
EVERY_OTHER = {**STEPS, "eval_steps": 2, "save_steps": 2}
# Eight prompts at two per update make four updates per epoch.
EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 8}


class Stop(TrainerCallback):
    """Sends this process SIGTERM at an event of an update."""

    def __init__(self, event, step):
        self.step = step
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class Fail(TrainerCallback):
    """Raises in the evaluation after an update, as a kill would end it."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            state.log_history.pop()
            raise RuntimeError("killed")


@pytest.fixture
def run(make_trainer, dataset, tmp_path, monkeypatch):
    """Return `run(name, callbacks=(), resume=None, **settings)`, which trains a trainer."""
    monkeypatch.setattr("latro.evaluation.accuracy.ANSWER_TOKENS", 1)

    def train(name, callbacks=(), resume=None, **settings):
        settings = {"num_generations": 2, "max_completion_length": 4, **settings}
        trainer = make_trainer(**{"output_dir": str(tmp_path / name), **settings})
        trainer.eval_dataset = dataset.select(range(2))
        # It draws a picture at each evaluation, which would take most of the time.
        trainer.remove_callback(MetricsFiles)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def evaluations(trainer):
    return [
        {name: value for name, value in entry.items() if name != "eval_runtime"}
        for entry in trainer.state.log_history
        if "eval_answer_logp" in entry
    ]


def logs(trainer, name="loss"):
    return [(e["step"], e[name]) for e in trainer.state.log_history if name in e]


def best(trainer):
    state = trainer.state
    checkpoint = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
    return checkpoint, state.best_metric, state.best_global_step


def assert_same(resumed, straight):
    assert resumed.interruption.signal is None
    assert evaluations(resumed) == evaluations(straight)
    assert evaluations(straight)
    assert logs(resumed) == logs(straight)
    assert logs(resumed, "learning_rate") == logs(straight, "learning_rate")
    assert best(resumed) == best(straight)
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)


# Where less counts as better, the first model that is evaluated is the best one.
LESS = {"greater_is_better": False}


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        # The first evaluation, one in between, the last; `step`: updates before the signal.
        *(({**STEPS, **LESS}, 0), (STEPS, 1), (STEPS, 3)),
        # An update with an evaluation due after it, and one without.
        *(({**EVERY_OTHER, **LESS}, 1), (EVERY_OTHER, 2)),
        # An evaluation is due after the last update whatever its number.
        ({**EVERY_OTHER, "max_steps": 3}, 2),
        ({**EVERY_OTHER, "eval_delay": 3}, 1),
        ({**EPOCHS, "max_steps": 4}, 3),
        *(({**EPOCHS, **LESS}, 3), (EPOCHS, 4), (EPOCHS, 7)),
        # The last update is in the middle of an epoch.
        ({**EPOCHS, "max_steps": 6}, 5),
        ({**EVERY_OTHER, "eval_on_start": True}, 1),
        *(({**STEPS, **LESS, "save_strategy": "best"}, s) for s in (0, 2)),
        ({**STEPS, "save_strategy": "best"}, 2),
    ],
)
def test_stopped_in_an_update_it_goes_on_as_if_it_had_not(run, settings, step):
    settings = {**BEST, **settings}
    stopped = run("run", [Stop("on_step_begin", step)], **settings)
    assert stopped.interruption.signal == signal.SIGTERM
    assert stopped.state.global_step == step + 1
    assert_same(run("run", resume=True, **settings), run("straight", **settings))


@pytest.mark.parametrize("event", ["on_step_begin", "on_evaluate"])
def test_a_stopped_run_keeps_the_checkpoint_that_it_goes_on_from(run, event):
    # The first model is the best one, and stays the only one at a run's end.
    settings = {**BEST, **STEPS, **LESS, "save_total_limit": 1}
    step = {"on_step_begin": 2, "on_evaluate": 4}[event]
    stopped = run("run", [Stop(event, step)], **settings)
    folder = Path(stopped.args.output_dir)
    last = stopped.state.global_step
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-1", f"checkpoint-{last}"}
    resumed = run("run", resume=True, **settings)
    assert_same(resumed, run("straight", **settings))
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("otherwise", ["moved", "named by another path", "copied"])
def test_the_best_checkpoint_is_found_where_the_run_goes_on(run, tmp_path, monkeypatch, otherwise):
    settings = {**BEST, **STEPS, **LESS, "save_total_limit": 2}
    monkeypatch.chdir(tmp_path)
    first = Path("run") if otherwise == "named by another path" else tmp_path / "run"
    run("run", [Stop("on_step_begin", 1)], **settings, output_dir=str(first))
    goes_on = tmp_path / "run"
    if otherwise != "named by another path":
        goes_on = tmp_path / "elsewhere"
        shutil.copytree(first, goes_on)
    if otherwise == "moved":
        shutil.rmtree(first)
    resumed = run("run", resume=True, **settings, output_dir=str(goes_on))
    assert resumed.state.best_model_checkpoint == str(goes_on / "checkpoint-1")
    assert {p.name for p in goes_on.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    assert_same(resumed, run("straight", **settings))


def test_where_the_best_checkpoint_is_lost_a_later_one_is_taken(run, caplog):
    settings = {**BEST, **STEPS, **LESS}
    stopped = run("run", [Stop("on_step_begin", 1)], **settings)
    shutil.rmtree(stopped.state.best_model_checkpoint)
    resumed = run("run", resume=True, **settings)
    assert "best checkpoint so far" in caplog.text
    assert best(resumed)[0] == "checkpoint-2"


def test_where_the_best_checkpoint_is_deleted_the_last_model_is_kept(run, caplog):
    class Delete(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 4 and state.best_model_checkpoint is not None:
                shutil.rmtree(state.best_model_checkpoint, ignore_errors=True)

    deleted = run("run", [Delete()], **BEST, **STEPS, **LESS, save_total_limit=1)
    assert "is gone; the last model is kept" in caplog.text
    assert deleted.state.best_model_checkpoint is None


@pytest.mark.parametrize("step", [2, 4])
def test_stopped_in_an_evaluation_it_goes_on_as_if_it_had_not(run, step):
    settings = {**BEST, **EVERY_OTHER}
    stopped = run("run", [Stop("on_evaluate", step)], **settings)
    assert stopped.interruption.signal == signal.SIGTERM
    assert_same(run("run", resume=True, **settings), run("straight", **settings))


def test_the_evaluation_that_is_made_up_for_is_in_the_file_of_metrics(make_trainer, tmp_path):
    stopped = make_trainer(**EVERY_OTHER)
    stopped.add_callback(Stop("on_step_begin", 1))
    stopped.train()
    resumed = make_trainer(**EVERY_OTHER)
    resumed.train(resume_from_checkpoint=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == resumed.state.log_history
    assert [e["step"] for e in evaluations(resumed)] == [2, 4]


def test_stopped_twice_it_makes_the_evaluation_once(run):
    settings = {**BEST, **EVERY_OTHER}
    run("run", [Stop("on_step_begin", 1)], **settings)
    # The signal comes in the evaluation that is made up for.
    run("run", [Stop("on_evaluate", 2)], resume=True, **settings)
    assert_same(run("run", resume=True, **settings), run("straight", **settings))


def test_killed_in_the_evaluation_at_the_end_of_an_epoch_it_makes_it_again(run):
    settings = {"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    with pytest.raises(RuntimeError, match="killed"):
        run("run", [Fail(4)], **settings)
    assert_same(run("run", resume=True, **settings), run("straight", **settings))


def test_a_schedule_by_evaluations_takes_its_step(run):
    settings = {
        **{**STEPS, "lr_scheduler_type": "reduce_lr_on_plateau", "greater_is_better": False},
        **{"metric_for_best_model": "eval_answer_logp", "lr_scheduler_kwargs": {"patience": 0}},
    }
    straight = run("straight", **settings)
    assert len({rate for _, rate in logs(straight, "learning_rate")}) > 1
    for step in range(1, 3):
        run(f"run-{step}", [Stop("on_step_begin", step)], **settings)
        assert_same(run(f"run-{step}", resume=True, **settings), straight)


def test_the_evaluation_that_is_made_up_for_may_stop_the_training(run):
    settings = {**BEST, **STEPS, "greater_is_better": False}
    straight = run("straight", [EarlyStoppingCallback(1)], **settings)
    assert straight.state.global_step == 2
    run("run", [EarlyStoppingCallback(1), Stop("on_step_begin", 1)], **settings)
    # A checkpoint holds a callback's own count only if asked.
    settings["restore_callback_states_from_checkpoint"] = True
    resumed = run("run", [EarlyStoppingCallback(1)], resume=True, **settings)
    assert resumed.state.global_step == 2
    assert_same(resumed, straight)


@pytest.mark.parametrize("step", [1, 3])
def test_what_was_summed_up_since_the_last_log_is_logged(run, step):
    settings = {
        "logging_steps": 3,
        "save_strategy": "no",
        "max_steps": 6,
        "lr_scheduler_type": "constant",
    }
    run("run", [Stop("on_step_begin", step)], **settings)
    resumed = run("run", resume=True, **settings)
    assert [s for s, _ in logs(resumed)] == sorted({step + 1, 3, 6})
    each = dict(logs(run("each", **{**settings, "logging_steps": 1})))
    before = 0
    for until, loss in logs(resumed):
        mean = sum(each[s] for s in range(before + 1, until + 1)) / (until - before)
        assert loss == pytest.approx(mean, rel=1e-4)
        before = until


def test_where_nothing_is_logged_a_signal_logs_nothing(run):
    stopped = run("run", [Stop("on_step_begin", 1)], logging_strategy="no")
    assert logs(stopped) == []


def test_resumed_from_the_end_it_does_nothing_again(run):
    settings = {**BEST, **EPOCHS, "max_steps": 6}
    straight = run("run", **settings)
    again = run("run", resume=str(Path(straight.args.output_dir) / "checkpoint-6"), **settings)
    assert_same(again, straight)


def test_a_run_that_goes_on_has_its_first_evaluation_behind_it(run):
    settings = {"eval_on_start": True, "save_strategy": "steps", "save_steps": 2}
    run("run", max_steps=2, **settings)
    resumed = run("run", resume=True, **settings)
    assert [e["step"] for e in evaluations(resumed)] == [0]
    assert resumed.args.eval_on_start
