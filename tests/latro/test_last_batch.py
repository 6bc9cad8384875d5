"""An epoch's last batch has the remaining prompts, each once, over several processes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.latro.engines_on_cpu import engines, sharded
from tests.latro.last_batches import CASES, PROCESSES, SHARDED, train_case

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def launch(tmp_path_factory, warm):
    """Return `launch(*options)`, which runs the cases in several processes, into a folder."""
    done = {}

    def run(*options):
        if options not in done:
            done[options] = folder = tmp_path_factory.mktemp("several")
            warm.run_together(
                "tests.latro.last_batches",
                (folder, *options),
                tmp_path_factory.mktemp("several") / "printed",
                processes=PROCESSES,
                timeout=600,
            )
        return done[options]

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return `alone(name)`, which runs a case in one process, into a folder."""
    folder = tmp_path_factory.mktemp("alone")
    done = {}

    def train(name):
        if name not in done:
            done[name] = train_case(name, folder, 1)
        return done[name]

    return train


def updates(output):
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in lines if "loss" in entry]


def assert_same_run(ours, theirs):
    a, b = updates(ours), updates(theirs)
    assert len(a) == len(b)
    assert a
    told = ("step", "epoch", "loss", "grad_norm", "trunk_tokens", "reward", "kl", "target_tokens")
    for mine, yours in zip(a, b, strict=True):
        for name in set(told) & mine.keys():
            assert mine[name] == pytest.approx(yours[name], rel=1e-4, abs=1e-5), (mine, yours)
    a, b = (load_file(p / "model.safetensors") for p in (ours, theirs))
    for name, tensor in b.items():
        torch.testing.assert_close(a[name], tensor, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_several_processes_train_what_one_does(launch, alone, name):
    assert_same_run(launch() / name.replace(" ", "-"), alone(name))


@sharded
@pytest.mark.parametrize("name", SHARDED)
def test_several_processes_with_weights_in_shards_train_what_one_does(launch, alone, name, engine):
    assert_same_run(launch(engine) / name.replace(" ", "-"), alone(name))


@engines
def test_resumed_in_the_middle_of_an_epoch(launch, alone, engine):
    options = () if engine == "ddp" else (engine,)
    assert_same_run(launch(*options) / "resumed" / "one-is-left", alone("one is left"))
