"""Records of a study's cells, with numbers that the tests choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from studies.cells import Cell
from studies.replicate.study import Scale, cells

_METRICS = {
    "accuracy_greedy": 0.5,
    "accuracy_sampled": 0.4,
    "maj@1": 0.4,
    "maj@2": 0.45,
    "maj@4": 0.5,
    "maj@8": 0.55,
    "rationale_length": 20.0,
    "answer_logp": -1.5,
}


@pytest.fixture
def named() -> dict[str, Cell]:
    """Return the cells of a study of three seeds, by name."""
    return {cell.name: cell for cell in cells(Scale())}


@pytest.fixture
def record(named: dict[str, Cell]) -> Callable[..., dict[str, Any]]:
    """Return `record(name, **metrics)`, which makes the record of the cell of that name."""

    def make(name: str, **metrics: float) -> dict[str, Any]:
        cell = named[name]
        return {
            **cell.about,
            "seconds": [60.0, 30.0],
            "problems": 100,
            "metrics": {**_METRICS, **{k.replace("maj_", "maj@"): v for k, v in metrics.items()}},
            "training": {"kl": 2.0} if cell.method == "latro" else {},
            "environment": {
                "date": "2026-01-02T03:04:05+00:00",
                "device": "a CPU",
                "python": "3.11",
                "torch": "2.13",
                "transformers": "5.23",
            },
        }

    return make
