"""Start and stop a vLLM server on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.warm_process import free_port

ROOT = Path(__file__).parents[2]
START_SECONDS = 240

SETTINGS = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Starts in a third of the time, since children need not import everything again.
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def serve(
    python: str,
    model: Path,
    log: Path,
    *more: str,
) -> Iterator[str]:
    """Start a server of a folder's model, by a Python that has vLLM, and yield its url.

    `more`: further arguments of the server.

    Raises:
        RuntimeError: it did not start; the end of its log says why.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with open(log, "wb") as file:
        # Runs the module of `vllm serve`, since the command itself fails in vLLM's CPU wheels.
        process = subprocess.Popen(
            [
                *(python, "-m", "vllm.entrypoints.openai.api_server"),
                *("--host", "127.0.0.1", "--port", str(port), "--model", model),
                *("--dtype", "float32", "--max-model-len", "256", "--enforce-eager"),
                *("--logprobs-mode", "processed_logprobs", "--no-enable-chunked-prefill"),
                *more,
            ],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | SETTINGS,
            stdout=file,
            stderr=subprocess.STDOUT,
            # A process group of its own, so that its children are stopped with it.
            start_new_session=True,
        )
    try:
        _wait(url, process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(
        f"vLLM did not start: {log.read_text(encoding='utf-8', errors='replace')[-3000:]}"
    )
