from __future__ import annotations

import json
import math
from types import SimpleNamespace

from matplotlib.axes import Axes
from PIL import Image
from transformers import TrainerControl, TrainerState

from latro.reporting import callbacks
from latro.reporting.callbacks import MetricsFiles, draw_progress
from latro.trainer import LatroTrainer


def test_metrics_are_appended_and_rewritten_at_the_start(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = TrainerState()
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 7, "rew')
    files = MetricsFiles(LatroTrainer.panels)
    state.log_history = [{"step": 1, "reward": -2.0}]
    files.on_train_begin(args, state, TrainerControl())
    state.log_history.append({"step": 2, "reward": -1.0})
    files.on_log(args, state, TrainerControl())
    assert [json.loads(line) for line in path.read_text().splitlines()] == state.log_history


def test_a_number_that_json_lacks_is_null(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = TrainerState()
    files = MetricsFiles(LatroTrainer.panels)
    state.log_history = [{"step": 0, "eval_answer_logp": -math.inf}]
    files.on_train_begin(args, state, TrainerControl())
    state.log_history.append({"step": 1, "grad_norm": math.nan})
    files.on_log(args, state, TrainerControl())
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert first == '{"step": 0, "eval_answer_logp": null}'
    assert second == '{"step": 1, "grad_norm": null}'


def test_progress_is_drawn(tmp_path):
    path = tmp_path / "progress.png"
    draw_progress([], path, LatroTrainer.panels)
    empty = Image.open(path).tobytes()
    history = [{"step": i, "reward": -5.0 + i, "kl": 0.1 * i} for i in range(5)]
    history += [{"step": 0, "eval_accuracy_greedy": 0.1, "eval_accuracy_sampled": 0.2}]
    draw_progress(history, path, LatroTrainer.panels)
    with Image.open(path) as drawn:
        assert drawn.size == (1080, 720)
        assert drawn.tobytes() != empty
    assert list(tmp_path.iterdir()) == [path]


def test_a_long_run_is_drawn_as_fast_as_a_short_one(tmp_path, monkeypatch):
    """At 100,000 updates the picture took 7 seconds, at every evaluation and save."""
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axis, x, y, **o: drawn.append((x, y)) or plot(axis, x, y, **o)
    )
    history = [{"step": i, "reward": -2.0 + i % 7 / 10} for i in range(50_000)]
    history[31_111]["reward"], history[40_000]["reward"] = -9.0, math.nan
    history += [{"step": i, "eval_accuracy_greedy": 0.5} for i in range(0, 50_000, 50)]
    draw_progress(history, tmp_path / "progress.png", LatroTrainer.panels)
    (steps, rewards), (evaluations, _) = drawn
    assert len(steps) <= 2_002
    assert list(steps) == sorted(steps)
    # A spike of a single update stays, and one that is NaN takes no neighbour along.
    assert (31_111, -9.0) in zip(steps, rewards, strict=True)
    assert max(rewards) == -1.4
    assert not any(map(math.isnan, rewards))
    assert len(evaluations) == 1_000


def test_it_is_drawn_again_only_when_something_was_logged(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(callbacks, "draw_progress", lambda history, *_: drawn.append(len(history)))
    args, state, control = SimpleNamespace(output_dir=tmp_path), TrainerState(), TrainerControl()
    files = MetricsFiles(LatroTrainer.panels)
    files.on_train_begin(args, state, control)
    state.log_history = [{"step": 1, "reward": -2.0}]
    files.on_evaluate(args, state, control)
    files.on_save(args, state, control)
    state.log_history.append({"step": 2, "reward": -1.0})
    files.on_train_end(args, state, control)
    files.on_train_begin(args, state, control)
    files.on_save(args, state, control)
    assert drawn == [1, 2, 2]
