from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from latro.run.signals import Interruption

pytestmark = pytest.mark.usefixtures("ordinary_signals")

ALONE = SimpleNamespace(world_size=1, logging_strategy="steps")


def step(interruption):
    control = TrainerControl(should_evaluate=True)
    interruption.on_step_end(ALONE, TrainerState(), control)
    return control


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_stops_at_the_end_of_the_step(number, capfd):
    before = signal.getsignal(number)
    interruption = Interruption()
    with interruption:
        assert not step(interruption).should_training_stop
        os.kill(os.getpid(), number)
        assert f"{number.name}: saving after this update" in capfd.readouterr().err
        control = step(interruption)
        assert control.should_save
        assert control.should_training_stop
        assert not control.should_evaluate
        # The sums since the last log would be lost otherwise.
        assert control.should_log
        # The epoch ends too, so nothing is saved twice and nothing is evaluated.
        control = TrainerControl(should_save=True, should_evaluate=True)
        interruption.on_epoch_end(ALONE, TrainerState(), control)
        assert not control.should_save
        assert not control.should_evaluate
    assert interruption.signal == number
    assert signal.getsignal(number) is before
    with interruption:
        assert not step(interruption).should_training_stop
    assert interruption.signal is None


def test_a_second_ctrl_c_does_not_wait():
    before = signal.getsignal(signal.SIGINT)

    def impatient():
        with Interruption():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        impatient()
    assert signal.getsignal(signal.SIGINT) is before


def test_after_the_last_update_a_signal_does_what_it_would():
    with pytest.raises(KeyboardInterrupt), Interruption():
        os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interruption = Interruption()
        with interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not step(interruption).should_training_stop
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_trains_without_handlers():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run():
        with Interruption() as interruption:
            seen.append(signal.getsignal(signal.SIGTERM))
            seen.append(step(interruption).should_training_stop)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before, False]


def test_a_forked_process_leaves_it_to_its_parent():
    with Interruption():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
