from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.common import small_lm
from benchmarks.common.small_lm import Settings

CPU = torch.device("cpu")
SETTINGS = Settings(
    vocab=300, hidden=32, layers=1, steps=30, batch=4, length=16, learning_rate=1e-2
)
ROWS = 40


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        records = [
            {
                "question": f"{name} has {n} apples and buys {m} more. How many are there now?",
                "answer": f"There are {n} + {m} = {n + m} apples.\n#### {n + m}",
            }
            for name in ("Ann", "Bob", "Cleo")
            for n in range(2, 12)
            for m in range(3, 6)
        ]
        lines = (json.dumps(record) for record in records)
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_learns_and_is_not_trained_twice(data, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    head = small_lm.trained(data, SETTINGS, ROWS, cache=cache, device=CPU)
    assert head.hidden.shape == (ROWS, SETTINGS.hidden)
    assert head.weight.shape == (SETTINGS.vocab, SETTINGS.hidden)
    assert head.target.shape == (ROWS,)
    assert head.perplexity < SETTINGS.vocab / 4
    log_p = torch.log_softmax(head.hidden @ head.weight.T, 1)
    of_rows = (-log_p.gather(1, head.target[:, None]).mean()).exp()
    assert of_rows < SETTINGS.vocab / 4

    def train(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(small_lm, "train", train)
    again = small_lm.trained(data, SETTINGS, ROWS, cache=cache, device=CPU)
    assert torch.equal(again.hidden, head.hidden)
    assert torch.equal(again.weight, head.weight)
    assert [path.suffix for path in cache.iterdir()] == [".pt"]
    with pytest.raises(AssertionError, match="trained again"):
        small_lm.trained(data, replace(SETTINGS, seed=1), ROWS, cache=cache, device=CPU)


def test_absent_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl"):
        small_lm.trained(tmp_path, SETTINGS, ROWS, cache=tmp_path, device=CPU)


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"vocab": 5000}, ROWS, "expected text for 5000 tokens"),
        ({}, 100_000, "rows: expected at most"),
        ({"length": 50_000, "steps": 1}, ROWS, "stream: expected more than 50000"),
    ],
)
def test_too_little_text(data, tmp_path, changes, rows, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        small_lm.trained(
            data, replace(SETTINGS, **changes), rows, cache=tmp_path / "cache", device=CPU
        )
