"""Sample with vLLM's offline engine once for every line of input; run by a Python that has vLLM.

    python vllm_offline.py job.json

The job names the model's folder, its dtype, the threads, the device, the prompts' token ids and the
lengths of each prompt's completions. The first line of output has vLLM's version, and every other
one the number of tokens that a lap sampled. This imports nothing of this repository.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # vLLM and what it starts print on stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(job["threads"]),
    }
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    longest = max(map(len, job["prompts"])) + max(job["lengths"])
    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=len(job["prompts"]) * len(job["lengths"]),
        enable_prefix_caching=True,
    )
    prompts, params = [], []
    for prompt in job["prompts"]:
        for length in job["lengths"]:
            prompts.append(TokensPrompt(prompt_token_ids=prompt))
            params.append(
                SamplingParams(
                    temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False
                )
            )
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for _ in sys.stdin:
        llm.reset_prefix_cache()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
