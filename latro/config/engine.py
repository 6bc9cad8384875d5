"""The settings of the engine that samples."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, fields

import torch

from latro.config.fields import WEIGHT_DTYPES, setting
from latro.config.ranges import above_zero, at_least

_OF_A_SERVER = ("vllm_url", "vllm_weights_dir", "vllm_sync")
_LEAST_OF_VLLM, _MOST_OF_VLLM = 0.01, 2  # temperatures above 0
_OF_COLOCATED = ("vllm_gpu_memory_utilization", "vllm_max_model_length")


@dataclass
class EngineArguments:
    """The engine that samples, in training and in evaluation."""

    rollout_engine: str = setting(
        "transformers",
        "The engine that samples: transformers in this process, or vLLM.",
        choices=["transformers", "vllm"],
    )
    rollout_dtype: str | None = setting(
        None,
        "For transformers, and vLLM in this process: dtype of a copy of the weights to sample "
        "from, refreshed after each update; auto: bfloat16 where they are float32 and the "
        "processor or GPU multiplies bfloat16, else their own. Without it: their own, and for "
        "transformers no copy.",
        choices=["auto", *WEIGHT_DTYPES],
    )
    rollout_compile: bool = setting(
        False,
        "For transformers: compile the decoding step by torch.compile. That takes a minute in the "
        "first rollout, and a C++ compiler on a CPU; each step is faster by what Python and small "
        "operations take.",
    )
    vllm_mode: str = setting(
        "server",
        "vLLM as a server at --vllm_url, or colocated: in this process and on its device, asleep "
        "between rollouts.",
        choices=["server", "colocate"],
    )
    vllm_url: str = setting(
        "http://127.0.0.1:8000", "The address of `vllm serve`; see latro.engines.vllm."
    )
    vllm_weights_dir: str | None = setting(
        None,
        "The folder that the server reads weights from; one in /dev/shm saves the disk. Without "
        "it: vllm_weights in the output's folder.",
    )
    vllm_sync: str = setting(
        "files",
        "How weights reach the server: files, in --vllm_weights_dir, or nccl, from GPU to GPU.",
        choices=["files", "nccl"],
    )
    vllm_gpu_memory_utilization: float = setting(
        0.3, "For colocate: the share of the GPU's memory that vLLM takes while it samples."
    )
    vllm_max_model_length: int | None = setting(
        None,
        "For colocate: tokens of a prompt with its completion, at most; without it as many as the "
        "model's config says.",
    )

    def check_engine(self, temperature: float) -> None:
        """Raise ValueError for settings that are out of range, or do not go together.

        `temperature` is that of sampling.
        """
        above_zero("vllm_gpu_memory_utilization", self.vllm_gpu_memory_utilization)
        if self.vllm_gpu_memory_utilization > 1:
            raise ValueError(
                "vllm_gpu_memory_utilization: expected at most 1, got "
                f"{self.vllm_gpu_memory_utilization}"
            )
        if self.vllm_max_model_length is not None:
            at_least("vllm_max_model_length", self.vllm_max_model_length, 1)
        served = self.rollout_engine == "vllm"
        for field in fields(self):
            value = getattr(self, field.name)
            of_vllm = field.name in ("vllm_mode", *_OF_A_SERVER) and value != field.default
            if of_vllm and not served:
                raise ValueError(
                    f"{field.name}: expected rollout_engine='vllm' with {value}, got "
                    f"{self.rollout_engine!r}"
                )
        if served and not _LEAST_OF_VLLM <= temperature <= _MOST_OF_VLLM:
            raise ValueError(
                f"temperature: expected from {_LEAST_OF_VLLM} to {_MOST_OF_VLLM} with "
                "rollout_engine='vllm', which takes no higher one and samples at "
                f"{_LEAST_OF_VLLM} in place of a lower one; got {temperature}"
            )
        if self.rollout_compile and served:
            raise ValueError(
                "rollout_compile: expected rollout_engine='transformers' with true, since vLLM "
                f"compiles by itself; got {self.rollout_engine!r}"
            )
        self._check_mode()
        if self.vllm_sync == "nccl":
            self._check_nccl()

    def _check_mode(self) -> None:
        colocated = self.vllm_mode == "colocate"
        other = _OF_A_SERVER if colocated else _OF_COLOCATED
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in other and value != field.default:
                raise ValueError(
                    f"{field.name}: expected vllm_mode={'server' if colocated else 'colocate'!r} "
                    f"with it, got {self.vllm_mode!r} and {value!r}"
                )
        if colocated:
            _require_vllm("vllm_mode", "colocate")

    def _check_nccl(self) -> None:
        if self.vllm_weights_dir is not None:
            raise ValueError(
                "vllm_weights_dir: expected vllm_sync='files' with it, since nccl writes no files; "
                f"got {self.vllm_weights_dir!r}"
            )
        _require_vllm("vllm_sync", "nccl")
        if not torch.cuda.is_available():
            raise ValueError(
                "vllm_sync: expected files on a machine without a CUDA GPU, since NCCL sends from "
                "one GPU to another; got nccl"
            )


def _require_vllm(name: str, value: str) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"{name}: {value} needs the package vllm in the trainer's environment, where it is not "
            "installed"
        )
