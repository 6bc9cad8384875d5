"""Rollouts from a vLLM server: paged attention and continuous batching do the sampling.

The server runs beside the trainer, on GPUs of its own or on the same machine:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

`processed_logprobs` makes it report log-probs under softmax(logits / temperature), the distribution
that it samples from; the dev mode opens the routes that load weights. Keep the server on a private
network, since whoever reaches those routes can change the model. On a CPU it needs
--no-enable-chunked-prefill too, because vLLM 0.32 crashes there at a seeded prompt that it reads in
pieces; and a model with tied embeddings cannot be updated there, because vLLM keeps a packed copy
of the old head.

After each update the policy is written as safetensors into a folder that the server can read. The
server loads the weights in place and drops its cached prefixes, whose keys and values are the old
policy's. On one machine a folder in memory (/dev/shm) avoids the disk. Every set of weights gets a
version name of its own, which the server must report before it samples: a server that was
restarted, or that another run has taken over, is an error and never a stale rollout.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.engines.vllm_client import ATTEMPTS, LARGEST_ANSWER, SERVE, Answer, Client, Hangup
from latro.engines.vllm_sampling import sampling
from latro.engines.vllm_weights import WeightFiles
from latro.model.adapters import check_ties
from latro.rollout.sequences import Progress, Sample

_PROBE = "The answer is 42."
_CHECK_SECONDS = 60.0
_MAX_CONNECTIONS = 256
_BYTES_PER_TOKEN = 1024  # at most, in a reply: id and log-prob take 30, the token's text some more
# How far rounding may raise the log-prob of a sure token above 0, in a server's coarsest dtype.
_LOGP_ROUNDING = torch.finfo(torch.bfloat16).eps
_SHOWN_CHARACTERS = 200

HandOver = Callable[[PreTrainedModel, int, Mapping[str, Tensor] | None, Callable[..., Any]], None]
"""What takes weights to a server: the arguments of `RolloutEngine.update_weights`, and what sends a
request. It does not hold the engine, which holds it."""


class VllmEngine:
    """A `RolloutEngine` that samples from `vllm serve`.

    Seeds decide the samples up to the server's arithmetic: it batches requests as they arrive, and
    rounding depends on the batch.

    Args:
        url: the server's address, "http://127.0.0.1:8000".
        tokenizer: the policy's tokenizer; the server must have the same.
        eos_token_ids: all tokens that end a completion.
        weights_dir: the folder through which weights reach the server (`WeightFiles`); None: they
            go over NCCL (`latro.engines.vllm_nccl`).
        vocab_size: number of token ids that the policy knows; None: the tokenizer's.
        timeout: seconds that one request may take, including its wait in the server's queue.

    Raises:
        ValueError: there is no server at `url`, or it cannot serve this policy's rollouts; or
            `weights_dir` is not a folder.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token_ids: Sequence[int],
        weights_dir: str | Path | None,
        vocab_size: int | None = None,
        timeout: float = 1800.0,
    ) -> None:
        self.eos_token_ids = list(eos_token_ids)
        self.weights_dir = None if weights_dir is None else Path(weights_dir).absolute()
        if self.weights_dir and self.weights_dir.exists() and not self.weights_dir.is_dir():
            raise ValueError(f"vllm_weights_dir: expected a folder, got {self.weights_dir}")
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        self.timeout = timeout
        self._client = Client(url)
        self.url = self._client.url
        self._run = uuid.uuid4().hex[:8]
        self._version: str | None = None
        try:
            served = self._request("/v1/models", timeout=_CHECK_SECONDS).at("data", 0)
            self._model = served.at("id").of(str)
            self._max_length = served.at("max_model_len").of(int)
            self._on_cpu = self._check_settings()
            self._check_tokenizer(tokenizer)
        except ConnectionError as error:
            raise ValueError(f"vllm_url: {error}; start the server with `{SERVE}`") from error
        self._hand_over = self._way_of_weights()

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
        hangup: Hangup | None = None,
    ) -> list[list[Sample]]:
        """Sample `num_samples` completions of each prompt from the model's whole distribution.

        All prompts are sent at once, so the server batches them. `Sample.logp` is the server's
        log-prob of each token under softmax(logits / temperature), and None at temperature 0.
        `progress` is told of a prompt's samples when all of them have ended. `hangup` cancels the
        requests from another thread.

        Raises:
            ValueError: a prompt is too long for the server, or the server has other weights than
                this engine loaded last.
            ConnectionError: the server is gone, failed, took longer than `timeout` or did not
                return the samples that were asked for; the other requests are then cancelled.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds: expected {len(prompts)}, one per prompt, got {len(seeds)}")
        self.check_length(max(map(len, prompts), default=0) + max_new_tokens)
        hangup = hangup or Hangup()
        self._check_version(hangup)

        def sample(prompt: Sequence[int], seed: int) -> list[Sample]:
            answer = self._request(
                "/v1/completions",
                {
                    "model": self._model,
                    "prompt": list(prompt),
                    "return_token_ids": True,
                }
                | sampling(
                    num_samples=num_samples,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed,
                    template=template,
                    eos_token_ids=self.eos_token_ids,
                ),
                # Each choice in the reply repeats its prompt's ids.
                largest=LARGEST_ANSWER
                + _BYTES_PER_TOKEN * num_samples * (len(prompt) + max_new_tokens),
                hangup=hangup,
            )
            samples = self._samples(answer, num_samples, max_new_tokens)
            return samples if temperature > 0 else [Sample(s.ids) for s in samples]

        with ThreadPoolExecutor(min(len(prompts), _MAX_CONNECTIONS) or 1) as pool:
            pairs = zip(prompts, seeds, strict=True)
            futures = [pool.submit(sample, prompt, seed) for prompt, seed in pairs]
            rows_alive = len(prompts) * num_samples
            try:
                for future in as_completed(futures):
                    ended = future.result()
                    rows_alive -= len(ended)
                    if progress is not None:
                        progress(sum(len(s.ids) for s in ended), rows_alive)
            finally:
                # After a failure nothing is left to wait for. The queue is emptied before the
                # requests are cancelled, since their threads would take from it.
                pool.shutdown(wait=False, cancel_futures=True)
                hangup()
        return [future.result() for future in futures]

    def check_length(self, longest: int) -> None:
        """Raise ValueError where the server takes less than `longest` tokens per sequence."""
        if longest > self._max_length:
            raise ValueError(
                f"vllm_url: {self.url} takes {self._max_length} tokens per sequence and the "
                f"longest prompt with its completion has {longest}; serve with "
                f"--max-model-len {longest}"
            )

    def update_weights(
        self, model: PreTrainedModel, step: int, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Make the server sample from `model` as it is now; only one process of several calls it.

        PEFT's adapters are merged into a copy of the model, on the model's device.

        Raises:
            ConnectionError: the server could not load the weights, and must be restarted.
            ValueError: the model's embeddings are tied and the server runs on a CPU; or the config
                ties them while head and embedding differ.
        """
        if weights is None:
            check_ties(model)
        if self._on_cpu and model.config.get_text_config().tie_word_embeddings:
            raise ValueError(
                f"vllm_url: {self.url} runs on a CPU, where vLLM keeps the old head of a model "
                "whose embeddings are tied; serve on a GPU, or take rollout_engine=transformers"
            )
        version = f"{self._run}-{step}"
        if self.weights_dir is None:
            self._request("/pause?mode=wait", {})
        self._hand_over(model, step, weights, self._request)
        if self._request("/reset_prefix_cache", {}).at("success").value is not True:
            raise ConnectionError(
                f"{self.url} kept its prefix cache, which is of the old weights: requests that are "
                "not this run's hold it"
            )
        self._request("/update_weight_version", {"new_version": version})
        if self.weights_dir is None:
            self._request("/resume", {})
        self._version = version

    def _way_of_weights(self) -> HandOver:
        if self.weights_dir is not None:
            return WeightFiles(self.weights_dir)
        # Needs the package vllm.
        from latro.engines.vllm_nccl import WeightBroadcast

        return WeightBroadcast(self._client.own_address(_CHECK_SECONDS))

    def _check_settings(self) -> bool:
        """Check the server's settings, and return whether it runs on a CPU."""
        info = self._request("/server_info?config_format=json", timeout=_CHECK_SECONDS)
        config = info.at("vllm_config")
        mode = config.at("model_config", "logprobs_mode").of(str)
        if mode != "processed_logprobs":
            raise ValueError(
                f"vllm_url: {self.url} reports {mode}, which leave the temperature out; serve with "
                "--logprobs-mode processed_logprobs"
            )
        if self.weights_dir is None:
            transfer = config.at("weight_transfer_config").value
            if not isinstance(transfer, dict) or transfer.get("backend") != "nccl":
                raise ValueError(
                    f"vllm_sync: {self.url} takes no weights over NCCL; serve with "
                    """--weight-transfer-config '{"backend": "nccl"}'"""
                )
        on_cpu: bool = config.at("device_config", "device").value == "cpu"
        if on_cpu and self.weights_dir is None:
            raise ValueError(
                f"vllm_sync: expected files with a server on a CPU, got nccl with {self.url}"
            )
        if on_cpu and config.at("scheduler_config", "enable_chunked_prefill").of(bool):
            raise ValueError(
                f"vllm_url: {self.url} runs on a CPU, where vLLM ends at a seeded prompt that it "
                "reads in pieces; serve with --no-enable-chunked-prefill"
            )
        return on_cpu

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        ids = tokenizer.encode(_PROBE, add_special_tokens=False)
        probe = {"prompt": _PROBE, "add_special_tokens": False}
        answer = self._request("/tokenize", probe, timeout=_CHECK_SECONDS)
        theirs = answer.at("tokens").of(list)
        if theirs != ids:
            raise ValueError(
                f"vllm_url: {self.url} serves {self._model}, whose tokenizer is not the policy's: "
                f"{_PROBE!r} is {str(theirs)[:_SHOWN_CHARACTERS]} there and {ids} here"
            )

    def _check_version(self, hangup: Hangup) -> None:
        # A process that loaded no weights does not know their version.
        if self._version is None:
            return
        version = self._request("/weight_info", hangup=hangup).at("weight_version").of(str)
        if version != self._version:
            raise ValueError(
                f"vllm_url: {self.url} has the weights {version!r} and not {self._version!r}: it "
                "was restarted, or another run uses it"
            )

    def _samples(self, answer: Answer, num_samples: int, max_new_tokens: int) -> list[Sample]:
        choices = answer.at("choices").parts()
        by_index = {choice.at("index").of(int): choice for choice in choices}
        if len(choices) != num_samples or sorted(by_index) != list(range(num_samples)):
            raise ConnectionError(
                f"{answer.source}: gave {len(choices)} of {num_samples} completions, or two of one "
                "index"
            )
        for choice in choices:
            reason = choice.at("finish_reason").of(str)
            if reason not in ("stop", "length"):
                raise ConnectionError(
                    f"{answer.source}: {choice.place} of {num_samples} completions was ended by "
                    f"{reason[:_SHOWN_CHARACTERS]!r}, expected stop or length"
                )
        return [self._sample(by_index[index], max_new_tokens) for index in range(num_samples)]

    def _sample(self, choice: Answer, max_new_tokens: int) -> Sample:
        token_ids, token_logps = choice.at("token_ids"), choice.at("logprobs", "token_logprobs")
        ids, logps = token_ids.of(list), token_logps.of(list)
        if not 1 <= len(ids) <= max_new_tokens or len(logps) != len(ids):
            raise ConnectionError(
                f"{choice.source}: expected 1 to {max_new_tokens} tokens, a log-prob each, at "
                f"{choice.place}, got {len(ids)} and {len(logps)} log-probs"
            )
        # An update may have millions of tokens, so that one by one only a bad one is looked for.
        if not all(type(token) is int and 0 <= token < self.vocab_size for token in ids):
            for token in token_ids.parts():
                self._check_token(token)
        if not all(type(logp) in (int, float) and _is_logp(logp) for logp in logps):
            for logp in token_logps.parts():
                _check_logp(logp)
        return Sample(list(ids), list(map(float, logps)))

    def _check_token(self, token: Answer) -> None:
        if not 0 <= token.of(int) < self.vocab_size:
            raise ConnectionError(
                f"{token.source}: expected a token id below {self.vocab_size} at "
                f"{token.place}, got {str(token.value)[:_SHOWN_CHARACTERS]}"
            )

    def _request(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
        largest: int = LARGEST_ANSWER,
        hangup: Hangup | None = None,
        attempts: int = ATTEMPTS,
    ) -> Answer:
        return self._client.request(
            path,
            body,
            timeout=timeout or self.timeout,
            largest=largest,
            hangup=hangup,
            attempts=attempts,
        )


def _is_logp(value: float) -> bool:
    """Return whether a number is finite and at most 0 up to rounding."""
    # The comparison is false for NaN, and an int may be larger than any float.
    return -sys.float_info.max <= value <= _LOGP_ROUNDING


def _check_logp(logp: Answer) -> None:
    """Raise ConnectionError for what is no log-prob; JSON may write one as an int."""
    value = logp.value if type(logp.value) is int else logp.of(float)
    if not _is_logp(value):
        raise ConnectionError(
            f"{logp.source}: expected a finite log-prob of at most 0 at {logp.place}, got "
            f"{str(value)[:_SHOWN_CHARACTERS]}"
        )
