"""Who samples in `rollout.py`: our engine, transformers' `generate`, vLLM in another Python."""

from __future__ import annotations

import json
import os
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.rollouts.workloads import Workload
from latro.engines.cast import cast_copy
from latro.engines.transformers import TransformersEngine

_CHILD = Path(__file__).with_name("vllm_offline.py")


class Contender(ABC):
    """One way to sample a workload.

    Attributes:
        tokens: how many the last lap sampled.
    """

    tokens: int

    @abstractmethod
    def __call__(self) -> None:
        """Sample the workload's completions, the same in every lap."""


class Ours(Contender):
    """`TransformersEngine` on the model, or on its copy in another dtype, compiled or not."""

    def __init__(self, workload: Workload, dtype: torch.dtype, *, compiles: bool = False) -> None:
        self.workload = workload
        self.model = _in_dtype(workload.model, dtype)
        self.engine = TransformersEngine(self.model, workload.tokenizer, compiles=compiles)

    def __call__(self) -> None:
        prompts, setting = self.workload.prompts, self.workload.setting
        with self.workload.ending(self.model):
            samples = self.engine.generate(
                prompts,
                num_samples=setting.K,
                max_new_tokens=setting.rationale[1],
                temperature=1.0,
                seeds=range(len(prompts)),
            )
        self.tokens = sum(len(sample.ids) for group in samples for sample in group)


class Transformers(Contender):
    """transformers' own `generate`, as one would call it for K samples of each prompt."""

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        self.workload = workload
        self.model = _in_dtype(workload.model, dtype)
        setting = workload.setting
        self.config = GenerationConfig(
            max_new_tokens=setting.rationale[1],
            num_return_sequences=setting.K,
            do_sample=True,
            temperature=1.0,
            # The whole distribution; its default is the 50 likeliest tokens.
            top_k=0,
            top_p=1.0,
            eos_token_id=workload.end,
            pad_token_id=0,
        )

    @torch.no_grad()
    def __call__(self) -> None:
        ids = torch.tensor(self.workload.prompts, device=self.model.device)
        torch.manual_seed(0)
        with self.workload.ending(self.model):
            output = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=self.config
            )
        sampled = output[:, ids.shape[1] :].tolist()
        end = self.workload.end
        self.tokens = sum(row.index(end) + 1 if end in row else len(row) for row in sampled)


class Vllm(Contender):
    """vLLM's offline `LLM.generate`, in a process of a Python that has it.

    Completions have given lengths, since its sampling cannot be bent to end by chance; each is a
    request, and those of one prompt share its keys and values by vLLM's cache of prefixes, which is
    emptied before every lap.

    Args:
        workload: what is sampled.
        dtype: of the weights.
        python: the interpreter.
        folder: for the weights that vLLM loads.

    Attributes:
        version: vLLM's.

    Raises:
        RuntimeError: it did not start; the end of its log says why.
    """

    def __init__(self, workload: Workload, dtype: torch.dtype, python: str, folder: Path) -> None:
        _in_dtype(workload.model, dtype).save_pretrained(folder)
        job = {
            "model": str(folder),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "device": workload.model.device.type,
            "prompts": workload.prompts,
            "lengths": workload.lengths,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        self._log = folder / "log.txt"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [python, str(_CHILD), str(folder / "job.json")],
                # Not ours, which has other versions of the same packages.
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.version: str = self._answer()["version"]

    def __call__(self) -> None:
        assert self._process.stdin is not None, "it was made with a pipe"
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        self.tokens = self._answer()["tokens"]

    def close(self) -> None:
        """End the process."""
        # Its end of input, at which it leaves.
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it was made with a pipe"
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(f"vLLM ended: {self._log.read_text(errors='replace')[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    return model if model.dtype == dtype else cast_copy(model, dtype)
