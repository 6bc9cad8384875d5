"""What needs vLLM in the trainer's process: weights over NCCL, and vLLM colocated with the trainer.

These tests run what is in the environment of the Python that LATRO_VLLM_PYTHON names. There is no
GPU: NCCL's broadcast is replaced by one over TCP, and vLLM does not sleep.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tests.latro.real_vllm import ROOT, SETTINGS, serve
from tests.latro.test_vllm_server import SIZES

pytestmark = pytest.mark.long
NEEDED = ("vllm", "accelerate", "datasets", "matplotlib", "rich", "yaml")
# Without importing them, which takes vLLM ten seconds.
ALL_ARE_THERE = """
import sys
from importlib.util import find_spec
sys.exit(None in map(find_spec, sys.argv[1:]))
"""


@pytest.fixture
def python() -> str:
    found = os.environ.get("LATRO_VLLM_PYTHON")
    if not found:
        pytest.skip("needs vLLM: LATRO_VLLM_PYTHON names no Python that has it")
    if subprocess.run([found, "-c", ALL_ARE_THERE, *NEEDED], check=False).returncode:
        pytest.skip(f"needs what the trainer imports beside vLLM: {', '.join(NEEDED[1:])}")
    return found


@pytest.fixture
def model_dir(tiny: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny(**SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(python: str, *arguments: str) -> None:
    done = subprocess.run(
        [python, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | SETTINGS | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, done.stderr[-3000:]


def test_a_server_takes_weights_through_vllms_own_engines(
    python: str, model_dir: Path, tmp_path: Path
) -> None:
    result = tmp_path / "result.json"
    settings = (
        *("--weight-transfer-config", '{"backend": "nccl"}'),
        *("--worker-extension-cls", "tests.latro.nccl_over_tcp.Extension"),
    )
    with serve(python, model_dir, tmp_path / "log", *settings) as url:
        run(python, "tests.latro.send_by_nccl", url, str(model_dir), str(result))
    found = json.loads(result.read_text())
    assert len(found) == 3
    for of_weights in found:
        assert of_weights["error"] <= of_weights["allowed"]
        assert of_weights["error_of_before"] > 100 * of_weights["allowed"]
        assert not of_weights["paused"]


def test_a_run_with_vllm_in_its_process(python: str, model_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(
        python,
        "latro.train",
        *("--model_name_or_path", str(model_dir), "--output_dir", str(output)),
        *("--dataset_name", "arithmetic", "--num_train_examples", "8", "--max_steps", "3"),
        *("--num_generations", "4", "--max_completion_length", "20", "--num_eval_examples", "2"),
        *("--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--use_cpu", "true"),
        *("--disable_tqdm", "true", "--save_strategy", "no", "--rollout_engine", "vllm"),
        *("--vllm_mode", "colocate", "--vllm_gpu_memory_utilization", "0.05"),
        *("--vllm_max_model_length", "256", "--importance_cap", "2"),
    )
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    history = [line for line in lines if "importance_ratio" in line]
    assert len(history) == 3
    # Every update moves the weights, and its samples are of the weights that score them.
    assert history[-1]["reward"] > history[0]["reward"] + 1
    for line in history:
        for name in ("importance_ratio", "importance_ratio_max"):
            # fp32's rounding of log-probs of some nats, as between trainer and server.
            assert abs(math.log(line[name])) < 1e-4
