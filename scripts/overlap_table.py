"""Write docs/many-devices.md's table of when `--async_rollouts 1` pays, by simulation.

    python -m scripts.overlap_table            # rewrite the page
    python -m scripts.overlap_table --check    # exit 1 where it differs

Nothing here is measured. A rollout takes as long as its longest rationale, and an update as all of
its rationales together; their lengths are drawn. The time of an update is 1 on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

from scripts.tables import ROOT, fill, markdown, rewrite

PAGE = ROOT / "docs" / "many-devices.md"
UPDATES, EPOCHS, RATIONALES, LIMIT = 100, 20, 48, 500
MEDIAN, SPREAD = 250, 0.4
"""Of the lengths, in tokens: exp(SPREAD · a normal number) · MEDIAN, cut at LIMIT."""


def waiting(rollouts: Sequence[float], updates: Sequence[float], sync: float) -> float:
    """Return the time of an epoch where every update waits for its rollout."""
    return sum(rollouts) + sum(updates) + sync * len(updates)


def overlapped(rollouts: Sequence[float], updates: Sequence[float], sync: float) -> float:
    """Return the time of an epoch where each rollout but the first runs beside an update.

    Args:
        rollouts: time of each update's rollout.
        updates: time of each update.
        sync: time to bring the weights to the server, after each update.
    """
    beside = [max(r, u) for r, u in zip(rollouts[1:], updates[:-1], strict=True)]
    return rollouts[0] + sum(beside) + updates[-1] + sync * len(updates)


def draw_epoch(numbers: Random, rollout: float) -> tuple[list[float], list[float]]:
    """Return the times of an epoch's rollouts, `rollout` on average, and of its updates."""
    lengths = [
        [min(MEDIAN * numbers.lognormvariate(0, SPREAD), LIMIT) for _ in range(RATIONALES)]
        for _ in range(UPDATES)
    ]
    longest, together = [max(row) for row in lengths], [sum(row) for row in lengths]
    rollouts = [rollout * time * UPDATES / sum(longest) for time in longest]
    return rollouts, [time * UPDATES / sum(together) for time in together]


def overlap_table() -> str:
    rows = []
    for ratio in (4.0, 2.0, 1.0, 0.5, 0.25):
        cells = [f"{ratio:g}"]
        for sync in (0.0, 0.1, 0.5):
            numbers = Random(0)
            epochs = [draw_epoch(numbers, ratio) for _ in range(EPOCHS)]
            before = sum(waiting(r, u, sync) for r, u in epochs)
            after = sum(overlapped(r, u, sync) for r, u in epochs)
            cells.append(f"{before / after:.2f} ×")
        rows.append(cells)
    header = ["a rollout takes, in updates", *(f"weights take {s:g}" for s in (0.0, 0.1, 0.5))]
    told = (
        f"{EPOCHS} epochs of {UPDATES} updates of {RATIONALES} rationales; lengths log-normal with "
        f"median {MEDIAN} and σ {SPREAD}, at most {LIMIT} tokens."
    )
    return f"{markdown(header, rows)}\n\n{told}"


def render(text: str, page: Path = PAGE) -> str:
    """Return the page with its table made anew.

    Raises:
        ValueError: the table's markers are missing.
    """
    return fill(text, {"overlap": overlap_table()}, page.name)


def main(argv: Sequence[str] | None = None) -> None:
    rewrite([PAGE], render, __doc__, argv)


if __name__ == "__main__":
    main()
