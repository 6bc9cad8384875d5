"""The simulation of rollouts beside updates: its sums, and the page that it writes."""

from __future__ import annotations

from random import Random

import pytest

from scripts.overlap_table import UPDATES, draw_epoch, main, overlapped, waiting


def test_the_page_is_up_to_date() -> None:
    main(["--check"])


def test_times_by_hand() -> None:
    rollouts, updates = [2.0, 4.0, 1.0], [3.0, 2.0, 5.0]
    assert waiting(rollouts, updates, 0.5) == 7 + 10 + 1.5
    # The first rollout alone; 4 beside 3; 1 beside 2; the last update alone; three times weights.
    assert overlapped(rollouts, updates, 0.5) == 2 + 4 + 2 + 5 + 1.5


def test_drawn_times_have_the_means_that_were_asked_for() -> None:
    rollouts, updates = draw_epoch(Random(1), 3.0)
    assert sum(rollouts) / UPDATES == pytest.approx(3.0)
    assert sum(updates) / UPDATES == pytest.approx(1.0)
    assert len(set(rollouts)) > 1
    assert len(set(updates)) == UPDATES
