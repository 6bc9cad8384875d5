"""The settings of the engine that samples."""

from __future__ import annotations

from dataclasses import dataclass

from latro.config.fields import WEIGHT_DTYPES, setting


@dataclass
class EngineArguments:
    """The engine that samples, in training and in evaluation."""

    rollout_engine: str = setting(
        "transformers",
        "The engine that samples: transformers in this process, or a vLLM server at --vllm_url.",
        choices=["transformers", "vllm"],
    )
    rollout_dtype: str | None = setting(
        None,
        "For transformers: dtype of a copy of the weights to sample from, refreshed after each "
        "update; auto: bfloat16 where they are float32 and the processor or GPU multiplies "
        "bfloat16, else no copy. Without it the policy itself samples.",
        choices=["auto", *WEIGHT_DTYPES],
    )
    vllm_url: str = setting(
        "http://127.0.0.1:8000", "The address of `vllm serve`; see latro.engines.vllm."
    )
    vllm_weights_dir: str | None = setting(
        None,
        "The folder that the server reads weights from; one in /dev/shm saves the disk. Without "
        "it: vllm_weights in the output's folder.",
    )
