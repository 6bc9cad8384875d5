from __future__ import annotations

import html
import io
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import TrainerControl, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from latro import LatroConfig
from latro.config.trackers import check_trackers
from latro.reporting import trackers
from latro.reporting.callbacks import CompletionsTable
from latro.reporting.trackers import (
    Report,
    Sample,
    SequenceReports,
    Trackio,
    WeightsAndBiases,
    _markdown_table,
)
from latro.rollout.sequences import decode
from latro.terminal import Terminal, shown
from latro.update.metrics import Outcome

SAMPLE = Sample("How | many?", " 2+3=[5]\n<eos>", " The answer is `5`", -1.5, 0.25)


@pytest.fixture
def reports(tokenizer):
    """Return `SequenceReports` for K = 2 with one sample, and the reports that its sink gets."""
    got = []
    reports = SequenceReports(
        [lambda step, report: got.append((step, report))],
        tokenizer,
        Accelerator(cpu=True),
        num_generations=2,
        num_samples=1,
    )
    return reports, got


def outcome(groups, advantages):
    rollouts = [rollout for group in groups for rollout in group]
    advantage = torch.tensor(advantages)
    return Outcome(rollouts, advantage - 1, advantage)


def log(reports, step=1, logs=None):
    state = TrainerState(global_step=step, is_world_process_zero=True)
    reports.on_log(SimpleNamespace(), state, TrainerControl(), logs={"loss": 0.0, **(logs or {})})


def test_a_log_tells_of_all_updates_since_the_last_and_shows_the_newest(
    reports, rollouts, tokenizer
):
    reports, got = reports
    first, second = rollouts(2, 2), rollouts(3, 2, seed=1)
    reports.add([outcome(first, [1.0, -1.0, 2.0, -2.0])], last=True, skipped=False)
    two = [outcome(second[:1], [3.0, -3.0]), outcome(second[1:], [4.0, -4.0, 5.0, -5.0])]
    reports.add(two[:1], last=False, skipped=False)
    reports.add(two[1:], last=True, skipped=False)
    log(reports, step=7)
    ((step, report),) = got
    assert step == 7
    assert report.advantages == [1, -1, 2, -2, 3, -3, 4, -4, 5, -5]
    assert report.rationale_lengths == [len(r.rationale_ids) for g in first + second for r in g]
    newest = second[0][0]
    assert report.samples == [
        Sample(
            decode(tokenizer, newest.prompt_ids),
            decode(tokenizer, newest.sampled_ids),
            decode(tokenizer, newest.answer_ids),
            reward=2.0,
            advantage=3.0,
        )
    ]
    # There are no new sequences.
    log(reports, step=8)
    assert len(got) == 1


def test_a_run_that_never_logs_keeps_the_latest_sequences_alone(reports, rollouts, monkeypatch):
    """Every sequence of the run was kept, on the device too, where logs were far apart or off."""
    reports, got = reports
    monkeypatch.setattr(trackers, "_MOST_SEQUENCES", 4)
    for update in range(9):
        reports.add([outcome(rollouts(1, 2), [update, -1.0 * update])], last=True, skipped=False)
        assert len(reports._seen.outcomes) <= 2
    log(reports)
    assert got[0][1].advantages == [7, -7, 8, -8]
    assert len(got[0][1].rationale_lengths) == 4
    assert [sample.advantage for sample in got[0][1].samples] == [8]
    # An update of more sequences is shown whole.
    reports.add([outcome(rollouts(1, 2), [1.0, -1.0])], last=True, skipped=False)
    groups = rollouts(3, 2)
    parts = [outcome(groups[i : i + 1], [i + 2.0, -i - 2.0]) for i in range(3)]
    reports.add(parts, last=True, skipped=False)
    log(reports)
    assert got[1][1].advantages == [2, -2, 3, -3, 4, -4]
    assert [sample.advantage for sample in got[1][1].samples] == [2]


def test_a_skipped_update_is_not_told_of(reports, rollouts):
    reports, got = reports
    groups = rollouts(1, 2)
    reports.add([outcome(groups, [1.0, -1.0])], last=False, skipped=False)
    reports.add([outcome(groups, [float("nan")] * 2)], last=True, skipped=True)
    log(reports)
    assert got == []
    reports.add([outcome(groups, [2.0, -2.0])], last=True, skipped=False)
    log(reports)
    assert got[0][1].advantages == [2, -2]


def test_an_update_whose_prompts_other_processes_have_shows_nothing(reports, rollouts):
    reports, got = reports
    reports.add([], last=True, skipped=False)
    log(reports)
    assert got == []
    reports.add([outcome(rollouts(1, 2), [1.0, -1.0])], last=True, skipped=False)
    reports.add([], last=True, skipped=False)
    log(reports)
    ((_, report),) = got
    assert report.advantages == [1.0, -1.0]
    assert report.samples == []


def test_an_evaluation_s_log_waits_for_that_of_the_updates(reports, rollouts):
    reports, got = reports
    reports.add([outcome(rollouts(1, 2), [1.0, -1.0])], last=True, skipped=False)
    state = TrainerState(is_world_process_zero=True)
    reports.on_log(SimpleNamespace(), state, TrainerControl(), logs={"eval_accuracy_greedy": 1.0})
    assert got == []
    log(reports)
    assert len(got) == 1


def test_the_terminal_shows_completions_to_the_letter():
    console = Terminal(file=io.StringIO(), width=120)
    table = CompletionsTable(console)
    table(3, Report([0.25], [4], []))
    assert console.file.getvalue() == ""
    table(3, Report([0.25], [4], [SAMPLE]))
    shown = console.file.getvalue()
    assert r"' 2+3=[5]\n<eos>'" in shown
    assert "How | many?" in shown
    assert "-1.50" in shown
    assert "+0.25" in shown


@pytest.mark.parametrize("place", ["prompt", "rationale", "answer"])
@pytest.mark.parametrize("text", ["[INST] a [/INST]", "[bold]", "[/]", ":smile:", "\x1b[2J", "a|b"])
def test_no_text_is_markup(place, text):
    sample = replace(SAMPLE, **{place: text})
    console = Terminal(file=io.StringIO(), width=120)
    CompletionsTable(console)(3, Report([0.25], [4], [sample]))
    assert repr(text) in console.file.getvalue()
    row = _markdown_table([sample]).splitlines()[2]
    assert row.count("|") == 6
    assert "\x1b" not in html.unescape(row)
    assert html.escape(shown(text)) in html.escape(html.unescape(row))


def test_a_run_logs_completions_of_prompts_that_look_like_markup(make_trainer, capsys):
    data = Dataset.from_list([{"prompt": "[INST] How many? [/INST]", "answer": "5"}] * 4)
    make_trainer(train_dataset=data, log_completions=True, max_steps=1).train()
    assert "[INST] How many? [/INST]" in capsys.readouterr().out


def test_without_trackers_nothing_is_kept(make_trainer):
    trainer = make_trainer()
    assert trainer.reports is None


def test_tensorboard_reads_back_what_the_run_logged(make_trainer, tmp_path, task):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plugin = pytest.importorskip("tensorboard.plugin_util")
    trainer = make_trainer(
        report_to=["tensorboard"], max_steps=4, logging_steps=2, num_completions_to_print=3
    )
    trainer.train()
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = accumulators.EventAccumulator(str(folder), {"tensors": 0, "histograms": 0}).Reload()

    def read(name, step):
        return next(e for e in getattr(events, name[0])(name[1]) if e.step == step)

    for step in (2, 4):
        advantages = read(("Histograms", "train/advantages"), step).histogram_value
        lengths = read(("Histograms", "train/rationale_lengths"), step).histogram_value
        # Two updates, of two prompts with four sequences each.
        assert advantages.num == lengths.num == 16
        mean = read(("Scalars", "train/rationale_length"), step).value
        assert lengths.sum == pytest.approx(16 * mean, rel=1e-6)
        spread = read(("Scalars", "train/advantage_std"), step).value
        assert advantages.sum_squares == pytest.approx(16 * spread**2, rel=1e-5)
    (text,) = (
        e.tensor_proto.string_val[0].decode()
        for e in events.Tensors("train/samples/text_summary")
        if e.step == 4
    )
    shown = html.unescape(plugin.markdown_to_safe_html(text))
    assert shown.count("<tr>") == 4
    assert any(row["prompt"] in shown for row in task.load("train"))
    assert shown.count("The answer is") >= 3


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_report_in_the_classes_of_the_others(monkeypatch, name):
    logged = []
    run = SimpleNamespace(get=lambda: None)
    tracker = SimpleNamespace(
        run=None,
        context_vars=SimpleNamespace(current_run=run),
        log=logged.append,
        Histogram=lambda values: ("histogram", values),
        Table=lambda dataframe: ("table", dataframe.to_dict("records")),
    )
    monkeypatch.setitem(sys.modules, name, tracker)
    sink = {"wandb": WeightsAndBiases, "trackio": Trackio}[name]()
    # A closed run is not opened again.
    sink(3, Report([0.25], [4], [SAMPLE]))
    assert logged == []
    tracker.run = "open"
    run.get = lambda: "open"
    sink(3, Report([0.25], [4], [SAMPLE]))
    assert logged == [
        {
            "train/advantages": ("histogram", [0.25]),
            "train/rationale_lengths": ("histogram", [4]),
            "train/global_step": 3,
            "train/samples": (
                "table",
                [
                    {
                        "prompt": SAMPLE.prompt,
                        "rationale": SAMPLE.rationale,
                        "answer": SAMPLE.answer,
                        "reward": -1.5,
                        "advantage": 0.25,
                    }
                ],
            ),
        }
    ]


def test_weights_and_biases_offline(make_trainer, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = make_trainer(report_to=["wandb"], max_steps=2)
    trainer.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/global_step"] == 2
    assert summary["train/samples"]["nrows"] == 4
    assert sum(summary["train/advantages"]["values"]) == 8
    assert "train/reward" in summary


def test_trackio_on_this_machine(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    trainer = make_trainer(
        report_to=["trackio"],
        max_steps=2,
        project="sums",
        run_name="one",
        trackio_static_space_id=False,
    )
    trainer.train()
    logs = SQLiteStorage.get_logs("sums", "one")
    (last,) = (e for e in logs if e["train/global_step"] == 2 and "train/samples" in e)
    assert len(last["train/samples"]["_value"]) == 4
    assert np.sum(last["train/advantages"]["values"]) == 8
    assert any("train/reward" in e for e in logs)


@pytest.mark.parametrize("name", sorted(INTEGRATION_TO_CALLBACK))
def test_a_tracker_that_is_not_there_is_named_with_what_it_needs(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    package = {"azure_ml": "azureml-sdk", "flyte": "flytekit"}.get(name, name)
    told = f"report_to: {name} is not installed; pip install {package}$"
    if name == "kubeflow":
        told = "report_to: expected kubeflow in one of its jobs only, which sets KUBEFLOW_TRAINER_S"
    with pytest.raises(ValueError, match=told):
        check_trackers([name])


def test_an_unknown_tracker_is_refused_with_the_settings():
    with pytest.raises(ValueError, match="report_to: expected none, all, or some of"):
        LatroConfig(use_cpu=True, report_to=["wandbb"])
