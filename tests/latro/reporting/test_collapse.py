from __future__ import annotations

import logging

import pytest
from transformers import TrainerControl, TrainerState

from latro.config.training import LatroConfig
from latro.reporting.collapse import CollapseWarnings


def line(step, length, unfinished=0.0, reward=-20.0, own=-10.0):
    return {
        "step": step,
        "rationale_length": length,
        "unfinished": unfinished,
        "reward": reward,
        "reward_own_tokens": own,
    }


@pytest.fixture
def warned(tmp_path, caplog):
    """`warned(lines, **settings)`: what is warned of, with the update it is warned at."""
    caplog.set_level(logging.WARNING, "latro")

    def run(lines, watch=None, **settings):
        args = LatroConfig(str(tmp_path), max_completion_length=64, **settings)
        watch = watch or CollapseWarnings()
        state, control = TrainerState(), TrainerControl()
        watch.on_train_begin(args, state, control)
        caplog.clear()
        for entry in lines:
            state.log_history.append(entry)
            state.global_step = entry["step"]
            watch.on_log(args, state, control)
        return [record.getMessage() for record in caplog.records]

    return run


def test_the_hasty_run_of_a_real_model_is_warned_of(warned):
    # What SmolLM2-135M logged at a learning rate of 2e-5, until its rationales were gone.
    lengths = {1: 61, 2: 55, 3: 48, 4: 42, 5: 35, 6: 28, 7: 21, 8: 16, 9: 12}
    lines = [line(u, n, 0.81 if u == 1 else 0.3, -28.0 + 2 * u, -9.0) for u, n in lengths.items()]
    limit, short = warned(lines)
    assert limit.startswith("update 1: 81% of the rationales hit the limit of 64 tokens")
    assert short.startswith("update 7: rationales have 21 tokens, and had 61 at the start.")
    assert "changed by +12.0 nats, of which +0.0 on the answer's own tokens" in short


def test_a_run_that_keeps_its_rationales_is_left_alone(warned):
    dip = [60, 40, 29, 45, 29, 50]
    assert warned([line(u, n, 0.5) for u, n in enumerate(dip)]) == []


def test_unfinished_rationales_that_are_left_out_are_no_sign(warned):
    assert warned([line(1, 64, 0.9)], unfinished="exclude") == []


def test_each_training_is_warned_anew_and_other_logs_are_passed_over(warned):
    watch = CollapseWarnings()
    lines = [line(1, 60, 0.9), {"step": 1, "eval_accuracy_greedy": 0.0}, line(2, 60, 0.9)]
    for _ in range(2):
        assert len(warned(lines, watch)) == 1


def test_a_log_does_not_go_through_all_that_were_before(tmp_path):
    """At 100,000 logged updates that took longer with every one of them."""

    class LongHistory(list):
        def __iter__(self):
            raise AssertionError("read as a whole")

    args, watch = LatroConfig(str(tmp_path), max_completion_length=64), CollapseWarnings()
    state, control = TrainerState(), TrainerControl()
    state.log_history = [line(step, 60) for step in range(1, 5)]
    watch.on_train_begin(args, state, control)
    state.log_history = LongHistory(state.log_history)
    for step in range(5, 50):
        state.log_history.append(line(step, 60))
        watch.on_log(args, state, control)
        assert len(watch._lines) <= 3
