"""Records of the study's cells, with numbers that the tests choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from studies.cells import Cell
from studies.real_model.study import Scale, cells


@pytest.fixture
def named() -> dict[str, Cell]:
    """Return the cells of a study of two seeds, by name."""
    return {cell.name: cell for cell in cells(Scale(seeds=(1, 2)))}


@pytest.fixture
def record(named: dict[str, Cell]) -> Callable[..., dict[str, Any]]:
    """Return `record(name, greedy, none)`, the record of a cell with such log-probs by problem."""

    def figure(values: list[float]) -> dict[str, float]:
        return {"mean": sum(values) / len(values), "stderr": 0.25}

    def make(name: str, greedy: list[float], none: list[float]) -> dict[str, Any]:
        cell = named[name]
        evaluation = {
            "step": 20,
            "eval_answer_logp": -9.0,
            "eval_rationale_gain": 1.5,
            "eval_accuracy_greedy": 0.25,
            "eval_rationale_length": 31.0,
            "eval_unfinished": 0.125,
        }
        summary = {
            "none": {"sequence": figure(none)},
            "greedy": {
                "sequence": figure(greedy),
                "sequence_gain": figure([a - b for a, b in zip(greedy, none, strict=True)]),
            },
        }
        return {
            **cell.about,
            "seconds": [60.0, 30.0, 30.0],
            "problems": len(greedy),
            "metrics": {
                "accuracy_greedy": 0.5,
                "accuracy_sampled": 0.4,
                "maj@8": 0.55,
                "answer_logp": -8.5,
                "rationale_length": 42.4,
                "unfinished": 0.25,
            },
            "intervals": {"accuracy_greedy": [0.4, 0.6]},
            "training": {"kl": 1.25} if "latro" in cell.method else {},
            "likelihood": {"summary": summary, "problems": {"greedy": greedy, "none": none}},
            **({"evaluations": [evaluation]} if "latro" in cell.method else {}),
            "environment": {
                "date": "2026-01-02T03:04:05+00:00",
                "device": "a CPU",
                "torch": "2.13",
                "transformers": "5.23",
                "threads": 2,
            },
        }

    return make
