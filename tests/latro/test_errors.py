"""Errors from outside end in one line with the path, and lose no complete file."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors import SafetensorError
from torch.distributed import DistNetworkError

from latro.config.training import SMALL_MODEL
from latro.errors import exit_with, reading, writing
from latro.files import append, replacing, write_json
from latro.run.checkpoints import MANIFEST, PARTIAL, damage
from latro.run.identity import RUN_FILE
from latro.train import train


def full(path=None):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


# What a process of several is told when another one ends.
LOST = RuntimeError(
    "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:1. This is typically caused by a remote worker crashing. Check the logs"
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (LOST, "p: another process of this run has ended, or does not answer"),
        (DistNetworkError("timed out"), "p: another process of this run has ended"),
        (ValueError("beta: bad\n  value"), "p: beta: bad value"),
        (full("/x/metrics.jsonl"), "p: /x/metrics.jsonl: No space left on device"),
        (PermissionError(13, "Permission denied", b"/x"), "p: /x: Permission denied"),
        (OSError("we\ncannot\n\n  connect"), "p: we cannot connect"),
        (ConnectionError("offline"), "p: offline"),
        (TimeoutError("too long"), "p: too long"),
        (SafetensorError("header"), "p: header"),
        (ImportError("\nno bitsandbytes:\n`pip`"), "p: no bitsandbytes: `pip`"),
        (FloatingPointError("NaN"), "p: NaN"),
        (json.JSONDecodeError("Expecting value", "x", 0), "p: Expecting value: line 1"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "p: 'utf-8' codec can't decode"),
        (EOFError, None),
        (KeyError("name"), None),
        (TypeError("bug"), None),
        (RuntimeError("bug"), None),
        (AttributeError("bug"), None),
        (AssertionError("bug"), None),
    ],
)
def test_a_command_ends_with_one_line_and_a_bug_with_its_traceback(error, line):
    def run():
        raise error

    if line is None:
        with pytest.raises(error if isinstance(error, type) else type(error)):
            exit_with("p", run)
        return
    with pytest.raises(SystemExit) as caught:
        exit_with("p", run)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


# The errors of libraries that cannot write or read; tokenizers raises Exception itself.
UNTYPED = (RuntimeError("enforce fail"), Exception("File too large (os error 27)"))


@pytest.mark.parametrize("error", [full(), full("/elsewhere"), SafetensorError("I/O"), *UNTYPED])
def test_what_is_written_is_named(tmp_path, error):
    with pytest.raises(OSError, match=rf"{tmp_path}/a") as caught, writing(tmp_path / "a"):
        raise error
    assert caught.value.__cause__ is error
    if isinstance(error, OSError):
        assert caught.value.errno == errno.ENOSPC
    else:
        assert "bytes are free on that disk" in str(caught.value)


def test_a_file_inside_of_what_is_written_names_itself(tmp_path):
    inside = str(tmp_path / "a" / "b")
    with pytest.raises(OSError, match="a/b") as caught, writing(tmp_path / "a"):
        raise full(inside)
    assert caught.value.filename == inside


READ = (
    *(EOFError("end"), pickle.UnpicklingError("x"), SafetensorError("x"), full()),
    *(json.JSONDecodeError("x", "", 0), UnicodeDecodeError("utf-8", b"", 0, 1, "x")),
)


@pytest.mark.parametrize("error", [*READ, *UNTYPED])
def test_what_is_read_is_named(error):
    with (
        pytest.raises(ValueError, match=r"^resume_from_checkpoint: /c cannot be read: "),
        reading("resume_from_checkpoint", "/c"),
    ):
        raise error


class OwnError(RuntimeError):
    pass


@pytest.mark.parametrize(
    "error", [KeyError("x"), OwnError("x"), AttributeError("x"), SystemExit(), LOST]
)
def test_a_bug_in_writing_or_reading_stays_what_it_is(tmp_path, error):
    for within in (writing(tmp_path), reading("model", tmp_path)):
        with pytest.raises(type(error)) as caught, within:
            raise error
        assert caught.value is error


def test_a_full_disk_is_told_with_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append("/dev/full", "line\n")
    path = tmp_path / "a.json"
    write_json(path, 1)

    def fill():
        with replacing(path), open("/dev/full", "w", encoding="utf-8") as file:
            file.write("x")

    # /dev/full replaces the temporary file, whose errors at closing name no file.
    with pytest.raises(OSError, match=r"No space left on device: .*a.json"):
        fill()
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_is_no_folder_is_told(tmp_path):
    (tmp_path / "file").touch()
    for write in (lambda p: write_json(p, 1), lambda p: append(p, "x")):
        with pytest.raises(OSError, match=r"file/a"):
            write(tmp_path / "file" / "a")


@pytest.fixture
def run(make_trainer, tmp_path):
    """Return a trainer of three updates and its checkpoint after the first."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_completion_length": 2}
    make_trainer(max_steps=1, **settings).train()
    trainer = make_trainer(max_steps=3, **settings)
    return trainer, tmp_path / "run" / "checkpoint-1"


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("latro.run.saving.write_identity", full()),
        ("latro.run.checkpoints.write_manifest", full()),
        ("transformers.trainer.torch.save", RuntimeError("[enforce fail] unexpected pos")),
        ("transformers.modeling_utils.safe_save_file", SafetensorError("No space left on device")),
        ("transformers.trainer.TrainerState.save_to_json", full()),
        (
            "transformers.tokenization_utils_base.PreTrainedTokenizerBase.save_pretrained",
            Exception("No space left on device (os error 28)"),
        ),
    ],
)
def test_half_a_checkpoint_does_not_stay(run, monkeypatch, tmp_path, where, error):
    trainer, checkpoint = run

    def fail(*args, **kwargs):
        raise error

    begin = trainer._begin_run

    def begin_and_break():
        begin()
        monkeypatch.setattr(where, fail)

    trainer.callback_handler.callbacks[-1].on_train_begin = lambda *a, **k: None
    monkeypatch.setattr(trainer._beginning, "begin", begin_and_break)
    with pytest.raises(OSError, match="checkpoint-2"):
        trainer.train(resume_from_checkpoint=True)
    assert damage(checkpoint) is None
    assert [p.name for p in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-1"]
    assert not (tmp_path / "run" / PARTIAL).exists()


def test_half_a_model_does_not_take_the_place_of_a_whole_one(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    trainer.save_model()
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with torch.no_grad():
        trainer.model.model.norm.weight += 1
    with monkeypatch.context() as patched:
        patched.setattr(
            "transformers.tokenization_utils_base.PreTrainedTokenizerBase.save_pretrained",
            lambda *args, **kwargs: exec("raise Exception('File too large (os error 27)')"),
        )
        with pytest.raises(OSError, match=r"run: cannot be written: File too large"):
            trainer.save_model()
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    trainer.save_model()
    after = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert after.keys() == before.keys()
    assert after["model.safetensors"] != before["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            (name, content)
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
            for content in (b"", b"PK\x03\x04", b"no pickle")
        ),
        ("model.safetensors", b"\x10"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_named(run, name, content):
    trainer, checkpoint = run
    (checkpoint / name).write_bytes(content)
    # As transformers' Trainer writes it, without what would reveal the damage before reading.
    for own in (MANIFEST, RUN_FILE):
        (checkpoint / own).unlink()
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: ") as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(caught.value)
    assert str(checkpoint) in str(caught.value)


RUN = (
    *("--num_train_examples", "4", "--num_eval_examples", "2", "--dataset_name", "arithmetic"),
    *("--num_generations", "2", "--max_completion_length", "4", "--use_cpu", "true"),
    *("--per_device_train_batch_size", "2", "--disable_tqdm", "true", "--max_steps", "2"),
    *("--eval_on_start", "false", "--save_strategy", "steps", "--save_steps", "1"),
)


def line_of(*argv):
    """Return the error line that `latro.train` ends with."""
    with pytest.raises(SystemExit) as caught:
        exit_with("latro.train", lambda: train([*RUN, *argv]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


LIMITED = """
import resource
from latro import train
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
train.main()
"""


def test_a_disk_that_takes_no_checkpoint_ends_a_run_in_one_line(tmp_path, warm):
    output = tmp_path / "run"
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    arguments = (*RUN, "--output_dir", output)
    done = warm.start(str(script), arguments, tmp_path / "printed").wait()
    assert done.code == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"latro.train: {output}/.latro-partial/checkpoint-1")
    assert "Traceback" not in done.stderr
    assert not list(output.glob("*checkpoint*"))
    assert [p.name for p in output.iterdir()] == ["metrics.jsonl"]
    # The log up to the error is there.
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_an_output_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    line = line_of("--output_dir", str(tmp_path / "file" / "run"))
    assert line == f"latro.train: {tmp_path}/file/run: Not a directory"


def test_weights_that_are_cut_are_named(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(SMALL_MODEL, model)
    for size in (100_000, 1000, 5, 0):
        os.truncate(model / "model.safetensors", size)
        line = line_of("--model_name_or_path", str(model), "--output_dir", str(tmp_path / "run"))
        assert line.startswith(f"latro.train: model_name_or_path: cannot load '{model}'")
    assert not (tmp_path / "run").exists()
