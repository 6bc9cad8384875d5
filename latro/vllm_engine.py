"""Rollouts from a vLLM server: paged attention and continuous batching do the sampling.

The server runs beside the trainer, on GPUs of its own or on the same machine:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

`processed_logprobs` makes it report log-probs under softmax(logits / temperature), the distribution
that it samples from; the dev mode opens the routes that load weights. Those are for a private
network: whoever reaches them can change the model. On a CPU it takes --no-enable-chunked-prefill
too, since vLLM 0.32 ends there at a seeded prompt that it reads in pieces; and a model whose
embeddings are tied cannot be updated there, since the packed head stays the old one.

After each update the policy is written as safetensors into a folder that the server reads too, and
the server loads it in place and forgets its cached prefixes, whose keys and values are the old
policy's. On one machine a folder in memory (/dev/shm) saves the disk. Every set of weights has a
version of its own, which the server must still name before it samples: a server that was restarted,
or that another run has taken, is an error and never a stale rollout.
"""

from __future__ import annotations

import copy
import http.client
import json
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latro.peft import has_adapter
from latro.rollout import Sample

SERVE = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"

# Each is named, since the server takes what is not from the model's own generation config.
_WHOLE_DISTRIBUTION = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_PROBE = "The answer is 42."
_CHECK_SECONDS = 60.0
_MAX_CONNECTIONS = 256
_ATTEMPTS = 3
_SHOWN_CHARACTERS = 1000


class VllmEngine:
    """A `RolloutEngine` that samples from `vllm serve`.

    Seeds decide the samples as far as the server's arithmetic does: its batches are made as
    requests arrive, and a sum's rounding depends on the batch.

    Args:
        url: of the server, "http://127.0.0.1:8000".
        tokenizer: the policy's; the server must have the same.
        eos_token_ids: every token that ends a completion.
        weights_dir: a folder that this process writes and the server reads, under the same path and
            as the same user; made where it is missing. One set of weights lies there while the
            server loads it, and none between updates.
        timeout: seconds that one request may take, its wait in the server's queue included.

    Raises:
        ValueError: no server at `url`, or one that does not serve this policy's rollouts.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token_ids: Sequence[int],
        weights_dir: str | Path,
        timeout: float = 1800.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"vllm_url: expected http://HOST:PORT, got {url!r}")
        self.url = url.rstrip("/")
        self.eos_token_ids = list(eos_token_ids)
        self.weights_dir = Path(weights_dir).absolute()
        self.timeout = timeout
        self._address = parts
        self._run = uuid.uuid4().hex[:8]
        self._version: str | None = None
        try:
            served = self._request("/v1/models", timeout=_CHECK_SECONDS)["data"][0]
            self._model, self._max_length = served["id"], served["max_model_len"]
            self._on_cpu = self._check_settings()
            self._check_tokenizer(tokenizer)
        except ConnectionError as error:
            raise ValueError(f"vllm_url: {error}; start the server with `{SERVE}`") from error

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        template: str | None = None,
    ) -> list[list[Sample]]:
        """Sample `num_samples` completions of each prompt from the model's whole distribution.

        All prompts are under way at once, so the server batches them. `Sample.logp` is the server's
        log-prob of each token under softmax(logits / temperature), and None at temperature 0.

        Raises:
            ValueError: a prompt too long for the server, or a server that has other weights than
                this engine gave it last.
            ConnectionError: the server went away, failed or took longer than `timeout`.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds: expected {len(prompts)}, one per prompt, got {len(seeds)}")
        longest = max(map(len, prompts), default=0) + max_new_tokens
        if longest > self._max_length:
            raise ValueError(
                f"vllm_url: {self.url} takes {self._max_length} tokens per sequence and the "
                f"longest prompt with its rationale has {longest}; serve with "
                f"--max-model-len {longest}"
            )
        self._check_version()

        def sample(prompt: Sequence[int], seed: int) -> list[Sample]:
            answer = self._request(
                "/v1/completions",
                {
                    "model": self._model,
                    "prompt": list(prompt),
                    "n": num_samples,
                    "max_tokens": max_new_tokens,
                    "temperature": temperature,
                    # Sample j gets seed + j there: neighbouring seeds would share their draws.
                    "seed": Random(seed).getrandbits(62),
                    "stop": [] if template is None else [template],
                    "stop_token_ids": self.eos_token_ids,
                    "skip_special_tokens": False,
                    "return_token_ids": True,
                    "logprobs": 0,
                }
                | _WHOLE_DISTRIBUTION,
            )
            samples = self._samples(answer, num_samples)
            return samples if temperature > 0 else [Sample(s.ids) for s in samples]

        with ThreadPoolExecutor(min(len(prompts), _MAX_CONNECTIONS) or 1) as pool:
            return list(pool.map(sample, prompts, seeds))

    def update_weights(
        self, model: PreTrainedModel, step: int, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Make the server sample from `model` as it is now; one process of several calls this.

        Adapters of PEFT are merged into a copy of the model, on the model's device.

        Raises:
            ConnectionError: the server could not load the weights, and must be started anew.
            ValueError: the embeddings are tied, and the server runs on a CPU.
        """
        if self._on_cpu and model.config.get_text_config().tie_word_embeddings:
            raise ValueError(
                f"vllm_url: {self.url} runs on a CPU, where vLLM keeps the old head of a model "
                "whose embeddings are tied; serve on a GPU, or take rollout_engine=transformers"
            )
        version = f"{self._run}-{step}"
        self.weights_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"step-{step}-", dir=self.weights_dir) as folder:
            if weights is None:
                _merged(model).save_pretrained(folder)
            else:
                model.save_pretrained(folder, state_dict=weights)
            try:
                self._request(
                    "/collective_rpc",
                    {"method": "reload_weights", "kwargs": {"weights_path": folder}},
                )
            except ConnectionError as error:
                raise ConnectionError(
                    f"{error}; the server could not load {folder}: it must serve the same "
                    "architecture and read that folder. Start it anew, its weights may be in pieces"
                ) from error
        if not self._request("/reset_prefix_cache", {})["success"]:
            raise ConnectionError(
                f"{self.url} kept its prefix cache, which is of the old weights: requests that are "
                "not this run's hold it"
            )
        self._request("/update_weight_version", {"new_version": version})
        self._version = version

    def _check_settings(self) -> bool:
        """Of the server; whether it runs on a CPU."""
        info = self._request("/server_info?config_format=json", timeout=_CHECK_SECONDS)
        config = info["vllm_config"]
        mode = config["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise ValueError(
                f"vllm_url: {self.url} reports {mode}, which leave the temperature out; serve with "
                "--logprobs-mode processed_logprobs"
            )
        on_cpu = config["device_config"]["device"] == "cpu"
        if on_cpu and config["scheduler_config"]["enable_chunked_prefill"]:
            raise ValueError(
                f"vllm_url: {self.url} runs on a CPU, where vLLM ends at a seeded prompt that it "
                "reads in pieces; serve with --no-enable-chunked-prefill"
            )
        return on_cpu

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        ids = tokenizer.encode(_PROBE, add_special_tokens=False)
        probe = {"prompt": _PROBE, "add_special_tokens": False}
        theirs = self._request("/tokenize", probe, timeout=_CHECK_SECONDS)["tokens"]
        if theirs != ids:
            raise ValueError(
                f"vllm_url: {self.url} serves {self._model}, whose tokenizer is not the policy's: "
                f"{_PROBE!r} is {theirs} there and {ids} here"
            )

    def _check_version(self) -> None:
        # The process that gave no weights does not know their version.
        if self._version is None:
            return
        version = self._request("/weight_info")["weight_version"]
        if version != self._version:
            raise ValueError(
                f"vllm_url: {self.url} has the weights {version!r} and not {self._version!r}: it "
                "was restarted, or another run uses it"
            )

    def _samples(self, answer: dict[str, Any], num_samples: int) -> list[Sample]:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        samples = [Sample(c["token_ids"], c["logprobs"]["token_logprobs"]) for c in choices]
        reasons = {choice["finish_reason"] for choice in choices}
        if len(samples) != num_samples or not reasons <= {"stop", "length"}:
            raise ConnectionError(
                f"{self.url} gave {len(samples)} of {num_samples} completions, ended by "
                f"{', '.join(sorted(map(str, reasons)))}"
            )
        return samples

    def _request(
        self, path: str, body: dict[str, Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        """What the server answers to a POST of `body`, or to a GET where there is none.

        A connection that breaks is tried again: each request has one meaning however often it
        comes. One that is refused is not, since a server that comes back has lost its weights.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                status, content = self._send(path, body, timeout or self.timeout)
                break
            except TimeoutError as error:
                raise ConnectionError(
                    f"{self.url}{path}: no answer in {timeout or self.timeout:g} seconds"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, ConnectionRefusedError) or attempt == _ATTEMPTS:
                    raise ConnectionError(f"{self.url}{path}: {error}") from error
                time.sleep(attempt)
        if status == http.client.NOT_FOUND:
            raise ValueError(
                f"vllm_url: {self.url} has no {path}; it takes vLLM 0.32 or newer, started as "
                f"`{SERVE}`"
            )
        text = content.decode(errors="replace")
        if status in range(400, 500):
            raise ValueError(f"vllm_url: {self.url}{path} refuses the request: {status} {text}")
        try:
            if status == http.client.OK:
                return json.loads(text)
        except json.JSONDecodeError:
            pass
        raise ConnectionError(f"{self.url}{path}: {status} {text[:_SHOWN_CHARACTERS]}")

    def _send(self, path: str, body: dict[str, Any] | None, timeout: float) -> tuple[int, bytes]:
        secure = self._address.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self._address.netloc, timeout=timeout)
        path = self._address.path.rstrip("/") + path
        try:
            if body is None:
                connection.request("GET", path)
            else:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def _merged(model: PreTrainedModel) -> PreTrainedModel:
    if not has_adapter(model):
        return model
    # Merging in place and out again would round the frozen weights at every update.
    peft_model: Any = copy.deepcopy(model)
    return peft_model.merge_and_unload()
