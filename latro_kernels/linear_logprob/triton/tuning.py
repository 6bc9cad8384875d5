"""Time the shapes of a block of products on this machine's GPU, and save the fastest.

    python -m latro_kernels.linear_logprob.triton.tuning --hidden 4096 --vocab 128256 --dtype bf16

It is saved in Triton's cache folder, which TRITON_CACHE_DIR, Triton's own variable, may move.
`blocks.config` looks there first, so that no call waits for a search.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from typing import Any

import torch
import triton

from latro_kernels.head import Head
from latro_kernels.linear_logprob.state import Wanted
from latro_kernels.linear_logprob.triton import blocks, fused
from latro_kernels.linear_logprob.triton.blocks import DTYPES, Config


def measure(dtype: str, N: int, H: int, V: int) -> list[tuple[float, Config]]:
    """Return the milliseconds of the forward with each shape that runs, fastest first."""
    hidden, weight = (
        torch.randn(size, H, device="cuda", dtype=DTYPES[dtype]) / H**0.25 for size in (N, V)
    )
    target = torch.randint(V, (N,), device="cuda")
    head = Head(hidden, weight, bias=None, temperature=1.0, softcap=0.0, backend="triton")
    wanted = Wanted(weighted_sum=False, dx_sum=False, block_max=False, memory_budget=0)
    timed = []
    for candidate in blocks.candidates(hidden.dtype):

        def run(candidate: Config = candidate) -> None:
            fused.forward(head, fused.empty_state(head, target, wanted), candidate)

        try:
            timed.append((triton.testing.do_bench(run, return_mode="median"), candidate))
        except triton.runtime.errors.OutOfResources as error:
            print(f"{candidate}: {error}")
    return sorted(timed, key=lambda pair: pair[0])


def save(key: dict[str, Any], entry: dict[str, Any]) -> None:
    """Add an entry to those saved, in the place of one with the same key."""
    path = blocks.saved_path()
    others = [other for other in blocks.saved(path) if not key.items() <= other.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps([*others, entry], indent=1) + "\n")
    os.replace(beside, path)
    print(f"saved in {path}")


def main() -> None:
    """Time the shapes for one head, and save the fastest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, required=True, help="H")
    parser.add_argument("--vocab", type=int, required=True, help="V")
    parser.add_argument("--rows", type=int, default=8192, help="N (default 8192)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU to measure on")
    timed = measure(args.dtype, args.rows, args.hidden, args.vocab)
    for milliseconds, shape in timed:
        print(f"{milliseconds:8.3f} ms  {shape}")
    name = torch.cuda.get_device_name()
    key = {"device": name, "dtype": args.dtype, "H": args.hidden, "V": args.vocab}
    entry = key | {"milliseconds": timed[0][0], "rows": args.rows, "config": asdict(timed[0][1])}
    save(key, entry)


if __name__ == "__main__":
    main()
