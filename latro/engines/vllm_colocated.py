"""Rollouts from vLLM inside the trainer's process, on its device.

Each process has a vLLM of its own for its own prompts. Between rollouts vLLM sleeps: its weights
lie in the host's memory, and its keys and values are gone, so that the update has the GPU. The
policy's weights are loaded in place after each update.

This is imported only for `--vllm_mode colocate`, since it needs the package vllm in the trainer's
environment. Untested beyond a CPU: the tests train with vLLM 0.32 in the process on a CPU, where
vLLM does not sleep. Sleeping, and several processes, have not run.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from vllm import LLM, RequestOutput, SamplingParams
from vllm.platforms import current_platform
from vllm.utils.network_utils import get_open_port

from latro.engines.vllm_sampling import sampling
from latro.engines.vllm_weights import named_weights
from latro.model.adapters import without_wrapper
from latro.rollout.sequences import Progress, Sample

if TYPE_CHECKING:
    from peft import PeftModel


class ColocatedVllm:
    """A `RolloutEngine` that samples with a `vllm.LLM` in this process.

    Args:
        model: the policy; vLLM is made for its architecture.
        tokenizer: the policy's tokenizer.
        eos_token_ids: all tokens that end a completion.
        dtype: of vLLM's weights.
        gpu_memory_utilization: share of the device's memory that vLLM takes.
        max_model_length: tokens of a sequence, at most; None: as many as the model's config says.

    Raises:
        ValueError: vLLM cannot serve this model.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token_ids: Sequence[int],
        dtype: torch.dtype,
        gpu_memory_utilization: float,
        max_model_length: int | None,
    ) -> None:
        self.eos_token_ids = list(eos_token_ids)
        on_cpu: bool = current_platform.is_cpu()
        if on_cpu and model.config.get_text_config().tie_word_embeddings:
            raise ValueError(
                "vllm_mode: expected server, or a GPU, where vLLM on a CPU keeps the old head of a "
                "model whose embeddings are tied; got colocate"
            )
        self._sleeps: bool = current_platform.is_sleep_mode_available()
        with tempfile.TemporaryDirectory() as folder, _launched():
            # No weights: those of the policy follow with the first update.
            base = without_wrapper(model)
            config = copy.deepcopy(base.config)
            config.architectures = [type(base).__name__]
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            self._llm = LLM(
                model=folder,
                load_format="dummy",
                generation_config="vllm",
                dtype=str(dtype).removeprefix("torch."),
                gpu_memory_utilization=gpu_memory_utilization,
                max_model_len=max_model_length,
                logprobs_mode="processed_logprobs",
                distributed_executor_backend="external_launcher",
                enable_sleep_mode=self._sleeps,
                # vLLM 0.32 crashes on a CPU at a seeded prompt that it reads in pieces; and to
                # compile there takes longer than to sample.
                enable_chunked_prefill=False if on_cpu else None,
                enforce_eager=on_cpu,
                disable_log_stats=True,
            )
        self.max_length: int = self._llm.model_config.max_model_len
        self._is_asleep = False
        self._sleep()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        template: str | None = None,
        progress: Progress | None = None,
    ) -> list[list[Sample]]:
        """Sample as `VllmEngine.generate` does; `progress` is told once, when all have ended.

        Raises:
            ValueError: a prompt is too long.
        """
        self.check_length(max(map(len, prompts), default=0) + max_new_tokens)
        params = [
            SamplingParams(
                **sampling(
                    num_samples=num_samples,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed,
                    template=template,
                    eos_token_ids=self.eos_token_ids,
                )
            )
            for seed in seeds
        ]
        self._wake()
        # vLLM has a dtype of its own, which the trainer's autocast would change.
        with torch.autocast(current_platform.device_type, enabled=False):
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False
            )
        self._sleep()
        samples = [_samples(output, scored=temperature > 0) for output in outputs]
        if progress is not None:
            progress(sum(len(sample.ids) for of_prompt in samples for sample in of_prompt), 0)
        return samples

    def check_length(self, longest: int) -> None:
        """Raise ValueError where vLLM takes less than `longest` tokens per sequence."""
        if longest > self.max_length:
            raise ValueError(
                f"vllm_max_model_length: expected at least {longest}, the tokens of the longest "
                f"prompt with its completion, got {self.max_length}"
            )

    def update_weights(
        self, model: PreTrainedModel, step: int, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Load the policy's weights in place; every process does so for its own vLLM."""
        self._wake()
        found = named_weights(model, weights)
        with torch.no_grad():
            tensors = iter([(name, tensor.detach()) for name, tensor in found.items()])
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        self._llm.reset_prefix_cache()
        self._sleep()

    def _wake(self) -> None:
        if self._is_asleep:
            # What torch keeps for later allocations is free for vLLM.
            torch.accelerator.empty_cache()
            self._llm.wake_up()
            self._is_asleep = False

    def _sleep(self) -> None:
        if self._sleeps and not self._is_asleep:
            self._llm.sleep(level=1)
            self._is_asleep = True


def _samples(output: RequestOutput, *, scored: bool) -> list[Sample]:
    completions = sorted(output.outputs, key=lambda completion: completion.index)
    return [
        Sample(
            list(completion.token_ids),
            [
                logps[token].logprob
                for token, logps in zip(completion.token_ids, completion.logprobs, strict=True)
            ]
            if scored
            else None,
        )
        for completion in completions
    ]


@contextmanager
def _launched() -> Iterator[None]:
    """Tell vLLM in a single process, within the block, what a launcher tells each of several."""
    if distributed.is_initialized():
        yield
        return
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_open_port())}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
