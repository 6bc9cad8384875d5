"""The bar moves while an engine samples, and tells tokens a second and rows alive."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from latro.engines.transformers import TransformersEngine
from latro.evaluation import progress
from latro.evaluation.accuracy import EvaluationSettings, evaluate_model
from latro.evaluation.likelihood import ProbeSettings, probe_model
from latro.evaluation.progress import EvaluationBar
from latro.model.scoring import Scorer
from latro.tasks import Task


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list whose only number is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_sampling_is_shown_every_few_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with EvaluationBar("evaluating", total=4, done=0, shown=True) as bar:
        bar.add(2, {"greedy": "50.0%"})
        told = bar.sampling()
        capsys.readouterr()
        # Not a terminal: one line every ten seconds.
        clock[0] = 9.0
        told(90, 30)
        assert capsys.readouterr().err == ""
        clock[0] = 10.0
        told(910, 20)
        shown = capsys.readouterr().err
        assert "2/4" in shown
        assert "greedy=50.0%, tokens/s=100, rows=20" in shown
        # Another call of the engine begins anew.
        told = bar.sampling()
        clock[0] = 20.0
        told(20, 0)
        assert "tokens/s=2, rows=0" in capsys.readouterr().err
        bar.add(2, {"greedy": "75.0%"})
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize("shown", [True, False])
def test_evaluations_show_how_their_engine_goes(
    tiny: Any,
    tokenizer: Any,
    task: Task,
    dataset: Dataset,
    capsys: pytest.CaptureFixture[str],
    shown: bool,
) -> None:
    scorer = Scorer(tiny())

    class Watched(TransformersEngine):
        def generate(self, *args: Any, progress: Any, **options: Any) -> Any:
            calls: list[tuple[int, int]] = []

            def told(tokens: int, rows_alive: int) -> None:
                calls.append((tokens, rows_alive))
                progress(tokens, rows_alive)

            samples = super().generate(*args, progress=told, **options)
            sampled = [len(sample.ids) for group in samples for sample in group]
            assert sum(tokens for tokens, _ in calls) == sum(sampled)
            assert calls[-1][1] == 0
            return samples

    settings = EvaluationSettings(num_samples=2, max_completion_length=5, progress=shown)
    engine = Watched(scorer.model, tokenizer)
    evaluate_model(scorer, tokenizer, task, dataset, settings, engine=engine)
    printed = capsys.readouterr().err
    assert ("rows=0" in printed) == shown
    if shown:
        probe_model(
            scorer, tokenizer, task, dataset, ProbeSettings(max_completion_length=5), engine=engine
        )
        assert "rows=0" in capsys.readouterr().err
