"""Several processes on one machine, over gloo, end with the same weights as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from latro.config.training import SMALL_MODEL
from latro.engines.transformers import seed_of
from latro.train import train
from tests.latro.engines_on_cpu import MODULES, engines, sharded
from tests.latro.fake_vllm import sample_for_real

pytestmark = pytest.mark.long

PROMPTS = 4
"""Number of prompts per update, over all processes."""
OPTIONS = (
    *("--dataset_name", "arithmetic", "--num_train_examples", "16", "--num_eval_examples", "3"),
    *("--num_generations", "4", "--max_completion_length", "48", "--disable_tqdm", "true"),
    *("--learning_rate", "1e-3", "--use_cpu", "true", "--max_steps", "3"),
    *("--save_strategy", "steps", "--save_steps", "2"),
)

KILLED = """
import os, signal
from latro import train
from latro.trainer import LatroTrainer

save = LatroTrainer._save_rng_state

def save_or_die(trainer, folder):
    if trainer.args.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    save(trainer, folder)

LatroTrainer._save_rng_state = save_or_die
train.main()
"""
"""A script that trains, and loses process 1 while a checkpoint is written."""


def arguments(processes: int, output: Path, *more: str) -> list[str]:
    """Return the command line of each of `processes` processes."""
    return [
        *(*OPTIONS, "--per_device_train_batch_size", str(PROMPTS // processes)),
        *("--output_dir", str(output), *more),
    ]


@pytest.fixture
def launch(warm, tmp_path):
    """Return `launch(processes, output, *more)`, which runs the command in several processes."""

    def run(processes: int, output: Path, *more: str, engine: str = "ddp") -> None:
        done = warm.run_together(
            MODULES[engine],
            arguments(processes, output, *more, *["--fsdp"] * (engine == "fsdp2")),
            tmp_path / f"printed by {output.name}",
            processes=processes,
        )
        # Only one process prints.
        assert done.stdout.count("held-out problems") == 1

    return run


def metrics(output: Path, name: str) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [entry[name] for entry in map(json.loads, lines) if name in entry]


def assert_same_run(ours: Path, theirs: Path) -> None:
    for name in ("reward", "kl", "rationale_length", "eval_answer_logp", "grad_norm"):
        assert metrics(ours, name) == pytest.approx(metrics(theirs, name), rel=1e-4, abs=1e-5), name
    a, b = (load_file(p / "model.safetensors") for p in (ours, theirs))
    # FSDP writes tied weights a second time, as the head.
    a, b = ({k: t for k, t in w.items() if k != "lm_head.weight"} for w in (a, b))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        # Adam divides a gradient by its size, so rounding of a small one changes a weight by a
        # share of the learning rate: a hundredth of one step of 1e-3 is allowed.
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_processes_are_one_run_by_themselves(tmp_path, launch):
    output = tmp_path / "two"
    launch(2, output, "--use_cpu", "false", "--max_steps", "1", "--eval_strategy", "no")
    assert metrics(output, "step") == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("auto_find_batch_size", "auto_find_batch_size: expected False with several processes"),
        ("save_on_each_node", "save_on_each_node: expected False with fsdp"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_at_once(tmp_path, warm, setting, line):
    more = (f"--{setting}", "true", *["--fsdp"] * (setting == "save_on_each_node"))
    done = warm.run_together(
        MODULES["fsdp2" if "--fsdp" in more else "ddp"],
        arguments(2, tmp_path / "two", *more),
        tmp_path / "printed",
        processes=2,
        code=1,
    )
    assert done.stderr.count(line) == 2


def test_a_process_whose_fellow_is_killed_ends_with_one_line(tmp_path, warm):
    (tmp_path / "script.py").write_text(KILLED)
    started = tmp_path / "printed"
    options = arguments(2, tmp_path / "two", "--eval_strategy", "no", "--eval_on_start", "false")
    with pytest.raises(AssertionError, match="process 1 ended with -9"):
        warm.run_together(str(tmp_path / "script.py"), options, started, processes=2, code=1)
    lines = (started / "0" / "stderr").read_text().strip().splitlines()
    assert lines[-1].startswith("latro.train: another process of this run has ended")
    assert "Traceback" not in "".join(lines)
    assert "cannot be written" not in lines[-1]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    train([*OPTIONS, "--per_device_train_batch_size", str(PROMPTS), "--output_dir", str(output)])
    assert metrics(output, "advantage_std")[0] > 0.1
    return output


@engines
def test_two_processes_and_their_checkpoint_in_one(tmp_path, one_process, launch, engine):
    output = tmp_path / "two"
    # The budget cuts the two processes' groups into different numbers of pieces.
    launch(2, output, "--token_budget", "100", engine=engine)
    assert_same_run(output, one_process)
    resumed = tmp_path / "resumed"
    checkpoint = ("--resume_from_checkpoint", str(output / "checkpoint-2"))
    if engine == "ddp":
        prompts = ("--per_device_train_batch_size", str(PROMPTS))
        train([*OPTIONS, *prompts, "--output_dir", str(resumed), *checkpoint])
    else:
        # A checkpoint in shards is read by its engine only: by DeepSpeed in as many processes.
        launch({"fsdp2": 1, "zero3": 2}[engine], resumed, *checkpoint, engine=engine)
    assert_same_run(resumed, one_process)


@engines
def test_four_processes(tmp_path, one_process, launch, engine):
    output = tmp_path / "four"
    launch(4, output, "--report_to", "tensorboard", engine=engine)
    assert_same_run(output, one_process)
    # The one histogram of a log covers all processes' sequences.
    (folder,) = (output / "runs").iterdir()
    advantages = EventAccumulator(str(folder)).Reload().Histograms("train/advantages")
    assert advantages[-1].histogram_value.num == PROMPTS * 4


@sharded
def test_an_exact_kl_reads_the_head_that_the_engine_gathers(tmp_path, launch, engine):
    one, two = tmp_path / "one", tmp_path / "two"
    exact = ("--kl", "exact", "--beta", "0.5")
    prompts = ("--per_device_train_batch_size", str(PROMPTS))
    train([*OPTIONS, *prompts, *exact, "--output_dir", str(one)])
    launch(2, two, *exact, engine=engine)
    assert_same_run(two, one)
    assert metrics(two, "kl")[0] == 0.0


@sharded
def test_log_probs_are_fp32_where_the_engine_runs_in_bf16(tmp_path, launch, engine):
    # The kernels would refuse log-probs of another dtype.
    output = tmp_path / "two"
    launch(2, output, "--bf16", "true", engine=engine)
    assert metrics(output, "kl")[0] == 0.0


@pytest.fixture(scope="module")
def adapter_in_one_process(tmp_path_factory):
    """Return options that name a trained adapter with a head, and the run of one process."""
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj", "down_proj", "lm_head"],
        init_lora_weights=False,
    )
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL)
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    options = (
        *("--model_name_or_path", str(folder / "adapter"), "--kl", "exact", "--beta", "0.5"),
        *("--eval_on_start", "false", "--max_steps", "2", "--save_steps", "1"),
    )
    prompts = ("--per_device_train_batch_size", str(PROMPTS))
    train([*OPTIONS, *prompts, *options, "--output_dir", str(folder / "one")])
    return options, folder / "one"


@engines
def test_the_reference_of_a_trained_adapter(tmp_path, adapter_in_one_process, launch, engine):
    options, one = adapter_in_one_process
    two, resumed = tmp_path / "two", tmp_path / "resumed"
    launch(2, two, *options, engine=engine)
    checkpoint = ("--resume_from_checkpoint", str(two / "checkpoint-1"))
    launch(2, resumed, *options, *checkpoint, engine=engine)
    assert metrics(one, "kl")[0] == metrics(two, "kl")[0] == 0.0
    assert metrics(one, "kl")[1] > 0.0
    for output in (two, resumed):
        for name in ("reward", "kl", "grad_norm"):
            ours, theirs = metrics(output, name), metrics(one, name)
            assert ours == pytest.approx(theirs[-len(ours) :], rel=1e-3, abs=1e-5), name


def test_every_process_samples_from_a_copy_of_each_updates_weights(tmp_path, launch):
    one, two = tmp_path / "one", tmp_path / "two"
    prompts = ("--per_device_train_batch_size", str(PROMPTS))
    train([*OPTIONS, *prompts, "--rollout_dtype", "bfloat16", "--output_dir", str(one)])
    launch(2, two, "--rollout_dtype", "bfloat16")
    assert_same_run(two, one)


@sharded
def test_a_server_is_handed_whole_weights(tmp_path, fake, small_tokenizer, launch, engine):
    one, two = tmp_path / "one", tmp_path / "two"
    fake.tokenizer = small_tokenizer
    seeds = [seed_of(42, step, place) for step in range(2) for place in range(PROMPTS)]
    sample_for_real(fake, [*seeds, seed_of(42, 0)], "The answer is")
    served = (
        *("--rollout_engine", "vllm", "--vllm_url", fake.url, "--max_completion_length", "16"),
        *("--max_steps", "2", "--num_eval_examples", "1", "--save_strategy", "no"),
    )
    prompts = ("--per_device_train_batch_size", str(PROMPTS))
    train([*OPTIONS, *prompts, *served, "--output_dir", str(one)])
    launch(2, two, *served, engine=engine)
    assert_same_run(two, one)
