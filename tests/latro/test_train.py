"""The training command from end to end."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations import TensorBoardCallback

from latro.errors import TrainingInterrupted
from latro.evaluate import evaluate
from latro.evaluation import accuracy as evaluation
from latro.reporting.callbacks import MetricsFiles
from latro.reporting.held_out_samples import SAMPLES_FILE
from latro.run.checkpoints import damage
from latro.train import train
from scripts.make_tiny_model import make_model, make_tokenizer
from tests.warm_process import Running

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def model_dir(tiny, tokenizer, tmp_path):
    """Return a model folder as a user may have it, with the toy tokenizer."""
    path = tmp_path / "model"
    tiny().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


SMALL = (
    *("--dataset_name", "arithmetic", "--num_train_examples", "16", "--num_eval_examples", "4"),
    *("--num_generations", "2", "--max_completion_length", "8", "--disable_tqdm", "true"),
    *("--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--use_cpu", "true"),
)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "phi3"])
@pytest.mark.parametrize("name", ["gsm8k", "arc_challenge"])
def test_real_data(tmp_path, architecture, name):
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}: the data set is not part of the repository")
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[:400]
    tokenizer = make_tokenizer(lines, vocab_size=600)
    make_model(architecture, tokenizer, max_position_embeddings=2048).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    output = tmp_path / "run"
    train(
        [
            *("--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(output)),
            *("--dataset_name", name, "--dataset_path", str(folder), "--max_steps", "2"),
            *("--num_generations", "4", "--max_completion_length", "16"),
            *("--num_eval_examples", "4", "--disable_tqdm", "true", "--beta", "0.25"),
        ]
    )
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "reward" in s] == [1, 2]
    assert next(s["kl"] for s in steps if "kl" in s) == 0.0
    assert (output / "progress.png").stat().st_size > 0
    results = json.loads((output / "results.json").read_text())
    assert set(results) == {"base", "final"}
    card = ModelCard.load(output / "README.md")
    accuracy = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert accuracy["greedy accuracy"] == results["final"]["eval_accuracy_greedy"]
    (dataset,) = card.data.datasets
    assert dataset in ("openai/gsm8k", "allenai/ai2_arc")
    AutoModelForCausalLM.from_pretrained(output)


def test_a_run_that_does_not_evaluate_at_the_start_has_no_base(model_dir, tmp_path, capsys):
    settings = tmp_path / "run.yaml"
    settings.write_text("eval_on_start: no\nsave_strategy: no\n")
    output = tmp_path / "run"
    results = train(
        [
            *("--model_name_or_path", str(model_dir), *SMALL, "--max_steps", "1"),
            *("--config", str(settings), "--output_dir", str(output)),
        ]
    )
    assert list(results) == ["final"]
    assert results["final"]["step"] == 1
    assert results == json.loads((output / "results.json").read_text())
    assert "base" not in capsys.readouterr().out
    settings.write_text("resume_from_checkpoint: true\n")
    with pytest.raises(ValueError, match="resume_from_checkpoint: no whole checkpoint in"):
        train([*SMALL, "--config", str(settings), "--output_dir", str(output)])


def test_a_tracker_s_run_has_the_last_evaluation_too(tmp_path):
    output = tmp_path / "run"
    results = train(
        [
            *(*SMALL, "--max_steps", "1", "--save_strategy", "no", "--eval_strategy", "no"),
            *("--report_to", "tensorboard", "--output_dir", str(output)),
        ]
    )
    # TensorBoard's callback begins another file where one logs after the end of the training;
    # others begin another run.
    (events,) = (output / "runs").glob("*/*")
    logged = EventAccumulator(str(events)).Reload().Scalars("eval/answer_logp")
    assert [event.step for event in logged] == [0, 1]
    assert logged[-1].value == pytest.approx(results["final"]["eval_answer_logp"])


@pytest.mark.parametrize("event", ["on_train_begin", "on_log"])
def test_a_tracker_s_error_names_it(tmp_path, monkeypatch, event):
    class UsageError(Exception):
        pass

    def fail(*args, **options):
        raise UsageError("No API key configured.\nLog in.")

    monkeypatch.setattr(TensorBoardCallback, event, fail)
    settings = (*SMALL, "--max_steps", "1", "--output_dir", str(tmp_path / "run"))
    message = r"^report_to: tensorboard cannot be written to: No API key configured. Log in.$"
    with pytest.raises(OSError, match=message):
        train([*settings, "--report_to", "tensorboard"])


def test_an_error_of_another_callback_is_passed_on(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise LookupError("a fault of ours")

    monkeypatch.setattr(MetricsFiles, "on_log", fail)
    with pytest.raises(LookupError, match="a fault of ours"):
        train([*SMALL, "--max_steps", "1", "--output_dir", str(tmp_path / "run")])


def test_a_signal_in_the_last_evaluation_leaves_a_run_that_goes_on(
    tmp_path, monkeypatch, ordinary_signals
):
    # Where the run does not handle it, it is lost, and does not end the tests.
    signal.signal(signal.SIGTERM, lambda number, frame: None)

    def evaluate_model(*args, **options):
        if (output / "model.safetensors").exists():
            signal.raise_signal(signal.SIGTERM)
        return evaluation.evaluate_model(*args, **options)

    output = tmp_path / "run"
    settings = [
        *(*SMALL, "--max_steps", "2", "--save_strategy", "no", "--eval_strategy", "no"),
        *("--output_dir", str(output)),
    ]
    with monkeypatch.context() as patch:
        patch.setattr("latro.evaluating_trainer.evaluate_model", evaluate_model)
        with pytest.raises(TrainingInterrupted, match="stopped after update 2, with a checkpoint"):
            train(settings)
    assert not (output / "results.json").exists()
    results = train([*settings, "--resume_from_checkpoint", "true"])
    assert [results[name]["step"] for name in ("base", "final")] == [0, 2]
    assert [e["step"] for e in logged(output) if "eval_answer_logp" in e] == [0, 2]


@pytest.mark.parametrize("adapter", ["false", "true"])
def test_what_is_pushed_last_is_what_a_run_leaves(model_dir, tmp_path, monkeypatch, adapter):
    output = tmp_path / "run"
    pushed = []

    def files():
        return {p.name: p.read_bytes() for p in output.iterdir() if p.is_file()}

    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **options: None)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, **options: pushed.append(files()))
    train(
        [
            *("--model_name_or_path", str(model_dir), *SMALL, "--max_steps", "1"),
            *("--use_peft", adapter, "--save_strategy", "no", "--push_to_hub", "true"),
            *("--output_dir", str(output)),
        ]
    )
    (last,) = pushed
    assert "results.json" in last
    assert last == files()


def test_a_hub_that_cannot_be_reached_takes_nothing_away(tmp_path, monkeypatch):
    output = tmp_path / "run"
    settings = [
        *(*SMALL, "--max_steps", "1", "--save_strategy", "no", "--push_to_hub", "true"),
        *("--output_dir", str(output)),
    ]

    # Of the library beneath the hub's client, which passes its errors on.
    of_connections = HfHubHTTPError.__mro__[1]

    def fail(self, *args, **options):
        raise of_connections("no such host")

    assert not issubclass(of_connections, OSError)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "init_hf_repo", fail)
        with pytest.raises(OSError, match=r"^push_to_hub: .* no such host; nothing has been tr"):
            train(settings)
    assert not (output / "model.safetensors").exists()
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **options: None)
    monkeypatch.setattr(Trainer, "push_to_hub", fail)
    with pytest.raises(OSError, match=r"^push_to_hub: .* no such host; everything is in .*run$"):
        train(settings)
    assert json.loads((output / "results.json").read_text())["final"]["step"] == 1
    assert (output / "README.md").exists()
    assert load_file(output / "model.safetensors")


@pytest.mark.parametrize(("saving", "adapter"), [("steps", "false"), ("best", "true")])
def test_the_best_checkpoint_is_what_a_run_ends_with(
    tmp_path, monkeypatch, capsys, saving, adapter
):
    output = tmp_path / "run"
    # Accuracies before training, where there is no checkpoint, and after each update.
    planted = iter([0.9, 0.5, 0.8, 0.6])

    def evaluate_model(*args, **options):
        metrics, records = evaluation.evaluate_model(*args, **options)
        return metrics | {"accuracy_greedy": next(planted)}, records

    monkeypatch.setattr("latro.evaluating_trainer.evaluate_model", evaluate_model)
    results = train(
        [
            *(*SMALL, "--max_steps", "3", "--eval_strategy", "steps", "--eval_steps", "1"),
            *("--save_strategy", saving, "--save_steps", "1", "--save_total_limit", "1"),
            *("--load_best_model_at_end", "true", "--use_peft", adapter),
            *("--metric_for_best_model", "eval_accuracy_greedy", "--output_dir", str(output)),
        ]
    )
    assert results["base"]["step"] == 0
    assert results["final"]["step"] == 2
    assert results["final"]["eval_accuracy_greedy"] == 0.8
    assert "of update 2 of 3" in capsys.readouterr().out
    assert results == json.loads((output / "results.json").read_text())
    name = "adapter_model.safetensors" if adapter == "true" else "model.safetensors"
    saved, best = (load_file(folder / name) for folder in (output, output / "checkpoint-2"))
    assert all(torch.equal(saved[key], tensor) for key, tensor in best.items())
    # The saved model gives the accuracies in the results.
    again = evaluate(
        [
            *("--model_name_or_path", str(output), "--eval_split", "validation"),
            *("--num_eval_examples", "4", "--num_samples", "1", "--majority", "1"),
            *("--max_completion_length", "8", "--output", str(tmp_path / "evaluation.json")),
        ]
    )
    likelihood = again["metrics"]["answer_logp"]
    assert results["final"]["eval_answer_logp"] == pytest.approx(likelihood, rel=1e-5)


def test_an_impossible_answer_is_no_error_at_the_end(tmp_path, monkeypatch, capsys):
    def evaluate_model(*args, **options):
        metrics, records = evaluation.evaluate_model(*args, **options)
        return metrics | {"answer_logp": -math.inf}, records

    monkeypatch.setattr("latro.evaluating_trainer.evaluate_model", evaluate_model)
    output = tmp_path / "run"
    train([*SMALL, "--max_steps", "1", "--save_strategy", "no", "--output_dir", str(output)])
    results = json.loads((output / "results.json").read_text())
    assert results["final"]["eval_answer_logp"] is None
    assert "-inf" in capsys.readouterr().out
    assert (output / "README.md").exists()


@pytest.fixture(scope="module")
def long_run(tokenizer, warm, tmp_path_factory):
    """Return a starter of a run with six updates and evaluations, and a complete run's folder."""
    folder = tmp_path_factory.mktemp("long_run")
    make_model("llama", tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    def start(output: Path, printed: Path, *more: str) -> Running:
        options = (*SMALL, "--max_steps", "6", "--output_dir", output, *more)
        options = ("--model_name_or_path", folder / "model", *options)
        return warm.start("latro.train", options, printed)

    finished = start(folder / "whole", folder / "printed").wait()
    assert finished.code == 0, finished
    return start, folder / "whole"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_by_a_signal_and_resumed_it_ends_with_the_same_bits(long_run, tmp_path, number):
    start, whole = long_run
    output = tmp_path / "run"
    # A killed run has earlier checkpoints; a run that is asked to end saves one at once.
    saving = ("--save_strategy", "no")
    awaited = "metrics.jsonl"
    if number == signal.SIGKILL:
        saving = ("--save_strategy", "steps", "--save_steps", "1")
        awaited = "checkpoint-2"
    process = start(output, tmp_path / "printed", *saving)
    deadline = time.monotonic() + 240
    while not ((output / awaited).exists() and len(logged(output)) > 2):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, number)
    finished = process.wait()
    assert not (output / "results.json").exists(), "the run ended before it could be stopped"
    assert finished.code == (143 if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        assert "with --resume_from_checkpoint true goes on" in finished.stderr
        (checkpoint,) = output.glob("checkpoint-*")
        assert damage(checkpoint) is None
        assert int(checkpoint.name.rpartition("-")[2]) == logged(output)[-2]["step"] < 6
    # This checkpoint is incomplete; the newest complete one is taken instead.
    (output / "checkpoint-99").mkdir()
    more = (*saving, "--resume_from_checkpoint", "true")
    finished = start(output, tmp_path / "printed again", *more).wait()
    assert finished.code == 0, finished
    resumed, straight = (load_file(p / "model.safetensors") for p in (output, whole))
    assert resumed.keys() == straight.keys()
    for name, tensor in straight.items():
        assert tensor.equal(resumed[name]), name
    rewards = [[entry.get("reward") for entry in logged(p)] for p in (output, whole)]
    assert rewards[0] == rewards[1]
    # Samples from before the stop are kept too, so the card has a first and a last evaluation.
    assert (output / SAMPLES_FILE).read_bytes() == (whole / SAMPLES_FILE).read_bytes()
    assert "update 0 | update 6 |" in (output / "README.md").read_text(encoding="utf-8")


def logged(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--num_generations", "1"), "num_generations: expected at least 2"),
        (("--dataset_name", "gsm9k"), "gsm9k"),
        (("--dataset_name", "gsm8k", "--dataset_path", "nowhere"), "there is no file"),
        (("--eval_split", "tset"), "tset"),
        (("--model_name_or_path", "./nowhere"), "model_name_or_path: cannot load"),
        (("--backend", "tpu"), "backend: expected one of"),
        (("--resume_from_checkpoint", "./nowhere"), "expected a checkpoint folder"),
        (("--max_completion_length", "100000"), "lower max_completion_length"),
    ],
)
def test_bad_input_leaves_the_output_folder_as_it_was(tmp_path, monkeypatch, argv, message):
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").write_text("earlier")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        train([*SMALL, "--output_dir", str(output), *argv])
    assert [p.name for p in output.iterdir()] == ["metrics.jsonl"]
    assert (output / "metrics.jsonl").read_text() == "earlier"


def test_a_malformed_row_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        '{"question": "1+1?", "answer": "#### 2"}\n{"question": "2+2?"}\n'
    )
    options = ("--dataset_name", "gsm8k", "--dataset_path", str(tmp_path))
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=r"train\.jsonl:2: .*'answer'"):
        train([*SMALL, "--output_dir", str(output), *options])
    assert not output.exists()


def test_weights_that_are_nan_are_refused(tiny, tokenizer, tmp_path):
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").write_text("earlier")
    with pytest.raises(ValueError, match="logits are not finite; the weights hold NaN"):
        train(
            [
                *("--model_name_or_path", str(tmp_path / "model")),
                *(*SMALL, "--output_dir", str(output)),
            ]
        )
    assert [p.name for p in output.iterdir()] == ["metrics.jsonl"]
    assert (output / "metrics.jsonl").read_text() == "earlier"


def test_a_tokenizer_larger_than_the_model_is_refused(tiny, tokenizer, tmp_path):
    tiny(vocab_size=100).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens but .* has 100"):
        train(["--model_name_or_path", str(tmp_path), *SMALL])


def test_a_folder_with_another_runs_checkpoints_is_not_mixed(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="checkpoints of an earlier run"):
        train([*SMALL, "--output_dir", str(tmp_path)])


def test_errors_are_one_line_of_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "latro.train", "--num_generations", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("latro.train: num_generations: expected")
    assert "Traceback" not in done.stderr
