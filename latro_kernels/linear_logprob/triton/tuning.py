"""Time the shapes of a block of products on this machine's GPU, and save the fastest.

    python -m latro_kernels.linear_logprob.triton.tuning --hidden 4096 --vocab 128256 --dtype bf16

`blocks.config` looks there first, so that no call waits for a search.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict

import torch
import triton

from latro_kernels.head import Head
from latro_kernels.linear_logprob.state import Wanted
from latro_kernels.linear_logprob.triton import blocks, fused
from latro_kernels.linear_logprob.triton.blocks import DTYPES, Config


def measure(dtype: str, N: int, H: int, V: int) -> list[tuple[float, Config]]:
    """Milliseconds of the forward with each shape that runs, fastest first."""
    hidden, weight = (
        torch.randn(size, H, device="cuda", dtype=DTYPES[dtype]) / H**0.25 for size in (N, V)
    )
    target = torch.randint(V, (N,), device="cuda")
    head = Head(hidden, weight, target, None, 1.0, 0.0, "triton")
    timed = []
    for candidate in blocks.candidates(hidden.dtype):

        def run(candidate: Config = candidate) -> object:
            return fused.forward(head, Wanted(False, False, False, 0), candidate)

        try:
            timed.append((triton.testing.do_bench(run, return_mode="median"), candidate))
        except triton.runtime.errors.OutOfResources as error:
            print(f"{candidate}: {error}")
    return sorted(timed, key=lambda pair: pair[0])


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
    others = [entry for entry in blocks.saved() if key.items() - entry.items()]
    entry = key | {"milliseconds": timed[0][0], "rows": args.rows, "config": asdict(timed[0][1])}
    beside = blocks.SAVED.with_suffix(".tmp")
    beside.write_text(json.dumps([*others, entry], indent=1) + "\n")
    os.replace(beside, blocks.SAVED)


if __name__ == "__main__":
    main()
