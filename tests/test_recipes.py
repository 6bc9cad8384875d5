"""Every recipe is read by its own program, and started on two processes where that is possible."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin

from latro.config.command_line import parse_arguments
from latro.config.data import DataArguments
from latro.config.model import ModelArguments, PeftArguments
from latro.config.training import SMALL_MODEL, LatroConfig
from latro.train import train
from scripts.make_tiny_model import make_model, make_tokenizer
from tests.latro.engines_on_cpu import MODULES, engines
from tests.warm_process import WarmProcess, free_port, no_picture

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
RUNS = sorted(RECIPES.glob("*.yaml"))
ARCHITECTURES = {"llama": "llama", "mistral": "mistral", "phi-3.5": "phi3"}
"""The architecture of a model, by a part of its name."""
ENGINES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
LAUNCHER = "accelerate.commands.launch"
SAVE = ("sh", "-c", 'env -0 > "$0/environment-$RANK"')
"""A command that saves its environment in the folder that is its argument."""
SMALL = (
    *("--model_name_or_path", str(SMALL_MODEL), "--dataset_name", "arithmetic"),
    *("--num_train_examples", "16", "--num_eval_examples", "2", "--max_completion_length", "8"),
    *("--num_generations", "4", "--max_steps", "2", "--disable_tqdm", "true", "--bf16", "false"),
    *("--save_strategy", "no"),
)


def run(command: list[str]) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run_as_launched(
    warm: WarmProcess, module: str, arguments: list[str], folder: Path, **own: str
) -> str:
    """Run a module in forks with the variables saved in `folder`, or `own` ones instead.

    Return what they print.
    """
    started = []
    for path in sorted(folder.glob("environment-*")):
        saved = dict(line.split("=", 1) for line in path.read_text().split("\0") if line)
        printed = folder / f"printed-{saved['RANK']}"
        started.append(warm.start(module, arguments, printed, cwd=ROOT, environment=saved | own))
    assert len(started) == 2
    finished = [process.wait(240) for process in started]
    for process in finished:
        assert process.code == 0, process.stderr[-4000:]
    return "".join(process.stdout for process in finished)


def assert_two_updates(output: Path, stdout: str) -> None:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    assert [entry["step"] for entry in lines if "reward" in entry] == [1, 2]
    assert (output / "model.safetensors").is_file()
    # Two processes that did not form one run would both print.
    assert stdout.count("held-out problems") == 1


def test_there_is_one_config_of_each_engine():
    assert {path.stem for path in RECIPES.glob("accelerate/*")} == set(ENGINES)
    assert RUNS


@pytest.mark.parametrize("name", ENGINES)
def test_accelerate_reads_its_config(name):
    path = RECIPES / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == ENGINES[name]
    assert (config.num_machines, config.num_processes) == (1, 8)
    # The launcher ignores unknown names of the engine's settings.
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= known
    # The first lines explain how to use several nodes.
    assert "--num_machines M" in path.read_text(encoding="utf-8")


def test_fsdp_loads_the_model_in_every_process():
    settings = yaml.safe_load((RECIPES / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    assert settings["fsdp_version"] == 2
    # With that setting all processes but the first would have uninitialised weights.
    assert settings["fsdp_cpu_ram_efficient_loading"] is False


def test_zero3_saves_weights_and_clips_gradients():
    settings = yaml.safe_load((RECIPES / "accelerate" / "zero3.yaml").read_text())
    settings = settings["deepspeed_config"]
    # This setting belongs to the launcher, not to the plugin.
    assert settings.pop("deepspeed_multinode_launcher") == "standard"
    made = DeepSpeedPlugin(**settings).deepspeed_config
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    # The Trainer replaces it by --max_grad_norm.
    assert made["gradient_clipping"] == "auto"


@engines
def test_a_recipe_starts_under_each_engine(tmp_path, warm, engine):
    launch = (
        *("--config_file", str(RECIPES / "accelerate" / f"{engine}.yaml")),
        # Without bf16, which a CPU may not support.
        *("--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"),
    )
    arguments = ["--config", str(RUNS[0]), *SMALL, "--output_dir", str(tmp_path / "run")]
    arguments += ["--use_cpu", "true"]
    if engine == "fsdp2":
        # Started as forks: `ddp` starts processes as users do.
        launched = warm.start(LAUNCHER, [*launch, "--no_python", *SAVE, tmp_path], tmp_path / "out")
        assert launched.wait(120).code == 0
        # The launcher has ended, and its store with it: the first process makes one.
        own = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port())}
        stdout = run_as_launched(warm, MODULES[engine], arguments, tmp_path, **own)
    else:
        stdout = run([sys.executable, "-m", LAUNCHER, *launch, "-m", MODULES[engine], *arguments])
    assert_two_updates(tmp_path / "run", stdout)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_latro_reads_a_run(path):
    classes = (ModelArguments, PeftArguments, DataArguments, LatroConfig)
    # Without a GPU the Trainer refuses bf16 unless use_cpu is set.
    argv = ["--config", str(path), "--use_cpu", "true"]
    parts = parse_arguments(classes, argv, prog="test")
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in given.items():
        parsed = next(getattr(a, name) for a in parts if hasattr(a, name))
        assert parsed == value, name


PUBLISHED = {
    f"{data}-{model}": (path, task, beta, epochs)
    for data, task, beta, epochs in (
        ("gsm8k", "gsm8k", 0.05, 6),
        ("arc", "arc_challenge", 0.25, 12),
    )
    for model, path in (
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("phi-3.5-mini", "microsoft/Phi-3.5-mini-instruct"),
    )
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    """The recipes of arXiv 2411.04282 cover three models on two tasks."""
    given = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    of_the_run = ("model_name_or_path", "dataset_name", "beta", "num_train_epochs")
    assert tuple(given[setting] for setting in of_the_run) == PUBLISHED[name]
    assert (given["num_generations"], given["per_device_train_batch_size"]) == (16, 3)
    assert (given["temperature"], given["learning_rate"]) == (1.0, 5e-7)
    assert (given["lr_scheduler_type"], given["warmup_steps"]) == ("linear", 0)
    assert given["max_completion_length"] == 500
    assert given["bf16"] is True
    assert given["output_dir"] == f"runs/{name}"


@pytest.fixture
def raw_files(tmp_path):
    """Write a folder of raw files for each task, as its authors publish them."""
    problems = [
        {
            "question": f"Tom has {n} pens and gets 2. How many?",
            "answer": f"{n}+2={n + 2}\n#### {n + 2}",
        }
        for n in range(60)
    ]
    choices = [{"label": label, "text": f"{n} pens"} for n, label in enumerate("ABCD")]
    # No problem is in training and held out at the same time.
    questions = {
        split: [
            {
                "question": {"stem": f"Case {n} of {split}: which?", "choices": choices},
                "answerKey": "ABCD"[n % 4],
            }
            for n in range(8)
        ]
        for split in ("train", "dev", "test")
    }
    files = {"gsm8k": {"train": problems, "test": problems[:8]}, "arc_challenge": questions}
    for task, splits in files.items():
        (tmp_path / task).mkdir()
        for split, records in splits.items():
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (tmp_path / task / f"{split}.jsonl").write_text(lines)
    return tmp_path


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_makes_two_updates(path, raw_files, monkeypatch):
    """Use a tiny model of the recipe's architecture, and data in the task's own format."""
    monkeypatch.setattr("latro.reporting.callbacks.draw_progress", no_picture)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    hub_id, task = given["model_name_or_path"].lower(), given["dataset_name"]
    architecture = next(
        name for part, name in ARCHITECTURES.items() if part in hub_id.partition("/")[2]
    )
    data = raw_files / task
    tokenizer = make_tokenizer((data / "train.jsonl").read_text().splitlines(), vocab_size=384)
    tiny = raw_files / "model"
    # A width that blocks of 64 weights divide, for recipes with weights in 4 bits.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    make_model(architecture, tokenizer, **sizes).save_pretrained(tiny)
    tokenizer.save_pretrained(tiny)
    output = raw_files / "run"
    # Two CPU cores lack the memory and the time for 500 tokens, and may lack bf16.
    given_here = ("--max_steps", "2", "--max_completion_length", "8", "--num_eval_examples", "2")
    given_here += ("--gradient_accumulation_steps", "1", "--dtype", "float32")
    results = train(
        [
            *("--config", str(path), "--model_name_or_path", str(tiny)),
            *("--dataset_path", str(data), "--output_dir", str(output)),
            *("--bf16", "false", "--use_cpu", "true", "--disable_tqdm", "true", *given_here),
        ]
    )
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    updates = [entry for entry in lines if "reward" in entry]
    assert [entry["step"] for entry in updates] == [1, 2]
    # The schedule is linear from the start, without warm-up.
    rate = given["learning_rate"]
    assert [entry["learning_rate"] for entry in updates] == [rate, rate / 2]
    assert updates[0]["kl"] == 0
    assert set(results) == {"base", "final"}


SLURM = {
    "scontrol": """\
#!/usr/bin/env bash
echo "$@" >> "$CALLS"
if [ "$1" = show ]; then echo localhost; echo other; fi
""",
    # Slurm starts the same command for both tasks of a node, with different variables.
    "srun": """\
#!/usr/bin/env bash
shift
status=0
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" & pids[$rank]=$!
done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
""",
    # Replaces Python where only the exit status matters.
    "python": """\
#!/usr/bin/env bash
echo "$RANK/$WORLD_SIZE $@" >> "$CALLS"
exit 143
""",
}


SAVED_START = """\
#!/usr/bin/env bash
folder=$(dirname "$CALLS")
env -0 > "$folder/environment-$RANK"
printf '%s\\n' "${@:2}" > "$folder/arguments"
"""
"""Replaces Python where the start is saved, for forks to run it."""


@pytest.fixture
def slurm(tmp_path):
    """Return `slurm(*arguments, python=...)`, which runs the batch script with fake programs."""
    if shutil.which("bash") is None:
        pytest.skip("no bash")

    def submit(*arguments: str, python: str = SLURM["python"]) -> subprocess.CompletedProcess[str]:
        programs = tmp_path / "bin"
        programs.mkdir()
        for name, program in {**SLURM, "python": python}.items():
            (programs / name).write_text(program)
            (programs / name).chmod(0o755)
        path = os.pathsep.join(
            [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        environment = {"PATH": path, "CALLS": str(tmp_path / "calls"), "OMP_NUM_THREADS": "1"}
        environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]"}
        return subprocess.run(
            ["bash", str(RECIPES / "slurm" / "multi_node.sbatch"), *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    return submit


def test_the_slurm_script_starts_a_run(slurm, tmp_path, warm):
    output = tmp_path / "run"
    options = (str(RUNS[-1]), str(output), *SMALL, "--use_cpu", "true")
    done = slurm(*options, python=SAVED_START)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "calls").read_text() == "show hostnames node[1-2]\n"
    module, *arguments = (tmp_path / "arguments").read_text().splitlines()
    assert_two_updates(output, run_as_launched(warm, module, arguments, tmp_path))
    assert (tmp_path / "calls").read_text() == "show hostnames node[1-2]\n"


def test_the_slurm_script_goes_on_after_a_signal(slurm, tmp_path):
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    done = slurm("run.yaml", str(tmp_path / "run"), "--seed", "1")
    assert done.returncode == 143
    *ranks, last = (tmp_path / "calls").read_text().splitlines()[1:]
    assert last == f"requeue {os.getpid()}"
    command = (
        f"-m latro.train --config run.yaml --output_dir {tmp_path / 'run'} "
        "--resume_from_checkpoint auto --fsdp --seed 1"
    )
    assert sorted(ranks) == [f"0/2 {command}", f"1/2 {command}"]


def test_the_slurm_script_says_what_it_wants(slurm):
    done = slurm("run.yaml")
    assert done.returncode != 0
    assert "RUN.yaml OUTPUT_DIR" in done.stderr
