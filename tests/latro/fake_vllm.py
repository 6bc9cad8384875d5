"""A small server that answers like vLLM's, to test what is sent to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any, BinaryIO

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from latro.engines.transformers import TransformersEngine


class FakeVllm(ThreadingHTTPServer):
    """Answers as vLLM does, and records the requests.

    `answers[path]` replaces its own answer; `speaks[path]` writes to the connection itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokenizer = tokenizer
        self.asked: list[tuple[str, Any]] = []
        self.answers: dict[str, Callable[[Any], tuple[int, Any]]] = {}
        self.speaks: dict[str, Callable[[BinaryIO], None]] = {}
        self.drop = 0
        self.version = "default"
        self.logprobs_mode = "processed_logprobs"
        self.device = "cuda"
        self.chunked_prefill = True
        self.loaded: list[list[str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def of(self, path: str) -> list[Any]:
        return [body for asked, body in self.asked if asked == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent, since tests of timeouts make clients that stop waiting."""

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path in self.answers:
            return self.answers[path](body)
        match path:
            case "/v1/models":
                return 200, {"data": [{"id": "tiny", "max_model_len": 64}]}
            case "/server_info?config_format=json":
                config = {
                    "model_config": {"logprobs_mode": self.logprobs_mode},
                    "device_config": {"device": self.device},
                    "scheduler_config": {"enable_chunked_prefill": self.chunked_prefill},
                }
                return 200, {"vllm_config": config}
            case "/tokenize":
                return 200, {
                    "tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=False)
                }
            case "/v1/completions":
                return 200, {"choices": [choice(j, body) for j in reversed(range(body["n"]))]}
            case "/collective_rpc":
                folder = Path(body["kwargs"]["weights_path"])
                self.loaded.append(sorted(file.name for file in folder.iterdir()))
                return 200, {"results": [None]}
            case "/reset_prefix_cache":
                return 200, {"success": True}
            case "/update_weight_version":
                self.version = body["new_version"]
                return 200, {"success": True}
            case "/weight_info":
                return 200, {"weight_version": self.version}
        return 404, {"detail": "Not Found"}


def choice(index: int, body: Any) -> dict[str, Any]:
    """Return completion `index`: the prompt's first id, then `index` times the id `index`."""
    ids = [body["prompt"][0]] + [index] * index
    return {
        "index": index,
        "token_ids": ids,
        "logprobs": {"token_logprobs": [-0.5 * i for i in ids]},
        "finish_reason": "stop" if index else "length",
    }


def sample_for_real(server: FakeVllm, seeds: Iterable[int], template: str | None = None) -> None:
    """Make the server sample with transformers, from the weights that it was handed last.

    Args:
        server: the fake.
        seeds: those of the prompts, which the client hashes; the same ones draw the same samples
            here as in a `TransformersEngine`.
        template: what ends a completion, where a request names strings to stop at.
    """
    by_hash = {Random(seed).getrandbits(62): seed for seed in seeds}
    served: list[PreTrainedModel] = []
    lock = Lock()

    def load(body: Any) -> tuple[int, Any]:
        served[:] = [AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"])]
        return 200, {"results": [None]}

    def complete(body: Any) -> tuple[int, Any]:
        # Requests come in threads, but the model can serve only one at a time.
        with lock:
            (samples,) = TransformersEngine(served[0], server.tokenizer).generate(
                [body["prompt"]],
                num_samples=body["n"],
                max_new_tokens=body["max_tokens"],
                temperature=body["temperature"],
                seeds=[by_hash[body["seed"]]],
                template=template if body["stop"] else None,
            )
        choices = [
            {
                "index": index,
                "token_ids": sample.ids,
                "logprobs": {"token_logprobs": [-1.0] * len(sample.ids)},
                "finish_reason": "stop" if len(sample.ids) < body["max_tokens"] else "length",
            }
            for index, sample in enumerate(samples)
        ]
        return 200, {"choices": choices}

    models = {"data": [{"id": "small", "max_model_len": 1024}]}
    server.answers |= {
        "/v1/models": lambda body: (200, models),
        "/collective_rpc": load,
        "/v1/completions": complete,
    }


class _Handler(BaseHTTPRequestHandler):
    server: FakeVllm

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        self.server.asked.append((self.path, body))
        if self.server.drop:
            self.server.drop -= 1
            return
        if self.path in self.server.speaks:
            self.server.speaks[self.path](self.wfile)
            self.close_connection = True
            return
        status, answer = self.server.answer(self.path, body)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
