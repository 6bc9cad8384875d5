from __future__ import annotations

import time

import pytest
import torch

from latro.run.stopwatch import Stopwatch


def test_laps_of_one_name_add_up_and_are_read_once():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.lap("sleep"):
            time.sleep(0.02)
    with watch.lap("nothing"):
        pass
    seconds = watch.read()
    assert seconds["sleep"] >= 0.04
    assert 0 <= seconds["nothing"] < 0.02
    assert watch.read() == {}


@pytest.mark.gpu
def test_a_lap_holds_what_the_device_does_and_not_the_launch():
    watch = Stopwatch(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    for name, count in (("one", 1), ("many", 64)):
        with watch.lap(name):
            for _ in range(count):
                x @ x
    seconds = watch.read()
    assert seconds["many"] > 8 * seconds["one"] > 0
