"""Time the shapes of a block of products on this machine's GPU, and save the fastest.

    python -m latro_kernels.linear_logprob.triton.tuning --hidden 4096 --vocab 128256 --dtype bf16

It is saved in Triton's cache folder, which TRITON_CACHE_DIR, Triton's own variable, may move.
`blocks.config` looks there first, so that no call waits for a search.

The warp-specialised form of sm_90 comes last, when the best of the others is saved: it has never
run on a GPU, and may hang. It is timed where its results are right, and saved where it is faster.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
import triton
from torch import Tensor

from latro_kernels.head import Head
from latro_kernels.linear_logprob.state import Wanted
from latro_kernels.linear_logprob.triton import blocks, fused
from latro_kernels.linear_logprob.triton.blocks import DTYPES, Config

# Of a form that has never run: an odd number, so that blocks are full and not, and how often its
# results have to come again.
_CHECKED_ROWS, _REPEATS = 333, 20


def problem(dtype: str, N: int, H: int, V: int) -> tuple[Head, Tensor]:
    """Return a random head on the GPU, and targets."""
    hidden, weight = (
        torch.randn(size, H, device="cuda", dtype=DTYPES[dtype]) / H**0.25 for size in (N, V)
    )
    target = torch.randint(V, (N,), device="cuda")
    head = Head(hidden, weight, bias=None, temperature=1.0, softcap=0.0, backend="triton")
    return head, target


def measure(head: Head, target: Tensor, candidates: Iterable[Config]) -> list[tuple[float, Config]]:
    """Return the milliseconds of the forward with each shape that runs, fastest first."""
    wanted = Wanted(weighted_sum=False, dx_sum=False, block_max=False, memory_budget=0)
    timed = []
    for candidate in candidates:

        def run(candidate: Config = candidate) -> None:
            fused.forward(head, fused.empty_state(head, target, wanted), candidate)

        try:
            timed.append((triton.testing.do_bench(run, return_mode="median"), candidate))
        except triton.runtime.errors.OutOfResources as error:
            print(f"{candidate}: {error}")
    return sorted(timed, key=lambda pair: pair[0])


def is_right(head: Head, target: Tensor, candidate: Config, trusted: Config) -> bool:
    """Return whether log-probs and entropies of a candidate are those of every run, and exact.

    Their largest error against fp64 may be twice that of the trusted shape, plus 1e-5.
    """
    few = slice(0, _CHECKED_ROWS)
    head, target = replace(head, hidden=head.hidden[few]), target[few]
    z = head.hidden.double() @ head.weight.double().T
    log_p = z.log_softmax(1)
    truth = torch.stack([log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)])

    def results(config: Config, *, with_entropy: bool) -> Tensor:
        wanted = Wanted(with_entropy, dx_sum=False, block_max=False, memory_budget=0)
        state = fused.empty_state(head, target, wanted)
        fused.forward(head, state, config)
        log_sum = state.sum_exp.log()
        found = [(state.target_logit - state.row_max) - log_sum]
        if state.weighted_sum is not None:
            found.append(log_sum - state.weighted_sum / state.sum_exp)
        return torch.stack(found)

    for with_entropy in (False, True):
        exact = truth[: 1 + with_entropy]
        bound = 2 * (results(trusted, with_entropy=with_entropy) - exact).abs().amax(1) + 1e-5
        first = results(candidate, with_entropy=with_entropy)
        again = (results(candidate, with_entropy=with_entropy) for _ in range(_REPEATS))
        # NaN is neither.
        if not ((first - exact).abs().amax(1) <= bound).all():
            return False
        if not all(torch.equal(first, other) for other in again):
            return False
    return True


def save(key: dict[str, Any], entry: dict[str, Any]) -> None:
    """Add an entry to those saved, in the place of one with the same key."""
    path = blocks.saved_path()
    others = [other for other in blocks.saved(path) if not key.items() <= other.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps([*others, entry], indent=1) + "\n")
    os.replace(beside, path)
    print(f"saved in {path}")


def show(timed: Iterable[tuple[float, Config]]) -> None:
    """Print what `measure` has returned."""
    for milliseconds, config in timed:
        print(f"{milliseconds:8.3f} ms  {config}", flush=True)


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
    head, target = problem(args.dtype, args.rows, args.hidden, args.vocab)
    name, dtype = torch.cuda.get_device_name(), head.hidden.dtype
    key = {"device": name, "dtype": args.dtype, "H": args.hidden, "V": args.vocab}

    def keep(best: tuple[float, Config]) -> None:
        milliseconds, config = best
        entry = {"milliseconds": milliseconds, "rows": args.rows, "config": asdict(config)}
        save(key, key | entry)

    timed = measure(head, target, blocks.candidates(dtype))
    show(timed)
    best = timed[0]
    keep(best)
    if blocks.can_warp_specialize(head.hidden.device, dtype):
        form = blocks.WARP_SPECIALIZED
        if not is_right(head, target, form, trusted=best[1]):
            parser.exit(1, f"{form}: its results are wrong, or not the same each time\n")
        timed = measure(head, target, [form])
        show(timed)
        if timed and timed[0][0] < best[0]:
            keep(timed[0])


if __name__ == "__main__":
    main()
