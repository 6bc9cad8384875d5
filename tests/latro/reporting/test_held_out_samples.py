from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from latro.reporting.held_out_samples import PROBLEMS, SAMPLES_FILE, HeldOutSamples, read_samples


def records(text):
    completion = {"text": text, "predicted": None, "correct": False, "finished": True}
    return [
        {"index": i, "prompt": f"{i}?", "answer": "5", "greedy": [completion], "sampled": []}
        for i in range(PROBLEMS + 2)
    ]


def test_the_first_problems_of_each_evaluation_are_kept(tmp_path):
    path = tmp_path / SAMPLES_FILE
    assert read_samples(path) == {}
    # The text has line ends of every kind.
    HeldOutSamples.keep(str(tmp_path), 20, records("after\u2028\x85\r\n"))
    HeldOutSamples.keep(str(tmp_path), 0, records("before"))
    HeldOutSamples.keep(str(tmp_path), 20, records("again\u2028\x85\r\n"))
    samples = read_samples(path)
    assert list(samples) == [0, 20]
    assert [len(problems) for problems in samples.values()] == [PROBLEMS, PROBLEMS]
    assert samples[20][1] == {
        "prompt": "1?",
        "answer": "5",
        "text": "again\u2028\x85\r\n",
        "predicted": None,
        "correct": False,
    }


def test_training_starts_with_what_its_state_knows(tmp_path):
    for step in (0, 20, 40):
        HeldOutSamples.keep(str(tmp_path), step, records("text"))
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = TrainerState(is_world_process_zero=True)
    state.log_history = [{"step": s, "eval_accuracy_greedy": 0.5} for s in (0, 20)]
    state.log_history.append({"step": 40, "loss": 0.1})
    HeldOutSamples().on_train_begin(args, state, TrainerControl())
    assert list(read_samples(tmp_path / SAMPLES_FILE)) == [0, 20]
    state.log_history = []
    HeldOutSamples().on_train_begin(args, state, TrainerControl())
    assert read_samples(tmp_path / SAMPLES_FILE) == {}


@pytest.mark.parametrize("line", [b'{"step": 4, "prob', b"[1]", b"{}", b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path, line):
    path = tmp_path / SAMPLES_FILE
    path.write_bytes(b'{"step": 0, "problems": []}\n' + line)
    with pytest.raises(ValueError, match=rf"output_dir: {path}:2: expected an object"):
        read_samples(path)
