"""Two processes that stand for two nodes, with one disk for both or with one for each."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from latro.run.checkpoints import damage

SCRIPT = """
import json, os, sys, time
from pathlib import Path

# Each process is the first of a node.
os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}

from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainingArguments
from latro.run import saving
from latro.run.resumable import LongRunTrainer

publish, replace = saving.publish_files, Path.replace

def publish_slowly(folder, place):
    # Between the listing of the files and their moves there is time for the other process.
    Path.replace = lambda *paths: time.sleep(0.05) or replace(*paths)
    publish(folder, place)
    Path.replace = replace

saving.publish_files = publish_slowly
folder, output, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
resume = settings.pop("resume", None)
ids = list(range(5, 21))
dataset = Dataset.from_dict({"input_ids": [ids] * 8, "labels": [ids] * 8})
args = TrainingArguments(
    output_dir=str(folder / output.replace("RANK", os.environ["RANK"])), use_cpu=True,
    disable_tqdm=True, report_to=[], per_device_train_batch_size=1, **{"save_steps": 1, **settings},
)
trainer = LongRunTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder / "model"),
    args=args,
    train_dataset=dataset,
    eval_dataset=dataset,
)
trainer.train(resume_from_checkpoint=resume)
print("begun at update", trainer._first_step)
weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
save_file(weights, folder / f"trained by {args.process_index}.safetensors")
trainer.save_model()
"""


@pytest.fixture
def train(tiny, tmp_path, warm):
    """Return `train(output, **settings)`, which trains in a folder of each node or of both."""
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(output, code=0, **settings):
        arguments = (tmp_path, output, json.dumps(settings))
        printed = tmp_path / "printed"
        shutil.rmtree(printed, ignore_errors=True)
        script = str(tmp_path / "script.py")
        return warm.run_together(script, arguments, printed, processes=2, code=code)

    return run


def trained(folder):
    """Return both processes' weights, which are the same, as the first has them."""
    first, second = (load_file(folder / f"trained by {rank}.safetensors") for rank in (0, 1))
    assert all(first[name].equal(second[name]) for name in first)
    return first


def same(path, weights):
    found = load_file(path / "model.safetensors")
    return all(tensor.equal(weights[name]) for name, tensor in found.items())


def test_on_a_shared_disk_one_process_publishes_the_model(train, tmp_path):
    train("both", max_steps=1, save_strategy="no")
    assert same(tmp_path / "both", trained(tmp_path))
    assert not (tmp_path / "both" / ".latro-partial").exists()


def test_each_node_has_whole_checkpoints_and_goes_on_from_one_that_all_have(train, tmp_path):
    nodes = [tmp_path / "node 0", tmp_path / "node 1"]
    done = train("node RANK", max_steps=3, save_on_each_node=True)
    assert done.stdout.count("begun at update 0") == 2
    straight = trained(tmp_path)
    for node in nodes:
        assert same(node, straight)
        for step in (1, 2, 3):
            assert damage(node / f"checkpoint-{step}") is None
            assert (node / f"checkpoint-{step}" / "model.safetensors").exists()
    # One node was stopped before the last checkpoint had its name there; another is damaged.
    shutil.rmtree(nodes[1] / "checkpoint-3")
    (nodes[0] / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    # All rows are the same.
    more = {"resume": True, "ignore_data_skip": True}
    done = train("node RANK", max_steps=3, save_on_each_node=True, **more)
    assert done.stdout.count("begun at update 1") == 2
    assert done.stderr.count("ignore_data_skip was False, now True") == 1
    assert "checkpoint-3 is left out: not all processes have a whole one" in done.stderr
    assert all(tensor.equal(straight[name]) for name, tensor in trained(tmp_path).items())
    for node in nodes:
        assert same(node, straight)


def test_a_best_model_that_not_all_have_is_loaded_by_none(train, tmp_path):
    # The best is the first one, by a metric that falls.
    done = train(
        "node RANK",
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=1e-2,
        load_best_model_at_end=True,
        greater_is_better=True,
    )
    assert same(tmp_path / "node 0" / "checkpoint-2", trained(tmp_path))
    assert "node 1 of process 1 is on another disk than that of process 0" in done.stderr
    assert done.stderr.count("is gone; the last model is kept") >= 1


def test_a_process_that_cannot_write_is_told_in_all_before_the_first_update(train, tmp_path):
    (tmp_path / "node 1").touch()
    done = train("node RANK/run", code=1, max_steps=3, save_steps=3)
    assert done.stderr.count("ValueError: output_dir: process 1 cannot write there: ") == 2
    assert not any((tmp_path / "node 0" / "run").iterdir())
