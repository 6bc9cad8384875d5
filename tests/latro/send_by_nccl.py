"""Send weights to a server as `--vllm_sync nccl` does, and draw samples from them.

    python -m tests.latro.send_by_nccl URL MODEL RESULT

This runs where vLLM is. RESULT is JSON, an object for each of three sets of weights.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro.engines.vllm import VllmEngine
from latro.engines.vllm_nccl import WeightBroadcast
from tests.latro import nccl_over_tcp
from tests.latro.vllm_errors import errors

TEMPERATURE = 0.7


def main(url: str, model_dir: str, result: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    # Longer than a block of 128 tokens in the prefix cache, which must not be reused.
    prompts = [tokenizer.encode(f"Tom has {n} pens. " * 30) for n in range(3)]
    assert min(map(len, prompts)) > 128
    engine = VllmEngine(url, tokenizer, eos_token_ids=[0], weights_dir=mkdtemp())
    # By itself it would refuse to send weights to a server on a CPU.
    engine.weights_dir = None
    engine._hand_over = WeightBroadcast(engine._client.own_address(60))
    found = []
    for step in range(3):
        before = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        engine.update_weights(model, step)
        groups = engine.generate(
            prompts, num_samples=4, max_new_tokens=30, temperature=TEMPERATURE, seeds=[1, 2, 3]
        )
        error, allowed = errors(model, prompts, groups, TEMPERATURE)
        found.append(
            {
                "error": error,
                "allowed": allowed,
                "error_of_before": errors(before, prompts, groups, TEMPERATURE)[0],
                "paused": engine._request("/is_paused").value["is_paused"],
            }
        )
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    assert nccl_over_tcp.Extension
    main(*sys.argv[1:])
