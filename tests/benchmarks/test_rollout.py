from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rollout
from benchmarks.rollouts.contenders import Ours, Transformers, Vllm
from benchmarks.rollouts.workloads import WORKLOADS, Workload, make_workload
from benchmarks.updates.problem import QUICK

FAKE_VLLM = """
from types import SimpleNamespace as Part

__version__ = "0.0"
print("vLLM prints what it likes")


class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize):
        assert (temperature, ignore_eos, detokenize) == (1.0, True, False)
        self.max_tokens = max_tokens


class LLM:
    def __init__(self, model, dtype, skip_tokenizer_init, max_model_len, **options):
        assert dtype == "bfloat16", dtype
        self.most, self.resets = max_model_len, 0

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, prompts, params, use_tqdm):
        assert self.resets, "the cache of prefixes is full"
        self.resets = 0
        pairs = zip(prompts, params)
        longest = max(len(p["prompt_token_ids"]) + s.max_tokens for p, s in pairs)
        assert longest == self.most
        return [Part(outputs=[Part(token_ids=[0] * s.max_tokens)]) for s in params]
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """Return a Python that has a package called vllm."""
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_VLLM)
    (package / "inputs.py").write_text("TokensPrompt = dict\n")
    command = tmp_path / "python"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    command.chmod(0o755)
    return str(command)


@pytest.fixture
def tiny() -> dict[str, Workload]:
    return {name: make_workload(name, torch.device("cpu"), quick=True) for name in WORKLOADS}


def test_rows_have_rates_and_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Making code of the graphs takes most of the time, and is not what is tested.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    options = ["--quick", "--compiled", "--device", "cpu", "--reps", "2"]
    rollout.main([*options, "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"rollout_{name}.{kind}" for name in WORKLOADS for kind in ("json", "png")
    ]
    for name in WORKLOADS:
        one: dict[str, Any] = json.loads((tmp_path / f"rollout_{name}.json").read_text())
        assert one["workload"] == name
        assert one["cannot_run"] == ["vllm: no --vllm_python"]
        rows = {(row["contender"], row["dtype"]): row for row in one["rows"]}
        contenders = ("latro", "latro, compiled", "transformers")
        assert list(rows) == [(name, dtype) for dtype in rollout.DTYPES for name in contenders]
        for (_, dtype), row in rows.items():
            theirs = rows["transformers", dtype]["tokens_per_second"]
            assert row["tokens_per_second"] == row["tokens"] / row["times"]["median"]
            assert row["ratio"] == pytest.approx(row["tokens_per_second"] / theirs)
            assert row["times"]["reps"] == 2


@pytest.mark.parametrize("kind", [Ours, Transformers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_lap_samples_the_same(tiny: dict[str, Workload], kind: Any, dtype: Any) -> None:
    setting = tiny["smollm2"].setting
    assert setting.lengths == [QUICK.rationale[1]] * setting.K
    for name, workload in tiny.items():
        contender = kind(workload, dtype)
        counts = []
        for _ in range(2):
            contender()
            counts.append(contender.tokens)
        assert counts[0] == counts[1]
        rows, (low, high) = workload.setting.G * workload.setting.K, workload.setting.rationale
        assert rows * low <= counts[0] <= rows * high
        if name == "step":
            # Lengths are drawn: not all are the longest.
            assert counts[0] < rows * high


def test_vllm_in_another_python_samples_given_lengths(
    tiny: dict[str, Workload], python: str, tmp_path: Path
) -> None:
    workload = tiny["step"]
    vllm = Vllm(workload, torch.bfloat16, python=python, folder=tmp_path / "model")
    try:
        assert vllm.version == "0.0"
        for _ in range(2):
            vllm()
            assert vllm.tokens == workload.setting.G * sum(workload.lengths)
    finally:
        vllm.close()


def test_a_python_without_vllm_says_why(tiny: dict[str, Workload], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"vLLM ended: (?s:.*)No module named 'vllm'"):
        Vllm(tiny["step"], torch.float32, python=sys.executable, folder=tmp_path / "model")
